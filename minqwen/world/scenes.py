"""The scenes of the toy world: what they hold, how they look, and how they are drawn by chance.

    Scene -> picture (64, 64, 3)          World -> Scene

A picture is a 2x2 grid of cells on a plain background, each empty or with one shape in it. Training draws
them by the million, so a shape's mask is made once and kept. Tests: tests/test_world.py.
"""

import math
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64  # pixels on a side; centres and radii below are in pixels of a picture of this size
RADIUS = 12
SHAPES = ("circle", "square", "triangle", "star", "heart")
PLACES = ("top left", "top right", "bottom left", "bottom right")
COLOURS = {
    "red": (218, 38, 46), "green": (46, 164, 79), "blue": (44, 92, 222), "yellow": (252, 218, 54),
    "purple": (142, 60, 190), "orange": (247, 132, 30), "cyan": (64, 204, 228),
}
BACKGROUNDS = {  # none of them is one of COLOURS: no shape is ever lost in its background
    "white": (252, 252, 252), "black": (26, 26, 30), "gray": (172, 174, 178), "pink": (252, 202, 214),
    "brown": (98, 66, 46),
}


@dataclass(frozen=True)
class Thing:
    shape: str
    colour: str
    place: str
    dx: int = 0  # from the middle of its cell
    dy: int = 0
    radius: int = RADIUS


@dataclass(frozen=True)
class Scene:
    background: str
    things: tuple[Thing, ...] = ()  # in the order of PLACES, so that equal pictures are equal scenes

    def at(self, place: str) -> Thing | None:
        return next((thing for thing in self.things if thing.place == place), None)

    def empty_places(self) -> list[str]:
        return [place for place in PLACES if self.at(place) is None]

    def content(self) -> tuple:
        """What a person would say of it: all but sizes and offsets."""
        return self.background, tuple((thing.place, thing.shape, thing.colour) for thing in self.things)

    def with_things(self, *things: Thing) -> "Scene":
        """The same background with these things instead."""
        return Scene(self.background, tuple(sorted(things, key=lambda thing: PLACES.index(thing.place))))


def outline(shape: str) -> list[tuple[float, float]]:
    """The corners of a shape of radius 1 around (0, 0), y downwards."""
    if shape == "square":
        return [(-0.87, -0.87), (0.87, -0.87), (0.87, 0.87), (-0.87, 0.87)]
    if shape == "triangle":
        return [(0, -0.98), (1.08, 0.88), (-1.08, 0.88)]
    if shape == "star":
        corners = [(0.48 if k % 2 else 1.14, k * math.pi / 5) for k in range(10)]
        return [(r * math.sin(angle), 0.06 - r * math.cos(angle)) for r, angle in corners]
    angles = [k * math.pi / 60 for k in range(120)]
    if shape == "circle":
        return [(math.cos(t), math.sin(t)) for t in angles]
    heart = [13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) for t in angles]
    return [(1.05 * math.sin(t) ** 3, -0.1 - y / 15.2) for t, y in zip(angles, heart, strict=True)]


@cache
def mask(shape: str, dx: int = 0, dy: int = 0, radius: int = RADIUS, cell: int = SIZE // 2) -> np.ndarray:
    """How much of each pixel of a cell a shape covers, (cell, cell, 1) in [0, 1]: drawn 8 times as large."""
    large = Image.new("L", (8 * cell, 8 * cell))
    middle, scale = SIZE / 4, 8 * cell / (SIZE / 2)
    corners = [(middle + dx + radius * x, middle + dy + radius * y) for x, y in outline(shape)]
    corners = [(x * scale, y * scale) for x, y in corners]
    ImageDraw.Draw(large).polygon(corners, fill=255)
    return np.asarray(large.resize((cell, cell), Image.Resampling.BOX), np.float32)[..., None] / 255


def in_cell(place: str, size: int = SIZE) -> tuple[slice, slice]:
    """The rows and columns of a cell."""
    row, column = divmod(PLACES.index(place), 2)
    half = size // 2
    return slice(row * half, (row + 1) * half), slice(column * half, (column + 1) * half)


def draw_array(scene: Scene, size: int = SIZE) -> np.ndarray:
    """The picture of a scene, (size, size, 3) uint8, for an even size."""
    ground = np.array(BACKGROUNDS[scene.background], np.float32)
    picture = np.empty((size, size, 3), np.uint8)
    picture[:] = ground
    for thing in scene.things:
        cover = mask(thing.shape, thing.dx, thing.dy, thing.radius, size // 2)
        cell = ground + cover * (COLOURS[thing.colour] - ground)
        picture[in_cell(thing.place, size)] = cell + 0.5  # rounds
    return picture


def draw(scene: Scene, size: int = SIZE) -> Image.Image:
    return Image.fromarray(draw_array(scene, size))


KINDS = ("recolour", "remove", "add", "background", "shape", "move", "swap")  # of edits of one picture
HELD_BACK = "mirror"  # a kind of edit that the shipped checkpoint was never shown: the fine-tune teaches it
COMBINE = "combine"  # the kind of two pictures: data/tiny's edit_plus_lora.safetensors has learned it
# What a reference may name. The place is always enough; the others only while nothing else in the scene fits.
REFERENCES = (("shape",), ("colour",), ("colour", "shape"), ("place",), ("shape", "place"))


@dataclass(frozen=True)
class World:
    """What may be drawn and said: training goes from a small world to a large one."""

    shapes: tuple[str, ...] = SHAPES
    colours: tuple[str, ...] = tuple(COLOURS)
    backgrounds: tuple[str, ...] = tuple(BACKGROUNDS)
    kinds: tuple[str, ...] = KINDS
    phrasings: int = 8  # how many of each kind's PHRASES
    references: tuple[tuple[str, ...], ...] = REFERENCES
    chinese: float = 0.1  # share of instructions in Chinese
    unseen: bool = False  # UNSEEN_PHRASES instead of PHRASES: to test, never to train
    jitter: int = 1  # 0, 1 or 2: centres move by up to so many pixels, radii shrink by up to twice as many
    max_objects: int = 3  # leaves an empty cell to move to
    twins: float = 0.5  # share of two-picture edits whose reference fits a thing of Picture 1 as well, if any can


SMALL = World(kinds=KINDS[:5], phrasings=2, references=REFERENCES[:4], chinese=0.0, jitter=0)  # where training begins
WORLD = World()  # where it ends, and the default everywhere below


def random_item(rng: np.random.Generator, items, other_than=None):
    """One of the items. (`rng.choice` would build an array of them first.)"""
    items = [item for item in items if item != other_than]
    return items[int(rng.integers(len(items)))]


def sample_thing(rng: np.random.Generator, place: str, world: World) -> Thing:
    thing = Thing(random_item(rng, world.shapes), random_item(rng, world.colours), place)
    if not world.jitter:
        return thing
    dx, dy = rng.integers(-world.jitter, world.jitter + 1, 2).tolist()
    return replace(thing, dx=dx, dy=dy, radius=RADIUS - int(rng.integers(2 * world.jitter + 1)))


def sample_scene(rng: np.random.Generator, world: World = WORLD, least: int = 1, most: int = 4) -> Scene:
    """A scene of `least` to `most` things, never more than the world's max_objects."""
    count = int(rng.integers(least, min(most, world.max_objects) + 1))
    things = [sample_thing(rng, PLACES[k], world) for k in rng.permutation(4)[:count]]
    return Scene(random_item(rng, world.backgrounds)).with_things(*things)

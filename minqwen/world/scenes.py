"""The scenes of the small world, and their pictures.

    World -> Scene -> picture (96, 96, 3)

A picture is a 2x2 grid of places on a softly graded background; one to three of them hold a thing: a cat, a rocket, a
cake. Training draws scenes by the million, so every thing is made once for each size and kept. Pictures of the things:
Fluent Emoji (NOTICE.md). Tests: tests/test_world.py.
"""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

SIZE, CELL = 96, 48  # pixels on a side of a picture and of a place
SHEET, TILE = Path(__file__).with_name("things.png"), 128  # all things, in the order of THINGS, eight in a row
SIZES = {"small": 30, "large": 42}  # pixels on a side of a thing
JITTER = 2  # pixels by which a thing's middle may be off its place's, to any side
PLACES = ("top left", "top right", "bottom left", "bottom right")
MIRRORED = dict(zip(PLACES, ("top right", "top left", "bottom right", "bottom left"), strict=True))


class Kind(NamedTuple):
    """What is known of a thing."""

    chinese: str
    family: str | None = None  # the word that a reference or an open description may use instead


THINGS = {
    "apple": Kind("苹果", "fruit"), "ball": Kind("足球"), "banana": Kind("香蕉", "fruit"),
    "boat": Kind("帆船", "vehicle"), "cactus": Kind("仙人掌", "plant"), "cake": Kind("蛋糕", "snack"),
    "cat": Kind("猫", "animal"), "chick": Kind("小鸡", "animal"), "crown": Kind("皇冠"),
    "dog": Kind("狗", "animal"), "donut": Kind("甜甜圈", "snack"), "fox": Kind("狐狸", "animal"),
    "frog": Kind("青蛙", "animal"), "lemon": Kind("柠檬", "fruit"), "octopus": Kind("章鱼", "animal"),
    "panda": Kind("熊猫", "animal"), "penguin": Kind("企鹅", "animal"), "pizza": Kind("披萨", "snack"),
    "rocket": Kind("火箭", "vehicle"), "strawberry": Kind("草莓", "fruit"), "sunflower": Kind("向日葵", "plant"),
    "tree": Kind("树", "plant"), "turtle": Kind("乌龟", "animal"), "watermelon": Kind("西瓜", "fruit"),
    "whale": Kind("鲸鱼", "animal"),
}  # fmt: skip
FAMILIES = tuple(dict.fromkeys(kind.family for kind in THINGS.values() if kind.family))
BACKGROUNDS = {
    "white": (244, 244, 246), "pink": (250, 200, 214), "blue": (168, 208, 248), "green": (178, 224, 180),
    "gray": (150, 154, 162), "black": (44, 46, 56),
}  # fmt: skip


@dataclass(frozen=True)
class Thing:
    name: str
    place: str
    size: str = "large"
    dx: int = 0  # of its middle from that of its place, pixels to the right
    dy: int = 0  # downwards

    @property
    def family(self) -> str | None:
        return THINGS[self.name].family

    @property
    def side(self) -> int:
        """Pixels."""
        return SIZES[self.size]


@dataclass(frozen=True)
class Scene:
    background: str
    things: tuple[Thing, ...] = ()  # in the order of PLACES, so that equal pictures are equal scenes
    grade: int = 0  # levels of 255 by which the bottom is lighter than the top

    def at(self, place: str) -> Thing | None:
        return next((thing for thing in self.things if thing.place == place), None)

    def empty_places(self) -> list[str]:
        return [place for place in PLACES if self.at(place) is None]

    def content(self) -> tuple:
        """What a person would say of it: all but exact sizes, offsets and the grade."""
        return self.background, tuple((t.place, t.name, t.size) for t in self.things)

    def with_things(self, *things: Thing) -> "Scene":
        """The same background with these things instead."""
        return replace(self, things=tuple(sorted(things, key=lambda thing: PLACES.index(thing.place))))


@cache
def portrait(name: str) -> Image.Image:
    """A thing on a transparent ground, 128 pixels a side."""
    number = list(THINGS).index(name)
    left, top = number % 8 * TILE, number // 8 * TILE
    return Image.open(SHEET).convert("RGBA").crop((left, top, left + TILE, top + TILE))


@cache
def stamp(name: str, side: int) -> tuple[np.ndarray, np.ndarray]:
    """A thing: colour times cover (side, side, 3), in levels, and cover (side, side, 1) in [0, 1]."""
    array = np.asarray(portrait(name).resize((side, side), Image.Resampling.LANCZOS), np.float32)
    cover = array[..., 3:] / 255
    return array[..., :3] * cover, cover


def span(side: int, shift: int) -> slice:
    """The rows (or columns) of a place that a thing of this side takes, shifted from the middle."""
    first = (CELL - side) // 2 + shift
    return slice(first, first + side)


def in_cell(place: str) -> tuple[slice, slice]:
    """The rows and columns of a place."""
    row, column = divmod(PLACES.index(place), 2)
    return slice(row * CELL, (row + 1) * CELL), slice(column * CELL, (column + 1) * CELL)


def draw_array(scene: Scene) -> np.ndarray:
    """The picture of a scene, (96, 96, 3) uint8."""
    picture = np.empty((SIZE, SIZE, 3), np.float32)
    picture[:] = BACKGROUNDS[scene.background]
    picture += (np.linspace(-0.5, 0.5, SIZE, dtype=np.float32) * scene.grade)[:, None, None]
    for thing in scene.things:
        paint, cover = stamp(thing.name, thing.side)
        under = picture[in_cell(thing.place)][span(thing.side, thing.dy), span(thing.side, thing.dx)]
        under[:] = under * (1 - cover) + paint
    return (picture + 0.5).clip(0, 255).astype(np.uint8)


def draw(scene: Scene) -> Image.Image:
    return Image.fromarray(draw_array(scene))


@dataclass(frozen=True)
class World:
    """What may be drawn and said."""

    things: tuple[str, ...] = tuple(THINGS)
    kinds: tuple[str, ...] = ("replace", "remove", "add", "move", "swap", "background")
    chinese: float = 0.15  # share of instructions in Chinese
    unseen: bool = False  # UNSEEN_PHRASES instead of PHRASES: to test, never to train
    open: float = 0.4  # share of descriptions that leave something to the painter
    several: float = 0.25  # share of those that ask for several things
    twins: float = 0.5  # share of two-picture edits whose reference fits a thing of Picture 1 as well


WORLD = World()  # what the tiny checkpoint has learned, and the default everywhere


def pick(rng: np.random.Generator, items, other_than=None):
    """One of the items. (`rng.choice` would build an array of them first.)"""
    items = [item for item in items if other_than is None or item != other_than]
    return items[int(rng.integers(len(items)))]


def sample_thing(rng: np.random.Generator, place: str, names: tuple[str, ...]) -> Thing:
    """One of the named things, of any size and offset."""
    name = pick(rng, names)
    size = "small" if rng.random() < 0.3 else "large"
    dx, dy = (JITTER * rng.integers(-1, 2, 2)).tolist()
    return Thing(name, place, size, dx, dy)


def sample_scene(rng: np.random.Generator, world: World = WORLD, least: int = 1, most: int = 3) -> Scene:
    """least to most things in different places; one place at least stays empty."""
    count = int(rng.integers(least, most + 1))
    things = [sample_thing(rng, PLACES[k], world.things) for k in rng.permutation(4)[:count]]
    grade = int(rng.integers(-24, 25)) if rng.random() < 0.5 else 0
    return Scene(pick(rng, BACKGROUNDS), (), grade).with_things(*things)

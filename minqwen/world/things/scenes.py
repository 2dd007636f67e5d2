"""The scenes of the small world, and their pictures.

    World -> Scene -> picture (96, 96, 3)

A picture is a 2x2 grid of places on a softly graded background; one to three of them hold a thing: a cat, a rocket, a
cake. A few things come in several colours. Training draws scenes by the million, so every thing is made once for each
colour and size and kept. Pictures of the things: Fluent Emoji (NOTICE.md). Tests: tests/test_things.py.
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
JITTER = 2  # a thing's middle is up to so many pixels from its place's, its size up to one pixel from SIZES
PLACES = ("top left", "top right", "bottom left", "bottom right")
MIRRORED = dict(zip(PLACES, ("top right", "top left", "bottom right", "bottom left"), strict=True))


class Kind(NamedTuple):
    """What is known of a thing."""

    chinese: str
    family: str | None = None  # the word that a reference or an open description may use instead
    hue: int | None = None  # degrees of the colour that can be another one; None: the thing has one colour only


THINGS = {
    "apple": Kind("苹果", "fruit"), "ball": Kind("足球"), "balloon": Kind("气球", None, 345),
    "banana": Kind("香蕉", "fruit"), "boat": Kind("帆船", "vehicle"), "cactus": Kind("仙人掌", "plant"),
    "cake": Kind("蛋糕", "snack"), "car": Kind("汽车", "vehicle", 345), "cat": Kind("猫", "animal"),
    "chick": Kind("小鸡", "animal"), "crown": Kind("皇冠"), "dog": Kind("狗", "animal"),
    "donut": Kind("甜甜圈", "snack"), "fox": Kind("狐狸", "animal"), "frog": Kind("青蛙", "animal"),
    "gift": Kind("礼物", None, 45), "guitar": Kind("吉他", None, 340), "helicopter": Kind("直升机", "vehicle", 20),
    "lemon": Kind("柠檬", "fruit"), "mushroom": Kind("蘑菇", "plant", 350), "octopus": Kind("章鱼", "animal"),
    "panda": Kind("熊猫", "animal"), "penguin": Kind("企鹅", "animal"), "pizza": Kind("披萨", "snack"),
    "rocket": Kind("火箭", "vehicle"), "strawberry": Kind("草莓", "fruit"), "sunflower": Kind("向日葵", "plant"),
    "tree": Kind("树", "plant"), "turtle": Kind("乌龟", "animal"), "umbrella": Kind("雨伞", None, 255),
    "watermelon": Kind("西瓜", "fruit"), "whale": Kind("鲸鱼", "animal"),
}  # fmt: skip
FAMILIES = tuple(dict.fromkeys(kind.family for kind in THINGS.values() if kind.family))
COLOURED = tuple(word for word, kind in THINGS.items() if kind.hue is not None)
COLOURS = {"red": 352, "yellow": 46, "green": 125, "blue": 215, "purple": 285}  # degrees of hue
BACKGROUNDS = {
    "white": (244, 244, 246), "pink": (250, 200, 214), "blue": (168, 208, 248), "green": (178, 224, 180),
    "gray": (150, 154, 162), "black": (44, 46, 56),
}  # fmt: skip


@dataclass(frozen=True)
class Thing:
    name: str
    place: str
    colour: str | None = None  # of COLOURED things only
    size: str = "large"
    dx: int = 0  # of its middle from that of its place, pixels to the right
    dy: int = 0  # downwards
    extra: int = 0  # pixels by which it is larger than SIZES says

    @property
    def family(self) -> str | None:
        return THINGS[self.name].family

    @property
    def side(self) -> int:
        """Pixels."""
        return SIZES[self.size] + self.extra


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
        return self.background, tuple((t.place, t.name, t.colour, t.size) for t in self.things)

    def with_things(self, *things: Thing) -> "Scene":
        """The same background with these things instead."""
        return replace(self, things=tuple(sorted(things, key=lambda thing: PLACES.index(thing.place))))


@cache
def portrait(name: str, colour: str | None) -> Image.Image:
    """A thing on a transparent ground, 128 pixels a side, its own colour changed to the one asked for."""
    number = list(THINGS).index(name)
    left, top = number % 8 * TILE, number // 8 * TILE
    tile = Image.open(SHEET).convert("RGBA").crop((left, top, left + TILE, top + TILE))
    if colour is None:
        return tile
    hue, saturation, value = (np.asarray(band, np.float32) for band in tile.convert("RGB").convert("HSV").split())
    away = (hue * 360 / 255 - THINGS[name].hue + 180) % 360 - 180  # degrees from the thing's own colour
    ours = (abs(away) < 50) & (saturation > 60)
    vivid, bright = (levels / np.median(levels[ours & (np.asarray(tile.getchannel("A")) > 128)])
                     for levels in (saturation, value))  # fmt: skip
    hue = np.where(ours, (COLOURS[colour] + away / 2) % 360 * 255 / 360, hue)
    saturation = np.where(ours, 185 * vivid, saturation)  # dark and pale things become clear ones
    value = np.where(ours, 215 * bright, value)
    if colour == "yellow":  # a dark yellow is brown
        value = np.where(ours, 255 - (255 - value.clip(0, 255)) * 0.4, value)
    bands = [Image.fromarray(band.clip(0, 255).astype(np.uint8)) for band in (hue, saturation, value)]
    image = Image.merge("HSV", bands).convert("RGB")
    image.putalpha(tile.getchannel("A"))
    return image


@cache
def stamp(name: str, colour: str | None, side: int) -> tuple[np.ndarray, np.ndarray]:
    """A thing: colour times cover (side, side, 3), in levels, and cover (side, side, 1) in [0, 1]."""
    array = np.asarray(portrait(name, colour).resize((side, side), Image.Resampling.LANCZOS), np.float32)
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
        paint, cover = stamp(thing.name, thing.colour, thing.side)
        under = picture[in_cell(thing.place)][span(thing.side, thing.dy), span(thing.side, thing.dx)]
        under[:] = under * (1 - cover) + paint
    return (picture + 0.5).clip(0, 255).astype(np.uint8)


def draw(scene: Scene) -> Image.Image:
    return Image.fromarray(draw_array(scene))


@dataclass(frozen=True)
class World:
    """What may be drawn and said: training goes from a small world to a large one."""

    things: tuple[str, ...] = tuple(THINGS)
    kinds: tuple[str, ...] = ("replace", "remove", "add", "move", "swap", "background", "resize", "recolour")
    phrasings: int = 6  # how many of each kind's PHRASES
    chinese: float = 0.15  # share of instructions in Chinese
    unseen: bool = False  # UNSEEN_PHRASES instead of PHRASES: to test, never to train
    open: float = 0.4  # share of descriptions that leave something to the painter
    twins: float = 0.5  # share of two-picture edits whose reference fits a thing of Picture 1 as well


WORLD = World()  # where training ends, and the default everywhere
SMALL = World(tuple(THINGS)[::2], ("replace", "remove", "add", "move", "background"), 2, 0.0, open=0.25)  # its start


def pick(rng: np.random.Generator, items, other_than=None):
    """One of the items. (`rng.choice` would build an array of them first.)"""
    items = [item for item in items if other_than is None or item != other_than]
    return items[int(rng.integers(len(items)))]


def sample_thing(rng: np.random.Generator, place: str, names: tuple[str, ...]) -> Thing:
    """One of the named things, of any colour that it comes in, size and offset."""
    name = pick(rng, names)
    colour = pick(rng, COLOURS) if name in COLOURED else None
    size = "small" if rng.random() < 0.3 else "large"
    dx, dy = rng.integers(-JITTER, JITTER + 1, 2).tolist()
    return Thing(name, place, colour, size, dx, dy, int(rng.integers(-1, 2)))


def sample_scene(rng: np.random.Generator, world: World = WORLD, least: int = 1, most: int = 3) -> Scene:
    """least to most things in different places; one place at least stays empty."""
    count = int(rng.integers(least, most + 1))
    things = [sample_thing(rng, PLACES[k], world.things) for k in rng.permutation(4)[:count]]
    grade = int(rng.integers(-24, 25)) if rng.random() < 0.5 else 0
    return Scene(pick(rng, BACKGROUNDS), (), grade).with_things(*things)

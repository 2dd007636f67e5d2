"""The tasks of the small world: a scene, an instruction that can mean one thing only in it, and what should come out.

    World -> Edit(kind, scene, instruction, target_scene)

Most tasks have one right picture. An open description ("two animals") has many: there `wanted` says what is asked, and
the target scene is one example. Tests: tests/test_world.py.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from PIL import Image

from minqwen.world.scenes import (
    BACKGROUNDS,
    FAMILIES,
    MIRRORED,
    PLACES,
    THINGS,
    WORLD,
    Scene,
    Thing,
    World,
    draw,
    pick,
    sample_scene,
    sample_thing,
)
from minqwen.world.words import Slot, clear_references, indefinite, listed, phrase, reference, slot

KINDS = WORLD.kinds
HELD_BACK = "mirror"  # a kind of edit that the shipped checkpoint was never shown: the fine-tune teaches it
COMBINE = "combine"  # of two pictures: an adapter beside the checkpoint has learned it
ALL_OF_IT = ("name", "size", "place")


@dataclass(frozen=True)
class Wish:
    """What an open description asks for: a slot for each thing, in any order, and nothing else."""

    slots: tuple[Slot, ...]
    background: str | None = None
    more: bool = False  # other things may be there too ("something on a blue background")


@dataclass(frozen=True)
class Edit:
    """A task: a scene (None: draw from words alone), an instruction, and the scene that should come out.

    Of a two-picture edit `scene` is Picture 1, which changes, and `second` is Picture 2. `wanted` is there for open
    descriptions only; target_scene is then one of many right ones.
    """

    kind: str
    scene: Scene | None
    instruction: str
    target_scene: Scene
    second: Scene | None = None
    wanted: Wish | None = None

    @property
    def scenes(self) -> list[Scene]:
        """The scenes of `sources`."""
        return [scene for scene in (self.scene, self.second) if scene]

    @cached_property
    def source(self) -> Image.Image | None:
        return draw(self.scene) if self.scene else None

    @cached_property
    def sources(self) -> list[Image.Image]:
        """The pictures that the model is given, in their order; none for a drawing."""
        return [draw(scene) for scene in self.scenes]

    @cached_property
    def target(self) -> Image.Image:
        return draw(self.target_scene)


def sample_drawing(rng: np.random.Generator, world: World = WORLD, is_open: bool | None = None) -> Edit:
    """A task from words alone: `.instruction` is the prompt, `.source` is None. is_open: by default by chance."""
    chinese = bool(rng.random() < world.chinese)
    is_open = bool(rng.random() < world.open) if is_open is None else is_open
    if is_open:
        scene, wish, parts = sample_open(rng, world, chinese)
        scene = scene.with_things(*map(centered, scene.things))
        text = phrase(rng, "draw", world, chinese, things=listed(parts, wish.background, chinese))
        return Edit("open", None, text, scene, wanted=wish)
    scene = sample_scene(rng, world)
    scene = scene.with_things(*map(centered, scene.things))
    parts = [indefinite(slot(thing, ALL_OF_IT), chinese) for thing in scene.things]
    text = phrase(rng, "draw", world, chinese, things=listed(parts, scene.background, chinese))
    return Edit("draw", None, text, scene)


def sample_open(rng: np.random.Generator, world: World, chinese: bool) -> tuple[Scene, Wish, list[str]]:
    """One right scene, the wish, and the wish's parts in words."""
    scene = sample_scene(rng, world, 1, 1)
    background = scene.background if rng.random() < 0.5 else None
    if rng.random() < world.several:
        family, count = pick(rng, FAMILIES), int(rng.integers(2, 4))
        names = tuple(name for name in world.things if THINGS[name].family == family)
        first = pick(rng, (0, 2))  # side by side, above or below; a third in the other row
        places = (PLACES * 2)[first : first + count]
        scene = scene.with_things(*(sample_thing(rng, place, names) for place in places))
        wanted = Slot(family=family)
        return scene, Wish((wanted,) * count, background), [indefinite(wanted, chinese, count)]
    how = pick(rng, ("family", "name", "something"))
    if how == "something":
        background = scene.background
        return scene, Wish((Slot(),), background, more=True), ["一个东西" if chinese else "something"]
    thing = scene.things[0]
    if how == "family" and thing.family:
        wanted = slot(thing, ("family", "place"))
    else:
        wanted = slot(thing, ("name",))  # of any size and place
    return scene, Wish((wanted,), background), [indefinite(wanted, chinese)]


def sample_edit(rng: np.random.Generator, kind: str | None = None, world: World = WORLD) -> Edit:
    """A scene, an instruction that can mean one thing only in it, and the scene that it asks for."""
    kind = kind or pick(rng, world.kinds)
    if kind == COMBINE:
        return sample_combination(rng, world)
    if kind not in (*KINDS, HELD_BACK):
        raise ValueError(f"no edit is of kind {kind!r}: expected one of {', '.join((*KINDS, HELD_BACK, COMBINE))}")
    least, most = {"add": (0, 2), "swap": (2, 3)}.get(kind, (1, 3))
    while True:  # some scenes have nothing to mirror: take another
        scene = sample_scene(rng, world, least, most)
        chinese = bool(rng.random() < world.chinese)
        target, words = change(rng, kind, scene, world, chinese)
        if target.content() != scene.content():
            return Edit(kind, scene, phrase(rng, kind, world, chinese, **words), target)


def sample_combination(rng: np.random.Generator, world: World = WORLD) -> Edit:
    """A two-picture edit: a thing of Picture 2 goes onto Picture 1, into the same place, which is empty there."""
    twins = bool(rng.random() < world.twins)
    while True:
        scene, other = sample_scene(rng, world, 0, 2), sample_scene(rng, world)
        chinese, it = bool(rng.random() < world.chinese), pick(rng, other.things)
        parts = pick(rng, clear_references(other, it))
        if twins and rng.random() < 0.8 and "place" not in parts:  # else twins are rare
            twin = replace(it, place=pick(rng, PLACES, other_than=it.place))
            scene = scene.with_things(*(t for t in scene.things if t.place not in (twin.place, it.place)), twin)
        fits_here = any(map(slot(it, parts).fits, scene.things))
        target = scene.with_things(*scene.things, it)
        if scene.at(it.place) is None and twins == fits_here and target.content() != other.content():
            words = {"it": reference(it, parts, chinese)}
            return Edit(COMBINE, scene, phrase(rng, COMBINE, world, chinese, **words), target, other)


def change(
    rng: np.random.Generator, kind: str, scene: Scene, world: World, chinese: bool
) -> tuple[Scene, dict[str, str]]:
    """One change of a kind: the scene after it, and the words that its phrases need."""
    if kind == "background":
        colour = pick(rng, BACKGROUNDS, other_than=scene.background)
        return replace(scene, background=colour), {"colour": colour}
    if kind == "add":
        new = newcomer(rng, pick(rng, scene.empty_places()), world)
        words = {"a": indefinite(slot(new, ("name", "size")), chinese), "place": new.place}
        return scene.with_things(*scene.things, new), words
    if kind == HELD_BACK:
        return scene.with_things(*(replace(t, place=MIRRORED[t.place]) for t in scene.things)), {}
    it = pick(rng, scene.things)
    rest = [thing for thing in scene.things if thing is not it]
    words = {"it": reference(it, pick(rng, clear_references(scene, it)), chinese)}
    if kind == "remove":
        return scene.with_things(*rest), words
    if kind == "swap":
        other = pick(rng, rest)
        rest.remove(other)
        words["other"] = reference(other, pick(rng, clear_references(scene, other)), chinese)
        return scene.with_things(*rest, replace(it, place=other.place), replace(other, place=it.place)), words
    if kind == "replace":
        new = replace(newcomer(rng, it.place, world), size=it.size)
        words["a"] = indefinite(slot(new, ("name",)), chinese)
        return scene.with_things(*rest, new), words
    words["place"] = pick(rng, scene.empty_places())  # move
    return scene.with_things(*rest, replace(it, place=words["place"])), words


def newcomer(rng: np.random.Generator, place: str, world: World) -> Thing:
    """A thing that an instruction brings in."""
    return centered(sample_thing(rng, place, world.things))


def centered(thing: Thing) -> Thing:
    """What words bring in stands in the middle of its place, since they don't say where else."""
    return replace(thing, dx=0, dy=0)

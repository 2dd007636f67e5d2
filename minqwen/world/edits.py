"""The tasks of the toy world: a scene, an instruction that can mean one thing only in it, and what should come out.

    World -> Edit(kind, scene, instruction, target_scene)          Edit -> its pictures

Tests: tests/test_world.py.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from PIL import Image

from minqwen.world.scenes import (
    COMBINE,
    HELD_BACK,
    KINDS,
    PLACES,
    WORLD,
    Scene,
    World,
    draw,
    random_item,
    sample_scene,
    sample_thing,
)
from minqwen.world.words import definite, describe, fitting, indefinite, phrase, refer

MIRRORED = dict(zip(PLACES, ("top right", "top left", "bottom right", "bottom left"), strict=True))
TRIES = 10_000  # scenes that are drawn for one edit; one in a hundred will do where any does


@dataclass(frozen=True)
class Edit:
    """A task: a scene (None: draw from words alone), an instruction, and the scene that should come out.

    Of a two-picture edit `scene` is Picture 1, which changes, and `second` is Picture 2.
    """

    kind: str
    scene: Scene | None
    instruction: str
    target_scene: Scene
    jitter: int = 0  # that of its world: the freedom that the judge gives a thing whose place is new
    second: Scene | None = None

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


def sample_drawing(rng: np.random.Generator, world: World = WORLD) -> Edit:
    """A task from words alone: `.instruction` is the prompt, `.source` is None."""
    scene = sample_scene(rng, world)
    return Edit("draw", None, describe(scene, rng, world), scene, world.jitter)


def sample_edit(rng: np.random.Generator, kind: str | None = None, world: World = WORLD) -> Edit:
    """A scene, an instruction that can mean one thing only in it, and the scene that it asks for.

    Raises ValueError for an unknown kind, and for a world in which there is nothing of the kind to ask for.
    """
    kind = kind or random_item(rng, world.kinds)
    if kind == COMBINE:
        return sample_combination(rng, world)
    if kind not in (*KINDS, HELD_BACK):
        raise ValueError(f"no edit is of kind {kind!r}: expected one of {', '.join((*KINDS, HELD_BACK, COMBINE))}")
    least, most = {"add": (0, world.max_objects - 1), "swap": (2, 4)}.get(kind, (1, 4))
    for _ in range(TRIES):  # a world with few references has scenes whose things cannot be told apart: take another
        scene = sample_scene(rng, world, least, most)
        chinese = bool(rng.random() < world.chinese)
        target, words = change(rng, kind, scene, world, chinese)
        if target != scene and None not in words.values():
            return Edit(kind, scene, phrase(rng, kind, world, chinese, **words), target, world.jitter)
    raise ValueError(f"no edit of kind {kind!r} in {TRIES} scenes of {world}")


def sample_combination(rng: np.random.Generator, world: World = WORLD) -> Edit:
    """A two-picture edit: a thing of Picture 2 goes onto Picture 1, into the same corner, which is empty there."""
    # a reference by place never fits a thing of Picture 1, whose corner is empty; with one thing a scene, none does
    possible = world.max_objects > 1 and any("place" not in parts for parts in world.references)
    twins = bool(rng.random() < world.twins) and possible
    for _ in range(TRIES):
        scene = sample_scene(rng, world, 0, world.max_objects - 1)
        other = sample_scene(rng, world)
        chinese = bool(rng.random() < world.chinese)
        it = random_item(rng, other.things)
        parts = random_item(rng, world.references)
        target = scene.with_things(*scene.things, it)
        if scene.at(it.place) or len(fitting(other, it, parts)) > 1 or target.content() == other.content():
            continue
        if twins == bool(fitting(scene, it, parts)):
            instruction = phrase(rng, COMBINE, world, chinese, it=definite(it, parts, chinese))
            return Edit(COMBINE, scene, instruction, target, world.jitter, other)
    raise ValueError(f"no edit of kind {COMBINE!r} in {TRIES} pairs of scenes of {world}")


def change(
    rng: np.random.Generator, kind: str, scene: Scene, world: World, chinese: bool
) -> tuple[Scene, dict[str, str | None]]:
    """One change of a kind: the scene after it, and the words that its phrases need."""
    if kind == "background":
        colour = random_item(rng, world.backgrounds, other_than=scene.background)
        return replace(scene, background=colour), {"colour": colour}
    if kind == "add":
        new = sample_thing(rng, random_item(rng, scene.empty_places()), world)
        return scene.with_things(*scene.things, new), {"a": indefinite(new, chinese), "place": new.place}
    if kind == HELD_BACK:
        mirrored = scene.with_things(*(replace(t, place=MIRRORED[t.place], dx=-t.dx) for t in scene.things))
        if mirrored.content() == scene.content():
            return scene, {}  # nothing to see: sample_edit takes another scene
        return mirrored, {}
    it = random_item(rng, scene.things)
    rest = [thing for thing in scene.things if thing is not it]
    words = {"it": refer(rng, scene, it, world, chinese)}
    if kind == "remove":
        return scene.with_things(*rest), words
    if kind == "swap":
        other = random_item(rng, rest)
        if (it.shape, it.colour) == (other.shape, other.colour):
            return scene, words  # nothing to see
        rest.remove(other)
        words["other"] = refer(rng, scene, other, world, chinese)
        return scene.with_things(*rest, replace(it, place=other.place), replace(other, place=it.place)), words
    part = {"recolour": "colour", "shape": "shape", "move": "place"}[kind]
    choices = {"colour": world.colours, "shape": world.shapes, "place": scene.empty_places()}[part]
    words[part] = random_item(rng, choices, other_than=getattr(it, part))
    return scene.with_things(*rest, replace(it, **{part: words[part]})), words

"""The world of things: scenes of cats, rockets and cakes, edits of them in words, and a judge of the results.

    from minqwen.world.things import sample_edit, judge

Files: scenes, words, edits, judging. No checkpoint has learned this world yet: the shipped one knows the shapes only.
"""

from minqwen.world.things.edits import COMBINE, HELD_BACK, KINDS, Edit, Wish, sample_drawing, sample_edit
from minqwen.world.things.judging import explain, judge, read
from minqwen.world.things.scenes import (
    BACKGROUNDS,
    COLOURED,
    COLOURS,
    FAMILIES,
    PLACES,
    SIZE,
    SMALL,
    THINGS,
    WORLD,
    Scene,
    Thing,
    World,
    draw,
    draw_array,
    in_cell,
    pick,
    sample_scene,
)
from minqwen.world.things.words import vocabulary

__all__ = [
    "BACKGROUNDS",
    "COLOURED",
    "COLOURS",
    "COMBINE",
    "Edit",
    "FAMILIES",
    "HELD_BACK",
    "KINDS",
    "PLACES",
    "SIZE",
    "SMALL",
    "Scene",
    "THINGS",
    "Thing",
    "WORLD",
    "Wish",
    "World",
    "draw",
    "draw_array",
    "explain",
    "in_cell",
    "judge",
    "pick",
    "read",
    "sample_drawing",
    "sample_edit",
    "sample_scene",
    "vocabulary",
]

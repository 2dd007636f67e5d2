"""The small world of the tiny checkpoint: scenes of cats, rockets and cakes, edits in words, a judge of the results.

    from minqwen.world import sample_edit, judge

Files: scenes, words, edits, judging. Nothing else of the library knows of it.
"""

from minqwen.world.edits import COMBINE, HELD_BACK, KINDS, Edit, Wish, sample_drawing, sample_edit
from minqwen.world.judging import explain, judge, read
from minqwen.world.scenes import (
    BACKGROUNDS,
    FAMILIES,
    PLACES,
    SIZE,
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
from minqwen.world.words import vocabulary

__all__ = [
    "BACKGROUNDS",
    "COMBINE",
    "Edit",
    "FAMILIES",
    "HELD_BACK",
    "KINDS",
    "PLACES",
    "SIZE",
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

"""The small world of the tiny checkpoint: scenes of shapes, edits of them in words, and a judge of the results.

    from minqwen.world import sample_edit, judge

Files: scenes, words, edits, judging. Nothing else of the library knows of it.
"""

from minqwen.world.edits import Edit, sample_drawing, sample_edit
from minqwen.world.judging import explain, judge
from minqwen.world.scenes import (
    BACKGROUNDS,
    COLOURS,
    COMBINE,
    HELD_BACK,
    KINDS,
    PLACES,
    RADIUS,
    SHAPES,
    SIZE,
    SMALL,
    WORLD,
    Scene,
    Thing,
    World,
    draw,
    draw_array,
    in_cell,
    outline,
    random_item,
    sample_scene,
)
from minqwen.world.words import describe, vocabulary

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "COMBINE",
    "Edit",
    "HELD_BACK",
    "KINDS",
    "PLACES",
    "RADIUS",
    "SHAPES",
    "SIZE",
    "SMALL",
    "Scene",
    "Thing",
    "WORLD",
    "World",
    "describe",
    "draw",
    "draw_array",
    "explain",
    "in_cell",
    "judge",
    "outline",
    "random_item",
    "sample_drawing",
    "sample_edit",
    "sample_scene",
    "vocabulary",
]

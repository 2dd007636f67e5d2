"""The judge of the toy world: what is wrong with a picture?

    picture, Edit -> ["top left: star expected, circle seen"], from its pixels alone

So small a world can be read back without a network, so "97 of 100 edits are right" is a count and not an opinion.
Tests: tests/test_world.py.
"""

from functools import cache, lru_cache

import numpy as np
from PIL import Image, ImageFilter

from minqwen.world.edits import Edit
from minqwen.world.scenes import BACKGROUNDS, COLOURS, PLACES, RADIUS, SHAPES, SIZE, Thing, in_cell, mask

NEAR = 48  # two colours nearer than this may be the same one (black and white are 442 apart)
MIN_OVERLAP, MIN_LEAD = 0.8, 0.04  # intersection over union with the best shape, and its lead over the second
MAX_SPOTS = 0.01  # share of a cell's pixels that may be off

Placement = tuple[int, int, int]  # dx, dy, radius


def judge(image: Image.Image, edit: Edit) -> bool:
    """True only if every shape, colour and place and the background are those of `edit.target_scene`."""
    return not explain(image, edit)


def explain(image: Image.Image, edit: Edit) -> list[str]:
    """What is wrong with a picture, place by place. Empty where nothing is."""
    image = image.convert("RGB")
    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE), Image.Resampling.BOX)
    pixels = np.asarray(image, np.float32)
    rim = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = np.median(rim, axis=0)
    wanted, seen = edit.target_scene.background, nearest(ground, BACKGROUNDS)
    faults = [] if seen == wanted else [f"background: {wanted} expected, {seen} seen"]
    for place in PLACES:
        if fault := explain_cell(pixels[in_cell(place)], ground, edit, place):
            faults.append(f"{place}: {fault}")
    return faults


def explain_cell(cell: np.ndarray, ground: np.ndarray, edit: Edit, place: str) -> str | None:
    """What is wrong in one cell, (32, 32, 3), of a picture whose background is `ground`."""
    thing = edit.target_scene.at(place)
    away = np.linalg.norm(cell - ground, axis=-1)
    if thing is None:
        return "nothing expected, something seen" if (away > NEAR).mean() > MAX_SPOTS else None
    peak = np.percentile(away, 95)  # the smallest star is a tenth of its cell
    if peak < NEAR:
        return f"{thing.shape} expected, nothing seen"
    colour = np.median(cell[away > 0.75 * peak], axis=0)
    if (seen := nearest(colour, COLOURS)) != thing.colour:
        return f"{thing.colour} expected, {seen} seen"
    cover = (cell - ground) @ (colour - ground) / np.sum((colour - ground) ** 2)  # as mask() has it
    where = placements(edit, thing)
    fits = {shape: best_fit(cover, shape, where) for shape in SHAPES}
    second, best = sorted(SHAPES, key=lambda shape: fits[shape])[-2:]
    (score, placement), (runner_up, _) = fits[best], fits[second]
    if score < MIN_OVERLAP or score - runner_up < MIN_LEAD:
        return f"{thing.shape} expected, no clear shape seen"
    if best != thing.shape:
        return f"{thing.shape} expected, {best} seen"
    outside, inside = plain_parts(best, *placement)
    spots = (outside & (away > NEAR)) | (inside & (np.linalg.norm(cell - colour, axis=-1) > NEAR))
    return "spots on what should be plain" if spots.mean() > MAX_SPOTS else None


def nearest(rgb: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str:
    """The name of the nearest colour, if that is near and the next is clearly further."""
    distances = {word: float(np.linalg.norm(rgb - value)) for word, value in palette.items()}
    first, second = sorted(distances, key=lambda word: (distances[word], word))[:2]
    clear = distances[first] < NEAR and distances[second] - distances[first] > 12
    return first if clear else "no clear colour"


def placements(edit: Edit, thing: Thing) -> tuple[Placement, ...]:
    """Where a thing may be: a pixel off the target's place, or anywhere if the instruction leaves it open."""
    exact = (thing.dx, thing.dy, thing.radius)
    before = edit.scene and edit.scene.at(thing.place)
    if not edit.jitter or (before and (before.dx, before.dy, before.radius) == exact):
        return tuple((thing.dx + x, thing.dy + y, thing.radius) for x in (-1, 0, 1) for y in (-1, 0, 1))
    steps = range(-edit.jitter, edit.jitter + 1)
    return tuple((x, y, RADIUS - edit.jitter + r) for x in steps for y in steps for r in steps)


def best_fit(cover: np.ndarray, shape: str, where: tuple[Placement, ...]) -> tuple[float, Placement]:
    """How well a shape fits what a cell shows (intersection over union), and where it fits best."""
    seen, drawn = sharp(cover).ravel(), templates(shape, where)
    both = np.minimum(drawn, seen).sum(1)
    scores = both / (drawn.sum(1) + seen.sum() - both)
    return float(scores.max()), where[int(scores.argmax())]


@lru_cache(maxsize=1024)
def templates(shape: str, where: tuple[Placement, ...]) -> np.ndarray:
    """A shape in every placement, as `sharp` shows it: (placements, 32 * 32)."""
    return sharp(np.stack([mask(shape, *placement).ravel() for placement in where]))


def sharp(cover: np.ndarray) -> np.ndarray:
    """Twice as steep around one half: undoes a slight blur and drops slight noise."""
    return np.clip(2 * cover - 0.5, 0, 1)


@cache
def plain_parts(shape: str, dx: int, dy: int, radius: int) -> tuple[np.ndarray, np.ndarray]:
    """The pixels outside and inside a shape that lie more than two from its edge, where blur is not felt."""
    cover = Image.fromarray((mask(shape, dx, dy, radius)[..., 0] * 255).astype(np.uint8))
    outside = np.asarray(cover.filter(ImageFilter.MaxFilter(5))) == 0
    inside = np.asarray(cover.filter(ImageFilter.MinFilter(5))) == 255
    return outside, inside

"""The judge of the small world: what is wrong with a picture?

    picture -> what is seen in it          picture, Edit -> what is wrong with it

From pixels alone: in each place every thing is tried in every size and offset, and the one that leaves the
least unexplained is what is seen there, if it leaves little and the next leaves clearly more. So small a world can be
read back without a network: "97 of 100 edits are right" is a count and not an opinion. Tests: tests/test_world.py.
"""

from functools import cache, lru_cache
from itertools import permutations
from typing import NamedTuple

import numpy as np
from PIL import Image

from minqwen.world.edits import Edit, Wish
from minqwen.world.scenes import (
    BACKGROUNDS,
    CELL,
    JITTER,
    PLACES,
    SIZE,
    SIZES,
    THINGS,
    Thing,
    in_cell,
    span,
    stamp,
)
from minqwen.world.words import slot

NEAR = 40  # levels: two grounds nearer than this may be the same one
WORST = 34.0  # levels, root mean square over a thing: what is further from every template is no clear thing
WORST_SPOT = 48.0  # the same over any 8x8 pixels: half a thing leaves little on the whole, and much in one spot
FAINT_SPOT = 36.0  # the least that this may become, where a thing is hardly another colour than the ground
LEAD = 1.15  # by which the next thing must leave more unexplained than the best
MAX_SPOTS = 0.02  # share of an empty place's pixels that may be off the ground
MAX_SHIFT = 2  # pixels by which a thing that should stay may have moved or grown


class Look(NamedTuple):
    """One way in which a thing may look in its place."""

    name: str
    side: int
    dx: int
    dy: int


class Templates(NamedTuple):
    """Looks at a low resolution, as what `unexplained` multiplies with what is seen."""

    looks: tuple[Look, ...]
    factors: np.ndarray  # (n, 8 * pixels)
    square: np.ndarray  # (n,)
    inside: np.ndarray  # (n,) pixels that are covered


def shrunk(array: np.ndarray, by: int) -> np.ndarray:
    """(..., h, w, c) -> (..., h/by, w/by, c): means of squares, which slight blur and noise hardly change."""
    *front, h, w, channels = array.shape
    return array.reshape(*front, h // by, by, w // by, by, channels).mean((-4, -2))


def on_canvas(looks: list[Look]) -> np.ndarray:
    """Paint and cover of each look in its place, (n, CELL/2, CELL/2, 4)."""
    canvas = np.zeros((len(looks), CELL, CELL, 4), np.float32)
    for row, look in zip(canvas, looks, strict=True):
        paint, cover = stamp(look.name, look.side)
        under = row[span(look.side, look.dy), span(look.side, look.dx)]
        under[..., :3], under[..., 3:] = paint, cover
    return shrunk(canvas, 2)


def make_templates(looks: list[Look], by: int = 1) -> Templates:
    """by: how much smaller than half the resolution."""
    small = shrunk(on_canvas(looks), by)
    paint, cover = small[..., :3], small[..., 3:]
    parts = (paint, paint * cover, cover, cover**2)
    factors = np.concatenate([part.reshape(len(looks), -1) for part in parts], axis=1)
    return Templates(tuple(looks), factors, np.square(paint).sum((1, 2, 3)), (cover > 0.1).sum((1, 2, 3)))


@cache
def coarse() -> Templates:
    """Every thing in two sizes and nine offsets, at a quarter of the resolution."""
    steps, sides = (-JITTER, 0, JITTER), SIZES.values()
    looks = [Look(name, side, x, y) for name in THINGS for side in sides for x in steps for y in steps]
    return make_templates(looks, 2)


@lru_cache(maxsize=512)
def fine(look: Look) -> Templates:
    """The sizes and offsets around one that nearly fits."""
    name, side, dx, dy = look
    near = (-1, 0, 1)
    looks = [Look(name, side + s, dx + x, dy + y) for s in near for x in near for y in near]
    return make_templates([look for look in looks if max(abs(look.dx), abs(look.dy)) <= (CELL - look.side) // 2])


def unexplained(templates: Templates, cell: np.ndarray, ground: np.ndarray) -> np.ndarray:
    """What each look leaves of a place: squared levels, summed over the pixels and divided by those covered.

    cell, ground (h, w, 3): seen = paint + (1 - cover) * ground, if the look is the right one. The square of
    (seen - ground) + cover * ground - paint, multiplied out, is one product with a matrix that is made once.
    """
    rest = cell - ground
    seen = np.concatenate([
        -2 * rest.ravel(), -2 * ground.ravel(), 2 * (rest * ground).sum(-1).ravel(), np.square(ground).sum(-1).ravel()
    ])  # fmt: skip
    left = np.square(rest).sum() + templates.square + templates.factors @ seen
    return left.clip(0) / (3 * templates.inside)


def whole(look: Look, cell: np.ndarray, ground: np.ndarray) -> bool:
    """Whether a look leaves little in every spot: clearly less than if the thing were missing there."""
    canvas = on_canvas([look])[0]
    thing = canvas[..., :3] - canvas[..., 3:] * ground  # its difference from the ground
    left, shown = spots(cell - ground - thing), spots(thing)
    return bool((left < (0.8 * shown).clip(FAINT_SPOT, WORST_SPOT)).all())


def spots(difference: np.ndarray) -> np.ndarray:
    """Root mean squares over 8x8 pixels, from a difference at half the resolution."""
    square = np.square(difference).mean(-1)
    return np.sqrt(np.lib.stride_tricks.sliding_window_view(square, (4, 4)).mean((2, 3)))


class Seen(NamedTuple):
    """What a picture shows."""

    background: str | None  # None: none of BACKGROUNDS
    things: dict[str, Thing | None]  # place -> thing; None: no clear one
    looks: dict[str, Look]


def read(image: Image.Image) -> Seen:
    """What is seen in a picture, from its pixels alone."""
    image = image.convert("RGB")
    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE), Image.Resampling.BOX)
    pixels = np.asarray(image, np.float32)
    top, bottom = np.median(pixels[:2].reshape(-1, 3), axis=0), np.median(pixels[-2:].reshape(-1, 3), axis=0)
    share = np.linspace(0, 1, SIZE, dtype=np.float32)[:, None, None]
    ground = np.broadcast_to(top + (bottom - top) * share, pixels.shape)
    things, looks = {}, {}
    for place in PLACES:
        cell = in_cell(place)
        found = read_place(shrunk(pixels[cell], 2), shrunk(ground[cell], 2))
        if found is not None:
            things[place], looks[place] = found
            if things[place] is not None:
                things[place] = Thing(found[1].name, place, size_of(found[1].side))
    return Seen(nearest_background((top + bottom) / 2), things, looks)


def read_place(cell: np.ndarray, ground: np.ndarray) -> tuple[bool | None, Look] | None:
    """(True, look) for a clear thing, (None, look) for an unclear one, None for an empty place."""
    if (np.linalg.norm(cell - ground, axis=-1) > NEAR).mean() <= MAX_SPOTS:
        return None
    templates = coarse()
    left = unexplained(templates, shrunk(cell, 2), shrunk(ground, 2))
    candidates = {}
    for k in np.argsort(left)[:60]:
        candidates.setdefault(templates.looks[k].name, templates.looks[k])
    best = []
    for look in list(candidates.values())[:3]:
        near = fine(look)
        left = unexplained(near, cell, ground)
        best.append((float(left.min()), near.looks[int(left.argmin())]))
    best.sort(key=lambda pair: pair[0])
    (first, look), (second, _) = best[:2]
    clear = first < WORST**2 and second > LEAD**2 * first and whole(look, cell, ground)
    return (True if clear else None), look


def size_of(side: int) -> str:
    return min(SIZES, key=lambda size: abs(SIZES[size] - side))


def nearest_background(rgb: np.ndarray) -> str | None:
    """The name of the nearest ground, if that is near and the next is clearly further."""
    distances = sorted((float(np.linalg.norm(rgb - np.float32(value))), word) for word, value in BACKGROUNDS.items())
    return distances[0][1] if distances[0][0] < NEAR and distances[1][0] - distances[0][0] > 10 else None


def judge(image: Image.Image, edit: Edit) -> bool:
    """True only if every thing, size and place and the background are as asked."""
    return not explain(image, edit)


def explain(image: Image.Image, edit: Edit) -> list[str]:
    """What is wrong with a picture: ["top left: fox expected, cat seen"]. Empty where nothing is."""
    seen = read(image)
    unclear = [f"{place}: nothing clear" for place, thing in seen.things.items() if thing is None]
    if edit.wanted is not None:
        return unclear or open_faults(seen, edit.wanted)
    wanted = edit.target_scene
    faults = [] if seen.background == wanted.background else [
        f"background: {wanted.background} expected, {seen.background or 'another colour'} seen"]  # fmt: skip
    for place in PLACES:
        fault = place_fault(seen, edit, place)
        faults += [f"{place}: {fault}"] if fault else []
    return faults


def place_fault(seen: Seen, edit: Edit, place: str) -> str | None:
    """What is wrong in one place of a picture that has one right answer."""
    thing, there = edit.target_scene.at(place), seen.things.get(place)
    if place not in seen.things:
        return f"{thing.name} expected, nothing seen" if thing else None
    if there is None:
        return f"{thing.name if thing else 'nothing'} expected, nothing clear seen"
    if thing is None:
        return f"nothing expected, {there.name} seen"
    parts = ("size", "name")
    for part in parts:
        if getattr(there, part) != getattr(thing, part):
            return f"{slot(thing, parts).noun(False)} expected, {slot(there, parts).noun(False)} seen"
    look = seen.looks[place]
    before = edit.scene and edit.scene.at(place)
    apart = max(abs(look.dx - thing.dx), abs(look.dy - thing.dy), abs(look.side - thing.side))
    if before == thing and apart > MAX_SHIFT:
        return f"{thing.name} has moved"
    return None


def open_faults(seen: Seen, wish: Wish) -> list[str]:
    """What is wrong with a picture that has many right answers."""
    if wish.background not in (None, seen.background):
        return [f"background: {wish.background} expected, {seen.background or 'another colour'} seen"]
    if seen.background is None:
        return ["background: no clear colour"]
    things = [thing for thing in seen.things.values() if thing is not None]
    if len(things) < len(wish.slots) or (len(things) > len(wish.slots) and not wish.more):
        return [f"{len(wish.slots)} things expected, {len(things)} seen"]
    for order in permutations(things, len(wish.slots)):
        if all(wanted.fits(thing) for wanted, thing in zip(wish.slots, order, strict=True)):
            return []
    return [f"{' and '.join(w.noun(False) for w in wish.slots)} expected, {', '.join(t.name for t in things)} seen"]

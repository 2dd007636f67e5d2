"""The toy world of the tiny checkpoint: scenes of shapes, edits of them in words, and a judge of the results.

    World -> Scene -> picture (64, 64, 3)          Scene -> description
    World -> Edit: a scene, an instruction, the scene that it asks for
    picture, Edit -> what is wrong with it

A picture is a 2x2 grid of cells on a plain background, each empty or with one shape in it. Training draws
them by the million, so a shape's mask is made once and kept. The surprise is the judge: so small a world can
be read back from pixels without a network, so "97 of 100 edits are right" is a count and not an opinion.
"""

import math
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE = 64  # pixels on a side; centres and radii below are in pixels of a picture of this size
RADIUS = 12
SHAPES = ("circle", "square", "triangle", "star", "heart")
PLACES = ("top left", "top right", "bottom left", "bottom right")
MIRRORED = dict(zip(PLACES, ("top right", "top left", "bottom right", "bottom left"), strict=True))
COLOURS = {
    "red": (218, 38, 46), "green": (46, 164, 79), "blue": (44, 92, 222), "yellow": (252, 218, 54),
    "purple": (142, 60, 190), "orange": (247, 132, 30), "cyan": (64, 204, 228),
}
BACKGROUNDS = {  # none of them is one of COLOURS: no shape is ever lost in its background
    "white": (252, 252, 252), "black": (26, 26, 30), "gray": (172, 174, 178), "pink": (252, 202, 214),
    "brown": (98, 66, 46),
}
# {it} and {other} stand for references ("the red star"), {a} for a new thing ("an orange heart").
PHRASES = {
    "recolour": ("make {it} {colour}", "change {it} to {colour}", "paint {it} {colour}", "turn {it} {colour}",
                 "colour {it} {colour}", "{it} should be {colour}", "I would like {it} to be {colour}",
                 "change the colour of {it} to {colour}"),
    "remove": ("remove {it}", "delete {it}", "take away {it}", "erase {it}",
               "get rid of {it}", "{it} should be gone", "I would like {it} to be gone", "take {it} out"),
    "add": ("add {a} at the {place}", "put {a} in the {place}", "draw {a} at the {place}", "place {a} in the {place}",
            "insert {a} in the {place}", "there should be {a} at the {place}", "I would like {a} at the {place}",
            "at the {place}, add {a}"),
    "background": ("make the background {colour}", "change the background to {colour}",
                   "paint the background {colour}", "turn the background {colour}",
                   "use a {colour} background", "the background should be {colour}",
                   "I would like the background to be {colour}", "change the colour of the background to {colour}"),
    "shape": ("turn {it} into a {shape}", "replace {it} with a {shape}", "change {it} into a {shape}",
              "make {it} a {shape}", "change {it} to a {shape}", "{it} should be a {shape}",
              "I would like {it} to be a {shape}", "change the shape of {it} to a {shape}"),
    "move": ("move {it} to the {place}", "put {it} in the {place}", "shift {it} to the {place}",
             "place {it} at the {place}", "bring {it} to the {place}", "{it} should be at the {place}",
             "I would like {it} to be at the {place}", "change the place of {it} to the {place}"),
    "swap": ("swap {it} and {other}", "switch {it} with {other}", "exchange {it} and {other}",
             "swap {it} with {other}", "exchange the places of {it} and {other}", "{it} and {other} should swap places",
             "I would like {it} and {other} to swap places", "let {it} and {other} trade places"),
    "draw": ("{things} on a {colour} background", "a {colour} background with {things}",
             "draw {things} on a {colour} background", "a picture of {things} on a {colour} background",
             "there should be {things} on a {colour} background", "I would like {things} on a {colour} background",
             "on a {colour} background, {things}", "a {colour} picture with {things}"),
    "mirror": ("mirror the picture", "mirror the picture from left to right", "flip the picture from left to right",
               "flip the picture", "the picture should be mirrored", "I would like the picture to be mirrored"),
    "combine": ("put {it} of Picture 2 on Picture 1", "add {it} of Picture 2 to Picture 1",
                "copy {it} from Picture 2 to Picture 1", "on Picture 1, put {it} of Picture 2",
                "take {it} from Picture 2 and put it on Picture 1", "Picture 1 should have {it} of Picture 2",
                "{it} of Picture 2 should be on Picture 1", "I would like {it} of Picture 2 to be on Picture 1"),
}
CHINESE_PHRASES = {
    "recolour": ("把{it}变成{colour}", "将{it}改为{colour}"),
    "remove": ("去掉{it}", "删除{it}"),
    "add": ("在{place}加一个{a}", "在{place}画一个{a}"),
    "background": ("把背景变成{colour}", "将背景改为{colour}"),
    "shape": ("把{it}换成{shape}", "将{it}变为{shape}"),
    "move": ("把{it}移到{place}", "将{it}放到{place}"),
    "swap": ("交换{it}和{other}", "把{it}和{other}对调"),
    "draw": ("{colour}背景上有{things}", "画{things}，背景是{colour}"),
    "mirror": ("左右翻转图片", "把图片左右镜像"),
    "combine": ("把图2里的{it}放到图1上", "在图1上加上图2的{it}"),
}
# No training sees these: what an instruction does that nobody has thought of.
UNSEEN_PHRASES = {
    "recolour": ("I want {it} to be {colour}", "could you please paint {it} in {colour}?"),
    "remove": ("I want {it} to be gone", "please take {it} away from the picture"),
    "add": ("I want {a} at the {place}", "could you draw {a} for me in the {place}?"),
    "background": ("I want the background to be {colour}", "please paint all of the background in {colour}"),
    "shape": ("I want {it} to be a {shape}", "could you please turn {it} to a {shape}?"),
    "move": ("I want {it} to be at the {place}", "please move {it} so that it is at the {place}"),
    "swap": ("I want {it} and {other} to swap places", "could you let {it} switch places with {other}?"),
    "draw": ("I want {things} on a {colour} background", "please paint {things}, on {colour}"),
    "combine": ("I want {it} of Picture 2 on Picture 1",
                "could you please draw {it} of Picture 2 on Picture 1 too?"),
}
CHINESE = {
    "circle": "圆形", "square": "正方形", "triangle": "三角形", "star": "星形", "heart": "心形",
    "top left": "左上角", "top right": "右上角", "bottom left": "左下角", "bottom right": "右下角",
    "red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色", "purple": "紫色", "orange": "橙色",
    "cyan": "青色", "white": "白色", "black": "黑色", "gray": "灰色", "pink": "粉色", "brown": "棕色",
}
KINDS = ("recolour", "remove", "add", "background", "shape", "move", "swap")
HELD_BACK = "mirror"  # a kind of edit that the shipped checkpoint was never shown: the fine-tune teaches it
COMBINE = "combine"  # of two pictures: data/tiny's edit_plus_lora.safetensors has learned it, KINDS are of one picture
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
    twins: float = 0.5  # share of two-picture edits whose reference fits a thing of Picture 1 as well


SMALL = World(kinds=KINDS[:5], phrasings=2, references=REFERENCES[:4], chinese=0.0, jitter=0)  # where training begins
WORLD = World()  # where it ends, and the default everywhere below


# ------------------------------------------------------------------------------------ scenes and pictures


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
    picture = np.empty((size, size, 3), np.uint8)
    picture[:] = ground = np.array(BACKGROUNDS[scene.background], np.float32)
    for t in scene.things:
        cover = mask(t.shape, t.dx, t.dy, t.radius, size // 2)
        cell = ground + cover * (COLOURS[t.colour] - ground)
        picture[in_cell(t.place, size)] = cell + 0.5  # rounds
    return picture


def draw(scene: Scene, size: int = SIZE) -> Image.Image:
    return Image.fromarray(draw_array(scene, size))


# ------------------------------------------------------------------------------------ words


def name(thing: Thing, parts: tuple[str, ...], chinese: bool = False) -> str:
    """A reference: ("colour",) gives "the red shape", ("shape", "place") "the star at the top left"."""
    place, colour, shape = (getattr(thing, p) if p in parts else "" for p in ("place", "colour", "shape"))
    if chinese:
        return "".join(CHINESE[word] + "的" for word in (place, colour) if word) + CHINESE.get(shape, "图形")
    words = ["the", colour, shape or "shape", place and f"at the {place}"]
    return " ".join(word for word in words if word)


def fits(scene: Scene, thing: Thing, parts: tuple[str, ...]) -> list[Thing]:
    """The things in the scene that a reference to `thing` by these parts could mean."""
    return [t for t in scene.things if all(getattr(t, part) == getattr(thing, part) for part in parts)]


def refer(rng: np.random.Generator, scene: Scene, thing: Thing, world: World, chinese: bool) -> str | None:
    """A reference that fits only this thing, or None where the world's references cannot tell it apart."""
    clear = [parts for parts in world.references if len(fits(scene, thing, parts)) == 1]
    return name(thing, pick(rng, clear), chinese) if clear else None


def a(thing: Thing, chinese: bool = False) -> str:
    if chinese:
        return CHINESE[thing.colour] + CHINESE[thing.shape]
    return f"{'an' if thing.colour == 'orange' else 'a'} {thing.colour} {thing.shape}"


def phrase(rng: np.random.Generator, kind: str, world: World, chinese: bool, **words: str) -> str:
    if chinese:
        words = {key: CHINESE.get(word, word) for key, word in words.items()}
        return pick(rng, CHINESE_PHRASES[kind]).format(**words)
    phrases = UNSEEN_PHRASES[kind] if world.unseen else PHRASES[kind][: world.phrasings]
    return pick(rng, phrases).format(**words)


def describe(scene: Scene, rng: np.random.Generator, world: World = WORLD) -> str:
    """A prompt for a whole scene: "a red circle at the top left and ... on a white background"."""
    chinese = bool(rng.random() < world.chinese)
    if chinese:
        things = "和".join(f"{CHINESE[t.place]}的{a(t, chinese)}" for t in scene.things)
    else:
        things = " and ".join(f"{a(t)} at the {t.place}" for t in scene.things)
    return phrase(rng, "draw", world, chinese, things=things or "nothing", colour=scene.background)


def vocabulary() -> list[str]:
    """Every English word and Chinese piece that an instruction or prompt can hold: what a tokenizer needs."""
    known = [by_kind[kind] for by_kind in (PHRASES, CHINESE_PHRASES) for kind in (*KINDS, "draw")]
    phrases = sum(known, ())
    text = " ".join([*phrases, *SHAPES, *PLACES, *COLOURS, *BACKGROUNDS, *CHINESE.values()])
    for mark in "{}，,":
        text = text.replace(mark, f" {mark} ")
    words = text.split() + "a an and nothing shape 图形 的 和".split()
    return sorted({word for word in words if word not in "{}，,"})


# ------------------------------------------------------------------------------------ sampling


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


def pick(rng: np.random.Generator, items, other_than=None):
    """One of the items. (`rng.choice` would build an array of them first.)"""
    items = [item for item in items if item != other_than]
    return items[int(rng.integers(len(items)))]


def sample_thing(rng: np.random.Generator, place: str, world: World) -> Thing:
    thing = Thing(pick(rng, world.shapes), pick(rng, world.colours), place)
    if not world.jitter:
        return thing
    dx, dy = rng.integers(-world.jitter, world.jitter + 1, 2).tolist()
    return replace(thing, dx=dx, dy=dy, radius=RADIUS - int(rng.integers(2 * world.jitter + 1)))


def sample_scene(rng: np.random.Generator, world: World = WORLD, least: int = 1, most: int = 4) -> Scene:
    count = int(rng.integers(least, min(most, world.max_objects) + 1))
    things = [sample_thing(rng, PLACES[k], world) for k in rng.permutation(4)[:count]]
    return Scene(pick(rng, world.backgrounds)).with_things(*things)


def sample_drawing(rng: np.random.Generator, world: World = WORLD) -> Edit:
    """A task from words alone: `.instruction` is the prompt, `.source` is None."""
    scene = sample_scene(rng, world)
    return Edit("draw", None, describe(scene, rng, world), scene, world.jitter)


def sample_edit(rng: np.random.Generator, kind: str | None = None, world: World = WORLD) -> Edit:
    """A scene, an instruction that can mean one thing only in it, and the scene that it asks for."""
    kind = kind or pick(rng, world.kinds)
    if kind == COMBINE:
        return sample_combination(rng, world)
    if kind not in (*KINDS, HELD_BACK):
        raise ValueError(f"no edit is of kind {kind!r}: expected one of {', '.join((*KINDS, HELD_BACK, COMBINE))}")
    least, most = {"add": (0, world.max_objects - 1), "swap": (2, 4)}.get(kind, (1, 4))
    while True:  # a world with few references has scenes whose things cannot be told apart: take another
        scene = sample_scene(rng, world, least, most)
        chinese = bool(rng.random() < world.chinese)
        target, words = change(rng, kind, scene, world, chinese)
        if target != scene and None not in words.values():
            return Edit(kind, scene, phrase(rng, kind, world, chinese, **words), target, world.jitter)


def sample_combination(rng: np.random.Generator, world: World = WORLD) -> Edit:
    """A two-picture edit: a thing of Picture 2 goes onto Picture 1, into the same corner, which is empty there."""
    twins = bool(rng.random() < world.twins)
    while True:
        scene, other = sample_scene(rng, world, 0, world.max_objects - 1), sample_scene(rng, world)
        chinese, it, parts = bool(rng.random() < world.chinese), pick(rng, other.things), pick(rng, world.references)
        target = scene.with_things(*scene.things, it)
        possible = scene.at(it.place) is None and len(fits(other, it, parts)) == 1
        if possible and twins == bool(fits(scene, it, parts)) and target.content() != other.content():
            instruction = phrase(rng, COMBINE, world, chinese, it=name(it, parts, chinese))
            return Edit(COMBINE, scene, instruction, target, world.jitter, other)


def change(
    rng: np.random.Generator, kind: str, scene: Scene, world: World, chinese: bool
) -> tuple[Scene, dict[str, str | None]]:
    """One change of a kind: the scene after it, and the words that its phrases need."""
    if kind == "background":
        colour = pick(rng, world.backgrounds, other_than=scene.background)
        return replace(scene, background=colour), {"colour": colour}
    if kind == "add":
        new = sample_thing(rng, pick(rng, scene.empty_places()), world)
        return scene.with_things(*scene.things, new), {"a": a(new, chinese), "place": new.place}
    if kind == HELD_BACK:
        mirrored = scene.with_things(*(replace(t, place=MIRRORED[t.place], dx=-t.dx) for t in scene.things))
        seen = mirrored.content() != scene.content()  # else sample_edit takes another scene
        return (mirrored if seen else scene), {}
    it = pick(rng, scene.things)
    rest = [thing for thing in scene.things if thing is not it]
    words = {"it": refer(rng, scene, it, world, chinese)}
    if kind == "remove":
        return scene.with_things(*rest), words
    if kind == "swap":
        other = pick(rng, rest)
        if (it.shape, it.colour) == (other.shape, other.colour):
            return scene, words  # nothing to see: sample_edit takes another scene
        rest.remove(other)
        words["other"] = refer(rng, scene, other, world, chinese)
        return scene.with_things(*rest, replace(it, place=other.place), replace(other, place=it.place)), words
    part = {"recolour": "colour", "shape": "shape", "move": "place"}[kind]
    choices = {"colour": world.colours, "shape": world.shapes, "place": scene.empty_places()}[part]
    words[part] = pick(rng, choices, other_than=getattr(it, part))
    return scene.with_things(*rest, replace(it, **{part: words[part]})), words


# ------------------------------------------------------------------------------------ judging

NEAR = 48  # two colours nearer than this may be the same one (black and white are 442 apart)
MIN_OVERLAP, MIN_LEAD = 0.8, 0.04  # intersection over union with the best shape, and its lead over the second
MAX_SPOTS = 0.01  # share of a cell's pixels that may be off


def judge(image: Image.Image, edit: Edit) -> bool:
    """True only if every shape, colour and place and the background are those of `edit.target_scene`."""
    return not explain(image, edit)


def explain(image: Image.Image, edit: Edit) -> list[str]:
    """What is wrong with a picture: ["top left: star expected, circle seen"]. Empty where nothing is."""
    image = image.convert("RGB")
    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE), Image.Resampling.BOX)
    pixels = np.asarray(image, np.float32)
    ground = np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]), axis=0)
    wanted, seen = edit.target_scene.background, nearest(ground, BACKGROUNDS)
    faults = [] if seen == wanted else [f"background: {wanted} expected, {seen} seen"]
    for place in PLACES:
        fault = explain_cell(pixels[in_cell(place)], ground, edit, place)
        faults += [f"{place}: {fault}"] if fault else []
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
    scores = {shape: overlap(cover, shape, placements(edit, thing)) for shape in SHAPES}
    second, best = sorted(SHAPES, key=lambda shape: scores[shape])[-2:]
    if scores[best][0] < MIN_OVERLAP or scores[best][0] - scores[second][0] < MIN_LEAD:
        return f"{thing.shape} expected, no clear shape seen"
    if best != thing.shape:
        return f"{thing.shape} expected, {best} seen"
    outside, inside = plain_parts(best, *scores[best][1])
    spots = (outside & (away > NEAR)) | (inside & (np.linalg.norm(cell - colour, axis=-1) > NEAR))
    return "spots on what should be plain" if spots.mean() > MAX_SPOTS else None


def nearest(rgb: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str:
    """The name of the nearest colour, if that is near and the next is clearly further."""
    distances = {word: float(np.linalg.norm(rgb - value)) for word, value in palette.items()}
    (first, word), (second, _) = sorted((distance, word) for word, distance in distances.items())[:2]
    return word if first < NEAR and second - first > 12 else "no clear colour"


def placements(edit: Edit, thing: Thing) -> tuple[tuple[int, int, int], ...]:
    """The (dx, dy, radius) that pass: a pixel off the target's, or any if the instruction leaves it open."""
    exact, before = (thing.dx, thing.dy, thing.radius), edit.scene and edit.scene.at(thing.place)
    if not edit.jitter or (before and (before.dx, before.dy, before.radius) == exact):
        return tuple((thing.dx + x, thing.dy + y, thing.radius) for x in (-1, 0, 1) for y in (-1, 0, 1))
    steps = range(-edit.jitter, edit.jitter + 1)
    return tuple((x, y, RADIUS - edit.jitter + r) for x in steps for y in steps for r in steps)


def sharp(cover: np.ndarray) -> np.ndarray:
    """Twice as steep around one half: undoes a slight blur and drops slight noise."""
    return np.clip(2 * cover - 0.5, 0, 1)


@lru_cache(maxsize=1024)
def templates(shape: str, where: tuple[tuple[int, int, int], ...]) -> np.ndarray:
    return sharp(np.stack([mask(shape, *placement).ravel() for placement in where]))


def overlap(cover: np.ndarray, shape: str, where: tuple) -> tuple[float, tuple[int, int, int]]:
    """How well a shape fits what a cell shows (intersection over union), and where it fits best."""
    seen, shapes = sharp(cover).ravel(), templates(shape, where)
    both = np.minimum(shapes, seen).sum(1)
    scores = both / (shapes.sum(1) + seen.sum() - both)
    return float(scores.max()), where[int(scores.argmax())]


@cache
def plain_parts(shape: str, dx: int, dy: int, radius: int) -> tuple[np.ndarray, np.ndarray]:
    """The pixels outside and inside a shape that lie more than two from its edge, where blur is not felt."""
    cover = Image.fromarray((mask(shape, dx, dy, radius)[..., 0] * 255).astype(np.uint8))
    outside = np.asarray(cover.filter(ImageFilter.MaxFilter(5))) == 0
    return outside, np.asarray(cover.filter(ImageFilter.MinFilter(5))) == 255

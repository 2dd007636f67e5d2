"""What is said of the toy world: references, instructions and descriptions, in English and Chinese.

    Scene, Thing -> "the red star"          kind, words -> instruction          Scene -> description

Every instruction has several phrasings; some that training never sees are kept apart, to test with.
Tests: tests/test_world.py.
"""

import numpy as np

from minqwen.world.scenes import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    PLACES,
    SHAPES,
    WORLD,
    Scene,
    Thing,
    World,
    random_item,
)

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


def definite(thing: Thing, parts: tuple[str, ...], chinese: bool = False) -> str:
    """A reference: ("colour",) gives "the red shape", ("shape", "place") "the star at the top left"."""
    place, colour, shape = (getattr(thing, part) if part in parts else "" for part in ("place", "colour", "shape"))
    if chinese:
        return "".join(CHINESE[word] + "的" for word in (place, colour) if word) + CHINESE.get(shape, "图形")
    words = ["the", colour, shape or "shape", place and f"at the {place}"]
    return " ".join(word for word in words if word)


def indefinite(thing: Thing, chinese: bool = False) -> str:
    """What is new to the scene: "an orange heart"."""
    if chinese:
        return CHINESE[thing.colour] + CHINESE[thing.shape]
    article = "an" if thing.colour == "orange" else "a"
    return f"{article} {thing.colour} {thing.shape}"


def fitting(scene: Scene, thing: Thing, parts: tuple[str, ...]) -> list[Thing]:
    """The things in the scene that a reference to `thing` by these parts could mean."""
    return [t for t in scene.things if all(getattr(t, part) == getattr(thing, part) for part in parts)]


def refer(rng: np.random.Generator, scene: Scene, thing: Thing, world: World, chinese: bool) -> str | None:
    """A reference that fits only this thing, or None where the world's references cannot tell it apart."""
    clear = [parts for parts in world.references if len(fitting(scene, thing, parts)) == 1]
    return definite(thing, random_item(rng, clear), chinese) if clear else None


def phrase(rng: np.random.Generator, kind: str, world: World, chinese: bool, **words: str) -> str:
    """One of a kind's phrases with its words filled in."""
    if chinese:
        words = {key: CHINESE.get(word, word) for key, word in words.items()}
        return random_item(rng, CHINESE_PHRASES[kind]).format(**words)
    phrases = UNSEEN_PHRASES[kind] if world.unseen else PHRASES[kind][: world.phrasings]
    return random_item(rng, phrases).format(**words)


def describe(scene: Scene, rng: np.random.Generator, world: World = WORLD) -> str:
    """A prompt for a whole scene: "a red circle at the top left and ... on a white background"."""
    chinese = bool(rng.random() < world.chinese)
    if chinese:
        things = "和".join(f"{CHINESE[t.place]}的{indefinite(t, chinese)}" for t in scene.things)
    else:
        things = " and ".join(f"{indefinite(t)} at the {t.place}" for t in scene.things)
    return phrase(rng, "draw", world, chinese, things=things or "nothing", colour=scene.background)


def vocabulary() -> list[str]:
    """Every English word and Chinese piece that an instruction or prompt can hold: what a tokenizer needs."""
    phrases = []
    for kind in (*KINDS, "draw"):
        phrases += [*PHRASES[kind], *CHINESE_PHRASES[kind]]
    text = " ".join([*phrases, *SHAPES, *PLACES, *COLOURS, *BACKGROUNDS, *CHINESE.values()])
    for mark in "{}，,":
        text = text.replace(mark, f" {mark} ")
    words = text.split() + "a an and nothing shape 图形 的 和".split()
    return sorted({word for word in words if word not in "{}，,"})

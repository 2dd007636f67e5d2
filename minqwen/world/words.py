"""What is said of the small world: references, instructions and descriptions, in English and Chinese.

    Scene, Thing -> "the cat"          kind, words -> instruction          Slots, background -> description

Every instruction has several phrasings; some that training never sees are kept apart, to test with.
Tests: tests/test_world.py.
"""

import re
from typing import NamedTuple

import numpy as np

from minqwen.world.scenes import BACKGROUNDS, FAMILIES, PLACES, THINGS, Scene, Thing, World, pick

# {it} and {other} stand for references ("the cat at the top left"), {a} for a new thing ("a small fox").
PHRASES = {
    "replace": ("replace {it} with {a}", "turn {it} into {a}", "change {it} into {a}", "put {a} in place of {it}",
                "{it} should become {a}", "I would like {a} instead of {it}"),
    "remove": ("remove {it}", "delete {it}", "take away {it}", "erase {it}", "{it} should be gone",
               "I would like {it} to be gone"),
    "add": ("add {a} at the {place}", "put {a} in the {place}", "draw {a} at the {place}", "place {a} in the {place}",
            "there should be {a} at the {place}", "I would like {a} at the {place}"),
    "move": ("move {it} to the {place}", "put {it} in the {place}", "shift {it} to the {place}",
             "bring {it} to the {place}", "{it} should be at the {place}", "I would like {it} to be at the {place}"),
    "swap": ("swap {it} and {other}", "exchange {it} and {other}", "switch {it} with {other}",
             "let {it} and {other} trade places", "{it} and {other} should swap places",
             "I would like {it} and {other} to swap places"),
    "background": ("make the background {colour}", "change the background to {colour}",
                   "paint the background {colour}", "use a {colour} background",
                   "the background should be {colour}", "I would like the background to be {colour}"),
    "draw": ("{things}", "draw {things}", "a picture of {things}", "paint {things}", "there should be {things}",
             "I would like {things}"),
    "mirror": ("mirror the picture", "mirror the picture from left to right", "flip the picture from left to right",
               "flip the picture", "the picture should be mirrored", "I would like the picture to be mirrored"),
    "combine": ("put {it} of Picture 2 on Picture 1", "add {it} of Picture 2 to Picture 1",
                "copy {it} from Picture 2 to Picture 1", "on Picture 1, put {it} of Picture 2",
                "Picture 1 should have {it} of Picture 2", "I would like {it} of Picture 2 to be on Picture 1"),
}  # fmt: skip
CHINESE_PHRASES = {
    "replace": ("把{it}换成{a}", "将{it}变成{a}"),
    "remove": ("去掉{it}", "删除{it}"),
    "add": ("在{place}加{a}", "在{place}画{a}"),
    "move": ("把{it}移到{place}", "将{it}放到{place}"),
    "swap": ("交换{it}和{other}", "把{it}和{other}对调"),
    "background": ("把背景变成{colour}", "将背景改为{colour}"),
    "draw": ("{things}", "画{things}"),
    "mirror": ("左右翻转图片", "把图片左右镜像"),
    "combine": ("把图2里的{it}放到图1上", "在图1上加上图2的{it}"),
}
# No training sees these: what an instruction does that nobody has thought of.
UNSEEN_PHRASES = {
    "replace": ("I want {a} instead of {it}", "could you change {it} into {a}?"),
    "remove": ("I want {it} to be gone", "please take {it} away"),
    "add": ("I want {a} at the {place}", "could you draw {a} in the {place}?"),
    "move": ("I want {it} to be at the {place}", "please move {it} so that it is at the {place}"),
    "swap": ("I want {it} and {other} to swap places", "could you let {it} switch places with {other}?"),
    "background": ("I want the background to be {colour}", "please paint all of the background in {colour}"),
    "draw": ("I want {things}", "please paint {things}"),
    "combine": ("I want {it} of Picture 2 on Picture 1", "could you draw {it} of Picture 2 on Picture 1 too?"),
}
CHINESE = {
    "top left": "左上角", "top right": "右上角", "bottom left": "左下角", "bottom right": "右下角",
    "green": "绿色", "blue": "蓝色", "white": "白色",
    "pink": "粉色", "gray": "灰色", "black": "黑色", "animal": "动物", "fruit": "水果", "vehicle": "交通工具",
    "plant": "植物", "snack": "点心", "thing": "东西", "small": "小",
} | {word: kind.chinese for word, kind in THINGS.items()}  # fmt: skip
# What a reference may name. The place is always enough; the others only while nothing else in the scene fits.
REFERENCES = (("name",), ("family",), ("place",), ("name", "place"), ("family", "place"))
COUNTS = {1: ("", "一个"), 2: ("two", "两个"), 3: ("three", "三个")}


class Slot(NamedTuple):
    """What a description asks of one thing; None: anything."""

    name: str | None = None
    family: str | None = None
    size: str | None = None
    place: str | None = None

    def fits(self, thing: Thing) -> bool:
        """Whether a thing is as asked."""
        return all(wanted in (None, getattr(thing, part)) for part, wanted in zip(self._fields, self, strict=True))

    def noun(self, chinese: bool) -> str:
        """ "small cake", without an article or a place."""
        words = ["small"] * (self.size == "small") + [self.name or self.family or "thing"]
        return "".join(CHINESE[word] for word in words) if chinese else " ".join(words)


def slot(thing: Thing, parts: tuple[str, ...]) -> Slot:
    """What these parts say of a thing."""
    return Slot(**{part: getattr(thing, part) for part in parts})


def reference(thing: Thing, parts: tuple[str, ...], chinese: bool = False) -> str:
    """("name",) gives "the cat", ("place",) "the thing at the top left"."""
    noun, place = slot(thing, parts).noun(chinese), thing.place if "place" in parts else None
    if chinese:
        return f"{CHINESE[place]}的{noun}" if place else noun
    return f"the {noun} at the {place}" if place else f"the {noun}"


def clear_references(scene: Scene, thing: Thing) -> list[tuple[str, ...]]:
    """The parts that tell a thing from all others in its scene."""
    known = [parts for parts in REFERENCES if all(getattr(thing, part) for part in parts)]
    return [parts for parts in known if sum(map(slot(thing, parts).fits, scene.things)) == 1]


def article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def indefinite(wanted: Slot, chinese: bool = False, count: int = 1) -> str:
    """A new thing: "a small fox", "an apple at the top left"; or several of a family: "two animals"."""
    noun = wanted.noun(chinese)
    if chinese:
        return (CHINESE[wanted.place] + "有" if wanted.place else "") + COUNTS[count][1] + noun
    text = article(noun) if count == 1 else f"{COUNTS[count][0]} {noun}s"
    return f"{text} at the {wanted.place}" if wanted.place else text


def phrase(rng: np.random.Generator, kind: str, world: World, chinese: bool, **words: str) -> str:
    """An instruction or a description of this kind, in one of its phrasings."""
    if chinese:
        words = {key: CHINESE.get(word, word) for key, word in words.items()}
        return pick(rng, CHINESE_PHRASES[kind]).format(**words)
    phrases = UNSEEN_PHRASES[kind] if world.unseen else PHRASES[kind]
    return pick(rng, phrases).format(**words)


def listed(parts: list[str], background: str | None, chinese: bool) -> str:
    """What is to be drawn: "a cat and an apple on a blue background"."""
    if chinese:
        return (f"{CHINESE[background]}背景，" if background else "") + "和".join(parts)
    return " and ".join(parts) + (f" on a {background} background" if background else "")


def vocabulary() -> list[str]:
    """Every English word and Chinese piece that an instruction or prompt can hold: what a tokenizer needs."""
    phrases = [each for by_kind in (PHRASES, CHINESE_PHRASES) for kind, each in by_kind.items() if kind != "mirror"]
    spoken = re.sub(r"\{\w+\}|[，,]", " ", " ".join(sum(phrases, ())))
    nouns = [*THINGS, *FAMILIES, *(f"{family}s" for family in FAMILIES), *BACKGROUNDS, *PLACES]
    joints = "a an and the thing something small two three on 的 有 和 背景 一个 两个 三个"
    return sorted(set(" ".join([spoken, *nouns, *CHINESE.values(), joints]).split()))

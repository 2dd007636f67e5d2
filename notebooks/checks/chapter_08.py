"""Checks of the exercises of chapter 08, with the broken cache that they need."""

import os
import random
import re
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch
from numpy.random import default_rng

from checks import Wrong, ask, exercise, expect, expect_finding, expect_five
from course import TINY
from minqwen.images import pack_latents
from minqwen.pipeline import QwenImagePipeline
from minqwen.world import sample_edit


@cache
def pipeline() -> QwenImagePipeline:
    return QwenImagePipeline.from_pretrained(TINY, device="cpu", dtype=torch.float32)


# ---------------------------------------------------------------------------------------------------- 08.1


@exercise("08.1")
def sizes(answer):
    """Five numbers of a 1920×1080 photo at the released working size."""
    wrong = [
        {"both sides are rounded to multiples of 32": 1365, "multiples of 32, not of 16": 1360,
         "the working size has 1024² pixels, the photo has more": 1920},
        {"the two sides are rounded separately, to the nearest multiple of 32": 774, "that is the photo's own": 1080},
        {"that counts numbers; in bf16 each has two bytes": 264192, "that is float32": 1056768,
         "16 channels, not 3, and an eighth of each side": 99072},
        {"four patches of 14×14 become one token": 5292, "those are the transformer's tokens, of 16×16 pixels": 4128,
         "round each side to a multiple of 28 first": 1348},
        {"the space is a token too": 1330, "two tokens frame the picture": 1329, "five tokens close the template": 1326,
         "the 64 tokens in front of the picture are dropped": 1395},
    ]  # fmt: skip
    names = ["working width", "working height", "bytes of the latents"]
    names += ["tokens of the picture", "tokens of the empty prompt"]
    expect_five(answer, (1376, 768, 528384, 1323, 1331), wrong, names)


# ---------------------------------------------------------------------------------------------------- 08.2

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def paired(images: list[str], control: list[str]) -> tuple[dict, list]:
    """The answer to 08.2, in another way than the solution's."""
    cut = lambda name: name.rpartition(".")[::2]  # noqa: E731

    def group(names, endings):
        found = {}
        for name in names:
            stem, ending = cut(name)
            if not name.startswith(".") and "." + ending.lower() in endings:
                found.setdefault(stem, []).append(name)
        return found

    targets, captions, controls = group(images, PICTURES), group(images, (".txt",)), group(control, PICTURES)
    problems = {("twice", stem) for found in (targets, controls) for stem in found if len(found[stem]) > 1}
    problems |= {("no caption", stem) for stem in targets.keys() - captions.keys()}
    problems |= {("no control", stem) for stem in targets.keys() - controls.keys()}
    problems |= {("no target", stem) for stem in controls.keys() - targets.keys()}
    bad = {stem for _, stem in problems}
    samples = {s: (targets[s][0], captions[s][0], controls[s][0]) for s in targets if s not in bad}
    return samples, sorted(problems)


@exercise("08.2")
def pair(answer):
    """pair(images, control): which files belong together, and what is wrong."""
    a, b, c = random.sample(["cat", "tree", "x1", "雪", "two words"], 3)
    cases = [
        ([f"{a}.png", f"{a}.txt"], [f"{a}.png"], "the plainest folder, one sample"),
        ([f"{a}.1.png", f"{a}.1.txt", f"{a}.2.png", f"{a}.2.txt"], [f"{a}.1.png", f"{a}.2.png"],
         "names with dots: only what follows the last dot is the ending"),
        ([f"{a}.PNG", f"{a}.TXT"], [f"{a}.Jpg"], "endings in any case: .PNG and .TXT count"),
        ([f"{a}.webp", f"{a}.txt", f"{b}.jpeg", f"{b}.txt"], [f"{a}.jpeg", f"{b}.webp"], ".jpeg and .webp count too"),
        ([f"{a}.png", f"{a}.txt", f"{b}.png.txt", f"{c}.jpg.bak"], [f"{a}.jpg"],
         "an ending stands at the end: cat.png.txt is no picture"),
        ([f"{a}.png", f"{a}.txt", f"._{a}.png", f"._{a}.txt"], [f"{a}.png", f"._{a}.png"],
         "hidden files, whose names start with a dot, do not count"),
        ([f"{a}.png", f"{a}.jpg", f"{a}.txt", f"{b}.png", f"{b}.txt"], [f"{a}.png", f"{b}.png"],
         "two targets of one name: which is meant? That is a problem, 'twice', and no sample"),
        ([f"{a}.png", f"{a}.txt"], [f"{a}.png", f"{a}.webp"], "two controls of one name are a problem, 'twice', too"),
        ([f"{a}.png", f"{b}.png", f"{b}.txt"], [f"{a}.png", f"{b}.png"], "a target without a caption: 'no caption'"),
        ([f"{a}.png", f"{a}.txt", f"{b}.png", f"{b}.txt"], [f"{a}.png"], "a target without a control: 'no control'"),
        ([f"{a}.png", f"{a}.txt"], [f"{a}.png", f"{b}.png"], "a control for no target: 'no target'"),
        ([f"{a}.png", f"{a}.txt", f"{b}.txt", "notes.md"], [f"{a}.png"], "captions alone are no problem"),
    ]  # fmt: skip
    endings = [".png", ".JPG", ".jpeg", ".webp", ".txt", ".TXT", ".md", ".gif"]
    some = lambda: random.sample([f"{s}{e}" for s in (a, b, c, f"{a}.v2", f".{b}") for e in endings], 12)  # noqa: E731
    cases += [(some(), some(), f"a random folder, the {n}th") for n in range(20)]
    for images, control, what in cases:
        got, want = ask(answer, list(images), list(control), library="precompute.py"), paired(images, control)
        if not isinstance(got, tuple | list) or len(got) != 2 or not isinstance(got[0], dict):
            raise Wrong("expected two results: a dictionary of samples and a list of problems")
        problems = [tuple(problem) for problem in got[1]]
        if what.startswith("a random"):  # which of several captions is taken stays open
            same = set(got[0]) == set(want[0]) and sorted(set(problems)) == want[1]
        else:
            same = {k: tuple(v) for k, v in got[0].items()} == want[0] and problems == want[1]
        if not same:
            raise Wrong(f"{what}\n  images {images}\n  control {control}\n  yours {got}\n  expected {want}")


# ---------------------------------------------------------------------------------------------------- 08.3


@exercise("08.3")
def key(answer):
    """key(target, control, caption, recipe): a name for the cached file."""
    target, control = random.randbytes(random.randint(40, 80)), random.randbytes(50)
    recipe = {"area": "4096", "model": f"{random.getrandbits(64):x}", "dtype": "float32"}
    hashed = []

    def watch(frame, event, function):
        if event == "c_call" and function is hash:
            hashed.append(1)

    def of(*change):
        given = [target, control, "a cat", dict(recipe)]
        for place, value in change:
            given[place] = value
        return ask(answer, *given, library="precompute.py")

    plain, before = of(), sys.getprofile()
    sys.setprofile(watch)
    try:
        answer(target, control, "a cat", dict(recipe))
    finally:
        sys.setprofile(before)
    if not isinstance(plain, str) or not re.fullmatch(r"[\w-]{16,100}", plain):
        raise Wrong(f"expected 16 to 100 letters and digits, fit for a file's name, got {plain!r}")
    if hashed:
        raise Wrong("hash() gives another number in every process: the next run would find nothing. Take hashlib")
    if of() != plain:
        raise Wrong("the same question twice gave two names")
    if of((3, dict(reversed(recipe.items())))) != plain:
        raise Wrong("the order in which the recipe was written down changes the name: sort it")
    flipped, middle = (target[:k] + bytes([target[k] ^ 1]) + target[k + 1 :] for k in (len(target) - 1, 30))
    cases = [
        ("the last byte of the target changed, and the name did not", (0, flipped)),
        ("a byte in the middle of the target changed, and the name did not", (0, middle)),
        ("the control changed, and the name did not", (1, random.randbytes(50))),
        ("drawing (control None) has the name of an edit", (1, None)),
        ("the caption changed, and the name did not", (2, "a cat sits")),
        ("the caption's case changed, and the name did not: the tokens differ", (2, "A cat")),
        ("a value of the recipe changed, and the name did not", (3, recipe | {"area": "9216"})),
        ("two values of the recipe changed places unnoticed", (3, recipe | {"area": "float32", "dtype": "4096"})),
        ("the recipe has one entry more, and the name is the same", (3, recipe | {"template": "edit"})),
    ]  # fmt: skip
    for words, change in cases:
        if of(change) == plain:
            raise Wrong(words)
    if of((0, target + control[:9]), (1, control[9:])) == plain:
        raise Wrong("bytes may move from one picture to the other unnoticed: mark where each part ends")
    if of((0, control), (1, target)) == plain:
        raise Wrong("target and control may change places unnoticed")
    if of((1, None)) == of((1, b"")):
        raise Wrong("no control and an empty control have the same name")


# ---------------------------------------------------------------------------------------------------- 08.4


def _watched(answer, path: Path, data: bytes, old: bytes | None) -> None:
    """Run it, and look at the folder whenever Python enters or leaves a function written in C."""
    seen, folder = {"synced": None, "renamed": False}, path.parent

    def look(_, event, function):
        if event not in ("c_call", "c_return"):
            return
        now = path.read_bytes() if path.exists() else None
        if now not in (old, data) and "half" not in seen:
            seen["half"] = now
        if event == "c_call" and function is os.fsync and seen["synced"] is None:
            seen["synced"] = max((p.stat().st_size for p in folder.iterdir() if p != path), default=None) or 0
            seen["beside"] = any(p != path for p in folder.iterdir())
        if event == "c_call" and function in (os.replace, os.rename):
            seen["too early"] = seen["synced"] is None

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        ask(answer, path, data)
    finally:
        sys.setprofile(before)
    now = path.read_bytes() if path.exists() else None
    if now != data:
        raise Wrong(f"afterwards {path.name} does not hold the {len(data)} bytes")
    if "half" in seen and seen["half"] is None:
        raise Wrong("for a moment there was no file of that name, though there was one before: rename over the old one")
    if "half" in seen:
        raise Wrong(
            f"at some moment {path.name} held {len(seen['half'])} of {len(data)} bytes: a kill then leaves half a file "
            "under the final name. Write under another name first"
        )
    if seen["synced"] is None:
        raise Wrong("nothing waits until the bytes are on the disk: after a power cut the name may be there alone")
    if seen.get("too early"):
        raise Wrong("the rename comes before fsync: the name may reach the disk before the bytes do")
    if not seen["beside"]:
        raise Wrong("the temporary file must lie in the same folder: only within a file system is a rename one step")
    if seen["synced"] < len(data):
        raise Wrong(f"at fsync the file had {seen['synced']} of {len(data)} bytes, Python's buffer others: flush first")
    if left := [p.name for p in folder.iterdir() if p != path]:
        raise Wrong(f"left behind: {left}")


@exercise("08.4")
def keep(answer):
    """keep(path, data): all or nothing, watched at every step."""
    with tempfile.TemporaryDirectory() as folder:
        path, old = Path(folder) / "sample.safetensors", None
        for size in (3000, 700, 50_000):
            data = random.randbytes(size)
            _watched(answer, path, data, old)
            old = data


# ---------------------------------------------------------------------------------------------------- 08.5


@cache
def samples() -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Four tasks for the tiny checkpoint: target and control latents (packed), embeddings of unequal lengths."""
    pipe, rng, found = pipeline(), default_rng(8), []
    for words in ("remove it", "remove the cat", "swap the cake and the cat at the top left", None):
        edit = sample_edit(rng)
        embeds = pipe.encode_prompt(words or edit.instruction, edit.source)[0].clone()
        found.append((*(pack_latents(pipe.encode_image(p)).clone() for p in (edit.target, edit.source)), embeds))
    return found


def padded(embeds: list[torch.Tensor], left=False, fill=0.0) -> tuple[torch.Tensor, torch.Tensor]:
    longest, width = max(e.shape[1] for e in embeds), embeds[0].shape[2]
    out = torch.full((len(embeds), longest, width), fill)
    mask = torch.zeros(len(embeds), longest, dtype=torch.bool)
    for row, e in enumerate(embeds):
        place = slice(longest - e.shape[1], longest) if left else slice(0, e.shape[1])
        out[row, place], mask[row, place] = e[0], True
    return out, mask


@exercise("08.5")
def batch(answer):
    """batch(embeds): random lengths, then the trained transformer, in a batch and one by one."""
    drawn = [[random.randint(1, 9) for _ in range(random.randint(2, 4))] for _ in range(5)]
    for lengths in ([3, 5], [4], [6, 6], *drawn):
        embeds = [torch.randn(1, n, 8) for n in lengths]
        got = ask(answer, [e.clone() for e in embeds], library="prompt.py")
        if not isinstance(got, tuple | list) or len(got) != 2:
            raise Wrong("expected two results: embeddings and mask")
        want, mask = padded(embeds)
        where = f"lengths {lengths}"
        shortest = [e[:, : min(lengths)] for e in embeds]
        expect(got[0], want, {
            "prompts are padded behind, where the encoder's positions end": padded(embeds, left=True)[0],
            "the longer prompts were cut": torch.cat(shortest),
        }, where=where)  # fmt: skip
        if len(set(lengths)) == 1:
            if got[1] is not None:
                raise Wrong(f"every token is valid: the mask should be None, so that fast attention may run ({where})")
            continue
        if got[1] is None:
            raise Wrong(f"without a mask attention reads the padding ({where})")
        if getattr(got[1], "dtype", None) != torch.bool:
            raise Wrong(f"the mask should be bool, it is {getattr(got[1], 'dtype', type(got[1]).__name__)} ({where})")
        expect(got[1].float(), mask.float(), {"True is for tokens, False for padding": 1 - mask.float()}, where=where)
    data, pipe = samples(), pipeline()
    sides = [(1, int(z.shape[1] ** 0.5), int(z.shape[1] ** 0.5)) for z in data[0][:2]]  # of square pictures, in tokens
    sigma, shapes = torch.tensor([0.6]), [sides]
    with torch.no_grad():
        alone = [pipe.transformer(torch.cat([z, c], 1), e, None, sigma, shapes) for z, c, e in data]
        embeds, mask = ask(answer, [e for *_, e in data], library="prompt.py")
        tokens = torch.cat([torch.cat([z, c], 1) for z, c, _ in data])
        together = pipe.transformer(tokens, embeds, mask, sigma, shapes)
        careless = pipe.transformer(tokens, embeds, None, sigma, shapes)
    expect(together, torch.cat(alone), tolerance=1e-3, where="velocities of the trained transformer")
    apart = [(x - torch.cat(alone)).abs().max() for x in (together, careless)]
    return f"In a batch and alone the trained velocities differ by {apart[0]:.0e}; without the mask by {apart[1]:.1f}."


# ---------------------------------------------------------------------------------------------------- 08.6


@cache
def pictures() -> list:
    """Control pictures 0 to 4, of three sizes, with their captions."""
    rng, sizes = default_rng(3), [(64, 64), (64, 64), (96, 64), (64, 96), (96, 64)]
    edits = [sample_edit(rng) for _ in sizes]
    return [(edit.source.resize(size), edit.instruction) for edit, size in zip(edits, sizes, strict=True)]


def _cached(order: list[int], faulty: bool) -> dict[str, torch.Tensor]:
    pipe, found, empties = pipeline(), {}, {}
    for number in order:
        picture, caption = pictures()[number]
        (picture,), _ = pipe.resize_references([picture], 64 * 96)
        if not faulty or picture.size not in empties:  # spoiler: the fault of exercise 08.6
            empties[picture.size] = pipe.encode_prompt(" ", picture)[0]
        found[f"sample {number} latents > 0"] = pipe.encode_image(picture)
        found[f"sample {number} embeds > 0"] = pipe.encode_prompt(caption, picture)[0]
        found[f"sample {number} empty > 0"] = empties[picture.size]
    return found


def broken(order: list[int]) -> dict[str, torch.Tensor]:
    """What a cache with one fault keeps of these samples, computed in this order."""
    return _cached(order, True)


def right(order: list[int]) -> dict[str, torch.Tensor]:
    """The same without the fault."""
    return _cached(order, False)


CAUSES = {
    "A": "then a single sample would be wrong already",
    "B": "then samples 0 and 2 would not agree",
    "D": "then the order would not matter, and embeds would differ too",
    "E": "the latents agree in every order",
}


@exercise("08.6")
def cause(finding, agree, differ):
    """(part, letter); an order of three samples that agrees; an order of two that does not."""
    for order, count in ((agree, 3), (differ, 2)):
        fits = isinstance(order, list | tuple) and all(type(n) is int and 0 <= n < 5 for n in order)
        if not fits or len(set(order)) != count or len(order) != count:
            raise Wrong(f"expected {count} different numbers from 0 to 4, got {order}")

    def parts(order):
        return zip(broken(list(order)).values(), right(list(order)).values(), strict=True)

    if not all(torch.equal(a, b) for a, b in parts(agree)):
        raise Wrong(f"in the order {list(agree)} a sample is wrong: look at the pictures' sizes")
    if all(torch.equal(a, b) for a, b in parts(differ)):
        raise Wrong(f"in the order {list(differ)} both samples are right")
    expect_finding(
        finding,
        "two: the part that differs and a letter",
        part=("empty", {"latents": "the latents are right", "embeds": "captions are right"}),
        cause=("C", CAUSES),
    )

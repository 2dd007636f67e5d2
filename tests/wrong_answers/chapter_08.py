"""Plausible wrong answers to the exercises of chapter 08, and the words of the diagnosis that each must get."""

import hashlib
import json
import os
import shutil
import tempfile

import torch

from checks import Answers

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def pairing(stem=lambda n: n.rpartition(".")[0], ending=lambda n: "." + n.rpartition(".")[2].lower(),
            pictures=PICTURES, hidden=True, twice=True, missing=("no caption", "no control", "no target")):  # fmt: skip
    def answer(images, control):
        problems = set()

        def group(names, endings):
            found = {}
            for name in names:
                if ending(name) not in endings or (hidden and name.startswith(".")):
                    continue
                if stem(name) in found and endings == pictures and twice:
                    problems.add(("twice", stem(name)))
                found.setdefault(stem(name), name)
            return found

        targets, captions, controls = group(images, pictures), group(images, (".txt",)), group(control, pictures)
        problems |= {("no caption", s) for s in targets if s not in captions and "no caption" in missing}
        problems |= {("no control", s) for s in targets if s not in controls and "no control" in missing}
        problems |= {("no target", s) for s in controls if s not in targets and "no target" in missing}
        bad = {s for _, s in problems}
        samples = {
            s: (targets[s], captions[s], controls[s])
            for s in targets
            if s not in bad and s in captions and s in controls
        }
        return samples, sorted(problems)

    return answer


def library_pair(images, control):
    from minqwen.precompute import find_sources

    return find_sources("images", "control")


def digest(*parts) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def by_hash(target, control, caption, recipe):
    return f"{hash((target, control, caption, str(sorted(recipe.items())))) % 2**64:020x}"


def run_together(target, control, caption, recipe):
    text = json.dumps([caption, recipe], sort_keys=True).encode()
    mark = b"drawing" if control is None else b"editing"
    return hashlib.sha256(target + (control or b"") + mark + text).hexdigest()


def unordered(target, control, caption, recipe):
    return digest(*sorted([target, control or b""]), control is None, caption, sorted(recipe.items()))


def library_key(target, control, caption, recipe):
    from minqwen.precompute import cache_key

    return cache_key(recipe | {"pictures": f"{target} {control}", "caption": caption})


def writing(beside=True, flush=True, sync=True, early=False, folder=None, remove=False, copy=False):
    def answer(path, data):
        place = (tempfile.mkdtemp() if folder else path.parent) / path.name if folder is None else None
        place = path.with_suffix(".tmp") if not folder else type(path)(tempfile.mkdtemp()) / path.name
        if not beside:
            place = path
        with open(place, "wb") as file:
            file.write(data)
            if flush:
                file.flush()
            if sync and not early:
                os.fsync(file.fileno())
        if remove and path.exists():
            path.unlink()
        if copy:
            shutil.copyfile(place, path)
        elif folder:
            shutil.move(place, path)
        elif beside:
            os.replace(place, path)
        if early:
            with open(path, "rb") as file:
                os.fsync(file.fileno())

    return answer


def leaves(path, data):
    writing()(path, data)
    path.with_suffix(".done").touch()


def library_batch(embeds):
    from minqwen.prompt import pad_prompts

    return pad_prompts([(e, None) for e in embeds])


def batched(left=False, mask=lambda m: m, cut=False, always=False, never=False):
    def answer(embeds):
        longest = (min if cut else max)(e.shape[1] for e in embeds)
        out, valid = torch.zeros(len(embeds), longest, embeds[0].shape[2]), torch.zeros(len(embeds), longest).bool()
        for row, e in enumerate(embeds):
            n = min(e.shape[1], longest)
            place = slice(longest - n, longest) if left else slice(0, n)
            out[row, place], valid[row, place] = e[0, :n], True
        if never or (bool(valid.all()) and not always):
            return out, None
        return out, mask(valid)

    return answer


RIGHT = (1376, 768, 528384, 1323, 1331)


def instead(place, value):
    return (*RIGHT[:place], value, *RIGHT[place + 1 :])


WRONG = {
    "sizes": [
        ("rounded to multiples of 32", instead(0, 1365)),
        ("the photo has more", instead(0, 1920)),
        ("rounded separately", instead(1, 774)),
        ("each has two bytes", instead(2, 264192)),
        ("that is float32", instead(2, 1056768)),
        ("four patches of 14×14", instead(3, 5292)),
        ("those are the transformer's tokens", instead(3, 4128)),
        ("the space is a token too", instead(4, 1330)),
        ("are dropped", instead(4, 1395)),
        ("expected five numbers", RIGHT[:4]),
    ],
    "pair": [
        ("names with dots", pairing(stem=lambda n: n.split(".")[0])),
        ("endings in any case", pairing(ending=lambda n: "." + n.rpartition(".")[2])),
        (".jpeg and .webp count too", pairing(pictures=(".png", ".jpg"))),
        ("an ending stands at the end",
         pairing(ending=lambda n: next((e for e in (*PICTURES, ".txt") if e in n.lower()), ""))),
        ("hidden files", pairing(hidden=False)),
        ("two targets of one name", pairing(twice=False)),
        ("'no caption'", pairing(missing=("no control", "no target"))),
        ("'no target'", pairing(missing=("no caption", "no control"))),
        ("your code raised FileNotFoundError", lambda images, control: open("no such file")),
        ("write it yourself", library_pair),
    ],
    "key": [
        ("Take hashlib", by_hash),
        ("bytes may move from one picture to the other", run_together),
        ("the control changed", lambda t, c, w, r: digest(t, w, sorted(r.items()))),
        ("may change places unnoticed", unordered),
        ("the caption's case changed", lambda t, c, w, r: digest(t, c, w.lower(), sorted(r.items()))),
        ("written down changes the name", lambda t, c, w, r: digest(t, c, w, r)),
        ("two values of the recipe", lambda t, c, w, r: digest(t, c, w, sorted(r), sorted(r.values()))),
        ("have the same name", lambda t, c, w, r: digest(t, c or b"", w, sorted(r.items()))),
        ("fit for a file's name", lambda t, c, w, r: json.dumps([w, sorted(r.items())])),
        ("in the middle of the target", lambda t, c, w, r: digest(t[:8], t[-8:], c, w, sorted(r.items()))),
        ("write it yourself", library_key),
    ],
    "keep": [
        ("under the final name", lambda path, data: path.write_bytes(data)),
        ("under the final name", writing(beside=False)),
        ("under the final name", writing(copy=True)),
        ("nothing waits", writing(sync=False)),
        ("before fsync", writing(early=True)),
        ("flush first", writing(flush=False)),
        ("in the same folder", writing(folder=True)),
        ("for a moment there was no file", writing(remove=True)),
        ("left behind", leaves),
    ],
    "batch": [
        ("without a mask attention reads", batched(never=True)),
        ("padded behind", batched(left=True)),
        ("True is for tokens", batched(mask=lambda m: ~m)),
        ("the mask should be bool", batched(mask=lambda m: m.float())),
        ("were cut", batched(cut=True)),
        ("the mask should be None", batched(always=True)),
        ("expected two results", lambda embeds: batched()(embeds)[0]),
        ("write it yourself", library_batch),
    ],
    "cause": [
        ("a sample is wrong", Answers((("empty", "C"), [0, 1, 2], [0, 1]))),
        ("both samples are right", Answers((("empty", "C"), [0, 2, 3], [0, 2]))),
        ("the latents are right", Answers((("latents", "E"), [0, 2, 3], [0, 1]))),
        ("a single sample would be wrong", Answers((("empty", "A"), [0, 2, 3], [0, 1]))),
        ("samples 0 and 2 would not agree", Answers((("empty", "B"), [0, 2, 3], [2, 4]))),
        ("expected 3 different numbers", Answers((("empty", "C"), [0, 2], [0, 1]))),
    ],
}

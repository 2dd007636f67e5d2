"""Damaged and unusual input, made by chance: make fuzz, or python tests/fuzz.py --help

Each kind of input is a function of a random number generator. It makes a file or an option, hands it to the library,
and says how that ended:

    right      taken, and the result is what it should be
    refused    an error of a documented kind, whose message names the file or the option
    lost       anything else: another error, a message without a name, a crash, half a minute without an end
    silent     taken, though it should not have been, or with a wrong result

The table of all kinds goes into tests/README.md. A case is repeated with --kind NAME --first N --count 1.
"""

import argparse
import contextlib
import copy
import io
import json
import random
import shutil
import signal
import struct
import sys
import tempfile
import unicodedata
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load, save
from tables import put
from tqdm import tqdm

from minqwen import edit, finetune, precompute, shrink
from minqwen.checkpoint import Checkpoint
from minqwen.images import load_image
from minqwen.lora import add_lora, load_lora, lora_state, merge_lora
from minqwen.pipeline import PARTS, QwenImagePipeline
from minqwen.precompute import find_sources
from minqwen.sampling import get_sigmas
from minqwen.tokenizer import load_tokenizer
from minqwen.transformer import QwenImageTransformer2DModel

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "data" / "tiny"
DOCUMENTED = (ValueError, TypeError, OSError, KeyError)
ENDS = ("right", "refused", "lost", "silent")
LIMIT = 30  # seconds, on a machine that does other things too
ROOM = 2**25  # bytes that a case may ask for beyond twice its files
PICTURE = 2**31  # the same of a picture, which unpacks: the largest that is taken needs half of it
ODD = (None, True, -1, 0, 1, 2.5, 10**9, 10**30, -(10**9), float("nan"), float("inf"), "", "x", "8", "../../x", [], {},
       [None], ["x"], [1, 2, 3], {"a": 1})  # fmt: skip
SMALL = {"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 24,
         "axes_dims_rope": (4, 6, 6)}  # fmt: skip


class Case(NamedTuple):
    """work() hands the input to the library; names: one of them stands in the message of an error; check(result) says
    what is wrong with it, None if nothing is; valid: refusing it would be a fault."""

    work: Callable[[], object]
    names: tuple[str, ...]
    check: Callable[[object], str | None] = lambda result: None
    valid: bool = False


class TooLong(BaseException):
    """After half a minute."""


def outcome(case: Case, most: int) -> tuple[str, str]:
    """How a case ends that may ask for so many bytes of memory: in one word, and why."""
    try:
        with time_limit(), memory_limit(most), warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            result = case.work()
            wrong = case.check(result)
        return ("silent", wrong) if wrong else ("right", "")
    except DOCUMENTED as error:
        message = str(error)
        if case.valid:
            return "lost", f"refused, though it is valid: {message}"
        if not any(name in message for name in case.names):
            return "lost", f"names none of {case.names}: {type(error).__name__}: {message}"
        return "refused", message
    except BaseException as error:
        return "lost", f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    if not hasattr(signal, "SIGALRM"):  # Windows
        yield
        return

    def stop(*_):
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def memory_limit(most: int) -> Iterator[None]:
    """Whoever believes a length in a file asks for more than so many bytes, and gets a MemoryError."""
    if not sys.platform.startswith("linux"):
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    held = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (held + most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def damaged(chance: random.Random, data: bytes) -> bytes:
    """Cut, filled with zeros, flipped, doubled, or another file altogether."""
    place = chance.randrange(len(data) + 1)
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    other = (b"", bytes(len(data)), pointer, b"<html>", b"[]")
    ways = [
        lambda: data[:place],
        lambda: data[:place] + bytes(chance.randrange(1, 9)) + data[place + 4 :],
        lambda: data[:place] + bytes([chance.randrange(256)]) + data[place + 1 :],
        lambda: data[:place] + data[max(0, place - 9) :],
        lambda: data + data[:place],
        lambda: chance.choice(other),
    ]
    return chance.choice(ways)()


# ------------------------------------------------------------------------------------------------------ weights


@cache
def small_transformer() -> tuple[QwenImageTransformer2DModel, bytes]:
    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(**SMALL).eval()
    return model, save(model.state_dict())


def write_transformer(folder: Path, data: bytes) -> Path:
    place = folder / "transformer"
    place.mkdir()
    (place / "config.json").write_text(json.dumps(SMALL), encoding="utf-8")
    (place / "model.safetensors").write_bytes(data)
    return folder


def same_shapes(module: QwenImageTransformer2DModel) -> str | None:
    want = small_transformer()[0].state_dict()
    got = module.state_dict()
    fits = want.keys() == got.keys() and all(want[name].shape == got[name].shape for name in want)
    return None if fits else "names or shapes are others"


def load_small(folder: Path) -> Case:
    def work():
        return Checkpoint(folder).load(QwenImageTransformer2DModel, "transformer")

    return Case(work, ("model.safetensors", f"{folder}/transformer"), same_shapes)


def weights(chance: random.Random, folder: Path) -> Case:
    """Bytes of a safetensors file: cut at its boundaries and elsewhere, flipped, doubled."""
    _, data = small_transformer()
    start = 8 + int.from_bytes(data[:8], "little")
    ends = [0, 7, 8, start - 1, start, len(data) - 1]
    ends += [start + entry["data_offsets"][1] for entry in json.loads(data[8:start]).values()]
    bad = data[: chance.choice(ends)] if chance.random() < 0.4 else damaged(chance, data)
    return load_small(write_transformer(folder, bad))


def headers(chance: random.Random, folder: Path) -> Case:
    """A table that lies: dtypes, shapes, offsets that overlap or lie outside, names twice or gone."""
    _, data = small_transformer()
    start = 8 + int.from_bytes(data[:8], "little")
    table = json.loads(data[8:start])
    name, other = chance.sample(sorted(table), 2)
    entry = table[name]
    lies = [
        lambda: entry.update(dtype=chance.choice(["F64", "BF16", "I8", "X", None, 3])),
        lambda: entry.update(shape=chance.choice([[], [0], [2**62], [-1], "x", None, entry["shape"][::-1], [1, 1]])),
        lambda: entry.update(data_offsets=chance.choice([[0, 0], [2**62, 2**63], [-4, 4], [8, 4], "x", None, [0]])),
        lambda: entry.update(data_offsets=table[other]["data_offsets"]),
        lambda: table.pop(name),
        lambda: table.update({f"{name}.more": dict(entry)}),
        lambda: table.update({chance.choice(["", "x", "../x", "猫" * 99]): table.pop(name)}),
        lambda: table.update(__metadata__=chance.choice([3, {"a": 1}, None, {"format": "pt"}])),
        lambda: entry.pop(chance.choice(sorted(entry))),
    ]
    chance.choice(lies)()
    header = json.dumps(table).encode()
    length = chance.choice([len(header)] * 6 + [0, 2**40, len(header) - 3])
    return load_small(write_transformer(folder, length.to_bytes(8, "little") + header + data[start:]))


# ------------------------------------------------------------------------------------------------- configs, tokenizers


def changed_json(chance: random.Random, content: dict) -> dict:
    """One value in it replaced by an odd one, gone, or new."""
    content = copy.deepcopy(content)
    place = content
    while chance.random() < 0.5 and (inside := [v for v in place.values() if isinstance(v, dict) and v]):
        place = chance.choice(inside)
    if not place or chance.random() < 0.1:
        place["another_key"] = chance.choice(ODD)
        return content
    key = chance.choice(sorted(place))
    if chance.random() < 0.1:
        del place[key]
    else:
        place[key] = chance.choice(ODD)
    return content


def json_bytes(chance: random.Random, path: Path) -> bytes:
    """A small file, damaged as text or as an object."""
    data = path.read_bytes()
    if chance.random() < 0.3:
        return damaged(chance, data)
    return json.dumps(changed_json(chance, json.loads(data))).encode()


def linked(folder: Path, but: str) -> Path:
    """data/tiny, every file of it linked but one, which is left for the caller to write."""
    for path in TINY.rglob("*"):
        name = path.relative_to(TINY).as_posix()
        if path.is_file() and name != but:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(path)
    (folder / but).parent.mkdir(exist_ok=True)
    return folder / but


def configs(chance: random.Random, folder: Path) -> Case:
    """The config of a part with weights: wrong types, huge, missing, unknown."""
    part = chance.choice(sorted(PARTS))
    path = linked(folder, f"{part}/config.json")
    path.write_bytes(json_bytes(chance, TINY / part / "config.json"))
    return Case(lambda: Checkpoint(folder).load(PARTS[part], part), ("config.json", f"{folder}/{part}"))


def small_files(chance: random.Random, folder: Path) -> Case:
    """model_index, scheduler and image processor."""
    names = ("model_index.json", "scheduler/scheduler_config.json", "processor/preprocessor_config.json")
    path = linked(folder, chance.choice([name for name in names if (TINY / name).is_file()]))
    path.write_bytes(json_bytes(chance, TINY / path.relative_to(folder)))

    def work() -> torch.Tensor:
        pipe = QwenImagePipeline.from_pretrained(folder, "cpu", torch.float32, tuple(PARTS))
        pipe.resize_references([Image.new("RGB", (64, 96))])
        return get_sigmas(4, 36, **pipe.schedule)

    def check(sigmas: torch.Tensor) -> str | None:
        falling = sigmas.isfinite().all() and (sigmas.diff() < 0).all() and sigmas[0] <= 1
        return None if falling else f"noise levels {sigmas.tolist()}"

    return Case(work, (path.name, "scheduler", "schedule", str(folder)), check)


def indexes(chance: random.Random, folder: Path) -> Case:
    """The index that says which file holds what: wrong types, links and `..`, files and tensors that are not there."""
    _, data = small_transformer()
    tensors = load(data)
    place = write_transformer(folder, data) / "transformer"
    (place / "model.safetensors").unlink()
    names, files = sorted(tensors), ["a.safetensors", "b.safetensors"]
    for number, file in enumerate(files):
        (place / file).write_bytes(save({name: tensors[name] for name in names[number::2]}))
    places = {name: files[number % 2] for number, name in enumerate(names)}
    content = {"metadata": {"total_size": 1}, "weight_map": places}
    victim = chance.choice(names)
    odd = (*ODD, "../a.safetensors", "/etc/passwd", "b.safetensors", "c.safetensors", "a.bin", "A.safetensors")
    kind = chance.randrange(5)
    if kind == 0:
        places[victim] = chance.choice(odd)
    elif kind == 1:
        content = changed_json(chance, content)
    elif kind == 2:
        del places[victim]
    elif kind == 3:
        places[chance.choice(["x", "", victim + ".more"])] = "a.safetensors"
    text = damaged(chance, json.dumps(content).encode()) if kind == 4 else json.dumps(content).encode()
    (place / "model.safetensors.index.json").write_bytes(text)
    case = load_small(folder)
    return case._replace(names=("index.json", *files, str(folder)))


@cache
def tokens_of_tiny() -> list[int]:
    return load_tokenizer(TINY / "tokenizer").encode("a small cat 猫").ids


def tokenizers(chance: random.Random, folder: Path) -> Case:
    """vocab, merges, added tokens, whole tokenizers."""
    names = [path.name for path in sorted((TINY / "tokenizer").iterdir())]
    path = linked(folder, f"tokenizer/{chance.choice(names)}")
    source = TINY / "tokenizer" / path.name
    data = source.read_bytes()
    as_json = path.suffix == ".json" and chance.random() < 0.5
    path.write_bytes(json_bytes(chance, source) if as_json else damaged(chance, data))

    def work() -> list[int]:
        return load_tokenizer(folder / "tokenizer").encode("a small cat 猫").ids

    def check(ids: list[int]) -> str | None:
        return None if ids else "no tokens"

    return Case(work, (path.name, str(folder / "tokenizer")), check)


# ------------------------------------------------------------------------------------------------------ adapters


def layouts(name: str, down: torch.Tensor, up: torch.Tensor, alpha: float, layout: int) -> dict[str, torch.Tensor]:
    """A layer's adapter as some programs write it."""
    told = torch.tensor(alpha)
    return [
        lambda: {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up},
        lambda: {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": told},
        lambda: {f"lora_unet_{name.replace('.', '_')}.lora_down.weight": down,
                 f"lora_unet_{name.replace('.', '_')}.lora_up.weight": up,
                 f"lora_unet_{name.replace('.', '_')}.alpha": told},
        lambda: {f"diffusion_model.{name}.lora_A.weight": down, f"diffusion_model.{name}.lora_B.weight": up},
        lambda: {f"base_model.model.{name}.lora_A.default.weight": down,
                 f"base_model.model.{name}.lora_B.default.weight": up},
    ][layout]()  # fmt: skip


def loras(chance: random.Random, folder: Path) -> Case:
    """Adapters in five layouts; whole, or with one thing wrong: halves, shapes, NaN, scales, layers twice."""
    model, rank, layout = copy.deepcopy(small_transformer()[0]), chance.choice([1, 2, 4, 8]), chance.randrange(5)
    add_lora(model, rank, targets=("to_q", "to_add_out", "net.2"))
    drawn = torch.Generator().manual_seed(chance.randrange(2**31))
    alpha, tensors = chance.choice([1.0, 2.0, rank, 16.0]), {}
    pairs = {}
    for name, tensor in lora_state(model).items():
        layer, part = name.removesuffix(".weight").rsplit(".", 1)
        pairs.setdefault(layer, {})[part] = torch.randn(tensor.shape, generator=drawn)
    for layer, parts in pairs.items():
        tensors |= layouts(layer, parts["lora_A"], parts["lora_B"], alpha, layout)
    expected = {layer: parts["lora_B"] @ parts["lora_A"] for layer, parts in pairs.items()}
    scale = alpha / rank if layout in (1, 2) else 1.0
    victim, harm = chance.choice(sorted(tensors)), chance.randrange(10)
    if harm == 0:
        del tensors[victim]
    elif harm == 1:
        tensors[victim] = tensors[victim] * float(chance.choice(["nan", "inf"]))
    elif harm == 2:
        tensors[victim] = torch.ones(chance.choice([(3,), (2, 2, 2), (0, 4), (5, 7)]))
    elif harm == 3:
        layer = chance.choice(sorted(pairs))
        tensors |= layouts(layer, pairs[layer]["lora_A"], pairs[layer]["lora_B"], alpha, (layout + 1) % 5)
    elif harm == 4:
        layer = chance.choice(sorted(pairs))
        mark = chance.choice(["lokr_w1", "hada_w1_a", "dora_scale", "lora_magnitude_vector"])
        tensors[f"{layer}.{mark}"] = torch.ones(2)
    data = save({name: tensor.clone() for name, tensor in tensors.items()})
    if harm == 5:
        data = damaged(chance, data)
    file = folder / "adapter.safetensors"
    file.write_bytes(data)
    if harm == 6:
        text = chance.choice(['{"r": 4, "lora_alpha": null}', "[]", "", '{"lora_alpha": "8"}', '{"rank_pattern": 3}',
                              '{"alpha_pattern": {"to_q": null}}', '{"use_rslora": 1, "lora_alpha": NaN}'])  # fmt: skip
        (folder / "adapter_config.json").write_text(text, encoding="utf-8")

    def work() -> tuple[QwenImageTransformer2DModel, object]:
        fresh = copy.deepcopy(small_transformer()[0])
        return fresh, load_lora(fresh, file)

    def check(found) -> str | None:
        fresh, report = found
        if harm in (5, 6) or report.unmatched:
            return None
        if 0 < harm < 5:
            return "taken"
        if harm == 0 and not victim.endswith("alpha"):
            return "half an adapter was taken"
        if harm == 0:
            return None
        merge_lora(fresh)
        for layer, update in expected.items():
            change = fresh.get_submodule(layer).weight - small_transformer()[0].get_submodule(layer).weight
            if (change - scale * update).abs().max() > 1e-4:
                return f"{layer} at another scale"
        return None

    return Case(work, ("adapter", *pairs, "LoKr", "LoHa", "DoRA"), check, valid=harm > 6)


# ------------------------------------------------------------------------------------------------------ pictures

FORMATS = {"PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"), "JPEG": ("L", "RGB", "CMYK"), "WEBP": ("RGB", "RGBA"),
           "GIF": ("L", "P"), "BMP": ("1", "L", "P", "RGB"), "TIFF": ("1", "L", "RGB", "RGBA", "CMYK", "I;16"),
           "PPM": ("1", "L", "RGB"), "ICO": ("RGBA",), "TGA": ("RGB",)}  # fmt: skip


def random_picture(chance: random.Random) -> tuple[Image.Image, str]:
    kind = chance.choice(sorted(FORMATS))
    mode = chance.choice(FORMATS[kind])
    size = chance.randint(1, 40), chance.randint(1, 40)
    levels = np.random.default_rng(chance.randrange(2**32)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(levels)
    if mode == "I;16":
        return Image.fromarray(levels[..., 0].astype(np.uint16) * 257), kind
    return image.convert(mode), kind


def exif_block(chance: random.Random) -> bytes:
    """EXIF with entries of any tag, type and count, an orientation among them."""
    tags = (256, 257, 259, 270, 271, 274, 282, 296, 305, 306, 315, 33432, 34665, 34853, 36864, 37510, 40962, 65535, 0)
    entries = [(274, 3, 1, struct.pack("<HH", chance.randint(0, 9), 0))] if chance.random() < 0.5 else []
    for _ in range(chance.randint(1, 4)):
        value = bytes(chance.randrange(256) for _ in range(4))
        entries.append((chance.choice(tags), chance.randint(0, 14), chance.choice([0, 1, 2, 4, 5, 99, 2**31]), value))
    tiff = b"II*\0" + struct.pack("<IH", 8, len(entries))
    return b"Exif\0\0" + tiff + b"".join(struct.pack("<HHI", *e[:3]) + e[3] for e in entries) + bytes(4)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_metadata(chance: random.Random, data: bytes, kind: str) -> bytes:
    """EXIF or chunks that no decoder needs, put behind a JPEG's or a PNG's first bytes."""
    if kind == "JPEG":
        block = exif_block(chance) if chance.random() < 0.7 else bytes(chance.randrange(256) for _ in range(30))
        marker = chance.choice([b"\xff\xe1", b"\xff\xe2", b"\xff\xed", b"\xff\xfe"])
        return data[:2] + marker + struct.pack(">H", len(block) + 2) + block + data[2:]
    if kind == "PNG":
        large = zlib.compress(bytes(chance.choice([10, 2 << 20])))
        chunks = [
            png_chunk(b"zTXt", b"workflow\0\0" + large),
            png_chunk(b"tEXt", bytes(chance.randrange(256) for _ in range(20))),
            png_chunk(b"iTXt", b"prompt\0" + bytes([chance.randrange(3), 0, 0, 0]) + large),
            png_chunk(b"iCCP", b"profile\0\0" + chance.choice([large, b"no zlib"])),
            png_chunk(b"eXIf", exif_block(chance)[6:]),
            png_chunk(b"tIME", bytes(chance.randrange(1, 9))),
            png_chunk(b"pHYs", bytes(chance.randrange(1, 12))),
        ]
        return data[:33] + chance.choice(chunks) + data[33:]
    return data


def pictures(chance: random.Random, folder: Path) -> Case:
    """Every mode in every format; with odd metadata, which may not cost the picture; and damaged."""
    image, kind = random_picture(chance)
    out = io.BytesIO()
    image.save(out, kind, sizes=[image.size])  # of an icon: an old Pillow writes none below 16
    data, harm = out.getvalue(), chance.random()
    if harm < 0.4:
        data = with_metadata(chance, data, kind)
    elif harm < 0.7:
        data = damaged(chance, data)
    file = folder / f"picture.{kind.lower()}"
    file.write_bytes(data)

    def check(got: Image.Image) -> str | None:
        if got.mode != "RGB":
            return f"mode {got.mode}"
        if harm < 0.7 and harm >= 0.4:
            return None
        if sorted(got.size) != sorted(image.size):
            return f"{image.size} became {got.size}"
        return None

    return Case(lambda: load_image(file), (file.name,), check, valid=harm < 0.4 or harm >= 0.7)


# ------------------------------------------------------------------------------------------------------ folders


def captions(chance: random.Random, folder: Path) -> Case:
    """Folders of pictures and captions: names in any form and bytes, encodings, suffixes, links, sub-folders."""
    images = folder / "images"
    images.mkdir()
    stems = ["a", "cat.v1.2", "café", "猫", "🐱", "two words", "x" * 100, "-flag", "%s{0}", "a\nb"]
    paired = []
    for stem in chance.sample(stems, chance.randint(1, 4)):
        form = chance.choice(["NFC", "NFD"])
        suffix = chance.choice([".png", ".PNG", ".png", ".png"])
        Image.new("RGB", (8, 8), "red").save(images / (unicodedata.normalize(form, stem) + suffix), "PNG")
        other = unicodedata.normalize(chance.choice(["NFC", "NFD"]), stem)
        words = chance.choice([b"make it red", "把猫变红".encode(), b"\xef\xbb\xbfwords\r\n"])
        (images / f"{other}.txt").write_bytes(words)
        paired.append(unicodedata.normalize("NFC", stem))
    victim = sorted(images.glob("*.txt"))[0]
    harm, names = chance.randrange(10), ()
    if harm == 0:
        victim.unlink()
        names = (victim.stem,)
    elif harm == 1:
        victim.write_bytes(chance.choice([b"", b" \n\t", bytes(9), b"\xff\xfe\0w", "ünï".encode("latin-1")]))
        names = (victim.name,)
    elif harm == 2:
        (images / "dead.png").symlink_to(images / "nowhere.png")
        names = ("dead.png",)
    elif harm == 3:
        (images / "more").mkdir()
        Image.new("RGB", (8, 8)).save(images / "more/y.png")
    elif harm == 4:
        (images / "broken.png").write_bytes(damaged(chance, b"\x89PNG\r\n\x1a\n" + bytes(30)))
        (images / "broken.txt").write_text("x", encoding="utf-8")
        names = ("broken.png",)
    elif harm == 5:
        Image.new("RGB", (1, 300)).save(images / "long.png")
        (images / "long.txt").write_text("x", encoding="utf-8")
        names = ("long.png",)

    def check(sources: list) -> str | None:
        if harm in (0, 1, 4, 5):
            return "taken"
        found = [unicodedata.normalize("NFC", source.name) for source in sources]
        return None if sorted(found) == sorted(paired) else f"{found} of {paired}"

    def work() -> list:
        with contextlib.redirect_stdout(io.StringIO()):
            return find_sources(images)

    shown = tuple(unicodedata.normalize(form, name) for name in names for form in ("NFC", "NFD"))
    return Case(work, shown or (str(images),), check, valid=harm in (3, 6, 7, 8, 9))


# ------------------------------------------------------------------------------------------------------- options


def options(chance: random.Random, folder: Path) -> Case:
    """One option of a command with any value: taken, or refused with status 2 and its name."""
    name, needed = chance.choice([
        ("edit", ["words"]), ("finetune", ["cache", "--out", str(folder / "out")]),
        ("precompute", [str(folder), "--cache", str(folder / "cache")]), ("shrink", [str(TINY), str(folder / "small")]),
    ])  # fmt: skip
    parser = {"edit": edit, "finetune": finetune, "precompute": precompute, "shrink": shrink}[name].command_line()
    actions = [a for a in parser._actions if a.option_strings and a.nargs != 0 and a.dest != "help"]
    action = chance.choice(actions)
    value = str(chance.choice([*ODD, "1e3", "0x10", "١", " 5 ", "5.", "1_0", "-0", "-inf", "1e400", "\0", "é"]))
    numeric = isinstance(action.default, int | float) or action.dest in ("guidance", "area", "width", "height", "seed")

    def work() -> argparse.Namespace:
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                asked = parser.parse_args([*needed, f"{action.option_strings[-1]}={value}"])
                if name == "finetune":
                    keywords = {each: getattr(asked, each) for each in finetune.Settings.__dataclass_fields__}
                    finetune.Settings(**keywords)
            return asked
        except SystemExit as end:
            if end.code != 2:
                raise
            raise ValueError(said.getvalue()) from None

    def check(asked: argparse.Namespace) -> str | None:
        got = getattr(asked, action.dest)
        finite = not isinstance(got, float) or (got == got and abs(got) < 1e30)
        return None if finite or not numeric else f"{action.dest} = {got!r}"

    return Case(work, (action.option_strings[-1], action.dest), check)


KINDS = {each.__name__: each for each in (weights, headers, configs, small_files, indexes, tokenizers, loras, pictures,
                                          captions, options)}  # fmt: skip


def run(kind: str, number: int) -> tuple[str, str]:
    """The outcome of a case, by the name of its kind and its number."""
    chance = random.Random(f"{kind} {number}")
    folder = Path(tempfile.mkdtemp(prefix="fuzz"))
    try:
        case = KINDS[kind](chance, folder)
        files = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        return outcome(case, PICTURE if kind == "pictures" else 2 * files + ROOM)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20000, help="cases in all")
    parser.add_argument("--first", type=int, default=0, help="number of the first case of each kind")
    parser.add_argument("--kind", choices=KINDS, help="this one only")
    parser.add_argument("--write", action="store_true", help="the table into tests/README.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    kinds = [args.kind] if args.kind else list(KINDS)
    each = max(1, args.count // len(kinds))
    lines, worst = [], 0
    for kind in kinds:
        counts, seen = Counter(), Counter()
        for number in tqdm(range(args.first, args.first + each), desc=kind, leave=False):
            end, why = run(kind, number)
            counts[end] += 1
            if end in ("lost", "silent"):
                seen[why[:60]] += 1
                if seen[why[:60]] <= 2:
                    tqdm.write(f"{kind} {number}: {end}: {why[:300]}")
        ends = " | ".join(str(counts[end]) for end in ENDS)
        lines.append(f"| {kind} | {each} | {ends} |")
        worst += counts["lost"] + counts["silent"]
    lines = [f"| kind | cases | {' | '.join(ENDS)} |", "|---|---|---|---|---|---|", *lines]
    print("\n".join(lines))
    if args.write:
        put(ROOT / "tests/README.md", "fuzz", lines)
    raise SystemExit(bool(worst))


if __name__ == "__main__":
    main()

"""Precomputing: what a frozen encoder says of a picture or a caption is the same in every epoch, so ask it once.

    images/cat.png, images/cat.txt, control/cat.jpg  ->  Sample(name, latents, control, embeds, empty)

Kept in memory, or on disk: one safetensors file a sample, named by a hash of everything that its numbers depend on
(both pictures, caption, weights, template, working size, dtype). A file that is there so is right, whatever happened
in between: what changed has another name. Each is written under a temporary name first, so that a run killed at any
point leaves whole files only, and the next one goes on where it stopped.
The surprise: the embedding of the *empty* prompt is kept for every sample, because in an edit it holds the picture.
Source: the seed's section on data, and FlyMyAI's trainer, without its traps. Tests: tests/test_precompute.py.
Chapter 08. As a command: python -m minqwen.precompute --help
"""

import argparse
import hashlib
import io
import json
import os
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from minqwen.images import calculate_dimensions, load_image
from minqwen.pipeline import AREA, QwenImagePipeline
from minqwen.prompt import T2I
from minqwen.tokenizer import IMAGE_PAD

FORMAT = "1"  # raise it when the same files give other numbers, or lie in the file in another way
PICTURES = (".png", ".jpg", ".jpeg", ".webp")  # in any case: .JPG too
EMPTY = " "  # the prompt that stands for none; guidance uses the same
INDEX = "index.json"  # which file belongs to which sample: written when all are there


class Sample(NamedTuple):
    """One training example, on the CPU, in the pipeline's dtype."""

    name: str  # of the target's file, without its last suffix
    latents: Tensor  # (1, 16, 1, h, w) of the target, normalised: the posterior's mode
    control: tuple[Tensor, ...]  # () for drawing, one (1, 16, 1, h2, w2) for editing
    embeds: Tensor  # (1, Nt, C), valid tokens only: one sample needs no mask
    empty: Tensor  # (1, N0, C), the same for the empty prompt, with the same control picture


class Source(NamedTuple):
    """The files that a sample is made of."""

    name: str
    caption: str
    pictures: tuple[Path, ...]  # target, then control if there is one
    digests: tuple[str, ...]  # hashes of their bytes


class Precomputed(torch.utils.data.Dataset):
    """Samples, in the order of their names: `dataset[i]` is a Sample, held in memory or read from its file.

    computed, reused: how many the run that made it had to compute, and how many it found.
    """

    def __init__(self, names: list[str], kept: list[Sample | Path], computed: int = 0):
        self.names, self.kept, self.computed, self.reused = names, kept, computed, len(kept) - computed

    @classmethod
    def open(cls, cache_dir: str | os.PathLike) -> "Precomputed":
        """What the last run left in a folder; needs no model and does not look at the pictures again.

        Raises FileNotFoundError where no run has finished since a picture or caption changed.
        """
        index = Path(cache_dir) / INDEX
        listed = json.loads(index.read_text(encoding="utf-8"))["samples"] if index.is_file() else []
        files = [index.parent / file for _, file in listed]
        if not files or not all(file.is_file() for file in files):
            raise FileNotFoundError(f"{cache_dir} holds no finished cache: run python -m minqwen.precompute (again)")
        return cls([name for name, _ in listed], files)

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, i: int) -> Sample:
        if isinstance(self.kept[i], Sample):
            return self.kept[i]
        tensors = load_file(self.kept[i])
        control = (tensors["control"],) if "control" in tensors else ()
        return Sample(self.names[i], tensors["latents"], control, tensors["embeds"], tensors["empty"])


def precompute(
    pipe: QwenImagePipeline,
    img_dir: str | os.PathLike,
    control_dir: str | os.PathLike | None = None,
    cache_dir: str | os.PathLike | None = None,
    area: int | None = None,
    progress: bool = True,
    prune: bool = False,
) -> Precomputed:
    """A folder of target pictures with captions, and one of control pictures with the same names, as samples.

    pipe: may lack its transformer. img_dir: cat.png with cat.txt beside it. control_dir: cat.jpg (None: draw from
    words). cache_dir: where the samples are kept, and found by the next run (None: in memory). area: pixels of the
    working size, by default the checkpoint's. prune: delete files in cache_dir that belong to no sample of this run;
    otherwise they stay, so that going back to an earlier caption, size or model costs nothing.
    Two runs on one cache_dir take turns. Raises ValueError that names everything wrong with the data, before any
    work, and FileNotFoundError for a folder that is not there.
    """
    if pipe.vae is None or pipe.text_encoder is None:
        raise ValueError("precompute needs the vae and the text encoder: only the transformer may be left out")
    if control_dir is not None and pipe.edit_template is None:
        raise ValueError("this checkpoint only draws: leave control_dir out, or open an Edit checkpoint")
    return _precompute(pipe, find_sources(img_dir, control_dir), cache_dir, area or pipe.area, progress, prune)


def find_sources(img_dir: str | os.PathLike, control_dir: str | os.PathLike | None = None) -> list[Source]:
    """The samples of a data set, by name; a ValueError lists all that is wrong with it. Needs no model."""
    problems = []
    targets = _by_stem(Path(img_dir), PICTURES, problems)
    captions = _by_stem(Path(img_dir), (".txt",), problems)
    controls = {} if control_dir is None else _by_stem(Path(control_dir), PICTURES, problems)
    if not targets:
        problems.append(f"{img_dir}: no pictures ({', '.join(PICTURES)})")
    problems += [f"{path}: no caption {stem}.txt beside it" for stem, path in targets.items() if stem not in captions]
    if control_dir is not None:
        problems += [f"{p}: no control picture {s} in {control_dir}" for s, p in targets.items() if s not in controls]
    problems += [f"{path}: a control for no target" for stem, path in controls.items() if stem not in targets]
    words = {stem: _read_caption(captions[stem], problems) for stem in targets if stem in captions}
    looked = [*targets.values(), *controls.values()]
    with ThreadPoolExecutor() as pool:
        digests = dict(zip(looked, pool.map(_look, looked), strict=True))
    problems += [f"{path}: {trouble}" for path, (_, trouble) in digests.items() if trouble]
    if problems:
        raise ValueError(f"{len(problems)} problem(s) with the data:\n  " + "\n  ".join(problems))
    if alone := [path.name for stem, path in captions.items() if stem not in targets]:
        warnings.warn(f"captions without a picture in {img_dir}: {', '.join(alone)}", stacklevel=2)
    sources = []
    for stem in sorted(targets):
        pictures = (targets[stem], *([controls[stem]] if controls else []))
        sources.append(Source(stem, words[stem], pictures, tuple(digests[path][0] for path in pictures)))
    return sources


def _by_stem(folder: Path, suffixes: tuple[str, ...], problems: list[str]) -> dict[str, Path]:
    """Files of a folder by name without the last suffix: "cat.v1.2.png" is "cat.v1.2". Hidden files don't count."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in suffixes and not path.name.startswith(".") and path.is_file():
            if path.stem in found:
                problems.append(f"{path}: has the same name as {found[path.stem].name}")
            found[path.stem] = path
    return found


def _read_caption(path: Path, problems: list[str]) -> str:
    """Without white space at its ends: an editor's last line break would be a token that no prompt has later."""
    try:
        caption = path.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        caption = ""
        problems.append(f"{path}: cannot be read as UTF-8 text ({error})")
    if IMAGE_PAD in caption:
        problems.append(f"{path}: holds {IMAGE_PAD}, which stands for a picture")
    return caption


def _look(path: Path) -> tuple[str, str]:
    """Hash of a picture's bytes, and what is wrong with it ("": nothing)."""
    try:
        data = path.read_bytes()
        image = load_image(Image.open(io.BytesIO(data)))
        calculate_dimensions(AREA, image.width / image.height)
    except UnidentifiedImageError:
        return "", "is no picture, or not a whole one"
    except Exception as error:  # decoders raise nearly everything
        return "", f"cannot be read as a picture ({error})"
    return hashlib.sha256(data).hexdigest(), ""


def encode_sample(pipe: QwenImagePipeline, name: str, caption: str, pictures: list[Image.Image], area: int) -> Sample:
    """Target, then control if there is one, as a sample: sizes and calls are those of `pipe.edit`."""
    (target,), _ = pipe.resize_references([load_image(pictures[0])], area)
    controls, seen = pipe.resize_references([load_image(picture) for picture in pictures[1:]], area)
    embeds, empty = (pipe.encode_prompt(prompt, seen or None)[0] for prompt in (caption, EMPTY))
    latents, *control = map(pipe.encode_image, [target, *controls])
    # a copy made out here may enter autograd; what comes out of inference_mode may not
    latents, embeds, empty, *control = (x.clone().cpu() for x in (latents, embeds, empty, *control))
    return Sample(name, latents, tuple(control), embeds, empty)


def fingerprint(pipe: QwenImagePipeline) -> str:
    """A hash of everything in the pipeline that pictures and captions meet on their way to a sample.

    Settings, vocabulary, and every bit of every weight of text encoder and VAE encoder; not the transformer, not the
    VAE's decoder. The device does not count, though it moves the last digits.
    """
    found = hashlib.sha256()
    for module in (pipe.vae.encoder, pipe.vae.quant_conv, pipe.text_encoder):
        for name, part in module.named_modules():
            kept = {k: v for k, v in vars(part).items() if isinstance(v, int | float | str | tuple)}
            kept = {k: v for k, v in kept.items() if k != "training" and not k.startswith("_")}
            found.update(repr((name, sorted(kept.items()))).encode())
        for name, weight in chain(module.named_parameters(), module.named_buffers()):
            found.update(repr((name, tuple(weight.shape), weight.dtype)).encode() + checksum(weight))
    rest = pipe.vae.latents_mean, pipe.vae.latents_std, sorted(pipe.image_settings.items()), pipe.tokenizer.to_str()
    found.update(repr(rest).encode())
    return found.hexdigest()


def checksum(tensor: Tensor) -> bytes:
    """Sums of a tensor's bits, read as 64-bit integers in rows of 1024, along both axes.

    Where one bit changes, a row and a column change; values that trade places change theirs. Integers add up to the
    same on every device, at the speed at which memory can be read.
    """
    bits = tensor.detach().reshape(-1).view(torch.uint8)
    if bits.storage_offset() % 8:  # mapped from a file, at an odd place
        bits = bits.clone()
    whole = len(bits) // 8192 * 8192
    rest = F.pad(bits[whole:], (0, -len(bits) % 8192))  # padding all of it would copy all of it
    words = [part.view(torch.int64).view(len(part) // 8192, 1024) for part in (bits[:whole], rest)]
    return torch.cat([part.sum(axis) for part in words for axis in (0, 1)]).cpu().numpy().tobytes()


def _precompute(pipe, sources: list[Source], cache_dir, area: int, progress: bool, prune: bool) -> Precomputed:
    names = [source.name for source in sources]
    bar = {"unit": " samples", "desc": "precompute", "disable": not progress}
    if cache_dir is None:
        return Precomputed(names, [_encode(pipe, s, area) for s in tqdm(sources, **bar)], len(sources))
    recipe = _recipe(pipe, sources[0], area)
    folder = Path(cache_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        for left in folder.glob("*.tmp"):
            left.unlink()
        files = [folder / f"{cache_key(source, recipe)}.safetensors" for source in sources]
        missing = {file: source for file, source in zip(files, sources, strict=True) if not _is_whole(file)}
        if missing:
            (folder / INDEX).unlink(missing_ok=True)
        everything = len(set(files))  # equal pictures with equal captions share a file
        for file, source in tqdm(missing.items(), total=everything, initial=everything - len(missing), **bar):
            _write(file, _to_bytes(_encode(pipe, source, area), source, recipe | {"key": file.stem}))
        listed = [(name, file.name) for name, file in zip(names, files, strict=True)]
        _write(folder / INDEX, json.dumps({"format": FORMAT, "samples": listed}, indent=1).encode())
        for file in set(folder.glob("*.safetensors")) - set(files) if prune else ():
            file.unlink()
    return Precomputed(names, files, len(missing))


def _encode(pipe: QwenImagePipeline, source: Source, area: int) -> Sample:
    data = [path.read_bytes() for path in source.pictures]
    for path, now, digest in zip(source.pictures, data, source.digests, strict=True):
        if hashlib.sha256(now).hexdigest() != digest:
            raise ValueError(f"{path} was changed while the samples were being computed: run it again")
    return encode_sample(pipe, source.name, source.caption, [Image.open(io.BytesIO(now)) for now in data], area)


def _recipe(pipe: QwenImagePipeline, source: Source, area: int) -> dict[str, str]:
    """All that a sample depends on besides its own files."""
    template = T2I if len(source.pictures) == 1 else pipe.edit_template
    said = {"format": FORMAT, "model": fingerprint(pipe), "area": str(area), "dtype": str(pipe.dtype)}
    return said | {"template": template.text.replace("{}", (template.picture or "") + "{}")}


def cache_key(source: Source, recipe: dict[str, str]) -> str:
    """The name of a sample's file. The sample's own name is no part of it: a renamed picture is found again."""
    parts = [sorted(recipe.items()), source.digests, source.caption]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:40]


def _to_bytes(sample: Sample, source: Source, recipe: dict[str, str]) -> bytes:
    tensors = {"latents": sample.latents, "embeds": sample.embeds, "empty": sample.empty}
    if sample.control:
        tensors["control"] = sample.control[0]
    sizes = {f"{name}_size": "{1}x{0}".format(*(8 * s for s in tensors[name].shape[-2:]))
             for name in ("latents", "control") if name in tensors}  # fmt: skip
    return save(tensors, recipe | sizes | {"name": source.name, "caption": source.caption})


def _is_whole(file: Path) -> bool:
    """Whether a cached file is there and as long as its table says."""
    try:
        with safe_open(file, framework="pt") as opened:
            return (opened.metadata() or {}).get("key") == file.stem
    except (OSError, SafetensorError):
        return False


def _alone(folder: Path):
    """A lock on the folder, which the system takes off when its process ends, however that ends."""
    lock = FileLock(folder / ".lock")
    try:
        return lock.acquire(timeout=1)
    except Timeout:
        print(f"another run works on {folder}: waiting for it", flush=True)
        return lock.acquire()


def _write(path: Path, data: bytes) -> None:
    """All or nothing: under another name until every byte is on the disk; then the name changes, in one step."""
    beside = path.with_suffix(".tmp")
    with open(beside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m minqwen.precompute",
        description="Compute embeddings and latents of a training set once and keep them on disk. Interrupted, run it "
        "again: it goes on. After a change of pictures, captions, model or size, only what changed is computed.",
    )
    add = parser.add_argument
    add("images", metavar="IMAGES", help="folder of target pictures (.png .jpg .jpeg .webp) with .txt captions beside")
    add("--control", metavar="DIR", help="folder of control pictures with the same names; without it: text to image")
    add("--cache", metavar="DIR", required=True, help="folder for the results, one safetensors file a sample")
    add("--model", default="Qwen/Qwen-Image-Edit", help="checkpoint folder or hub repository (default: %(default)s); "
        "its transformer is not loaded")  # fmt: skip
    add("--area", type=int, help="pixels of the working size, 1048576 is 1024x1024 (default: the checkpoint's own)")
    add("--device", help="cuda, mps or cpu (default: the first of these that is there)")
    add("--dtype", choices=("bfloat16", "float32"), help="(default: bfloat16 on a GPU, float32 on a CPU)")
    add("--prune", action="store_true", help="delete files in the cache that belong to no sample of this run")
    add("--quiet", action="store_true", help="no progress bar")
    said, started = parser.parse_args(arguments), time.time()
    try:
        find_sources(said.images, said.control)  # before minutes are spent on loading a model
        dtype = getattr(torch, said.dtype) if said.dtype else None
        pipe = QwenImagePipeline.from_pretrained(said.model, said.device, dtype, without="transformer")
        options = {"area": said.area, "progress": not said.quiet, "prune": said.prune}
        done = precompute(pipe, said.images, said.control, said.cache, **options)
    except (ValueError, OSError, KeyboardInterrupt) as error:
        stopped = "interrupted; run it again to go on" if isinstance(error, KeyboardInterrupt) else error
        raise SystemExit(f"precompute: {stopped}") from None
    size = sum(file.stat().st_size for file in set(done.kept)) / 1e6
    print(f"{len(done)} samples in {said.cache}: {done.computed} computed, {done.reused} reused, {size:.1f} MB, "
          f"{time.time() - started:.1f} s")  # fmt: skip
    others = len(set(Path(said.cache).glob("*.safetensors")) - set(done.kept))
    if others:
        print(f"{others} more files there belong to no sample of this run; --prune deletes them")


if __name__ == "__main__":
    main()

"""Precomputing: what a frozen encoder says of a picture or a caption is the same in every epoch, so ask it once.

    images/cat.png, images/cat.txt, control/cat.jpg  ->  Sample(name, latents, control, embeds, empty)

In the order of the file: a data folder becomes Sources (which files belong together), a Source becomes a Sample (what
the encoders say), Samples are held in memory or on disk, and the command does it all. On disk each is a safetensors
file, named by a hash of everything that its numbers depend on (`recipe_of`). A file that is there so is right,
whatever happened in between: what changed has another name. A run that is killed leaves whole files only, and the
next one goes on where it stopped.
The surprise: the embedding of the *empty* prompt is kept for every sample, because in an edit it holds the pictures.
Sizes and calls are those of diffusers' QwenImageEditPipeline and QwenImageEditPlusPipeline (tests/test_precompute.py).
Chapter 08. As a command: python -m minqwen.precompute --help
"""

import hashlib
import json
import os
import sys
import unicodedata
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from minqwen import parallel
from minqwen.command import Parser, model_options, number, one_line, open_pipeline
from minqwen.files import content_of, open_weights, read_json, save_weights, whole_file, write_json
from minqwen.images import MAX_AREA, UNSEEN, calculate_dimensions, expect_no_strip, load_image
from minqwen.pipeline import AREA, PARTS, QwenImagePipeline, area_seen
from minqwen.prompt import T2I
from minqwen.run import control_names, locked, tensors_of
from minqwen.tokenizer import IMAGE_PAD

FORMAT = "3"  # raise it when the same files give other numbers, or lie in the file in another way
PICTURES = (".png", ".jpg", ".jpeg", ".webp")  # in any case: .JPG too
EMPTY = " "  # the prompt that stands for none; guidance uses the same
INDEX = "index.json"  # which file belongs to which sample: written when all are there

Folder = str | os.PathLike
Folders = Folder | Sequence[Folder] | None


class Source(NamedTuple):
    """The files that a sample is made of."""

    name: str  # of the target's file, without its last suffix
    caption: str
    pictures: tuple[Path, ...]  # target, then the controls in the order of their folders
    digests: tuple[str, ...]  # hashes of their bytes


def find_sources(img_dir: Folder, control_dir: Folders = None, area: int = AREA, template=None) -> list[Source]:
    """The samples of a data set, by name; a ValueError lists all that is wrong with it. Needs no model.

    area, template: the working size and the edit template of a pipeline, since a text encoder refuses pictures that are
    too long at the size at which it looks at them. What is left out, and why, is printed in one line.
    """
    calculate_dimensions(area, 1.0)  # refuses what is no area
    problems, left_out = [], {}
    folders = [control_dir] if isinstance(control_dir, str | os.PathLike) else list(control_dir or [])
    targets, captions = _by_stem(Path(img_dir), problems, left_out)
    controls = [_by_stem(Path(folder), problems, left_out)[0] for folder in folders]
    left_out |= {path: "no picture has this name" for stem, path in captions.items() if stem not in targets}
    if not targets:
        problems.append(f"{img_dir}: no pictures ({', '.join(PICTURES)})")
    problems += [f"{path}: no caption {stem}.txt beside it" for stem, path in targets.items() if stem not in captions]
    for folder, found in zip(map(Path, folders), controls, strict=True):
        near = {_stem(p): f" ({p.name} is left out: {why})" for p, why in left_out.items() if p.parent == folder}
        missing = [(path, s, near.get(s, "")) for s, path in targets.items() if s not in found]
        problems += [f"{path}: no control picture {s} in {folder}{why}" for path, s, why in missing]
        problems += [f"{path}: a control for no target" for s, path in found.items() if s not in targets]
    words = {stem: _tried(_read_caption, captions[stem], problems) for stem in targets if stem in captions}
    seen = area_seen(template, area)
    seen_at = dict.fromkeys(targets.values(), UNSEEN) | {path: seen for found in controls for path in found.values()}
    with ThreadPoolExecutor() as pool:
        looks = pool.map(lambda path: _tried(_digest, path, problems, seen_at[path]), seen_at)
        digests = dict(zip(seen_at, looks, strict=True))
    if few := [f"{path.name!r} ({why})" for path, why in left_out.items() if path not in map(Path, folders)]:
        print(f"left out: {', '.join(few[:5])}{f', and {len(few) - 5} more' * (len(few) > 5)}", file=sys.stderr)
    if problems:
        raise ValueError(f"{len(problems)} problem(s) with the data:\n  " + "\n  ".join(sorted(problems)))
    pictures = {stem: tuple(found[stem] for found in (targets, *controls)) for stem in sorted(targets)}
    return [Source(s, words[s], paths, tuple(map(digests.get, paths))) for s, paths in pictures.items()]


def _stem(path: Path) -> str:
    """Without the last suffix: "cat.v1.2.png" is "cat.v1.2". Accents, which some systems take apart, are composed."""
    return unicodedata.normalize("NFC", path.stem)


def _by_stem(folder: Path, problems: list[str], left_out: dict[Path, str]) -> tuple[dict[str, Path], dict[str, Path]]:
    """Pictures and captions of a folder by `_stem`. Hidden files don't count."""
    pictures, captions = {}, {}
    for path in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
        stem, suffix = _stem(path), path.suffix.lower()
        found = pictures if suffix in PICTURES else captions
        if not path.is_file():
            left_out[path] = "a folder" if path.is_dir() else "a dead link"
        elif suffix not in (*PICTURES, ".txt"):
            left_out[path] = f"neither {' '.join(PICTURES)} nor .txt"
        elif stem != stem.encode(errors="ignore").decode():
            problems.append(f"{str(path)!r}: its name is no UTF-8: rename it")
        elif stem in found:
            problems.append(f"{path}: has the same name as {found[stem].name}")
        else:
            found[stem] = path
    return pictures, captions


def _tried(read: Callable[..., str], path: Path, problems: list[str], *more) -> str:
    try:
        return read(path, *more)
    except Exception as error:  # decoders of pictures raise nearly everything
        problems.append(f"{path}: {str(error).replace(f'{path} ', '')}")
        return ""


def _read_caption(path: Path) -> str:
    """Without white space at its ends: an editor's last line break would be a token that no prompt has later."""
    caption = path.read_text(encoding="utf-8-sig", errors="replace").strip()
    if not any(map(str.isprintable, caption)) or {"\0", "\N{REPLACEMENT CHARACTER}"} & set(caption):
        raise ValueError("says nothing, or is no text in UTF-8: write a caption and save it as UTF-8")
    if IMAGE_PAD in caption:
        raise ValueError(f"holds {IMAGE_PAD}, which stands for a picture")
    return caption


def _digest(path: Path, seen: int) -> str:
    """A hash of the bytes of a picture, which is decoded as well: only then does a file that is cut off show itself.

    seen: pixels of the copy that the text encoder looks at; rounded to multiples of 32, it may be longer still.
    """
    expect_no_strip(*load_image(path).size, seen)
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Sample(NamedTuple):
    """One training example, on the CPU, in the pipeline's dtype."""

    name: str
    latents: Tensor  # (1, 16, 1, h, w) of the target, normalised: the posterior's mode
    control: tuple[Tensor, ...]  # () for drawing; for editing a (1, 16, 1, h, w) of each control picture
    embeds: Tensor  # (1, Nt, C), valid tokens only: one sample needs no mask
    empty: Tensor  # (1, N0, C), the same for the empty prompt, with the same control pictures


def encode_sample(pipe: QwenImagePipeline, source: Source, area: int) -> Sample:
    """Sizes and calls are those of `pipe.edit`. Raises ValueError for a picture that is no longer what it was."""
    target, *controls = map(_open_unchanged, source.pictures, source.digests)
    (target,), _ = pipe.resize_references([target], area)
    references, conditions = pipe.resize_references(controls, area)  # the text encoder may look at smaller ones
    embeds, _ = pipe.encode_prompt(source.caption, conditions)
    empty, _ = pipe.encode_prompt(EMPTY, conditions)
    latents = pipe.encode_image(target)
    # a copy made out here may enter autograd; what comes out of inference_mode may not
    control = tuple(pipe.encode_image(image).clone().cpu() for image in references)
    sample = Sample(source.name, latents.clone().cpu(), control, embeds.clone().cpu(), empty.clone().cpu())
    if not all(tensor.isfinite().all() for tensor in tensors_of(sample).values()):
        raise ValueError(f"{source.name}: the encoders give NaN or infinity: are their weights damaged?")
    return sample


def _open_unchanged(path: Path, digest: str) -> Image.Image:
    image = load_image(path)
    if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
        raise ValueError(f"{path} was changed while the samples were being computed: run it again")
    return image


def recipe_of(pipe: QwenImagePipeline, source: Source, area: int, model: str) -> dict[str, str]:
    """All that a sample's numbers depend on: their hash is the name of its file, and they stand in it.

    model: the pipeline's fingerprint. The sample's own name is no part of it: a renamed picture is found again. Nor
    are the device and the versions of PyTorch and Pillow, though they move the last digits.
    """
    template = T2I if len(source.pictures) == 1 else pipe.edit_template
    return {
        "format": FORMAT,
        "model": model,
        "template": template.text.replace("{}", (template.picture or "") + "{}"),
        "area": str(area),
        "dtype": str(pipe.dtype),
        "pictures": " ".join(source.digests),  # target, then controls
        "caption": source.caption,
    }


def cache_key(recipe: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(sorted(recipe.items())).encode()).hexdigest()[:40]


def fingerprint(pipe: QwenImagePipeline) -> str:
    """A hash of what pictures and captions meet in the pipeline: vocabulary, image settings, every encoder weight.

    The transformer and the VAE's decoder do not count. A config.json that was changed beside the same weights would
    go unnoticed.
    """
    found = [pipe.tokenizer.to_str(), sorted(pipe.image_settings.items()), pipe.vae.latents_mean, pipe.vae.latents_std]
    for module in (pipe.vae.encoder, pipe.vae.quant_conv, pipe.text_encoder):
        for name, weight in module.state_dict().items():
            data = weight.cpu().reshape(-1).view(torch.uint8).numpy()
            found.append((name, weight.shape, weight.dtype, zlib.crc32(data)))  # on many CPUs faster than sha256
    return hashlib.sha256(repr(found).encode()).hexdigest()


class Precomputed(torch.utils.data.Dataset):
    """Samples, in the order of their names: `dataset[i]` is a Sample, held in memory or read from its file.

    computed, reused: how many the run that made it had to compute, and how many it found.
    """

    def __init__(self, names: list[str], kept: list[Sample | Path], computed: int = 0):
        self.names, self.kept, self.computed, self.reused = names, kept, computed, len(kept) - computed

    @classmethod
    def open(cls, cache_dir: Folder) -> "Precomputed":
        """What the last run left in a folder; needs no model and does not look at the pictures again.

        Raises FileNotFoundError where no run has finished since a picture or caption changed.
        """
        index = Path(cache_dir) / INDEX
        with content_of(index):
            listed = read_json(index)["samples"] if index.is_file() else []
            files = [index.parent / file for _, file in listed]
            if outside := [file for file in files if file.parent != index.parent]:
                raise ValueError(f"{outside[0]} lies outside of the folder")
        if not files or not all(file.is_file() for file in files):
            raise FileNotFoundError(f"{cache_dir} holds no finished cache: run python -m minqwen.precompute (again)")
        return cls([str(name) for name, _ in listed], files)

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, i: int) -> Sample:
        if isinstance(self.kept[i], Sample):
            return self.kept[i]
        with open_weights(self.kept[i]) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        control = tuple(tensors[name] for name in control_names(len(tensors) - 3))
        return Sample(self.names[i], tensors["latents"], control, tensors["embeds"], tensors["empty"])


def _write_sample(file: Path, sample: Sample, recipe: dict[str, str]) -> None:
    tensors = {"latents": sample.latents, "embeds": sample.embeds, "empty": sample.empty}
    tensors |= zip(control_names(len(sample.control)), sample.control, strict=True)
    with whole_file(file) as path:
        save_weights(tensors, path, recipe | {"key": file.stem, "name": sample.name})


def _is_whole(file: Path) -> bool:
    """Whether a cached file is there and as long as its table says."""
    try:
        with open_weights(file) as opened:
            return (opened.metadata() or {}).get("key") == file.stem
    except (OSError, ValueError):
        return False


def precompute(
    pipe: QwenImagePipeline,
    img_dir: Folder,
    control_dir: Folders = None,
    cache_dir: Folder | None = None,
    area: int | None = None,
    progress: bool = True,
    prune: bool = False,
) -> Precomputed:
    """A folder of target pictures with captions, and folders of control pictures with the same names, as samples.

    pipe: may lack its transformer. img_dir: cat.png with cat.txt beside it. control_dir: cat.jpg; a list of folders
    for several control pictures, Picture 1, Picture 2, ... of the prompt in this order; None: draw from words.
    cache_dir: where the samples are kept, and found by the next run (None: in memory). area: pixels of the working
    size, by default the checkpoint's. prune: delete files in cache_dir that belong to no sample of this run;
    otherwise they stay, so that going back to an earlier caption, size or model costs nothing.
    Two runs on one cache_dir take turns. Raises ValueError that names everything wrong with the data, before any
    work, and FileNotFoundError for a folder that is not there.
    """
    if pipe.vae is None or pipe.text_encoder is None:
        raise ValueError("precompute needs the vae and the text encoder: only the transformer may be left out")
    area = pipe.area if area is None else area
    sources = find_sources(img_dir, control_dir, area, pipe.edit_template)
    pipe.check_pictures(len(sources[0].pictures) - 1)
    return _precompute(pipe, sources, cache_dir, area, progress, prune)


def _precompute(pipe, sources: list[Source], cache_dir, area: int, progress: bool, prune: bool) -> Precomputed:
    names = [source.name for source in sources]
    bar = {"unit": " samples", "desc": "precompute", "disable": not progress}
    if cache_dir is None:
        samples = [encode_sample(pipe, source, area) for source in tqdm(sources, **bar)]
        return Precomputed(names, samples, len(samples))
    folder, model = Path(cache_dir), fingerprint(pipe)
    folder.mkdir(parents=True, exist_ok=True)
    files, listed, turns, computed = [], [], {}, 0
    with locked(folder):
        for left in [] if parallel.rank() else folder.glob(".*.part"):  # by a run that was killed
            left.unlink()
        parallel.wait()  # for the first of several processes, which also writes the index
        for source in tqdm(sources, **bar):
            recipe = recipe_of(pipe, source, area, model)
            file = folder / f"{cache_key(recipe)}.safetensors"  # equal pictures with equal captions share it
            mine = turns.setdefault(file, len(turns)) % parallel.size() == parallel.rank()
            files.append(file)
            listed.append((source.name, file.name))
            if mine and not _is_whole(file):
                (folder / INDEX).unlink(missing_ok=True)
                _write_sample(file, encode_sample(pipe, source, area), recipe)
                computed += 1
        computed = sum(parallel.gathered(computed))
        if parallel.rank():
            return Precomputed(names, files, computed)
        write_json(folder / INDEX, {"format": FORMAT, "samples": listed})
        if prune:
            for file in set(folder.glob("*.safetensors")) - set(files):
                file.unlink()
    return Precomputed(names, files, computed)


def command_line() -> Parser:
    """The command's options."""
    purpose = "Encode a training set once and keep it on disk. Run again, it goes on and encodes what is new."
    parser = Parser("precompute", purpose, "python -m minqwen.precompute images/ --control control/ --cache cache/")
    add = parser.add_argument
    add("images", metavar="IMAGES", help="folder of target pictures (.png .jpg .jpeg .webp) with .txt captions beside")
    add("--control", metavar="DIR", nargs="+", help="folders of Picture 1, Picture 2, ..., same names; None: draw")
    add("--cache", metavar="DIR", required=True, help="folder for the results, one safetensors file a sample")
    model_options(parser)
    add("--area", type=number(int, 32**2, MAX_AREA), help="pixels at work, 1024x1024 is 1048576; None: as the model")
    add("--prune", action="store_true", help="delete files in the cache that belong to no sample of this run")
    add("--quiet", action="store_true", help="no progress bar")
    return parser


@one_line("precompute", "interrupted; run it again to go on", status=1)
def main(arguments: list[str] | None = None) -> None:
    """The command."""
    asked = command_line().parse_args(arguments)
    asked.cache.encode()  # safetensors takes no other names
    with parallel.joined(asked.device) as asked.device:
        light = open_pipeline(asked, tuple(PARTS))  # the data are looked at before minutes are spent on loading a model
        area = asked.area or light.area
        sources = find_sources(asked.images, asked.control, area, light.edit_template)
        light.check_pictures(len(sources[0].pictures) - 1)
        pipe = open_pipeline(asked, ("transformer",), "auto")
        done = _precompute(pipe, sources, asked.cache, area, not asked.quiet, asked.prune)
        (width, height), made = calculate_dimensions(area, 1.0), f"{done.computed} computed, {done.reused} reused"
        print(f"{len(done)} samples of about {width}x{height} pixels in {asked.cache}: {made}")
        if others := set(Path(asked.cache).glob("*.safetensors")) - set(done.kept):
            print(f"{len(others)} more files there belong to no sample of this run; --prune deletes them")


if __name__ == "__main__":
    main()

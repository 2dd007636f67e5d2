"""A checkpoint made smaller: its blocks' linear layers at 8 or 4 bits, all else as it was, in the same layout.

    folder or "owner/name"  ->  a folder that from_pretrained opens; 57.7 GB become 21 at 4 bits

    python -m minqwen.shrink Qwen/Qwen-Image-Edit small/ --bits 4

One block at a time: read, from the hub by byte ranges; its adapters merged, if a LoRA file is given; quantized; written
to a file of its own. So no more than one block is ever in memory, and a run that was cut off goes on with the first
block that has no file, to the same bytes.
The surprise: a third of the result is modulation weights, at 8 bits, which only `resident` ever loads whole.
Tests: tests/test_shrink.py. Chapter 11.
"""

import json
import math
import os
import shutil
import warnings
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from minqwen.checkpoint import BLOCK, UNFINISHED, Checkpoint
from minqwen.command import Parser, number, one_line
from minqwen.files import content_of, open_weights, read_json, whole_file, write_json
from minqwen.lightning import SCHEDULE, steps_of
from minqwen.lora_files import read_lora
from minqwen.quantize import FORMAT, GROUP, bits_of, quantize
from minqwen.run import digest, locked
from minqwen.text_encoder import released_name
from minqwen.transformer import QwenImageTransformer2DModel

STEMS = {"transformer": "diffusion_pytorch_model", "text_encoder": "model", "vae": "diffusion_pytorch_model"}
SMALL_FILES = {
    "tokenizer": ("vocab.json", "merges.txt", "tokenizer_config.json", "added_tokens.json", "tokenizer.json",
                  "special_tokens_map.json"),
    "processor": ("preprocessor_config.json", "processor_config.json"),
    "scheduler": ("scheduler_config.json",),
}  # fmt: skip
OPTIONAL = ("added_tokens.json", "tokenizer.json", "special_tokens_map.json", "processor_config.json")
SCHEDULER = "scheduler/scheduler_config.json"
in_gb = partial(tqdm.format_sizeof, suffix="B")
ROOM = 1.01  # times what is left to write must be free on the disk, for headers and small files


def shrink(
    path_or_repo: str | os.PathLike,
    out: str | os.PathLike,
    bits: int = 4,
    lora: str | os.PathLike | None = None,
    lora_scale: float = 1.0,
    progress: bool = True,
) -> None:
    """Write a checkpoint in the released layout, smaller, to the folder `out`; run again, it goes on.

    bits: of the linear layers in the blocks of transformer and text encoder, 8 or 4; modulation layers get 8.
    lora: a file of adapters that are merged first, each at its own scale times lora_scale; with Lightning's goes their
    schedule, and guidance is off by default.
    Raises ValueError for other bits, a checkpoint that is shrunk already, a folder that holds something else, and a
    LoRA that does not fit; OSError where the disk has no room or a source cannot be read.
    """
    if bits not in (8, 4):
        raise ValueError(f"bits={bits!r}: linear layers are written with 8 bits or 4")
    source, out = Checkpoint(path_or_repo), Path(out)
    adapters, unmatched = adapters_of(source, lora, lora_scale) if lora else ({}, [])
    if unmatched:
        warnings.warn(f"{lora}: {len(unmatched)} keys fit nothing, such as {unmatched[0]}", stacklevel=2)
    told = (part for name, pair in sorted(adapters.items()) for part in (name, *pair))
    asked = {"format": FORMAT, "bits": bits, "of": fingerprint(source), "lora": digest(told) if lora else None}
    files = {component: files_of(source, out, component) for component in STEMS}
    done = is_whole(out, asked)
    with nullcontext() if done else locked(out):
        if done or is_whole(out, asked):  # by a run that this one waited for
            print(f"{out} is whole already")
            return
        for half in out.rglob(".*.part"):  # of runs that were killed
            half.unlink()
        announce(source, out, bits, files)
        write_json(out / UNFINISHED, asked)
        with tqdm(desc=f"shrinking to {bits} bits", unit=" blocks", disable=not progress) as bar:
            bar.total = sum(map(len, files.values()))
            for component, of_component in files.items():
                write_component(source, component, of_component, bits, adapters, bar)
        write_small_files(source, out)
        index = source.config("model_index.json") | {"_shrunk": asked}
        if steps_of(lora):
            write_json(out / SCHEDULER, source.config(SCHEDULER) | SCHEDULE)
            index["_true_cfg_scale"] = 1.0
        write_json(out / "model_index.json", index)  # with which it is whole
        (out / UNFINISHED).unlink(missing_ok=True)


def write_component(
    source: Checkpoint, component: str, files: dict[str, Path], bits: int, adapters: dict, bar: tqdm
) -> None:
    """The files of a component that are not there yet, then its index and config."""
    folder = next(iter(files.values())).parent
    folder.mkdir(exist_ok=True)
    done = [prefix for prefix, path in files.items() if path.exists()]
    bar.update(len(done))
    for prefix, tensors in source.blocks(component, without=done):
        smaller = shrunk(tensors, bits, adapters if component == "transformer" else {})
        with whole_file(files[prefix]) as path:
            save_file(smaller, path, metadata={"format": "pt"})
        del tensors, smaller  # before the next block is read
        bar.update()
    write_index(component, files)
    write_json(folder / "config.json", source.config(f"{component}/config.json"))


def is_whole(out: Path, asked: dict) -> bool:
    """Whether the folder holds what is asked for, every file of it; if not, it is there to be filled.

    Raises ValueError where it holds something else.
    """
    mark, index = out / UNFINISHED, out / "model_index.json"
    if mark.exists() or index.exists():
        with content_of(file := mark if mark.exists() else index):
            holds = read_json(file)
            holds = {**(holds if file is mark else holds.get("_shrunk", {"a whole checkpoint": True}))}
        if other := [f"{key} {value}" for key, value in holds.items() if value != asked.get(key)]:
            raise ValueError(f"{out} holds something else ({', '.join(other)}): name another folder, or delete it")
        absent, indexes = [], list(out.glob("*/*.index.json"))
        for path in indexes:
            with content_of(path):
                files = set(read_json(path)["weight_map"].values())
                absent += [file for file in files if not (path.parent / file).is_file()]
        return not mark.exists() and len(indexes) == len(STEMS) and not absent
    if out.exists() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise ValueError(f"{out} is not empty: name another folder")
    return False


def fingerprint(source: Checkpoint) -> str:
    """Which weights these are, wherever they lie: names and shapes of all, the numbers of some small ones."""
    told = []
    for component in STEMS:
        shapes = source.shapes(component)
        told.append(json.dumps(sorted((name, list(shape)) for name, shape in shapes.items())))
        small = sorted((math.prod(shape), name) for name, shape in shapes.items())[:: max(1, len(shapes) // 8)][:4]
        told += [source.tensors(component, name)[name] for _, name in small]
    return digest(told)


def adapters_of(source: Checkpoint, lora: str | os.PathLike, scale: float = 1.0) -> tuple[dict, list[str]]:
    """The adapters of a LoRA file: the name of a weight -> (A, B), B times its scale. And the keys that fit nothing."""
    with torch.device("meta"):
        model = QwenImageTransformer2DModel(**source.config("transformer/config.json"))
    found, unmatched = read_lora(lora, model)
    weights = {f"{name}.weight": (down.float(), scale * own * up.float()) for name, (down, up, own) in found.items()}
    return weights, unmatched


def files_of(source: Checkpoint, out: Path, component: str) -> dict[str, Path]:
    """The file of each block of a component, by the block's prefix; "" is what belongs to none."""
    names = source.weight_map(component)
    if packed := [name for name in names if name.endswith(".weight_scale")]:
        raise ValueError(f"{source.source} is shrunk already: {component}/ holds {packed[0]}")
    prefixes = sorted({BLOCK.match(name)[0] for name in names}, key=lambda prefix: (len(prefix), prefix))
    files = (f"{STEMS[component]}-{k:05d}-of-{len(prefixes):05d}.safetensors" for k in range(1, len(prefixes) + 1))
    return {prefix: out / component / file for prefix, file in zip(prefixes, files, strict=True)}


def shrunk(tensors: dict[str, Tensor], bits: int, adapters: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """A block's tensors, adapters added, and codes with their scales in place of the weights of linear layers."""
    smaller = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} holds whole numbers without their scales: no released checkpoint does")
        if name in adapters:
            down, up = adapters[name]
            tensor = (tensor.float() + up @ down).to(tensor.dtype)
        if given := bits_given(name, tensor.ndim, bits):
            layer = nn.Linear(tensor.shape[1], tensor.shape[0], bias=False, device="meta")
            layer.weight = nn.Parameter(tensor, requires_grad=False)
            packed = quantize(layer, given).state_dict()
            smaller |= {f"{name.removesuffix('weight')}{key}": value.contiguous() for key, value in packed.items()}
        else:
            smaller[name] = tensor.contiguous()
    return smaller


def bits_given(name: str, ndim: int, bits: int) -> int | None:
    """The bits of a stored tensor's codes, None for what stays as it is."""
    return bits_of(released_name(name) or "", bits) if name.endswith(".weight") and ndim == 2 else None


def announce(source: Checkpoint, out: Path, bits: int, files: dict[str, dict[str, Path]]) -> None:
    """Say how much will be read, written and needed; OSError where the disk has no room for it."""
    read, write = {}, {}  # bytes of each file that is not there yet
    for component, of_component in files.items():
        shapes = source.shapes(component)
        for name, size in source.stored_bytes(component).items():
            file = of_component[BLOCK.match(name)[0]]
            if not file.exists():
                less = size_at(shapes[name], bits_given(name, len(shapes[name]), bits), size)
                read[file], write[file] = read.get(file, 0) + size, write.get(file, 0) + less
    to_read, to_write = sum(read.values()), sum(write.values())
    largest = max((read[file] + write[file] for file in read), default=0)
    free = shutil.disk_usage(out).free
    told = f"{source.source}: reads {in_gb(to_read)}, writes {in_gb(to_write)} to {out}"
    if free < ROOM * to_write:
        raise OSError(f"{told}, where {in_gb(free)} are free")
    print(f"{told}, needs {in_gb(largest)} of memory", flush=True)


def size_at(shape: tuple[int, ...], bits: int | None, stored: int) -> int:
    """Bytes of a tensor once it is written."""
    if bits is None:
        return stored
    rows, columns = shape
    pairs = -(-columns // (2 * GROUP))  # of groups
    return rows * (columns + 4) if bits == 8 else rows * pairs * (GROUP + 8)


def write_index(component: str, files: dict[str, Path]) -> None:
    """The index that says which of a component's files holds what."""
    places, total = {}, 0
    for path in files.values():
        with open_weights(path) as weights:
            places |= dict.fromkeys(weights.keys(), path.name)
        total += path.stat().st_size
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    write_json(path.with_name(f"{STEMS[component]}.safetensors.index.json"), index)


def write_small_files(source: Checkpoint, out: Path) -> None:
    """Tokenizer, image processor and schedule as they are; without a network, the optional ones that are cached."""
    for component, names in SMALL_FILES.items():
        for name in names:
            with suppress(ConnectionError) if name in OPTIONAL else nullcontext():
                if path := source.file(f"{component}/{name}"):
                    (out / component).mkdir(exist_ok=True)
                    with whole_file(out / component / name) as beside:
                        shutil.copyfile(path, beside)


def command_line() -> Parser:
    """The command's options."""
    purpose = "Write a checkpoint in fewer bits, block by block. Run again, it goes on where it was cut off."
    example = "python -m minqwen.shrink Qwen/Qwen-Image-Edit small/ --bits 4"
    parser = Parser("shrink", purpose, example)
    add = parser.add_argument
    add("model", help="checkpoint folder or hub repository")
    add("out", metavar="FOLDER", help="where the smaller one goes")
    add("--bits", type=int, choices=(8, 4), default=4, help="of linear layers; modulation gets 8")
    add("--lora", metavar="FILE", help="adapters (.safetensors) to merge first, such as Lightning's")
    add("--lora-scale", type=number(float, -100, 100), default=1.0, help="times the scale that the file asks for")
    add("--quiet", action="store_true", help="no progress bar")
    return parser


@one_line("shrink", "interrupted; run it again to go on")
def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = command_line()
    asked = parser.parse_args(arguments)
    if asked.lora_scale != 1 and not asked.lora:
        parser.error("--lora-scale without --lora: there is nothing to scale")
    for path in (asked.model, asked.out):
        path.encode()  # safetensors takes no other names
    shrink(asked.model, asked.out, asked.bits, asked.lora, asked.lora_scale, not asked.quiet)


if __name__ == "__main__":
    main()

"""Weights in the released layout: a folder, or a hub repository; whole components, or block by block.

    folder or "owner/name"  ->  configs (dict), tensors (name -> Tensor), modules with their weights

A module is built on the meta device, where it costs nothing; its tensors are mapped from the files and assigned,
strictly by name and shape. What a repository holds is downloaded, or read by byte ranges where only parts are wanted
(hub.py).
The surprise: the number of shards differs between releases (9 or 5); only the index knows which file holds what.
Pickled weights (.bin, .pt) are never opened: unpickling runs code. Tests: tests/test_checkpoint.py. Chapter 05.
"""

import os
import re
from collections.abc import Container, Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from tqdm import tqdm

from minqwen.files import content_of, finder, open_weights, read_json
from minqwen.hub import Repository
from minqwen.quantize import FORMAT, insert_quantized_layers, keeps_dtype

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
STEMS = ("diffusion_pytorch_model", "model")  # of weight files: diffusers' components, transformers' components
REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w.-]*\w")  # owner/name
BLOCK = re.compile(r"((.*\.)?(transformer_blocks|layers|blocks)\.\d+\.)?")  # "" of what belongs to no block
UNFINISHED = "unfinished.json"  # in a folder that minqwen.shrink has not finished: what is being made there


class Checkpoint:
    """Weights in the released layout: `model_index.json` beside a folder for each component.

    source: a folder, or "owner/name" of a hub repository (then files are downloaded as they are needed, into
    huggingface_hub's cache, which keeps the files that are whole). Raises FileNotFoundError if neither.
    """

    def __init__(self, source: str | os.PathLike, revision: str | None = None):
        self.source, self.prefix = str(source), ""
        self.folder = Path(source) if self.source and Path(source).is_dir() else None
        self.repository = None if self.folder else Repository(self.source, revision)
        remote = REPOSITORY.fullmatch(self.source) and not self.source.endswith((".safetensors", *PICKLED))
        if self.folder is None and (Path(source).exists() or not remote):
            layout = "in the released layout (model_index.json, transformer/, vae/, text_encoder/, ...)"
            raise FileNotFoundError(f"{self.source} is neither a folder nor a hub repository 'owner/name' {layout}")

    @property
    def fetched(self) -> int:
        """Bytes read by ranges so far."""
        return 0 if self.repository is None else self.repository.fetched

    def __str__(self) -> str:
        return self.source

    def within(self, component: str) -> "Checkpoint":
        """The same from inside a component's folder: `file` takes names in it."""
        inner = copy(self)
        inner.source, inner.prefix = f"{self.source}/{component}", f"{self.prefix}{component}/"
        return inner

    def file(self, *names: str) -> Path | None:
        """The first of these files that exists, on this disk; None if there is none.

        On the hub, one that was downloaded before goes before the others, and then nothing is asked for.
        """
        names = [self.prefix + name for name in names]
        if self.repository is None:
            return finder(self.folder)(*names)
        found = names[0] if len(names) == 1 else self.repository.first(names)
        return found and self.repository.download(found)

    def config(self, name: str) -> dict:
        """A JSON file beside the weights. Raises FileNotFoundError, or ValueError if it is no JSON object."""
        path = self.file(name)
        if path is None:
            hint = "is it a checkpoint in the released layout?"
            if self.folder and (self.folder / UNFINISHED).exists():
                hint = "python -m minqwen.shrink left it unfinished, run that again"
            raise FileNotFoundError(f"{self.source} has no {name}: {hint}")
        found = read_json(path)
        with content_of(path):
            if (written := (found.get("_shrunk") or {}).get("format", FORMAT)) != FORMAT:
                raise ValueError(f"{self.source} is shrunk in format {written}, this minqwen reads format {FORMAT}")
        return found

    def weight_map(self, component: str) -> dict[str, str]:
        """Which file holds which tensor of a component: from its index, or else from the files' own headers."""
        files = self._files(component)
        if files[0].endswith(".index.json"):
            index = self.config(files[0])
            named, meta = index.get("weight_map"), index.get("metadata")
            for file in named.values() if named and isinstance(named, dict) else [None]:
                if not re.fullmatch(r"[^/\\:]+\.safetensors", str(file)):
                    index = f"{self.source}/{files[0]}"
                    raise ValueError(f"{index} points to {file!r}; only safetensors files beside it are opened")
            places = {name: f"{component}/{file}" for name, file in named.items()}
            if self.repository is not None and isinstance(meta, dict) and isinstance(meta.get("total_size"), int):
                size = f"{tqdm.format_sizeof(meta['total_size'], 'B')} in {len(set(named.values()))} files"
                self.repository.sizes |= dict.fromkeys(places.values(), f" (of {size})")
            return places
        places = {}
        for file in files:
            for name in self._shapes(file):
                if places.setdefault(name, file) != file:
                    raise ValueError(f"{self.source}: {file} and {places[name]} both hold {name}: take one file away")
        return places

    def _files(self, component: str) -> list[str]:
        """A component's index, or else its files of weights; none that is hidden."""
        names = [f"{component}/{stem}.safetensors{end}" for end in (".index.json", "") for stem in STEMS]
        if self.repository is not None:
            beside = [found] if (found := self.repository.first(names)) else []
        else:
            beside = sorted(f"{component}/{path.name}" for path in (self.folder / component).glob("[!.]*"))
        if usual := [name for name in names if name in beside]:
            return usual[:1]
        if found := [name for name in beside if name.endswith(".safetensors")]:
            return found
        found = f"found {beside or 'nothing'}; pickled weights are never opened, as that could run code"
        raise FileNotFoundError(f"{self.source} has no safetensors weights in {component}/, {found}")

    def shapes(self, component: str) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all tensors of a component, from its files' headers alone: no weight is read."""
        files = sorted(set(self.weight_map(component).values()))
        return {name: shape for file in files for name, shape in self._shapes(file).items()}

    def stored_bytes(self, component: str) -> dict[str, int]:
        """The bytes of each tensor of a component as stored, from its files' headers alone."""
        sizes = {}
        for file in sorted(set(self.weight_map(component).values())):
            if self._far(file):
                entries = self.repository.table(file).items()
                sizes |= {name: stop - start for name, entry in entries for start, stop in [entry["data_offsets"]]}
            else:
                with self._open(file) as weights:  # mapped: nothing is read
                    sizes |= {name: weights.get_tensor(name).nbytes for name in weights.keys()}
        return sizes

    def _shapes(self, file: str) -> dict[str, tuple[int, ...]]:
        if self._far(file):
            return {name: tuple(entry["shape"]) for name, entry in self.repository.table(file).items()}
        with self._open(file) as weights:
            return {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}

    def tensors(self, component: str, prefix: str = "") -> dict[str, torch.Tensor]:
        """The tensors of a component whose names start with prefix, as stored: name -> Tensor.

        From a folder they are mapped, not read: memory is used as they are touched. From the hub a prefix is read
        by byte ranges, the whole component as files. Raises KeyError if no name starts with prefix.
        """
        places = {name: file for name, file in self.weight_map(component).items() if name.startswith(prefix)}
        if not places:
            raise KeyError(f"no tensor in {self.source}/{component} starts with {prefix!r}")
        if self.repository is not None:
            self.repository.announce(f"{component}/{prefix}*", places)
        return self.read(places, by_ranges=bool(prefix))

    def blocks(self, component: str, without: Container[str] = ()) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """A component one block at a time: (prefix, its tensors), first ("", what belongs to no block).

        A block is an entry of `transformer_blocks`, `layers` or `blocks`. From a folder it is mapped, from the
        hub read by byte ranges. None is held here: whoever drops it (`del`) before the next needs memory for one.
        without: prefixes of blocks that are left out, unread.
        """
        places = {n: file for n, file in self.weight_map(component).items() if BLOCK.match(n)[0] not in without}
        blocks = {}
        for name, file in places.items():
            blocks.setdefault(BLOCK.match(name)[0], {})[name] = file
        if self.repository is not None:
            self.repository.announce(f"{component}/*", places)
        for prefix in sorted(blocks, key=lambda prefix: (len(prefix), prefix)):  # 2 before 10
            yield prefix, self.read(blocks[prefix], by_ranges=True)

    def _far(self, file: str) -> bool:
        return self.repository is not None and not self.repository.cached(file)

    def read(self, places: dict[str, str], by_ranges: bool = False) -> dict[str, torch.Tensor]:
        """Tensors, name -> the file that holds it, as stored; from a file on this disk they are mapped."""
        tensors = {}
        for file in sorted(set(places.values())):
            names = [name for name in places if places[name] == file]
            if by_ranges and self._far(file):
                tensors |= self.repository.tensors(file, names)
            else:
                with self._open(file) as weights:
                    tensors |= {name: weights.get_tensor(name) for name in names}
        return tensors

    @contextmanager
    def _open(self, file: str) -> Iterator[safe_open]:
        """A file of weights on this disk, downloaded first if it is on the hub: the one place that opens them."""
        path = self.file(file)
        if path is None:
            raise FileNotFoundError(f"{self.source} lists {file}, which is missing: fetch it again")
        with open_weights(path) as weights:
            yield weights

    def skeleton(self, module_class: type[nn.Module], component: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
        """A component without its weights, on the meta device and in evaluation mode, and its tensors as stored.

        Names are those of the released files. Raises ValueError as `load` does: what is missing, unexpected, misshapen,
        or of whole numbers without their scales.
        """
        config, rename = self.config(f"{component}/config.json"), getattr(module_class, "released_name", str)
        stored = {rename(name): tensor for name, tensor in self.tensors(component).items() if rename(name)}
        with content_of(f"{self.source}/{component}/config.json"), torch.device("meta"):
            expect_few_layers(config, len(stored))
            module = module_class(**config).eval()
        insert_quantized_layers(module, stored)
        assign(module, {name: tensor.to("meta") for name, tensor in stored.items()}, f"{self.source}/{component}")
        return module, stored

    def load(self, module_class: type[nn.Module], component: str, device="cpu", dtype=torch.float32) -> nn.Module:
        """A component as a module in evaluation mode, its weights strictly by name and shape.

        device, dtype (None: as stored): one for all tensors, or by the prefixes of their names, of which the longest
        counts: {"": "cpu", "transformer_blocks.": "cuda"}. Raises ValueError that names the missing, the unexpected and
        the misshapen tensors.
        """
        module, stored = self.skeleton(module_class, component)
        bar = tqdm(stored.items(), desc=f"loading {component}", unit=" tensors", leave=False, disable=len(stored) < 500)
        types = {name: None if keeps_dtype(name, t) else _choice(dtype, name) for name, t in stored.items()}
        moved = {name: t.to(device=_choice(device, name), dtype=types[name]) for name, t in bar}
        assign(module, moved, f"{self.source}/{component}")
        return module


def expect_few_layers(config: dict, most: int) -> None:
    """Raise ValueError for a config that asks for more layers than there are tensors: building them would not end."""
    for key, value in config.items():
        if isinstance(value, dict):
            expect_few_layers(value, most)
        elif key in ("num_layers", "num_hidden_layers", "depth", "num_res_blocks") and isinstance(value, int | float):
            if value > most:
                raise ValueError(f"{key} is {value}, but the weights are {most} tensors")


def assign(module: nn.Module, tensors: dict[str, torch.Tensor], where: str = "these weights") -> None:
    """Put tensors into a module built on the meta device, strictly; a ValueError names what does not fit."""
    try:
        module.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        told = "\n".join(line[:600] for line in str(error).splitlines()[:12])  # of 1,933 tensors the first will do
        raise ValueError(f"{where} do not fit {type(module).__name__}: {told}") from None


def choose_device(device: torch.device | str | None = None) -> torch.device:
    """A device that is there: the one asked for, by default CUDA, else MPS, else the CPU. Raises ValueError."""
    there = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    try:
        torch.zeros(1, device=device or there[0]).item()
        return torch.device(device or there[0])
    except Exception:  # RuntimeError, AssertionError or NotImplementedError, as PyTorch was built
        raise ValueError(f"there is no device {str(device)!r} here: expected {' or '.join(there)}") from None


def refuse_uncomputed(config: dict, computed: dict, where: str) -> None:
    """Raise ValueError for a key of a config whose value is not the one computed here; it may also be missing."""
    for key, value in computed.items():
        if config.get(key, value) != value:
            raise ValueError(f"{where}: {key} = {config[key]!r}, only {value!r} is computed here")


def _choice(choice, name: str):
    """One for all; or, of a dict by prefixes, that of the longest prefix of name."""
    if not isinstance(choice, dict):
        return choice
    fitting = [prefix for prefix in choice if name.startswith(prefix)]
    if not fitting:
        raise ValueError(f"{sorted(choice)} name no device or dtype for {name}: add the prefix '' for all others")
    return choice[max(fitting, key=len)]

"""Where weights are and how they get in: a folder or a hub repository in the released layout.

    folder or "owner/name"  ->  configs (dict), tensors (name -> Tensor), modules with their weights

A module is built on the meta device, where it costs nothing; its tensors are mapped from the files and assigned,
strictly by name and shape. Of a repository on the hub, one can also read single layers: a safetensors file starts
with a table of where each tensor lies, so a block of 0.7 GB comes out of 41 GB by HTTP byte ranges.
The surprise: the number of shards differs between releases (9 or 5); only the index knows which file holds what.
Pickled weights (.bin, .pt) are never opened: unpickling runs code. Tests: tests/test_checkpoint.py. Chapter 05.
"""

import json
import math
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import build_hf_headers, get_session
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm import tqdm

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
STEMS = ("diffusion_pytorch_model", "model")  # of weight files: diffusers' components, transformers' components
HELD_OPEN = (0.1, 0.2, 0.4, 0.8)  # seconds before each new attempt to replace a file
WAITS = (1, 2, 4)  # seconds before each new attempt to read a range
TRY_AGAIN = (429, 500, 502, 503, 504)
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Checkpoint:
    """A checkpoint in the released layout: `model_index.json` beside a folder for each component.

    source: a folder, or "owner/name" of a hub repository (then files are downloaded as they are needed, into
    huggingface_hub's cache, where an interrupted download goes on later). Raises FileNotFoundError if neither.
    """

    def __init__(self, source: str | os.PathLike, revision: str | None = None):
        self.source, self.revision = str(source), revision
        self.fetched = 0  # bytes read by ranges so far
        self.folder = Path(source) if self.source and Path(source).is_dir() else None
        if self.folder is None and (Path(source).exists() or not _looks_like_repo(self.source)):
            raise FileNotFoundError(
                f"{self.source} is neither a folder nor a hub repository 'owner/name'; minqwen reads the released "
                "layout (model_index.json, transformer/, vae/, text_encoder/, ...), not single weight files"
            )

    def file(self, name: str) -> Path | None:
        """A file of the checkpoint on this disk, downloaded first if it is on the hub; None if there is none."""
        if self.folder is not None:
            return self.folder / name if (self.folder / name).is_file() else None
        try:
            cached = self._cached(name)  # for the commit that the last config or index was read from
            if cached is not None and not isinstance(cached, str):
                return None
            if cached is not None and name.endswith(".safetensors"):  # asking the hub again for each shard takes long
                return Path(cached)
            return Path(hf_hub_download(self.source, name, revision=self.revision))
        except LocalEntryNotFoundError as error:
            raise ConnectionError(f"cannot reach the hub for {name} of {self.source}: {error}") from None
        except EntryNotFoundError:
            return None
        except (HfHubHTTPError, HFValidationError) as error:
            raise FileNotFoundError(f"cannot read {self.source} on the hub: {error}") from None
        except OSError:  # a full disk, a file that came out too short: says so itself
            raise
        except Exception as error:  # the http library's own errors differ between versions of huggingface_hub
            raise ConnectionError(f"the download of {name} of {self.source} broke off: {error}; run it again") from None

    def _cached(self, name: str) -> str | object | None:
        """Of a file on the hub: its path in the cache, another object if it is known not to exist, None if unknown."""
        return try_to_load_from_cache(self.source, name, revision=self.revision)

    def folder_of(self, component: str, names: tuple[str, ...]) -> Path:
        """The local folder of a component's small files (a tokenizer's, say); those that exist are fetched."""
        found = [path for name in names if (path := self.file(f"{component}/{name}"))]
        if not found:
            raise FileNotFoundError(f"{self.source}: no {component}/ with any of {', '.join(names)}")
        return found[0].parent

    def config(self, name: str) -> dict:
        """A JSON file of the checkpoint. Raises FileNotFoundError, or ValueError if it is no JSON object."""
        path = self.file(name)
        if path is None:
            raise FileNotFoundError(f"{self.source} has no {name}: is it a checkpoint in the released layout?")
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON ({error}): fetch it again") from None
        if not isinstance(config, dict):
            raise ValueError(f"{path} must hold a JSON object, found {type(config).__name__}")
        return config

    def weight_map(self, component: str) -> dict[str, str] | list[str]:
        """Which file holds which tensor, from the index; without an index, the names of the files themselves."""
        for stem in STEMS:
            if self.file(f"{component}/{stem}.safetensors.index.json"):
                weight_map = self.config(f"{component}/{stem}.safetensors.index.json").get("weight_map")
                if not isinstance(weight_map, dict):
                    raise ValueError(f"the index of {self.source}/{component} has no weight_map: fetch it again")
                for file in weight_map.values():
                    _refuse_outside(file, f"{self.source}/{component}")
                return weight_map
        for stem in STEMS:
            if self._exists(f"{component}/{stem}.safetensors"):
                return [f"{stem}.safetensors"]
        if self.folder is not None and (found := sorted((self.folder / component).glob("*.safetensors"))):
            return [path.name for path in found]
        beside = [] if self.folder is None else (self.folder / component).glob("*")
        pickled = sorted(path.name for path in beside if path.suffix in PICKLED)
        hint = f"; {pickled} are pickled and never opened, as that could run code" if pickled else ""
        raise FileNotFoundError(f"{self.source} has no safetensors weights in {component}/{hint}")

    def _exists(self, name: str) -> bool:
        if self.folder is not None:
            return (self.folder / name).is_file()
        if (cached := self._cached(name)) is not None:
            return isinstance(cached, str)
        try:
            self._fetch(name, 0, 8)
        except FileNotFoundError:
            return False
        return True

    def _has(self, name: str) -> bool:
        """Whether a file of a hub repository is in the cache already."""
        return isinstance(self._cached(name), str)

    def tensors(self, component: str, prefix: str = "") -> dict[str, torch.Tensor]:
        """The tensors of a component whose names start with prefix, as stored: name -> Tensor.

        From a folder they are mapped, not read: memory is used as they are touched. From the hub a prefix is read
        by byte ranges, the whole component as files. Raises KeyError if no name starts with prefix.
        """
        weights = self.weight_map(component)
        if isinstance(weights, dict):
            wanted = {name: file for name, file in weights.items() if name.startswith(prefix)}
            files = {file: [n for n in wanted if wanted[n] == file] for file in sorted(set(wanted.values()))}
        else:
            files = dict.fromkeys(weights)
        if self.folder is None and prefix and not all(self._has(f"{component}/{file}") for file in files):
            tensors = self._read_ranges(component, files, prefix)
        else:
            self._announce(component, files)
            paths = {file: self.file(f"{component}/{file}") for file in files}
            tensors = {}
            for file, names in files.items():
                if paths[file] is None:
                    raise FileNotFoundError(f"{self.source}/{component} lists {file}, which is missing: fetch it again")
                tensors |= _mapped(paths[file], names, prefix)
        if not tensors:
            raise KeyError(f"no tensor in {self.source}/{component} starts with {prefix!r}")
        return tensors

    def shapes(self, component: str) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all tensors of a component, from its files' headers alone: no weight is read."""
        weights = self.weight_map(component)
        files = sorted(set(weights.values())) if isinstance(weights, dict) else weights
        tables = [self._header(f"{component}/{file}")[0] for file in files]
        return {name: tuple(entry["shape"]) for table in tables for name, entry in table.items()}

    def load(
        self,
        module_class: type[nn.Module],
        component: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> nn.Module:
        """A component as a module in evaluation mode, its weights strictly by name and shape.

        Raises ValueError that lists the missing, the unexpected and the misshapen tensors.
        """
        with torch.device("meta"):
            module = module_class(**self.config(f"{component}/config.json"))
        stored = self.tensors(component)
        bar = tqdm(stored.items(), desc=f"loading {component}", unit=" tensors", leave=False, disable=len(stored) < 500)
        moved = {name: tensor.to(device, dtype) for name, tensor in bar}
        assign(module, moved, f"{self.source}/{component}")
        return module.eval()

    def _announce(self, component: str, files: dict) -> None:
        """Before a download: how much it will be. Nothing is asked or said if all is in the cache."""
        absent = [] if self.folder is not None else [f for f in files if not self._has(f"{component}/{f}")]
        if absent:
            size = sum(self._header(f"{component}/{file}")[2] for file in absent)
            print(f"{component}: {_gigabytes(size)} in {len(absent)} files from {self.source}", flush=True)

    def _read_ranges(self, component: str, files: dict, prefix: str) -> dict[str, torch.Tensor]:
        plan = []
        for file, names in files.items():
            table, start, _ = self._header(f"{component}/{file}")
            if missing := sorted(set(names or ()) - set(table)):
                raise ValueError(f"{self.source}/{component}/{file} does not match its index: it has no {missing[:12]}")
            plan += [(file, name, start, entry) for name, entry in table.items() if name.startswith(prefix)]
        total = sum(entry["data_offsets"][1] - entry["data_offsets"][0] for *_, entry in plan)
        print(f"{component}/{prefix}*: {len(plan)} tensors, {_gigabytes(total)} from {self.source}", flush=True)
        tensors = {}
        with tqdm(total=total, unit="B", unit_scale=True, desc=prefix, leave=False) as bar:
            for file, name, start, entry in plan:
                first, last = entry["data_offsets"]
                data = self._fetch(f"{component}/{file}", start + first, start + last)
                tensors[name] = _tensor(name, data, entry)
                bar.update(last - first)
        return tensors

    def _header(self, name: str) -> tuple[dict, int, int]:
        """The table of a safetensors file, where its data start, and the file's size in bytes."""
        length = int.from_bytes(self._fetch(name, 0, 8), "little")
        if not 2 <= length <= 100_000_000:  # the format's own limit
            raise ValueError(f"{self.source}/{name} is not a safetensors file: its header claims {length} bytes")
        try:
            table = json.loads(self._fetch(name, 8, 8 + length))
            table.pop("__metadata__", None)
            for entry in table.values():
                first, last = entry["data_offsets"]
                if not 0 <= first <= last or min(entry["shape"], default=0) < 0 or not isinstance(entry["dtype"], str):
                    raise ValueError
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ValueError(f"{self.source}/{name} is not a safetensors file: its header is damaged") from None
        size = max((entry["data_offsets"][1] for entry in table.values()), default=0)
        return table, 8 + length, 8 + length + size

    def _fetch(self, name: str, start: int, stop: int) -> bytes:
        """Bytes start to stop of a file, from this disk if it is there. Raises FileNotFoundError, ConnectionError."""
        if start == stop:
            return b""
        path = self._cached(name) if self.folder is None else str(self.folder / name)
        if isinstance(path, str):
            with open(path, "rb") as file:
                file.seek(start)
                return file.read(stop - start)
        url = hf_hub_url(self.source, name, revision=self.revision)
        asked = f"bytes={start}-{stop - 1}"
        headers = build_hf_headers() | {"Range": asked, "Accept-Encoding": "identity"}
        for wait in (*WAITS, None):
            try:
                with get_session().stream("GET", url, headers=headers, follow_redirects=True) as answer:
                    status, got = answer.status_code, answer.headers.get("Content-Range", "")
                    fits = status == 206 and got.startswith(f"{asked.replace('=', ' ')}/")
                    data = answer.read() if fits else b""  # an answer that is not the range may be 41 GB
                trouble = f"HTTP {status}"
            except Exception as error:  # the http library's own errors differ between versions of huggingface_hub
                status, trouble = None, error
            if status is not None and status not in TRY_AGAIN:
                break
            if wait is None:
                raise ConnectionError(f"cannot read {url}: {trouble}")
            time.sleep(wait)
        if status in (401, 403, 404):
            raise FileNotFoundError(f"{self.source} on the hub has no readable {name} (HTTP {status})")
        if len(data) != stop - start:
            raise ConnectionError(
                f"{url} answered HTTP {status} ({got or 'no range'}) with {len(data)} bytes to a request for {asked}: "
                "the server does not serve byte ranges, or the file is cut off"
            )
        self.fetched += len(data)
        return data


def assign(module: nn.Module, tensors: dict[str, torch.Tensor], where: str = "these weights") -> None:
    """Put tensors into a module built on the meta device, strictly; a ValueError lists all that does not fit."""
    try:
        module.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{where} do not fit {type(module).__name__}: {_shortened(str(error))}") from None


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """A path beside `path` to write to; once the body ends well it takes the place of `path`, all or nothing.

    Whoever reads `path` finds a whole file, the old or the new one, with several writers too and if one dies: what
    that one leaves is hidden and ends in .part. Raises OSError that names `path` and the reason (a full disk, say).
    """
    path = Path(path)
    half = path.with_name(f".{path.name[:50]}.{secrets.token_hex(4)}.part")  # a name of its own for each writer
    try:
        yield half
        with open(half, "rb+") as file:
            os.fsync(file.fileno())
        _replace(half, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # torch.save on a full disk
            raise
        hint = "" if isinstance(error, OSError) else "is the disk full? "
        raise OSError(f"cannot write {path}: {hint}{error}") from error
    finally:
        with suppress(OSError):
            half.unlink()


def _replace(half: Path, path: Path) -> None:
    for wait in HELD_OPEN:
        try:
            return os.replace(half, path)
        except PermissionError:  # Windows, while another program reads the old file
            time.sleep(wait)
    os.replace(half, path)


def _mapped(path: Path, names: list[str] | None, prefix: str) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)] if names is None else names
            return {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or does not match its index ({error}): fetch it again") from None


def _tensor(name: str, data: bytes, entry: dict) -> torch.Tensor:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{name} is stored as {entry['dtype']}; minqwen reads {', '.join(DTYPES)}")
    dtype = DTYPES[entry["dtype"]]
    if len(data) != math.prod(entry["shape"]) * dtype.itemsize:
        raise ValueError(f"{name}: {len(data)} bytes do not make a {entry['dtype']} tensor of shape {entry['shape']}")
    return torch.frombuffer(bytearray(data), dtype=dtype).view(entry["shape"])


def _refuse_outside(file: str, where: str) -> None:
    if not isinstance(file, str) or Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
        raise ValueError(f"the index of {where} points to {file!r}; only safetensors files beside it are opened")


def _looks_like_repo(source: str) -> bool:
    path_like = source.startswith((".", "/", "~")) or source.endswith(("/", ".safetensors", *PICKLED))
    return source.count("/") == 1 and not path_like


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def _shortened(message: str, lines: int = 12, width: int = 600) -> str:
    kept = [line if len(line) <= width else line[:width] + " ..." for line in message.splitlines()]
    return "\n".join(kept[:lines] + ([f"... and {len(kept) - lines} lines more"] if len(kept) > lines else []))

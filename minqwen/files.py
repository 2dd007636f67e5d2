"""Files, opened and written in one place: whoever reads a damaged one is told its path and what is wrong with it.

    read_json(path)  ->  the object in a small file          open_weights(path)  ->  a safetensors file, mapped
    finder(folder)(name, ...)  ->  the first of these files  content_of(path): what is wrong in it names it
    whole_file(path), write_json(path, content)              written all or nothing

The surprise: a pointer of Git LFS, an error page and a file that was cut off all carry the name of what they are not,
and the libraries below say "expected value at line 1 column 1". Tests: tests/test_files.py. Chapters 05 and 08.
"""

import json
import math
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from numbers import Real
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

HELD_OPEN = (0.1, 0.2, 0.4, 0.8)  # seconds before each new attempt to replace a file


def finder(folder) -> Callable[..., Path | None]:
    """find(name, ...): the first of these files, None if there is none. folder: a path, or Checkpoint.within(...)."""
    if hasattr(folder, "file"):
        return folder.file
    return lambda *names: next((path for name in names if (path := Path(folder) / name).is_file()), None)


@contextmanager
def content_of(path: str | os.PathLike) -> Iterator[None]:
    """Whatever the content of a small file leads to inside becomes a ValueError that names the file."""
    try:
        yield
    except Exception as error:  # libraries below raise nearly everything
        reason = error if isinstance(error, ValueError) else f"something in it has a wrong type or size ({error})"
        raise ValueError(reason if str(path) in str(reason) else f"{path}: {reason}") from None


def expect_numbers(**given: float) -> None:
    """Raise ValueError that names what is no finite number."""
    for name, value in given.items():
        if isinstance(value, bool) or not (isinstance(value, Real) and math.isfinite(value)):
            raise ValueError(f"{name} must be a finite number, got {value!r}")


def read_json(path: Path) -> dict:
    """The JSON object in a small file. Raises ValueError that names the file if it holds anything else."""
    try:
        return {**json.loads(path.read_text(encoding="utf-8-sig"))}
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} holds no JSON object ({error}): fetch it again") from None


@contextmanager
def open_weights(path: str | os.PathLike) -> Iterator[safe_open]:
    """A safetensors file, mapped. Raises FileNotFoundError, and ValueError that names it if it is damaged."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with safe_open(path, framework="pt") as weights:
            yield weights
    except (SafetensorError, OSError) as error:
        hint = "fetch it, or make it, again (pickled files are never opened)"
        raise ValueError(f"{path} is damaged or does not match its index ({error}): {hint}") from None


def save_weights(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """A safetensors file whose bytes depend on its content alone: safetensors writes metadata in an order of chance."""
    save_file(tensors, path, metadata)
    with open(path, "rb+") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(metadata.items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        assert len(text) == size, "the same table takes the same room"
        file.seek(8)
        file.write(text)


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


def write_json(path: Path, content: dict) -> None:
    """A JSON object in a small file, written whole."""
    with whole_file(path) as beside:
        beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _replace(half: Path, path: Path) -> None:
    for wait in HELD_OPEN:
        try:
            return os.replace(half, path)
        except PermissionError:  # Windows, while another program reads the old file
            time.sleep(wait)
    os.replace(half, path)

"""A repository on the hub: its files downloaded, or single tensors read out of them by byte ranges.

    "owner/name"  ->  files in huggingface_hub's cache; name -> Tensor, without a download

A safetensors file starts with a table of where each tensor lies. Whoever has read the table asks for the bytes of one
block alone, 0.7 GB out of 41 GB. Knows nothing of a model's folders: checkpoint.py does.
The surprise: a server may answer with other bytes than were asked for, or with all 41 GB. The answer's header says
which bytes they are, and is looked at before the first of them is read. Tests: tests/test_hub.py. Chapter 05.
"""

import hashlib
import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import _CACHED_NO_EXIST, constants, errors, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.utils import build_hf_headers, get_session
from tqdm import tqdm

# Seconds: before each new attempt; the most, if the hub asks for more; until a hub from which nothing comes is away.
WAITS, LONGEST, PATIENCE = (1, 2, 4), 120, 4
TRY_AGAIN = (None, 429, 500, 502, 503, 504)  # None: no answer
HINT = "run it again, or name a folder that holds all files in place of the repository"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I8": torch.int8, "U8": torch.uint8}  # fmt: skip


class Repository:
    """A repository "owner/name" of the hub; its files go by their paths in it. fetched: bytes read by ranges so far.

    What lies in the cache is taken as it is, and the hub is not asked whether there is a newer one.
    """

    def __init__(self, name: str, revision: str | None = None):
        self.name, self.revision, self.fetched, self.reached = name, revision, 0, False
        # Of files: what their headers hold; how large they are, in words, if known; which content was read first.
        self.tables, self.sizes, self.versions = {}, {}, {}

    def cached(self, file: str) -> bool:
        """Whether a file is on this disk already."""
        return isinstance(try_to_load_from_cache(self.name, file, revision=self.revision), str)

    def download(self, file: str) -> Path | None:
        """A file on this disk; None if the repository has no such file.

        A broken line is tried again, and a run that was cut off keeps the files that are whole. Whether the broken one
        goes on where it broke is up to huggingface_hub: before 1.18 always, since then only within a run, if at all.
        Raises ConnectionError if the hub cannot be reached or sends other bytes than it says, FileNotFoundError if it
        does not give the repository, OSError if the disk does not take the file.
        """
        if (cached := try_to_load_from_cache(self.name, file, revision=self.revision)) is not None:
            return None if cached is _CACHED_NO_EXIST else Path(cached)
        self._reach(file)
        for wait in (*WAITS, None):
            try:
                return _verified(Path(hf_hub_download(self.name, file, revision=self.revision)))
            except errors.RemoteEntryNotFoundError:
                return None
            except (errors.HTTPError, OSError, RuntimeError) as error:  # the last is hf_xet's, which downloads
                refused = isinstance(error, errors.HfHubHTTPError) and error.response.status_code not in TRY_AGAIN
                busy = isinstance(error, errors.HTTPError) or hasattr(error.__cause__, "response")
                if wait is None or refused or not busy:
                    kind = FileNotFoundError if refused else OSError if getattr(error, "errno", 0) else ConnectionError
                    told = f"{file} of {self.name}{self.sizes.get(file, '')} on the hub to {constants.HF_HUB_CACHE}"
                    raise kind(f"cannot download {told}: {error.__cause__ or error}; {HINT}") from None
            time.sleep(wait)

    def first(self, files: list[str]) -> str | None:
        """The first of these files that exists; what is on this disk goes before what must be asked for."""
        here = list(filter(self.cached, files))
        absent = [f for f in files if try_to_load_from_cache(self.name, f, revision=self.revision) is None]
        if len(absent) > 1 and not here:
            self._reach(" or ".join(absent))
        return here[0] if here else next(filter(self._exists, absent), None)  # asks no more than it must

    def _reach(self, file: str) -> None:
        """Ask once, and not for long, whether a hub is there: new attempts are for one that stumbles."""
        if self.reached:
            return
        url = hf_hub_url(self.name, file.split(" ")[0], revision=self.revision)
        head = ThreadPoolExecutor(1).submit(get_session().head, url, headers=build_hf_headers(), timeout=PATIENCE)
        try:  # in a thread: looking up a name takes any time, and each of its addresses is tried for PATIENCE
            head.result(PATIENCE + 0.5)
        except (errors.HTTPError, ConnectionError, TimeoutError) as error:
            if isinstance(error, OSError) or type(error).__name__ in ("ConnectError", "ConnectTimeout"):
                told = f"{file} of {self.name}{self.sizes.get(file, '')}, not cached: {constants.ENDPOINT} is away"
                raise ConnectionError(f"cannot download {told} ({error!r}); {HINT}") from None
        self.reached = True

    def _exists(self, file: str) -> bool:
        if not file.endswith(".safetensors"):
            return self.download(file) is not None
        try:  # of weights no more than the table is read for that
            return bool(self.table(file))
        except FileNotFoundError:
            return False

    def table(self, file: str) -> dict[str, dict]:
        """What a safetensors file holds: name -> dtype, shape and data_offsets, here counted from the file's start."""
        if file not in self.tables:
            length = int.from_bytes(self.fetch(file, 0, 8), "little")
            header = self.fetch(file, 8, 8 + length) if 2 <= length <= 100_000_000 else b""  # the format's own limits
            try:
                table = json.loads(header)
                table.pop("__metadata__", None)
                for entry in table.values():
                    entry["data_offsets"] = [8 + length + place for place in entry["data_offsets"]]
                    entry["dtype"], entry["shape"]
            except (ValueError, TypeError, KeyError, AttributeError):
                raise ValueError(f"{self.name}/{file} is not a safetensors file: its header is damaged") from None
            self.tables[file] = table
        return self.tables[file]

    def announce(self, what: str, places: dict[str, str]) -> None:
        """Before tensors (name -> its file) come: how much it will be. Says nothing if all are on this disk."""
        ranges = [self._entry(file, name)["data_offsets"] for name, file in places.items() if not self.cached(file)]
        if ranges:
            size = tqdm.format_sizeof(sum(stop - start for start, stop in ranges), "B")
            print(f"{what}: {len(ranges)} tensors, {size} from {self.name}", flush=True)

    def _entry(self, file: str, name: str) -> dict:
        if name not in self.table(file):
            raise ValueError(f"{self.name}/{file} does not match its index: it has no {name}")
        return self.table(file)[name]

    def tensors(self, file: str, names: list[str]) -> dict[str, torch.Tensor]:
        """Tensors of a file by byte ranges, as stored."""
        entries = ((name, self._entry(file, name)) for name in tqdm(names, desc=file, unit=" tensors", leave=False))
        return {name: _tensor(name, self.fetch(file, *entry["data_offsets"]), entry) for name, entry in entries}

    # Not HfFileSystem (tried with huggingface-hub 2.4): it takes bytes of another range for those it asked for, reads
    # the whole file where ranges are ignored, and asks three questions more.
    def fetch(self, file: str, start: int, stop: int) -> bytes:
        """Bytes start to stop of a file.

        Raises FileNotFoundError; ConnectionError after some attempts, or if the file is another one than it was before.
        """
        self._reach(file)
        url = hf_hub_url(self.name, file, revision=self.revision)
        for wait in (*WAITS, None):
            try:
                status, told, data, later, version = _ask(url, start, stop)
            except errors.HTTPError as error:
                status, told, data, later, version = None, f"{type(error).__name__}: {error}", b"", 0, None
            if wait is None or status not in TRY_AGAIN:
                break
            time.sleep(max(wait, min(later, LONGEST)))
        if status in (401, 403, 404):
            raise FileNotFoundError(f"{self.name} on the hub has no readable {file} (HTTP {status})")
        if len(data) != stop - start:
            hint = "" if status in TRY_AGAIN else "; the server does not serve byte ranges, or the file is cut off"
            raise ConnectionError(f"cannot read {url}, bytes {start} to {stop}: {told}, {len(data)} bytes read{hint}")
        if self.versions.setdefault(file, version) != version:
            raise ConnectionError(f"{self.name}/{file} on the hub changed while it was read: begin anew")
        self.fetched += len(data)
        return data


def _ask(url: str, start: int, stop: int) -> tuple[int, str, bytes, int, tuple]:
    """One request for a range: the status, what the answer says of itself, its bytes if they are the range's, how many
    seconds it asks to wait, and which content of the file it is of."""
    headers = build_hf_headers() | {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    # A silent line raises after this many seconds: huggingface_hub's sessions may wait for ever.
    with get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as answer:
        got, later = answer.headers.get("Content-Range", "no range"), answer.headers.get("Retry-After", "")
        # What does not fit may be 41 GB.
        data = answer.read() if answer.status_code == 206 and got.startswith(f"bytes {start}-{stop - 1}/") else b""
    # Which content it is, the hub says where it redirects to a CDN, whose own ETag may differ from machine to machine.
    hub = (answer, *answer.history)[-1].headers
    version = hub.get("X-Linked-Etag", hub.get("ETag")), got.rpartition("/")[2]
    return answer.status_code, f"HTTP {answer.status_code}, {got}", data, int(later) if later.isdigit() else 0, version


def _verified(path: Path) -> Path:
    """A file that was just downloaded, unless its bytes are not those whose SHA-256 names it in the cache."""
    blob = path.parent / path.readlink() if path.is_symlink() else path
    if len(blob.name) == 64 and hashlib.sha256(np.memmap(blob, np.uint8)).hexdigest() != blob.name:
        blob.unlink()
        raise ConnectionError("its bytes are not those that the hub announced")
    return path


def _tensor(name: str, data: bytes, entry: dict) -> torch.Tensor:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{name} is stored as {entry['dtype']}; minqwen reads {', '.join(DTYPES)}")
    dtype = DTYPES[entry["dtype"]]
    if len(data) != math.prod(entry["shape"]) * dtype.itemsize:
        raise ValueError(f"{name}: {len(data)} bytes do not make a {entry['dtype']} tensor of shape {entry['shape']}")
    return torch.frombuffer(bytearray(data), dtype=dtype).view(entry["shape"])

"""A repository on the hub: its files downloaded, or single tensors read out of them by byte ranges.

    "owner/name"  ->  files in huggingface_hub's cache; name -> Tensor, without a download

A safetensors file starts with a table of where each tensor lies. Whoever has read the table asks for the bytes of one
block alone, 0.7 GB out of 41 GB. Knows nothing of a model's folders: checkpoint.py does.
The surprise: a server may answer with other bytes than were asked for, or with all 41 GB. The answer's header says
which bytes they are, and is looked at before the first of them is read. Tests: tests/test_hub.py. Chapter 05.
"""

import json
import math
import time
from itertools import chain
from pathlib import Path

import torch
from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RemoteEntryNotFoundError
from huggingface_hub.errors import HTTPError as NetworkError  # of httpx or httpx2, as huggingface_hub's version has it
from huggingface_hub.utils import build_hf_headers, get_session
from tqdm import tqdm

WAITS = (1, 2, 4)  # seconds before each new attempt to read a range
PATIENCE = 4  # seconds until a hub from which nothing comes at all counts as away
TRY_AGAIN = (None, 429, 500, 502, 503, 504)  # None: no answer
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I8": torch.int8, "U8": torch.uint8}  # fmt: skip


class Repository:
    """A repository "owner/name" of the hub; its files go by their paths in it. fetched: bytes read by ranges so far.

    What lies in the cache is taken as it is, and the hub is not asked whether there is a newer one.
    """

    def __init__(self, name: str, revision: str | None = None):
        self.name, self.revision = name, revision
        self.fetched, self.reached = 0, False
        self.tables, self.sizes = {}, {}  # of files: what their headers hold; how large they are, in words, if known

    def cached(self, file: str) -> bool:
        """Whether a file is on this disk already."""
        return isinstance(try_to_load_from_cache(self.name, file, revision=self.revision), str)

    def download(self, file: str) -> Path | None:
        """A file on this disk, where an interrupted download goes on; None if the repository has no such file.

        Raises ConnectionError if the hub cannot be reached, FileNotFoundError if it does not give the repository.
        """
        cached = try_to_load_from_cache(self.name, file, revision=self.revision)
        if cached is not None:
            return None if cached is _CACHED_NO_EXIST else Path(cached)
        self._reach(file)
        try:
            return Path(hf_hub_download(self.name, file, revision=self.revision))
        except RemoteEntryNotFoundError:
            return None
        except HfHubHTTPError as error:
            raise FileNotFoundError(f"cannot read {self.name} on the hub: {error}") from None
        except (LocalEntryNotFoundError, NetworkError, RuntimeError) as error:  # the last is hf_xet's, which downloads
            hint = "run it again to go on, or name a folder that holds all files"
            raise ConnectionError(f"cannot download {file} of {self.name}: {error}; {hint}") from None

    def first(self, files: list[str]) -> str | None:
        """The first of these files that exists; what is on this disk goes before what must be asked for."""
        absent = [f for f in files if try_to_load_from_cache(self.name, f, revision=self.revision) is None]
        if len(absent) > 1 and not any(map(self.cached, files)):
            self._reach(" or ".join(absent))
        return next(chain(filter(self.cached, files), filter(self._exists, absent)), None)  # asks no more than it must

    def _reach(self, file: str) -> None:
        """Ask once, and not for long, whether a hub is there: new attempts are for one that stumbles."""
        if self.reached:
            return
        url = hf_hub_url(self.name, file.split(" ")[0], revision=self.revision)
        try:
            get_session().head(url, headers=build_hf_headers(), timeout=PATIENCE)
        except (NetworkError, ConnectionError) as error:
            if isinstance(error, ConnectionError) or type(error).__name__ in ("ConnectError", "ConnectTimeout"):
                missing = f"{file} of {self.name}{self.sizes.get(file, '')}, which is not in the cache: the hub is away"
                hint = "run it again with a network, or name a folder that holds all files"
                raise ConnectionError(f"cannot download {missing} ({error}); {hint}") from None
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
        absent = {file for file in set(places.values()) if not self.cached(file)}
        ranges = [self._entry(file, name)["data_offsets"] for name, file in places.items() if file in absent]
        if ranges:
            size = tqdm.format_sizeof(sum(stop - start for start, stop in ranges), "B")
            print(f"{what}: {len(ranges)} tensors, {size} from {self.name}", flush=True)

    def _entry(self, file: str, name: str) -> dict:
        if name not in self.table(file):
            raise ValueError(f"{self.name}/{file} does not match its index: it has no {name}")
        return self.table(file)[name]

    def tensors(self, file: str, names: list[str]) -> dict[str, torch.Tensor]:
        """Tensors of a file by byte ranges, as stored."""
        tensors = {}
        for name in tqdm(names, desc=file, unit=" tensors", leave=False):
            entry = self._entry(file, name)
            tensors[name] = _tensor(name, self.fetch(file, *entry["data_offsets"]), entry)
        return tensors

    # Not HfFileSystem (tried with huggingface-hub 2.4): it takes bytes of another range for those it asked for, reads
    # the whole file where ranges are ignored, and asks three questions more.
    def fetch(self, file: str, start: int, stop: int) -> bytes:
        """Bytes start to stop of a file. Raises FileNotFoundError, or ConnectionError after some attempts."""
        self._reach(file)
        url = hf_hub_url(self.name, file, revision=self.revision)
        for wait in (*WAITS, None):
            try:
                status, told, data = _ask(url, start, stop)
            except NetworkError as error:
                status, told, data = None, f"{type(error).__name__}: {error}", b""
            if wait is None or status not in TRY_AGAIN:
                break
            time.sleep(wait)
        if status in (401, 403, 404):
            raise FileNotFoundError(f"{self.name} on the hub has no readable {file} (HTTP {status})")
        if len(data) != stop - start:
            hint = "" if status in TRY_AGAIN else "; the server does not serve byte ranges, or the file is cut off"
            raise ConnectionError(f"cannot read {url}, bytes {start} to {stop}: {told}, {len(data)} bytes read{hint}")
        self.fetched += len(data)
        return data


def _ask(url: str, start: int, stop: int) -> tuple[int, str, bytes]:
    """One request for a range: the status, what the answer says of itself, and its bytes if they are the range's."""
    headers = build_hf_headers() | {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    with get_session().stream("GET", url, headers=headers, follow_redirects=True) as answer:
        got = answer.headers.get("Content-Range", "no range")
        fits = answer.status_code == 206 and got.startswith(f"bytes {start}-{stop - 1}/")
        data = answer.read() if fits else b""  # what does not fit may be 41 GB
    return answer.status_code, f"HTTP {answer.status_code}, {got}", data


def _tensor(name: str, data: bytes, entry: dict) -> torch.Tensor:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{name} is stored as {entry['dtype']}; minqwen reads {', '.join(DTYPES)}")
    dtype = DTYPES[entry["dtype"]]
    if len(data) != math.prod(entry["shape"]) * dtype.itemsize:
        raise ValueError(f"{name}: {len(data)} bytes do not make a {entry['dtype']} tensor of shape {entry['shape']}")
    return torch.frombuffer(bytearray(data), dtype=dtype).view(entry["shape"])

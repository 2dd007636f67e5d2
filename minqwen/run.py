"""A training run on disk: what it needs to go on where it stopped, and its log.

    Run(state file, log file, fields, parts, settings)  ->  step, rows; save, resume

Parts are whatever has a state to keep: a module, an optimiser, a random generator. The training loop counts `step`
up and appends to `rows`; everything else is the loop's own. What a run is of stands in its settings, digests of its
data (`look_at`) and its model (`model_of`) among them: with others it is not gone on with.
The surprise: two files cannot be replaced in one moment. So the log is written first and whole, and only then the
state, which alone says what is done: a run killed between the two goes on from the older state and writes the log anew.
Tests: tests/test_run.py. Chapter 10.
"""

import csv
import hashlib
import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from minqwen.files import open_weights, whole_file
from minqwen.parallel import entire, rank, wait

TEXTS = ("embeds", "empty")  # of a sample's tensors; the others are latents of pictures


class Run:
    """Where a training run stands, in memory and in two files.

    state, log: the files; None: not kept. fields: the log's columns; rows: its lines, of plain numbers and words (None:
    an empty cell). parts: name -> object with state_dict and load_state_dict. settings: what may not change when the
    run goes on, as JSON can hold it.
    """

    def __init__(self, state: Path | None, log: Path | None, fields: Sequence[str], parts: dict, settings: dict):
        self.state, self.log, self.fields, self.parts = state, log, fields, parts
        self.settings = json.loads(json.dumps(settings))  # as it comes out of the file: tuples are lists
        self.step, self.rows, self.seconds = 0, [], 0.0
        self._started = time.monotonic()

    def elapsed(self) -> float:
        """Seconds of training, those before the last resumption counted in."""
        return self.seconds + time.monotonic() - self._started

    def save(self) -> None:
        """The log, then the state. Each is replaced in one step: the old file stays until the new one is whole.

        Of several processes the first writes; all must be here.
        """
        parts = {name: part.state_dict() for name, part in self.parts.items()} if self.state is not None else {}
        if rank():
            return
        if self.log is not None:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(self.log) as path, open(path, "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([self.fields, *self.rows])
        if self.state is not None:
            self.state.parent.mkdir(parents=True, exist_ok=True)
            run = {"step": self.step, "seconds": self.elapsed(), "rows": self.rows, "settings": self.settings}
            with whole_file(self.state) as path:
                torch.save({"run": json.dumps(run), "parts": parts}, path)

    def resume(self) -> bool:
        """Go on where the run in the state file stopped; False if there is none.

        Raises ValueError for a run with other settings, of another model, and for a file that is damaged.
        """
        if self.state is None or not self.state.exists():
            return False
        for left in self.state.parent.glob(f".{self.state.name}.*.part"):  # by a save that was killed
            left.unlink(missing_ok=True)  # another process may have been here
        run = read_state(self.state)
        before, now = run["settings"], self.settings
        names = [name for name in before | now if before.get(name) != now.get(name)]
        if names:
            different = ", ".join(f"{name} {before.get(name)} there, {now.get(name)} now" for name in names)
            raise ValueError(f"{self.state} has other settings ({different}): go on with those, or in another folder")
        try:
            for name, part in self.parts.items():
                part.load_state_dict(run["parts"][name])
        except Exception as error:  # each part has its own way to say it
            reason = (str(error).splitlines() or [type(error).__name__])[-1].strip()
            raise ValueError(f"{self.state} is of a run that trained another model ({reason})") from None
        self.step, self.rows, self.seconds = run["step"], run["rows"], run["seconds"]
        self._started = time.monotonic()
        return True


def read_state(path: Path) -> dict:
    """A state file as it was saved: step, seconds, rows, settings, and parts (name -> state dict, on the CPU).

    Raises ValueError if the file is damaged or of another program. Nothing in it is ever run as code.
    """
    path.open("rb").close()  # what the system refuses, it says itself
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        run, kinds = json.loads(saved["run"]), {"step": int, "seconds": float, "settings": dict}
        run["rows"], run["parts"] = [tuple(row) for row in run["rows"]], dict(saved["parts"])
        return run | {name: kind(run[name]) for name, kind in kinds.items()}
    except Exception:  # torch's own words are long, and advise to open the file without its safeguards
        raise ValueError(f"{path} is damaged, or not the state of a training run: move it away to begin anew") from None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A lock on the folder, made first, which the system takes off when its process ends, however that ends.

    Of several processes the first takes it, for all of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    if not rank():
        try:
            lock.acquire(timeout=1)
        except Timeout:
            print(f"another run works on {folder}: waiting for it", flush=True)
            lock.acquire()
    wait()
    try:
        yield
    finally:
        lock.release()


def digest(parts: Iterable[str | Tensor]) -> str:
    """Words and tensors, in a few letters."""
    told = hashlib.sha256()
    for part in parts:
        told.update(part.encode() if isinstance(part, str) else part.detach().cpu().ravel().view(torch.uint8).numpy())
    return told.hexdigest()[:16]


def model_of(pipe) -> str:
    """Which transformer a run is of: its dtype, and a digest of its config, its schedule and its weights.

    Of these the names, shapes and dtypes, small ones whole and 64 numbers of each large one: cheap at any size.
    """
    parts = [repr(sorted(what.items())) for what in (pipe.transformer.config, pipe.schedule)]
    for name, tensor in pipe.transformer.state_dict().items():
        few = entire(tensor).reshape(-1)[:: tensor.numel() // 64 if tensor.numel() > 2**16 else 1]
        parts += [f"{name} {tuple(tensor.shape)} {tensor.dtype}", "" if tensor.is_meta else few]
    return f"{str(pipe.dtype).removeprefix('torch.')} {digest(parts)}"


def look_at(dataset: Sequence, config: dict) -> tuple[list[list[int]], str]:
    """Indices of samples that may share a batch, as their pictures have equal sizes; and a digest of all samples.

    config: the transformer's. Raises ValueError for a dataset that is empty, a file that is damaged or no sample, and
    a sample that is not of the model's widths.
    """
    text, latents = config.get("joint_attention_dim", 3584), config.get("in_channels", 64) // 4
    groups, keys, kept = {}, [], getattr(dataset, "kept", dataset)
    for i in range(len(dataset)):
        name, key, shapes = described(kept[i])
        for part, shape in shapes.items():
            even = (max(2, side - side % 2) for side in shape[-2:])
            wanted = (1, max((1, *shape[-2:-1])), text) if part in TEXTS else (1, latents, 1, *even)
            if shape != wanted:
                hint = "the cache is of another model, run python -m minqwen.precompute with this one's --model"
                raise ValueError(f"{name}: {part} {tuple(shape)}, where the model takes {wanted}: {hint}")
        keys.append(key)
        groups.setdefault(tuple(sorted((p, *s) for p, s in shapes.items() if p not in TEXTS)), []).append(i)
    if not groups:
        raise ValueError("the dataset is empty: there is nothing to train on")
    return list(groups.values()), digest(keys)


def described(sample) -> tuple[str, str, dict[str, tuple[int, ...]]]:
    """A sample's name, a digest of it, its tensors' shapes; of a file its path, its key, and what its header says."""
    if not isinstance(sample, Path):
        tensors = tensors_of(sample)
        words = (f"{name} {tuple(t.shape)} {t.dtype}" for name, t in tensors.items())
        return sample.name, digest([sample.name, *words, *tensors.values()]), {n: t.shape for n, t in tensors.items()}
    with open_weights(sample) as file:
        key = (file.metadata() or {}).get("key", sample.stem)  # caches of format 1 have none
        parts = {name: file.get_slice(name) for name in file.keys()}
        shapes = {name: tuple(part.get_shape()) for name, part in parts.items()}
        floats = all("F" in part.get_dtype() for part in parts.values())
    if key != sample.stem or not floats or shapes.keys() != {"latents", *TEXTS, *control_names(len(shapes) - 3)}:
        raise ValueError(f"{sample} is no sample of this cache: delete it, and run python -m minqwen.precompute again")
    return str(sample), key, shapes


def control_names(count: int) -> list[str]:
    """Of the tensors in a sample's file: control, control_2, control_3, ..."""
    return ["control", *(f"control_{n}" for n in range(2, count + 1))][: max(0, count)]


def tensors_of(sample) -> dict[str, Tensor]:
    """Of a Sample in memory, by name."""
    control = {f"control_{n}": latents for n, latents in enumerate(sample.control)}
    return {"latents": sample.latents, "embeds": sample.embeds, "empty": sample.empty} | control


def check_finite(samples: Sequence, rows: Sequence, norm: Tensor, lr: float) -> None:
    """Raise FloatingPointError where a step's losses or the norm of its gradient are not: they would spoil the run."""
    bad = [sample for sample, row in zip(samples, rows, strict=True) if not math.isfinite(row.loss)]
    if bad or not norm.isfinite():
        what = f"loss of {[sample.name for sample in bad]}" if bad else "gradient"
        spoilt = not all(tensor.isfinite().all() for sample in bad for tensor in tensors_of(sample).values())
        why = "the data hold NaN or infinity, make them again" if spoilt else f"try an lr below {lr}"
        raise FloatingPointError(f"step {rows[0].step}: the {what} is not finite; {why}")

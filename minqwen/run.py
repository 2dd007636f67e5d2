"""A training run on disk: what it needs to go on where it stopped, and its log.

    Run(state file, log file, fields, parts, settings)  ->  step, rows; save, resume

Parts are whatever has a state to keep: a module, an optimiser, a random generator. The training loop counts `step`
up and appends to `rows`; everything else is the loop's own.
The surprise: two files cannot be replaced in one moment. So the log is written first and whole, and only then the
state, which alone says what is done: a run killed between the two goes on from the older state and writes the log anew.
Tests: tests/test_run.py. Chapter 10.
"""

import csv
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from minqwen.files import whole_file


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
        """The log, then the state. Each is replaced in one step: the old file stays until the new one is whole."""
        if self.log is not None:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(self.log) as path, open(path, "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([self.fields, *self.rows])
        if self.state is not None:
            self.state.parent.mkdir(parents=True, exist_ok=True)
            run = {"step": self.step, "seconds": self.elapsed(), "rows": self.rows, "settings": self.settings}
            parts = {name: part.state_dict() for name, part in self.parts.items()}
            with whole_file(self.state) as path:
                torch.save({"run": json.dumps(run), "parts": parts}, path)

    def resume(self) -> bool:
        """Go on where the run in the state file stopped; False if there is none.

        Raises ValueError for a run with other settings, of another model, and for a file that is damaged.
        """
        if self.state is None or not self.state.exists():
            return False
        for left in self.state.parent.glob(f".{self.state.name}.*.part"):  # by a save that was killed
            left.unlink()
        run = read_state(self.state)
        before, now = run["settings"], self.settings
        names = [name for name in before | now if before.get(name) != now.get(name)]
        if names:
            different = ", ".join(f"{name} {before.get(name)} there, {now.get(name)} now" for name in names)
            raise ValueError(f"{self.state} has other settings ({different}): go on with those, or elsewhere")
        try:
            for name, part in self.parts.items():
                part.load_state_dict(run["parts"][name])
        except (KeyError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise ValueError(f"{self.state} is of a run that trained another model ({reason})") from None
        self.step, self.rows, self.seconds = run["step"], [tuple(row) for row in run["rows"]], run["seconds"]
        self._started = time.monotonic()
        return True


def read_state(path: Path) -> dict:
    """A state file as it was saved: step, seconds, rows, settings, and parts (name -> state dict, on the CPU).

    Raises ValueError if the file is damaged or of another program. Nothing in it is ever run as code.
    """
    path.open("rb").close()  # what the system refuses, it says itself
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        run = json.loads(saved["run"])
        return {name: run[name] for name in ("step", "seconds", "rows", "settings")} | {"parts": saved["parts"]}
    except Exception:  # torch's own words are long, and advise to open the file without its safeguards
        raise ValueError(f"{path} is damaged, or not the state of a training run: move it away to begin anew") from None


def locked(folder: Path):
    """A lock on the folder, which the system takes off when its process ends, however that ends."""
    lock = FileLock(folder / ".lock")
    try:
        return lock.acquire(timeout=1)
    except Timeout:
        print(f"another run works on {folder}: waiting for it", flush=True)
        return lock.acquire()

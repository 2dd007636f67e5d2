"""What the training recipes share: pictures as tensors, a CSV log, checkpoints that resume."""

import csv
import json
import os
import time
from pathlib import Path

import numpy as np
import torch

from minqwen.world import Scene, draw_array


def pictures(scenes: list[Scene]) -> torch.Tensor:
    """Scenes -> (B, 3, 1, 64, 64) in [-1, 1]."""
    array = np.stack([draw_array(scene) for scene in scenes])
    return torch.from_numpy(array).permute(0, 3, 1, 2)[:, :, None].float() / 127.5 - 1


def device() -> str:
    """Where to train: CUDA, else MPS, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


class Log:
    """A line of numbers on the screen and in a CSV file, which a resumed run continues."""

    def __init__(self, path: Path, fields: list[str]):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.fields = path, fields
        if not path.exists():
            path.write_text(",".join(fields) + "\n")

    def __call__(self, **numbers) -> None:
        row = {k: round(v, 4) if isinstance(v, float) else v for k, v in numbers.items()}
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.fields).writerow(row)
        print(" ".join(f"{k} {v}" for k, v in row.items()), flush=True)


class Run:
    """Everything that a training run must remember to go on exactly where it stopped."""

    def __init__(self, path: Path, modules: dict, rng: np.random.Generator):
        self.path, self.modules, self.rng = path, modules, rng
        self.step, self.seconds, self._started = 0, 0.0, time.time()

    def elapsed(self) -> float:
        """Seconds of training, earlier starts counted in."""
        return self.seconds + time.time() - self._started

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        state = {name: module.state_dict() for name, module in self.modules.items()}
        state |= {"step": self.step, "seconds": self.elapsed(), "torch": torch.get_rng_state()}
        state["numpy"] = json.dumps(self.rng.bit_generator.state)
        torch.save(state, self.path.with_suffix(".tmp"))
        os.replace(self.path.with_suffix(".tmp"), self.path)  # never half a checkpoint

    def resume(self) -> bool:
        if not self.path.exists():
            return False
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        for name, module in self.modules.items():
            module.load_state_dict(state[name])
        self.step, self.seconds = state["step"], state["seconds"]
        torch.set_rng_state(state["torch"])
        self.rng.bit_generator.state = json.loads(state["numpy"])
        self._started = time.time()
        print(f"resumed {self.path.name} at step {self.step}, {self.seconds / 60:.1f} minutes in", flush=True)
        return True

"""What the training recipes share: pictures as tensors, chance that resumes, the log's lines, an optimiser."""

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from minqwen.run import Run
from minqwen.world import Scene, draw_array

# Options that may differ when a run goes on; with any other one changed it would be another run.
FREE = ("steps", "checkpoint", "runs", "out", "device", "compile", "check_every", "save_every")


def pictures(scenes: list[Scene]) -> Tensor:
    """Scenes -> (B, 3, 1, 96, 96) in [-1, 1]."""
    return as_pixels([draw_array(scene) for scene in scenes])


def as_pixels(arrays: list[np.ndarray]) -> Tensor:
    """Pictures (H, W, 3) of levels up to 255, all of one size -> (B, 3, 1, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)[:, :, None].float() / 127.5 - 1


def device() -> str:
    """Where to train: CUDA, else MPS, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


@contextmanager
def fast(args: argparse.Namespace) -> Iterator[None]:
    """With --bf16, products are computed in bfloat16; weights and their steps stay in float32.

    On a CPU attention is written out: the gradients of the fused one take longer than all else of a step together.
    """
    attention = sdpa_kernel(SDPBackend.MATH) if args.device == "cpu" else nullcontext()
    with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.bf16), attention:
        yield


def settings(args: argparse.Namespace) -> dict:
    """The options that a run keeps when it goes on."""
    return {name: value for name, value in vars(args).items() if name not in FREE}


def note(run: Run, **numbers: float) -> None:
    """A line for the log, with what was not measured left empty; it is said on the screen too."""
    numbers = {name: round(value, 4) if isinstance(value, float) else value for name, value in numbers.items()}
    run.rows.append(tuple(numbers.get(field) for field in run.fields))
    print(" ".join(f"{name} {value}" for name, value in numbers.items()), flush=True)


class Chance:
    """The two sources of chance of a training, torch's own generator and one of numpy, as a part of its Run."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng

    def state_dict(self) -> dict:
        return {"torch": torch.get_rng_state(), "numpy": json.dumps(self.rng.bit_generator.state)}

    def load_state_dict(self, state: dict) -> None:
        torch.set_rng_state(state["torch"])
        self.rng.bit_generator.state = json.loads(state["numpy"])


class Muon(torch.optim.Optimizer):
    """Moves a matrix along its momentum, turned into the nearest orthogonal matrix: every direction equally far.

    The weights of a convolution are one too, of outputs by all that they see.

    The step is as long as AdamW's would be. It is torch.optim.Muon (new in torch 2.9) with match_rms_adamw and no
    weight decay, but for one thing: that one rounds to bfloat16, which a CPU without units for it computes at a
    fraction of the speed. Sources: Jordan et al. 2024, Muon; Liu et al. 2025, Muon is scalable for LLM training.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            alike = defaultdict(list)  # matrices of one shape are turned together
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(matrix)
                state["momentum_buffer"].lerp_(matrix.grad, 1 - group["momentum"])
                ahead = matrix.grad.lerp(state["momentum_buffer"], group["momentum"]).flatten(1)  # as Nesterov does
                alike[ahead.shape].append((matrix, ahead))
            for shape, pairs in alike.items():
                matrices, all_ahead = zip(*pairs, strict=True)
                for matrix, turned in zip(matrices, orthogonal(torch.stack(all_ahead)), strict=True):
                    matrix.sub_(turned.view_as(matrix), alpha=0.2 * math.sqrt(max(shape)) * group["lr"])


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """Matrices (..., m, n) with their singular values all brought near 1, by Newton and Schulz's iteration."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    wide = matrices.mT if tall else matrices
    x = wide / wide.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = 3.4445 * x + (2.0315 * square @ square - 4.775 * square) @ x
    return x.mT if tall else x

"""Flow matching, the loss of chapter 00 on precomputed samples: how far is the velocity from noise minus picture?

    samples of one shape  ->  a Batch; Batch, sigma (B,), noise (B, Ni, 64)  ->  a loss for each sample (B,)

Knows nothing of steps, optimisers and adapters; finetune.py does, and so do the recipes of the tiny checkpoint.
The surprise: control pictures pass through the whole model with the noisy one, but the loss is taken on the target's
tokens only, and in most trainers sigma is uniform although nobody samples that way.
Source: Lipman et al. 2022; the trainers of diffusers and FlyMyAI. Tests: tests/test_finetune.py. Chapter 10.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minqwen.images import pack_latents
from minqwen.precompute import Sample
from minqwen.prompt import pad_prompts
from minqwen.sampling import time_shift

TIMESTEP_SAMPLING = ("shifted", "uniform", "logit-normal")


class Batch(NamedTuple):
    """Samples of one shape, prompts padded to the longest."""

    target: Tensor  # (B, Ni, 64) packed, clean
    control: Tensor  # (B, Nc, 64) packed, of all control pictures one behind the other; Nc = 0 for drawing
    embeds: Tensor  # (B, Nt, C)
    mask: Tensor | None  # (B, Nt), None where every token is valid
    shapes: list[tuple[int, int, int]]  # (1, h, w) in tokens, of the target and of each control picture

    def to(self, device: torch.device, dtype: torch.dtype) -> "Batch":
        mask = None if self.mask is None else self.mask.to(device)
        target, control, embeds = (x.to(device, dtype) for x in (self.target, self.control, self.embeds))
        return Batch(target, control, embeds, mask, self.shapes)


def make_batch(samples: Sequence[Sample], dropped: Sequence[bool] | None = None) -> Batch:
    """Samples of one shape as a batch; those that are dropped say the empty prompt instead of their caption."""
    dropped = dropped or [False] * len(samples)
    prompts = [(s.empty if drop else s.embeds, None) for s, drop in zip(samples, dropped, strict=True)]
    embeds, mask = pad_prompts(prompts)
    pictures = [(s.latents, *s.control) for s in samples]
    latents = [torch.cat(column) for column in zip(*pictures, strict=True)]
    target, *controls = map(pack_latents, latents)
    control = torch.cat([target[:, :0], *controls], dim=1)
    shapes = [(1, z.shape[-2] // 2, z.shape[-1] // 2) for z in latents]
    return Batch(target, control, embeds, mask, shapes)


def flow_error(transformer: nn.Module, batch: Batch, sigma: Tensor, noise: Tensor) -> Tensor:
    """Flow matching's squared errors, (B, Ni, 64): how far is the velocity from noise minus picture?

    sigma (B,) in [0, 1]; noise (B, Ni, 64). The control's tokens are seen by the model, not by the loss.
    """
    picture, level = batch.target.float(), sigma[:, None, None]
    noisy = (1 - level) * picture + level * noise
    tokens = torch.cat([noisy.to(batch.control.dtype), batch.control], dim=1)
    velocity = transformer(tokens, batch.embeds, batch.mask, sigma, [batch.shapes] * len(tokens))[:, : noise.shape[1]]
    return (velocity.float() - (noise - picture)).square()


def flow_loss(transformer: nn.Module, batch: Batch, sigma: Tensor, noise: Tensor) -> Tensor:
    """The mean of each sample's errors, (B,)."""
    return flow_error(transformer, batch, sigma, noise).mean((1, 2))


def sample_sigmas(count: int, how: str, shift: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """Noise levels to train at, (count,) in [0, 1]: "uniform", "logit-normal", or "shifted", uniform then shifted."""
    if how not in TIMESTEP_SAMPLING:
        raise ValueError(f"timestep_sampling {how!r}: expected one of {', '.join(TIMESTEP_SAMPLING)}")
    if how == "logit-normal":
        return torch.randn(count, generator=generator).sigmoid()
    return time_shift(torch.rand(count, generator=generator), shift if how == "shifted" else 1.0)

"""The timestep embedding: how one network knows which noise level it is looking at.

    timestep (B,), the noise level sigma in [0, 1]  ->  temb (B, C)

A number becomes 256 waves (cosines first, then sines), the waves pass through a two-layer MLP, and the
result modulates every block and the output norm. Computed once for each denoising step.
The surprise: the model is told sigma in [0, 1], but the waves are made of 1000 * sigma.
Matches diffusers' Timesteps + TimestepEmbedding (tests/test_timestep.py). The function of the same name in
diffusers' transformer_qwenimage.py is never called there and rounds differently. Chapter 01.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def get_timestep_embedding(
    timesteps: torch.Tensor,
    embedding_dim: int,
    flip_sin_to_cos: bool = False,
    downscale_freq_shift: float = 1,
    scale: float = 1,
    max_period: int = 10000,
) -> torch.Tensor:
    """Sinusoids of each timestep, in float32.

    timesteps (B,), any real numbers  ->  (B, embedding_dim), in [-1, 1].
    Wave k of half_dim = embedding_dim // 2 turns by scale * t * max_period^(-k / (half_dim - downscale_freq_shift)).
    flip_sin_to_cos puts the cosines first; an odd embedding_dim ends in a column of zeros.
    Raises ValueError when timesteps is not one-dimensional or when no frequency can be formed.
    Source: Ho et al. 2020 (DDPM), after Vaswani et al. 2017; diffusers' get_timestep_embedding in models/embeddings.py.
    """
    if timesteps.ndim != 1:
        raise ValueError(f"timesteps must have shape (B,), got {tuple(timesteps.shape)}")
    half_dim = embedding_dim // 2
    if half_dim <= downscale_freq_shift:
        raise ValueError(f"embedding_dim {embedding_dim} is too small: half of it must exceed {downscale_freq_shift}")
    k = torch.arange(half_dim, dtype=torch.float32, device=timesteps.device)
    freqs = torch.exp(-math.log(max_period) * k / (half_dim - downscale_freq_shift))
    angles = scale * (timesteps[:, None].float() * freqs)  # (B, half_dim)
    waves = [angles.cos(), angles.sin()] if flip_sin_to_cos else [angles.sin(), angles.cos()]
    return F.pad(torch.cat(waves, dim=-1), (0, embedding_dim % 2))


class TimestepEmbedding(nn.Module):
    """The MLP behind the waves: (B, 256) -> (B, C)."""

    def __init__(self, in_channels: int, time_embed_dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, time_embed_dim)
        self.linear_2 = nn.Linear(time_embed_dim, time_embed_dim)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return self.linear_2(F.silu(self.linear_1(sample)))


class QwenTimestepProjEmbeddings(nn.Module):
    """Noise level -> conditioning vector.

    timestep (B,), sigma in [0, 1]; hidden_states: any tensor of the dtype to compute in  ->  (B, embedding_dim).
    Source: diffusers' class of this name.
    """

    def __init__(self, embedding_dim: int):
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(256, embedding_dim)

    def forward(self, timestep: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        waves = get_timestep_embedding(timestep, 256, flip_sin_to_cos=True, downscale_freq_shift=0, scale=1000)
        return self.timestep_embedder(waves.to(hidden_states.dtype))

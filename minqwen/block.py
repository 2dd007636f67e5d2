"""One of the 60 blocks: two streams, each normed, modulated, attended, gated; then the same with an MLP.

    image (B, Ni, C), text (B, Nt, C), temb (B, C)  ->  text, image of the same shapes

The noise level speaks through six vectors a stream (shift, scale, gate for attention and for the MLP), made
from temb alone: a third of all the model's parameters sit in the two linear layers that make them. Whoever knows
the noise levels beforehand can make the vectors apart (`modulations`), hand them in, and do without these layers.
The surprise: the result comes back as (text, image), the arguments go in as (image, text), as in the reference.
Matches diffusers' QwenImageTransformerBlock (tests/test_block.py). Chapter 04.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from minqwen.attention import QwenDoubleStreamAttention
from minqwen.rope import Rotary


class GELUProjection(nn.Module):
    """Linear, then GELU in its tanh form; the checkpoint keeps the layer under `net.0.proj`."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(dim, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """(B, N, C) -> (B, N, C) through 4C channels; names `net.0.proj` and `net.2` as released."""

    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.Sequential(GELUProjection(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class Modulation(NamedTuple):
    """What the noise level says to attention or to the MLP of one stream: three tensors (B, 1, C) or (B, N, C)."""

    shift: torch.Tensor
    scale: torch.Tensor
    gate: torch.Tensor


def modulate(x: torch.Tensor, mod: Modulation) -> torch.Tensor:
    """x (1 + scale) + shift, in one pass."""
    return torch.addcmul(mod.shift, x, 1 + mod.scale)


def split(vectors: torch.Tensor) -> tuple[Modulation, Modulation]:
    """Six vectors in a row, (B, N, 6C)  ->  those for attention and those for the MLP."""
    shift1, scale1, gate1, shift2, scale2, gate2 = vectors.chunk(6, dim=-1)
    return Modulation(shift1, scale1, gate1), Modulation(shift2, scale2, gate2)


class QwenImageTransformerBlock(nn.Module):
    """A double-stream block.

    hidden_states: image tokens (B, Ni, C); encoder_hidden_states: text tokens (B, Nt, C); temb (B, C);
    mask and rotary tables as in QwenDoubleStreamAttention; modulations: ready-made, as `modulations` gives them,
    and then temb is not read  ->  (text, image).
    zero_cond_t (Edit-2511): temb is (2B, C), rows for the noise level, then rows for noise 0; the first
    target_tokens image tokens take the former, the reference pictures behind them the latter; text the former.
    Source: diffusers' class of this name; Peebles and Xie 2023 (adaLN-Zero).
    """

    def __init__(
        self,
        dim: int = 3072,
        num_attention_heads: int = 24,
        attention_head_dim: int = 128,
        eps: float = 1e-6,
        zero_cond_t: bool = False,
    ):
        super().__init__()
        self.zero_cond_t = zero_cond_t
        self.img_mod = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.img_norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=eps)
        self.attn = QwenDoubleStreamAttention(dim, num_attention_heads, attention_head_dim, eps)
        self.img_norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=eps)
        self.img_mlp = FeedForward(dim)
        self.txt_mod = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.txt_norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=eps)
        self.txt_norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=eps)
        self.txt_mlp = FeedForward(dim)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor | None,
        encoder_hidden_states_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[Rotary, Rotary] | None = None,
        target_tokens: int | None = None,
        modulations: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        img, txt = hidden_states, encoder_hidden_states
        img_vectors, txt_vectors = self.modulations(temb) if modulations is None else modulations
        img_mod1, img_mod2 = split(self.spread(img_vectors, img.shape[1], target_tokens))
        txt_mod1, txt_mod2 = split(txt_vectors[:, None])

        img_attn, txt_attn = self.attn(
            modulate(self.img_norm1(img), img_mod1),
            modulate(self.txt_norm1(txt), txt_mod1),
            encoder_hidden_states_mask,
            image_rotary_emb,
        )
        img = torch.addcmul(img, img_mod1.gate, img_attn)  # img + gate * img_attn, in one pass
        txt = torch.addcmul(txt, txt_mod1.gate, txt_attn)

        img = torch.addcmul(img, img_mod2.gate, self.img_mlp(modulate(self.img_norm2(img), img_mod2)))
        txt = torch.addcmul(txt, txt_mod2.gate, self.txt_mlp(modulate(self.txt_norm2(txt), txt_mod2)))
        return clip_fp16(txt), clip_fp16(img)

    def modulations(self, temb: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Six vectors a stream for each noise level: (B, C) -> image (B, 6C), text (B, 6C); they read nothing else.

        zero_cond_t: (2B, C) -> image (2B, 6C), the rows of noise 0 behind, and text (B, 6C).
        """
        text_temb = temb.chunk(2)[0] if self.zero_cond_t else temb
        return self.img_mod(temb), self.txt_mod(text_temb)

    def spread(self, vectors: torch.Tensor, image_tokens: int, target_tokens: int | None) -> torch.Tensor:
        """The image's vectors over its tokens: (B, 1, 6C), one row for all; zero_cond_t: (B, Ni, 6C), each its own."""
        if not self.zero_cond_t:
            return vectors[:, None]
        noisy, clean = vectors[:, None].chunk(2)
        noisy = noisy.expand(-1, target_tokens, -1)
        clean = clean.expand(-1, image_tokens - target_tokens, -1)
        return torch.cat([noisy, clean], dim=1)


def clip_fp16(x: torch.Tensor) -> torch.Tensor:
    """Keep float16 finite: its largest number is 65504, which the released weights exceed. No other dtype needs it."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x

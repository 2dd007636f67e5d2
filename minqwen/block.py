"""One of the 60 blocks: two streams, each normed, modulated, attended, gated; then the same with an MLP.

    image (B, Ni, C), text (B, Nt, C), temb (B, C)  ->  text, image of the same shapes

The noise level speaks through six vectors a stream (shift, scale, gate for attention and for the MLP), made
from temb alone: a third of all the model's parameters sit in the two linear layers that make them.
The surprise: the result comes back as (text, image), the arguments go in as (image, text), as in the reference.
Matches diffusers' QwenImageTransformerBlock (tests/test_block.py). Chapter 04.
"""

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


class QwenImageTransformerBlock(nn.Module):
    """A double-stream block.

    hidden_states: image tokens (B, Ni, C); encoder_hidden_states: text tokens (B, Nt, C); temb (B, C);
    mask and rotary tables as in QwenDoubleStreamAttention  ->  (text, image).
    zero_cond_t (Edit-2511): temb is (2B, C), rows for the noise level, then rows for noise 0; the first
    target_tokens image tokens take the former, the reference pictures behind them the latter; text the former.
    Source: SEED.md section 2.
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
        temb: torch.Tensor,
        encoder_hidden_states_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[Rotary, Rotary] | None = None,
        target_tokens: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        img, txt = hidden_states, encoder_hidden_states
        img_mods, txt_mods = self.modulations(temb, img.shape[1], target_tokens)
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = img_mods
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = txt_mods

        img_attn, txt_attn = self.attn(
            _modulate(self.img_norm1(img), img_shift1, img_scale1),
            _modulate(self.txt_norm1(txt), txt_shift1, txt_scale1),
            encoder_hidden_states_mask,
            image_rotary_emb,
        )
        img = img + img_gate1 * img_attn
        txt = txt + txt_gate1 * txt_attn

        img = img + img_gate2 * self.img_mlp(_modulate(self.img_norm2(img), img_shift2, img_scale2))
        txt = txt + txt_gate2 * self.txt_mlp(_modulate(self.txt_norm2(txt), txt_shift2, txt_scale2))
        return clip_fp16(txt), clip_fp16(img)

    def modulations(self, temb: torch.Tensor, image_tokens: int, target_tokens: int | None):
        """Six tensors for each stream, (B, 1, C), or (B, Ni, C) for the image of a zero_cond_t model."""
        img = self.img_mod(temb)[:, None]
        if self.zero_cond_t:
            temb = temb.chunk(2)[0]
            noisy, clean = img.chunk(2)
            n_clean = image_tokens - target_tokens
            img = torch.cat([noisy.expand(-1, target_tokens, -1), clean.expand(-1, n_clean, -1)], dim=1)
        return img.chunk(6, dim=-1), self.txt_mod(temb)[:, None].chunk(6, dim=-1)


def _modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x * (1 + scale) + shift


def clip_fp16(x: torch.Tensor) -> torch.Tensor:
    """Keep float16 finite: its largest number is 65504, which the released weights exceed. No other dtype needs it."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x

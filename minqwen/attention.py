"""Joint attention: image and text tokens attend to each other in one softmax.

    image (B, Ni, C), text (B, Nt, C), rotary tables (Ni, D/2), (Nt, D/2)  ->  image, text of the same shapes

Each stream has its own projections and norms; only the softmax is shared.
The surprise: the projections that the checkpoint calls `add_*` and `to_add_out` are the text's, and inside the
softmax the order is [text, image], although every signature names the image first.
Matches diffusers' QwenDoubleStreamAttnProcessor2_0 (tests/test_attention.py). Chapter 03.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from minqwen.rope import Rotary, apply_rotary_emb_qwen


class QwenDoubleStreamAttention(nn.Module):
    """Joint attention of two streams, with RMS-normed queries and keys.

    hidden_states: image tokens (B, Ni, C); encoder_hidden_states: text tokens (B, Nt, C);
    encoder_hidden_states_mask: (B, Nt), true or 1 where the token is real, any pattern, or None if all are;
    image_rotary_emb: (image table, text table) of QwenEmbedRope, or None  ->  (image, text).
    Text tokens that the mask excludes are seen by nobody; what comes back in their place means nothing.
    Source: diffusers' QwenDoubleStreamAttnProcessor2_0; Esser et al. 2024 (MM-DiT).
    """

    def __init__(
        self, dim: int = 3072, num_attention_heads: int = 24, attention_head_dim: int = 128, eps: float = 1e-6
    ):
        super().__init__()
        self.heads, inner = num_attention_heads, num_attention_heads * attention_head_dim
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, inner) for _ in range(3))  # image
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(dim, inner) for _ in range(3))  # text
        self.norm_q, self.norm_k = (nn.RMSNorm(attention_head_dim, eps=eps) for _ in range(2))
        self.norm_added_q, self.norm_added_k = (nn.RMSNorm(attention_head_dim, eps=eps) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(inner, dim)])  # image; the checkpoint calls it to_out.0
        self.to_add_out = nn.Linear(inner, dim)  # text

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[Rotary, Rotary] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        img, txt = hidden_states, encoder_hidden_states
        img_q = self.split_heads(self.to_q(img))
        img_k = self.split_heads(self.to_k(img))
        img_v = self.split_heads(self.to_v(img))
        txt_q = self.split_heads(self.add_q_proj(txt))
        txt_k = self.split_heads(self.add_k_proj(txt))
        txt_v = self.split_heads(self.add_v_proj(txt))
        img_q, img_k = self.norm_q(img_q), self.norm_k(img_k)
        txt_q, txt_k = self.norm_added_q(txt_q), self.norm_added_k(txt_k)

        if image_rotary_emb is not None:
            img_freqs, txt_freqs = image_rotary_emb
            img_q = apply_rotary_emb_qwen(img_q, img_freqs)
            img_k = apply_rotary_emb_qwen(img_k, img_freqs)
            txt_q = apply_rotary_emb_qwen(txt_q, txt_freqs)
            txt_k = apply_rotary_emb_qwen(txt_k, txt_freqs)

        q, k, v = join(txt_q, img_q), join(txt_k, img_k), join(txt_v, img_v)
        mask = joint_key_mask(encoder_hidden_states_mask, img.shape[1])
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # scale 1 / sqrt(D)
        out = rearrange(out, "B H N D -> B N (H D)")
        txt, img = out.split([txt.shape[1], img.shape[1]], dim=1)
        return self.to_out[0](img), self.to_add_out(txt)

    def split_heads(self, x: torch.Tensor) -> torch.Tensor:
        return rearrange(x, "B N (H D) -> B N H D", H=self.heads)


def join(txt: torch.Tensor, img: torch.Tensor) -> torch.Tensor:
    """Text (B, Nt, H, D) and image (B, Ni, H, D) as one sequence, the text first: (B, H, Nt + Ni, D)."""
    return rearrange(torch.cat([txt, img], dim=1), "B N H D -> B H N D")


def joint_key_mask(text_mask: torch.Tensor | None, image_tokens: int) -> torch.Tensor | None:
    """Text mask (B, Nt) -> mask over the keys [text, image] (B, 1, 1, Nt + Ni); image tokens are always seen."""
    if text_mask is None:
        return None
    return F.pad(text_mask.bool(), (0, image_tokens), value=True)[:, None, None]

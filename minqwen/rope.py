"""Rotary positions: every query and key is turned by an angle that says where its token sits.

    image shapes [(T, h, w), ...] and the text length  ->  two tables, images (Ni, D/2) and text (Nt, D/2)
    queries or keys (B, N, H, D) and a table           ->  the same, rotated

The D numbers of a head are D/2 pairs, split over three axes (frame, height, width): 8 + 28 + 28 in the
released model. Height and width count from the picture's middle (`scale_rope`), the frame axis numbers the
pictures (0 the target, 1 the first reference, ...), and text continues on the diagonal behind the largest one.
The surprise: a pair is two neighbours (0, 1), (2, 3), ..., not the two halves that most language models pair.
Matches diffusers' QwenEmbedRope and apply_rotary_emb_qwen (tests/test_rope.py). Chapter 02.
"""

import torch
from torch import nn

# MKL picks its code at the first call: where several threads made it at once, some got cosines wrong by 1e-4 (1 start
# in 300, measured). So the first call is made here, by one.
torch.zeros(1, device="cpu").cos()

Rotary = torch.Tensor | tuple[torch.Tensor, torch.Tensor]  # complex (N, D/2), or cosine and sine of that shape


def apply_rotary_emb_qwen(x: torch.Tensor, freqs_cis: Rotary, use_real: bool = True) -> torch.Tensor:
    """Rotate neighbouring pairs of x by the angles of a table.

    x (B, N, H, D) -> (B, N, H, D), computed in float32 and returned in the dtype of x.
    use_real=True takes freqs_cis = (cos, sin), each (N, D/2); False takes the complex table (N, D/2), and
    multiplies complex numbers instead. Both give the same numbers; the real form also runs where complex
    tensors do not (MPS, torch.compile), and on a CPU is computed as the complex one, 12 times as fast: it passes over
    memory once. Source: Su et al. 2021 (RoFormer); diffusers' function of this name.
    """
    if use_real and x.device.type == "cpu" and not torch.compiler.is_compiling():
        freqs_cis, use_real = torch.complex(*freqs_cis), False
    pairs = x.float().unflatten(-1, (-1, 2))  # (B, N, H, D/2, 2)
    if use_real:
        cos, sin = freqs_cis
        cos, sin = cos[:, None], sin[:, None]  # (N, 1, D/2): one angle for all heads of a token
        x1, x2 = pairs.unbind(-1)
        out = torch.stack([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1)
    else:
        out = torch.view_as_real(torch.view_as_complex(pairs) * freqs_cis[:, None])
    return out.flatten(-2).to(x.dtype)


class QwenEmbedRope(nn.Module):
    """Tables of angles for the image tokens and the text tokens of one sequence.

    video_fhw: the (frames, height, width) of each image in tokens, target first; txt_seq_lens: text lengths of
    the batch (the longest counts)  ->  (vid_freqs, txt_freqs) as (cos, sin) pairs of shape (N, D/2), or as
    complex tensors with use_real=False. N = sum of frames * height * width for images.
    Tables are float32 and cached by image in `rope_cache`. Source: diffusers' class of this name.
    """

    def __init__(
        self,
        theta: int = 10000,
        axes_dim: tuple[int, int, int] = (16, 56, 56),
        scale_rope: bool = True,
        use_real: bool = True,
    ):
        super().__init__()
        if any(dim % 2 for dim in axes_dim):
            raise ValueError(f"every axis needs an even number of channels to form pairs, got {tuple(axes_dim)}")
        self.theta, self.axes_dim, self.scale_rope, self.use_real = theta, tuple(axes_dim), scale_rope, use_real
        self.rope_cache: dict[tuple, torch.Tensor] = {}

    def rope_params(self, index: torch.Tensor, dim: int) -> torch.Tensor:
        """Angles of positions (n,) on an axis of dim channels: (n, dim/2)."""
        powers = torch.arange(0, dim, 2, dtype=torch.float32, device=index.device) / dim
        return torch.outer(index.float(), 1.0 / torch.pow(self.theta, powers))

    def axis_positions(self, n: int, device: torch.device | None = None) -> torch.Tensor:
        """Positions of n tokens along height or width: 0 ... n-1, or centred: -(n - n//2) ... n//2 - 1."""
        first = -(n - n // 2) if self.scale_rope else 0
        return torch.arange(first, first + n, device=device)

    def _compute_video_freqs(self, frame: int, height: int, width: int, idx: int, device) -> torch.Tensor:
        frame_dim, height_dim, width_dim = self.axes_dim
        t = self.rope_params(torch.arange(idx, idx + frame, device=device), frame_dim)
        y = self.rope_params(self.axis_positions(height, device), height_dim)
        x = self.rope_params(self.axis_positions(width, device), width_dim)
        grid = (frame, height, width, -1)
        t = t[:, None, None].expand(grid)
        y = y[None, :, None].expand(grid)
        x = x[None, None, :].expand(grid)
        return torch.cat([t, y, x], dim=-1).flatten(0, 2)  # (frame * height * width, D/2)

    def video_freqs(self, frame: int, height: int, width: int, idx: int, device=None) -> torch.Tensor:
        """Angles of image number idx of the sequence, from the cache where it is there."""
        rope_key = (frame, height, width, idx, device)
        if rope_key not in self.rope_cache:
            if len(self.rope_cache) >= 64:  # readers try many sizes; a table of a large picture is 2 MB
                self.rope_cache.clear()
            self.rope_cache[rope_key] = self._compute_video_freqs(frame, height, width, idx, device)
        return self.rope_cache[rope_key]

    def forward(
        self,
        video_fhw: tuple[int, int, int] | list[tuple[int, int, int]],
        txt_seq_lens: int | list[int],
        device: torch.device | None = None,
    ) -> tuple[Rotary, Rotary]:
        shapes = [video_fhw] if isinstance(video_fhw, tuple) else video_fhw
        vid = torch.cat([self.video_freqs(*fhw, idx, device) for idx, fhw in enumerate(shapes)])
        longest_side = max(max(height, width) for _, height, width in shapes)
        text_start = longest_side // 2 if self.scale_rope else longest_side
        text_length = txt_seq_lens if isinstance(txt_seq_lens, int) else max(txt_seq_lens)
        index = torch.arange(text_start, text_start + text_length, device=device)
        txt = torch.cat([self.rope_params(index, dim) for dim in self.axes_dim], dim=-1)  # the same on all axes
        if self.use_real:
            return (vid.cos(), vid.sin()), (txt.cos(), txt.sin())
        return torch.polar(torch.ones_like(vid), vid), torch.polar(torch.ones_like(txt), txt)

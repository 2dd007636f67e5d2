"""Any network of two dimensions in overlapping tiles, so that its memory does not grow with the picture.

    net, x (B, C, H, W)  ->  nearly net(x), cross-faded where tiles overlap

Tiles disagree where they meet: near an edge a convolution sees zeros where the picture goes on, and attention sees
one tile only. Each tile's weight falls towards its edges, and the result is the weighted mean.
The surprise: at the picture's own rim nothing fades, since the sum is divided by the weights.
There is no reference to match: diffusers' tiles fade over the whole overlap (tests/test_tiling.py). Chapter 06.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def tiled(net: Callable[[Tensor], Tensor], x: Tensor, tile: int, shrink: int, grow: int) -> Tensor:
    """`net` on tiles of `tile` latents a side, each overlapping the next by a quarter or more, cross-faded.

    shrink: how many of x's pixels, each way, make a latent; grow: how many of the result's come of one. 8 and 1 to
    encode, 1 and 8 to decode.
    """
    h, w = x.shape[2] // shrink, x.shape[3] // shrink
    th, tw, overlap = min(tile, h), min(tile, w), tile // 4
    fade = _fade(th * grow, overlap * grow, x)[:, None] * _fade(tw * grow, overlap * grow, x)
    total, weight = None, fade.new_zeros(h * grow, w * grow)
    for top in _starts(h, th, overlap):
        for left in _starts(w, tw, overlap):
            out = net(_window(x, top, left, th, tw, shrink))
            if total is None:
                total = fade.new_zeros(*out.shape[:2], *weight.shape)
            _window(total, top, left, th, tw, grow).add_(out * fade)
            _window(weight, top, left, th, tw, grow).add_(fade)
    return (total / weight).to(x.dtype)


def _window(x: Tensor, top: int, left: int, height: int, width: int, scale: int) -> Tensor:
    return x[..., top * scale : (top + height) * scale, left * scale : (left + width) * scale]


def _starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where tiles of one length begin, spread evenly over `size`, each overlapping the next by enough."""
    if size <= tile:
        return [0]
    gaps = math.ceil((size - tile) / (tile - overlap))
    return [round(n * (size - tile) / gaps) for n in range(gaps + 1)]


def _fade(length: int, overlap: int, like: Tensor) -> Tensor:
    """A tile's weight along one side: 1 inside, then a straight line down over the middle half of the overlap.

    The outer quarter, spoilt by the zeros that convolutions see beyond an edge, counts only where nothing
    else does: that halves what is left of a seam in photos.
    """
    steps = torch.arange(length, device=like.device, dtype=torch.float32) + 0.5
    edge = torch.minimum(steps, length - steps) / overlap
    return (2 * edge - 0.5).clamp(1e-4, 1)

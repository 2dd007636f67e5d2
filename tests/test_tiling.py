"""Tiles: any network that treats every place alike comes out whole, and seams fade."""

import torch
from torch.nn.functional import avg_pool2d, interpolate

from minqwen.tiling import _starts, tiled


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def test_tiles_that_agree_join_exactly(rng):
    x = torch.randn(1, 2, 8 * rng.randint(1, 40), 8 * rng.randint(1, 40))
    tile = rng.randint(8, 16)
    assert far(tiled(lambda t: 2 * t, x, tile, 8, 8), 2 * x) < 1e-5
    assert far(tiled(lambda t: avg_pool2d(t, 8), x, tile, 8, 1), avg_pool2d(x, 8)) < 1e-5
    assert far(tiled(lambda t: interpolate(t, scale_factor=8), x, tile, 1, 8), interpolate(x, scale_factor=8)) < 1e-5


def test_tiles_that_disagree_fade_over_half_their_overlap():
    ramp = torch.linspace(0, 1, 200).expand(1, 1, 120, 200)
    tile = 16  # latents of 4 pixels, so the overlap is 16 pixels or more, and the fade 8 or more
    flat = tiled(lambda t: torch.full_like(t, t.mean()), ramp, tile, 4, 4)  # each tile has one colour of its own
    jump = flat.amax() - flat.amin()
    assert jump > 0.5 and (flat[..., 0] - flat[..., -1]).abs().min() > 0.5
    starts = _starts(50, tile, 4)
    largest = max(b - a for a, b in zip(starts, starts[1:], strict=False)) / (starts[-1] - starts[0]) * jump
    assert flat.diff(dim=3).abs().max() <= 1.01 * largest / 8
    assert flat.diff(dim=2).abs().max() < 1e-6


def test_tiles_overlap_by_a_quarter_and_reach_both_ends(rng):
    for _ in range(200):
        tile, size = rng.randint(8, 80), rng.randint(1, 500)
        starts = _starts(size, min(tile, size), tile // 4)
        assert starts[0] == 0 and starts[-1] + min(tile, size) == size
        assert all(0 < b - a <= tile - tile // 4 for a, b in zip(starts, starts[1:], strict=False))

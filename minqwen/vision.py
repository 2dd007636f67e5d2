"""The eyes of Qwen2.5-VL: an image becomes patches, and patches a run of tokens that the language model can read.

    image  ->  patches (gh*gw, 1176), grid (1, gh, gw)
    patches (P, 1176) and grids (n, 3) of n images  ->  tokens (P/4, 3584), images one after the other

The tower is a transformer over 14×14-pixel patches. 28 of its 32 blocks look only inside windows of 8×8 patches,
four look at the whole image; at the end each 2×2 square of patches is merged into one token.
The surprise: patches arrive square by square, not row by row, and the tower reorders the squares window by
window before the first block and puts them back after the last. Images never attend to each other.
Matches transformers' Qwen2VLImageProcessorPil and Qwen2_5_VisionTransformerPretrainedModel (tests/test_vision.py).
Chapter 07.
"""

import inspect
import math
from itertools import groupby

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from PIL import Image
from torch import Tensor, nn

from minqwen.checkpoint import refuse_uncomputed
from minqwen.files import content_of, finder, read_json

torch.zeros(1, device="cpu").cos()  # by one thread first: rope.py says why

PREPROCESSING = {"resample": 3, "do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255}
MOST = {"patch_size": 64, "merge_size": 64, "temporal_patch_size": 64, "min_pixels": 2**28}  # that a config may ask for
Runs = list[tuple[int, int]]  # consecutive groups of equal length: (how many, tokens in each)


def smart_resize(
    height: int, width: int, factor: int = 28, min_pixels: int = 3136, max_pixels: int = 12845056
) -> tuple[int, int]:
    """(height, width) in pixels, as multiples of `factor`, with an area between min_pixels and max_pixels.

    384×384 -> 392×392, 896×1184 -> 896×1176. Raises ValueError when one side is over 200 times the other.
    Source: smart_resize in transformers' Qwen2VLImageProcessorPil.
    """
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"an image of {width}×{height} pixels: one side may be at most 200 times the other")
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        h = max(factor, math.floor(height / shrink / factor) * factor)
        w = max(factor, math.floor(width / shrink / factor) * factor)
    elif h * w < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        h = math.ceil(height * grow / factor) * factor
        w = math.ceil(width * grow / factor) * factor
    return h, w


def image_patches(
    image: Image.Image,
    patch_size: int = 14,  # pixels
    merge_size: int = 2,  # 2×2 patches become one token
    temporal_patch_size: int = 2,  # frames; a still image is shown twice
    min_pixels: int = 3136,  # 56²
    max_pixels: int = 12845056,  # 3584²; transformers' own default, 1003520, would shrink a 1024² image
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073),
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711),
) -> tuple[Tensor, tuple[int, int, int]]:
    """A picture -> (patches (gh·gw, 1176) of normalised pixels, fp32; grid (1, gh, gw)).

    Each row is one patch, laid out (channel, frame, y, x); rows come square by square of 2×2 patches, since
    those four become one token. Bicubic resize by PIL, on 8-bit pixels; grids as `smart_resize` says. Raises
    ValueError for an image that is not RGB. Source: Qwen2VLImageProcessorPil.
    """
    if not isinstance(image, Image.Image):
        raise TypeError(f"expected a PIL image, got {type(image).__name__}")
    if image.mode != "RGB":
        raise ValueError(f"expected an RGB image, got {image.mode}: use minqwen.images.load_image")
    h, w = smart_resize(image.height, image.width, patch_size * merge_size, min_pixels, max_pixels)
    pixels = np.asarray(image.resize((w, h), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    pixels = (pixels - np.float32(image_mean)) / np.float32(image_std)
    size = {"a": merge_size, "b": merge_size, "y": patch_size, "x": patch_size}
    patches = rearrange(pixels, "(h a y) (w b x) c -> (h w a b) c y x", **size)
    rows = repeat(patches, "n c y x -> n (c t y x)", t=temporal_patch_size)
    return torch.from_numpy(rows), (1, h // patch_size, w // patch_size)


def load_image_settings(folder) -> dict:
    """Keywords for `image_patches`, from preprocessor_config.json in `processor/` or else transformers 5's
    processor_config.json; what it does not say has the released value. folder: a path, or Checkpoint.within.

    Raises FileNotFoundError for a folder without either, ValueError for a damaged file, for numbers that are none and
    for a step that is not computed here.
    """
    path = finder(folder)("preprocessor_config.json", "processor_config.json")
    if path is None:
        raise FileNotFoundError(f"{folder} has neither preprocessor_config.json nor processor_config.json")
    config = read_json(path)
    with content_of(path):
        config = {key: value for key, value in config.get("image_processor", config).items() if value is not None}
        refuse_uncomputed(config, PREPROCESSING, path)
        size = config.get("size", {})
        found = {"min_pixels": size.get("shortest_edge"), "max_pixels": size.get("longest_edge")} | config
        known = inspect.signature(image_patches).parameters
        settings = {key: found[key] for key in known if found.get(key) is not None}
        for key, value in settings.items():
            kinds, numbers = ((int, float), value) if key.startswith("image_") else ((int,), [value] * 3)
            good = [type(n) in kinds and 0 <= n <= MOST.get(key, 1e12) for n in numbers]
            if good != [True] * 3 or (0 in numbers and key != "image_mean"):
                raise ValueError(f"{key} is {value!r}")
        if settings.get("min_pixels", 1) > settings.get("max_pixels", math.inf):
            raise ValueError(f"min_pixels {settings['min_pixels']} is more than max_pixels {settings['max_pixels']}")
    return settings


class RMSNorm(nn.Module):
    """x / rms(x) in fp32, rounded to the dtype of x, then scaled. (..., C) -> (..., C)."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): one branch decides how much of the other passes. (..., C) -> (..., C)."""

    def __init__(self, dim: int, hidden: int, bias: bool):
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=bias)
        self.up_proj = nn.Linear(dim, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def inverse_frequencies(dim: int, theta: float, device: torch.device) -> Tensor:
    """theta^(-2i/dim), (dim/2,): radians that channel pair i turns from one position to the next."""
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn channel pairs (i, i + D/2) of `x` (..., D) by `angles` (..., D/2) in radians, in fp32.

    The transformer of chapter 02 pairs neighbours (2i, 2i + 1); Qwen2.5-VL pairs the two halves.
    """
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class PatchEmbed(nn.Module):
    def __init__(self, dim: int, in_channels: int, temporal_patch_size: int, patch_size: int):
        super().__init__()
        kernel = (temporal_patch_size, patch_size, patch_size)
        # the checkpoint calls it a 3-D convolution; its stride is its kernel, so it is one matrix
        self.proj = nn.Conv3d(in_channels, dim, kernel, stride=kernel, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        weight = self.proj.weight.flatten(1)
        return F.linear(patches.to(weight.dtype), weight)


class VisionAttention(nn.Module):
    """Full attention inside each group of consecutive patches, none between groups."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, angles: Tensor, runs: Runs) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "p (three h d) -> three p h d", three=3, h=self.num_heads)
        q, k = rotate(q, angles), rotate(k, angles)
        out, start = [], 0
        for count, length in runs:
            run = slice(start, start + count * length)
            batch = (rearrange(t[run], "(n l) h d -> n h l d", l=length) for t in (q, k, v))
            attended = F.scaled_dot_product_attention(*batch)
            out.append(rearrange(attended, "n h l d -> (n l) (h d)"))
            start = run.stop
        return self.proj(torch.cat(out))


class VisionBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int, hidden: int):
        super().__init__()
        self.norm1 = RMSNorm(dim)
        self.norm2 = RMSNorm(dim)
        self.attn = VisionAttention(dim, num_heads)
        self.mlp = SwiGLU(dim, hidden, bias=True)

    def forward(self, x: Tensor, angles: Tensor, runs: Runs) -> Tensor:
        x = x + self.attn(self.norm1(x), angles, runs)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nn.Module):
    """Four neighbouring patches side by side, then a small MLP into the language model's width."""

    def __init__(self, dim: int, out_dim: int, unit: int):
        super().__init__()
        self.ln_q = RMSNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(unit * dim, unit * dim), nn.GELU(), nn.Linear(unit * dim, out_dim))
        self.unit = unit

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(rearrange(self.ln_q(x), "(n unit) c -> n (unit c)", unit=self.unit))


def image_layout(gh: int, gw: int, merge: int, window: int) -> tuple[Tensor, Tensor, list[int]]:
    """Where the patches of one image lie, and how its squares of `merge`×`merge` patches sort into windows.

    gh, gw: patches down and across; window: squares along a window's side. Returns
    positions (squares, merge², 2): row and column of each patch, in the order in which patches arrive;
    order (squares,): the squares window by window, windows of equal size next to each other;
    lengths: patches in each window of that order.
    """
    row, col = torch.meshgrid(torch.arange(gh), torch.arange(gw), indexing="ij")
    positions = rearrange(torch.stack([row, col], -1), "(h a) (w b) two -> (h w) (a b) two", a=merge, b=merge)
    down, across = torch.arange(gh // merge) // window, torch.arange(gw // merge) // window
    label = (down[:, None] * gw + across).flatten()  # a number for each window
    _, label, count = label.unique(return_inverse=True, return_counts=True)
    order = (count[label] * len(count) + label).argsort(stable=True)  # by size of the window, then by window
    return positions, order, sorted((count * merge**2).tolist())


def run_lengths(lengths: list[int]) -> Runs:
    """[64, 64, 32] -> [(2, 64), (1, 32)]: equal neighbours can go through attention as one batch."""
    return [(len(list(group)), length) for length, group in groupby(lengths)]


class Qwen2_5_VLVisionTower(nn.Module):
    """Keywords: `vision_config` of text_encoder/config.json; other keys of that file are ignored."""

    def __init__(
        self,
        depth: int = 32,
        hidden_size: int = 1280,
        intermediate_size: int = 3420,  # inside the SwiGLU
        num_heads: int = 16,
        in_channels: int = 3,
        in_chans: int | None = None,  # an older name of in_channels
        patch_size: int = 14,  # pixels
        temporal_patch_size: int = 2,  # frames; a still image is shown twice
        spatial_merge_size: int = 2,  # 2×2 patches become one token
        window_size: int = 112,  # pixels
        fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31),  # blocks that see the whole image
        out_hidden_size: int = 3584,  # the language model's width
        rope_parameters: dict | None = None,  # transformers 5 only: {"rope_type": "axial", "rope_theta": 1e4}
        **others,
    ):
        super().__init__()
        rope = rope_parameters or {}
        refuse_uncomputed(others | rope, {"hidden_act": "silu", "rope_type": "axial"}, "vision_config")
        if hidden_size % (4 * num_heads):
            raise ValueError(f"vision_config: hidden_size {hidden_size} is no multiple of 4 × {num_heads} heads")
        self.spatial_merge_size = spatial_merge_size
        self.window = window_size // patch_size // spatial_merge_size
        self.fullatt_block_indexes = tuple(fullatt_block_indexes)
        self.head_dim = hidden_size // num_heads
        self.rope_theta = rope.get("rope_theta", 10000.0)
        self.patch_embed = PatchEmbed(hidden_size, in_chans or in_channels, temporal_patch_size, patch_size)
        self.blocks = nn.ModuleList(VisionBlock(hidden_size, num_heads, intermediate_size) for _ in range(depth))
        self.merger = PatchMerger(hidden_size, out_hidden_size, spatial_merge_size**2)

    def forward(self, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
        """Patches of all images (P, 1176), their grids (n, 3) -> (P/4, out_hidden_size), in the same order.

        pixel_values: rows from `image_patches`, images one after the other, normalised pixels.
        grid_thw: (1, gh, gw) of each image in patches; gh and gw are multiples of spatial_merge_size.
        Raises ValueError when the two do not fit together, or for video (t > 1).
        Source: Qwen2.5-VL technical report, section 2.1.1.
        """
        grids = self._check(pixel_values, grid_thw)
        order, angles, windows, images = self._layout(grids, pixel_values.device)
        squares = self.patch_embed(pixel_values).unflatten(0, (-1, self.spatial_merge_size**2))
        x = squares[order].flatten(0, 1)
        for i, block in enumerate(self.blocks):
            x = block(x, angles, images if i in self.fullatt_block_indexes else windows)
        return self.merger(x)[order.argsort()]

    def _check(self, pixel_values: Tensor, grid_thw: Tensor) -> list[tuple[int, int]]:
        grids, merge = grid_thw.tolist(), self.spatial_merge_size
        if any(t != 1 or h % merge or w % merge for t, h, w in grids):
            raise ValueError(f"grids {grids} must be (1, gh, gw), gh and gw multiples of {merge}; no video")
        width, rows = self.patch_embed.proj.weight[0].numel(), sum(h * w for _, h, w in grids)
        if pixel_values.shape != (rows, width):
            raise ValueError(f"pixel_values are {tuple(pixel_values.shape)}, grids {grids} call for ({rows}, {width})")
        return [(h, w) for _, h, w in grids]

    def _layout(self, grids: list[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor, Runs, Runs]:
        """Order of all squares (n,), angles (P, 1, D/2) in that order, runs of windows, runs of images."""
        positions, order, lengths, start = [], [], [], 0
        for gh, gw in grids:
            places, squares, windows = image_layout(gh, gw, self.spatial_merge_size, self.window)
            positions.append(places)
            order.append(start + squares)
            lengths += windows
            start += len(squares)
        order = torch.cat(order).to(device)
        turns = inverse_frequencies(self.head_dim // 2, self.rope_theta, device)
        # half of the pairs turn with the row, half with the column
        angles = torch.cat(positions).to(device)[order].flatten(0, 1)[..., None] * turns
        images = run_lengths([gh * gw for gh, gw in grids])
        return order, angles.flatten(1)[:, None], run_lengths(lengths), images

"""The autoencoder: a picture becomes latents, an eighth as wide and high with 16 channels, and comes back.

    pixels (B, 3, 1, H, W) in [-1, 1]  ->  posterior over latents (B, 16, 1, H/8, W/8)  ->  pixels

The surprise: it was trained on video with 3-D convolutions, and for one frame it is exactly a 2-D network. A
causal 3x3x3 kernel sees two empty frames before the first one, so its last temporal slice does all the work;
the `time_conv` layers, which join frames, never run. 44.6 of the 126.9 million released numbers remain.
State dicts still speak the released language: loading takes the 5-D weights and the `time_conv`s, checks
their shapes and drops what one frame never reads; saving writes zeros there. A file saved from here so opens in
diffusers, and is right for single pictures only. On a CPU this runs three times as fast as diffusers.
Matches diffusers' AutoencoderKLQwenImage (tests/test_vae.py, tests/benchmarks/bench_vae.py). Chapter 06.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minqwen.checkpoint import refuse_uncomputed
from minqwen.tiling import tiled

LATENTS_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
                0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)  # fmt: skip
LATENTS_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
               3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)  # fmt: skip
COMPUTED = {"attn_scales": [], "dropout": 0.0, "input_channels": 3}  # keys of a config that may say this only


class CausalConv2d(nn.Conv2d):
    """The last temporal slice of a causal 3-D convolution: all that a single frame touches.

    In memory the weight is (out, in, k, k); in a state dict it is the released (out, in, k, k, k).
    """

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight, frames_before = destination[prefix + "weight"], self.kernel_size[0] - 1
        destination[prefix + "weight"] = F.pad(weight[:, :, None], (0, 0, 0, 0, frames_before, 0))

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        key = prefix + "weight"
        if key in state_dict:
            if not _has_shape(state_dict[key], (*self.weight.shape, self.kernel_size[0]), key, errors):
                return
            last = state_dict[key][:, :, -1].clone(memory_format=torch.contiguous_format)  # frees the others
            state_dict = {**state_dict, key: last}
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)


def _has_shape(tensor: Tensor, shape: tuple[int, ...], key: str, errors: list[str]) -> bool:
    """Whether a checkpoint's tensor has the released shape; if not, `errors` says so."""
    if tensor.shape != shape:
        errors.append(f"size mismatch for {key}: the file has {tuple(tensor.shape)}, the model {shape}.")
    return tensor.shape == shape


class RMSNorm(nn.Module):
    """Each pixel's channels scaled to root mean square 1, then by `gamma`. Halves come out as fp32."""

    def __init__(self, dim: int, gamma_rank: int = 4):  # gamma (C, 1, 1, 1); in attention (C, 1, 1)
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * (gamma_rank - 1)))

    def forward(self, x: Tensor) -> Tensor:  # (B, C, h, w)
        wide = torch.promote_types(x.dtype, torch.float32)
        gamma = self.gamma.to(wide).view(-1, 1, 1) * math.sqrt(len(self.gamma))
        return F.normalize(x.to(wide), dim=1) * gamma


def norm_silu(norm: RMSNorm, x: Tensor) -> Tensor:
    """Norm and activation, rounded once; diffusers rounds after every step and ends further from fp32."""
    return F.silu(norm(x)).to(x.dtype)


class ResidualBlock(nn.Module):
    """Twice norm, SiLU, 3x3 convolution; added to the input, which a 1x1 convolution widens or narrows."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.norm1 = RMSNorm(in_dim)
        self.conv1 = CausalConv2d(in_dim, dim, 3, padding=1)
        self.norm2 = RMSNorm(dim)
        self.conv2 = CausalConv2d(dim, dim, 3, padding=1)
        self.conv_shortcut = CausalConv2d(in_dim, dim, 1) if in_dim != dim else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(norm_silu(self.norm1, x))
        return self.conv2(norm_silu(self.norm2, h)) + self.conv_shortcut(x)


class AttentionBlock(nn.Module):
    """Every latent pixel looks at every other, with one head as wide as the model: the only global step."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = RMSNorm(dim, gamma_rank=3)
        self.to_qkv = nn.Conv2d(dim, dim * 3, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.to_qkv(self.norm(x).to(x.dtype))
        q, k, v = rearrange(qkv, "b (three c) h w -> three b 1 (h w) c", three=3)
        out = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(rearrange(out, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class MidBlock(nn.Module):
    """Residual, attention, residual, where the picture is smallest."""

    def __init__(self, dim: int):
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(dim, dim), ResidualBlock(dim, dim)])
        self.attentions = nn.ModuleList([AttentionBlock(dim)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Resample(nn.Module):
    """Halves or doubles both sides; doubling also halves the channels.

    Where the video model resamples time as well, the checkpoint has a `time_conv`. One frame never runs it, so
    it is only two names and shapes here: loading checks them and drops the numbers, saving writes zeros.
    """

    def __init__(self, dim: int, up: bool, time: bool):
        super().__init__()
        if up:
            layers = nn.Upsample(scale_factor=2, mode="nearest-exact"), nn.Conv2d(dim, dim // 2, 3, padding=1)
        else:  # one row and one column of zeros, on the right and below only
            layers = nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2)
        self.resample = nn.Sequential(*layers)
        width = dim * 2 if up else dim  # upwards, two frames side by side in the channels
        self.unread = {"time_conv.weight": (width, dim, 3, 1, 1), "time_conv.bias": (width,)} if time else {}

    def forward(self, x: Tensor) -> Tensor:
        return self.resample(x)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, shape in self.unread.items():
            destination[prefix + name] = self.resample[1].weight.detach().new_zeros(shape)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        state_dict = dict(state_dict)
        for name, shape in self.unread.items():
            if prefix + name in state_dict:
                _has_shape(state_dict.pop(prefix + name), shape, prefix + name, errors)
            elif strict:
                missing.append(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)


class Encoder(nn.Module):
    """Pixels (B, 3, H, W) -> (B, 2 z_dim, h, w). `down_blocks` is one flat list, as in the checkpoint."""

    def __init__(self, base_dim, z_dim, dim_mult, num_res_blocks, time):
        super().__init__()
        self.conv_in = CausalConv2d(3, base_dim, 3, padding=1)
        self.down_blocks = nn.ModuleList()
        in_dim = base_dim
        for level, mult in enumerate(dim_mult):
            dim = base_dim * mult
            for _ in range(num_res_blocks):
                self.down_blocks.append(ResidualBlock(in_dim, dim))
                in_dim = dim
            if level < len(dim_mult) - 1:
                self.down_blocks.append(Resample(dim, up=False, time=time[level]))
        self.mid_block = MidBlock(dim)
        self.norm_out = RMSNorm(dim)
        self.conv_out = CausalConv2d(dim, 2 * z_dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(norm_silu(self.norm_out, self.mid_block(x)))


class UpBlock(nn.Module):
    """One level of the decoder: residual blocks, then the doubling, which the last level does without."""

    def __init__(self, in_dim, dim, num_res_blocks, upsampler):
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(d, dim) for d in [in_dim] + [dim] * num_res_blocks)
        self.upsamplers = nn.ModuleList([upsampler] if upsampler else [])

    def forward(self, x: Tensor) -> Tensor:
        for block in (*self.resnets, *self.upsamplers):
            x = block(x)
        return x


class Decoder(nn.Module):
    """Latents (B, z_dim, h, w) -> pixels (B, 3, H, W), not clamped. Levels have one residual block more."""

    def __init__(self, base_dim, z_dim, dim_mult, num_res_blocks, time):
        super().__init__()
        in_dim = base_dim * dim_mult[-1]
        self.conv_in = CausalConv2d(z_dim, in_dim, 3, padding=1)
        self.mid_block = MidBlock(in_dim)
        self.up_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(dim_mult))):
            dim = base_dim * mult
            upsampler = Resample(dim, up=True, time=time[level - 1]) if level > 0 else None
            self.up_blocks.append(UpBlock(in_dim, dim, num_res_blocks, upsampler))
            in_dim = dim // 2  # what the upsampler hands on
        self.norm_out = RMSNorm(dim)
        self.conv_out = CausalConv2d(dim, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(norm_silu(self.norm_out, x))


class Posterior:
    """What the encoder knows of a picture: a normal for each latent; `mean`, `logvar` (B, 16, 1, h, w)."""

    def __init__(self, moments: Tensor):  # (B, 32, 1, h, w)
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30, 20)

    def mode(self) -> Tensor:
        """The likeliest latents: what edits are conditioned on."""
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Latents drawn at random on the generator's device, as diffusers draws them."""
        device = self.mean.device if generator is None else generator.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.mean + torch.exp(0.5 * self.logvar) * noise.to(self.mean.device)


class AutoencoderKLQwenImage(nn.Module):
    """Encodes and decodes single pictures. Keywords are the keys of the released vae/config.json.

    ValueError for a key that it does not know (those that begin with `_` are the file's own notes), and for
    values that the VAE of Qwen-Image does not have: attn_scales, dropout, the four channels of Qwen-Image-Layered.
    """

    def __init__(
        self,
        base_dim: int = 96,  # channels at full resolution
        z_dim: int = 16,  # channels of the latents
        dim_mult: Sequence[int] = (1, 2, 4, 4),  # width of each level, in base_dims; sides halve between
        num_res_blocks: int = 2,  # of a level of the encoder
        temperal_downsample: Sequence[bool] = (False, True, True),  # [sic] which halvings have a time_conv
        latents_mean: Sequence[float] = LATENTS_MEAN,  # of each channel, over many pictures
        latents_std: Sequence[float] = LATENTS_STD,
        **others,
    ):
        super().__init__()
        refuse_uncomputed(others, COMPUTED, "vae/config.json")
        if unknown := [key for key in others if key not in COMPUTED and not key.startswith("_")]:
            raise ValueError(f"vae/config.json: unknown keys {', '.join(unknown)}")
        if len(temperal_downsample) != len(dim_mult) - 1:
            raise ValueError(f"{temperal_downsample=} must be one shorter than {dim_mult=}")
        self.factor = 2 ** len(temperal_downsample)  # pixels to a latent, each way: 8
        self.latents_mean, self.latents_std = (tuple(map(float, each)) for each in (latents_mean, latents_std))
        counts = {len(self.latents_mean), len(self.latents_std)}
        right = counts <= {z_dim, len(LATENTS_MEAN)} and min(self.latents_std) > 0
        if not (right and all(map(math.isfinite, (*self.latents_mean, *self.latents_std)))):
            raise ValueError(f"latents_mean and latents_std must be {z_dim} numbers each, those of latents_std above 0")
        self.encoder = Encoder(base_dim, z_dim, dim_mult, num_res_blocks, temperal_downsample)
        self.quant_conv = CausalConv2d(2 * z_dim, 2 * z_dim, 1)
        self.post_quant_conv = CausalConv2d(z_dim, z_dim, 1)
        self.decoder = Decoder(base_dim, z_dim, dim_mult, num_res_blocks, temperal_downsample)

    def encode(self, pixels: Tensor, tile: int | None = None) -> Posterior:
        """Pixels (B, 3, 1, H, W) in [-1, 1] -> the posterior over latents (B, 16, 1, H/8, W/8).

        tile: an edge in pixels, say 512: work on overlapping tiles, so memory does not grow with the picture.
        ValueError for another rank, more than one frame, or sides that are not multiples of 8.
        """
        _check_single_frame(pixels, 3)
        h, w = pixels.shape[3:]
        if h % self.factor or w % self.factor:
            raise ValueError(f"both sides must be multiples of {self.factor}, got {w} x {h}: resize first")
        moments = self._run(lambda x: self.quant_conv(self.encoder(x)), pixels, tile, shrink=self.factor)
        return Posterior(moments)

    def decode(self, latents: Tensor, tile: int | None = None) -> Tensor:
        """Latents (B, 16, 1, h, w), denormalised -> pixels (B, 3, 1, 8h, 8w), clamped to [-1, 1].

        tile: as for `encode`, also in pixels. ValueError for another rank or more than one frame.
        """
        _check_single_frame(latents, self.post_quant_conv.in_channels)
        pixels = self._run(lambda z: self.decoder(self.post_quant_conv(z)), latents, tile, grow=self.factor)
        return pixels.clamp(-1, 1)

    def normalize(self, latents: Tensor) -> Tensor:
        """(latents - mean) / std for each channel of (B, 16, 1, h, w): the transformer's scale."""
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def denormalize(self, latents: Tensor) -> Tensor:
        """The way back from `normalize`, to be taken before `decode`."""
        mean, std = self._statistics(latents)
        return latents * std + mean

    def _statistics(self, latents: Tensor) -> Tensor:
        _check_single_frame(latents, len(self.latents_mean))
        return latents.new_tensor([self.latents_mean, self.latents_std]).view(2, 1, -1, 1, 1, 1)

    def _run(self, net: Callable[[Tensor], Tensor], x: Tensor, tile: int | None, shrink=1, grow=1) -> Tensor:
        """A 2-D network on (B, C, 1, H, W), whole or in tiles."""
        x = x[:, :, 0].contiguous(memory_format=torch.channels_last)  # kept by convolutions: 1.4x on a CPU
        if tile is None:
            return net(x)[:, :, None]
        if tile % self.factor or tile < 8 * self.factor:
            raise ValueError(f"tile must be a multiple of {self.factor}, {8 * self.factor} or more: {tile}")
        return tiled(net, x, tile // self.factor, shrink, grow)[:, :, None]


def _check_single_frame(x: Tensor, channels: int) -> None:
    if x.ndim != 5 or x.shape[1:3] != (channels, 1):
        raise ValueError(f"expected pictures (B, {channels}, 1, height, width), one frame, got {tuple(x.shape)}")

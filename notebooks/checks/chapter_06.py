"""Checks of the exercises of chapter 06, with the broken encoder and the trained block that they need."""

import random
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

from checks import Wrong, ask, exercise, expect, expect_finding, expect_five
from course import TINY
from minqwen.checkpoint import Checkpoint
from minqwen.images import image_to_pixels
from minqwen.vae import AutoencoderKLQwenImage
from minqwen.world import draw, sample_scene

# ---------------------------------------------------------------------------------------------------- 06.1


@exercise("06.1")
def numbers(answer):
    """Width, height, tokens of a 3840 x 2160 photo; a number in a token; weights that act."""
    wrong = [
        {"round to the nearest step of 32, not down": 1344, "that rounds to 16; the working size has steps of 32": 1360,
         "round to a step of 32": 1365, "that is the height": 768},
        {"that is the width": 1376, "compute it from the unrounded width": 774},
        {"those are places of the latents; a token holds 2×2 of them": 172 * 96,
         "a token is 16 pixels wide and high, not 32": 43 * 24, "those are pixels": 1376 * 768},
        {"that order keeps a place's channels together": 16 * 2 + 5, "that is upper right: 2·dy + dx": 21,
         "channels count from 0": 18},
        {"those are all of them; two taps of three meet empty frames": 48 * 48 * 27,
         "those are the silent ones": 48 * 48 * 18},
    ]  # fmt: skip
    names = ("width", "height", "tokens", "number in the token", "weights that act")
    expect_five(answer, (1376, 768, 4128, 22, 48 * 48 * 9), wrong, names)


# ---------------------------------------------------------------------------------------------------- 06.2


def packed(z: torch.Tensor, p: int, numbers=(0, 1, 2), tokens=(0, 1), far: bool = False) -> torch.Tensor:
    """Patches of p x p as tokens. numbers: the order of channel, dy, dx in a token; tokens: that of rows, columns."""
    B, C, _, h, w = z.shape
    if far:  # dy and dx as the outer parts of rows and columns: a token's places lie apart
        parts = z[:, :, 0].reshape(B, C, p, h // p, p, w // p).permute(0, 3, 5, 1, 2, 4)
    else:
        parts = z[:, :, 0].reshape(B, C, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5)
    parts = parts.permute(0, *(1 + t for t in tokens), *(3 + n for n in numbers))
    return parts.reshape(B, (h // p) * (w // p), C * p * p)


PACKINGS = {
    "numbers of a token: each channel's places together, not each place's channels": {"numbers": (1, 2, 0)},
    "in a token, dy and dx are exchanged: the column runs fastest": {"numbers": (0, 2, 1)},
    "tokens go row by row: the column runs fastest": {"tokens": (1, 0)},
    "a token's places should be neighbours; yours lie h/p rows or w/p columns apart": {"far": True},
}


@exercise("06.2")
def packing(pack, unpack):
    """pack(latents, p) and unpack(tokens, h, w, p), over random sizes."""
    for _ in range(5):
        p, B, C = random.choice([2, 3]), random.randint(1, 3), random.randint(2, 5)
        h, w = (p * n for n in random.sample(range(2, 6), 2))
        z = torch.randn(B, C, 1, h, w)
        want = packed(z, p)
        mistakes = {diagnosis: packed(z, p, **change) for diagnosis, change in PACKINGS.items()}
        where = f"latents {tuple(z.shape)}, p = {p}"
        expect(ask(pack, z.clone(), p, library="images.py"), want, mistakes, where=f"pack, {where}")
        got = ask(unpack, want.clone(), h, w, p, library="images.py")
        if isinstance(got, torch.Tensor) and got.shape == z.shape and not torch.equal(got, z):
            for diagnosis, change in PACKINGS.items():
                if torch.equal(packed(got, p, **change), want):
                    raise Wrong(f"unpack does not undo pack: {diagnosis} ({where})")
        expect(got, z, {"the time axis is missing": z[:, :, 0]}, where=f"unpack, {where}")


# ---------------------------------------------------------------------------------------------------- 06.3


@exercise("06.3")
def flat(answer):
    """flat(weight, before): the 2-D kernel of one frame, with empty frames or copies of the first before it."""
    for taps in (3, 3, 2, 4, 1):
        inner, outer = random.sample(range(2, 7), 2)
        weight = torch.randn(outer, inner, taps, 3, 3)
        last, total = weight[:, :, -1], weight.sum(dim=2)
        for before, want, other in (("zeros", last, total), ("first", total, last)):
            mistakes = {
                f"{before!r}: every tap that meets the picture counts, and none that meets zeros": other,
                f"{before!r}: the taps add up; a mean makes it a third as strong": weight.mean(dim=2),
                "that is the tap that looks furthest back": weight[:, :, 0],
                "that is the middle tap; the convolution is causal": weight[:, :, taps // 2],
                "keep (out, in, k, k): the time axis goes": want[:, :, None],
            }
            got = ask(answer, weight.clone(), before, library="vae.py")
            expect(got, want, mistakes if taps == 3 else None, where=f"{before!r}, {taps} taps")
            x = torch.randn(1, inner, 1, 6, 7)
            clip = torch.cat([x * (before == "first")] * (taps - 1) + [x], dim=2)
            apart = (F.conv2d(x[:, :, 0], got) - F.conv3d(clip, weight)[:, :, 0]).abs().max()
            if apart > 1e-4:
                raise Wrong(f"2-D and 3-D differ by {apart:.1e} ({before!r}, {taps} taps)")


# ---------------------------------------------------------------------------------------------------- 06.4


def block_of(x, tensors, tap=-1, root=True, silu=True, before=True, shortcut=True, gamma=True, over=(1,)):
    """The residual block on stored tensors, or with a mistake."""
    h = x
    for i in (1, 2):
        scale = tensors[f"norm{i}.gamma"].view(-1, 1, 1) if gamma else 1
        h = h / h.square().mean(dim=over, keepdim=True).sqrt() * scale
        h = h if root else h / x.new_tensor(len(tensors[f"norm{i}.gamma"])).sqrt()
        h = F.silu(h) if silu and before else h
        h = F.conv2d(h, tensors[f"conv{i}.weight"][:, :, tap], tensors[f"conv{i}.bias"], padding=1)
        h = F.silu(h) if silu and not before else h
    if not shortcut:
        return h
    if "conv_shortcut.weight" in tensors:
        x = F.conv2d(x, tensors["conv_shortcut.weight"][:, :, -1], tensors["conv_shortcut.bias"])
    return h + x


BLOCKS = {
    "the weight's last temporal slice acts; this is the first": {"tap": 0},
    "the weight's last temporal slice acts; this is the middle one": {"tap": 1},
    "the norm makes the root mean square 1, so √C times what F.normalize gives": {"root": False},
    "the activation, SiLU, is missing": {"silu": False},
    "norm, SiLU, convolution: the activation comes before the convolution": {"before": False},
    "the input is not added": {"shortcut": False},
    "gamma, the norm's weight for each channel, is not applied": {"gamma": False},
    "each pixel is normed over its channels, not the whole picture": {"over": (1, 2, 3)},
}


@cache
def trained():
    """A decoder block of the tiny checkpoint that changes the width, and what enters and leaves it for a scene."""
    vae, name, seen = _vae(), "decoder.up_blocks.1.resnets.0", {}
    hook = vae.get_submodule(name).register_forward_hook(lambda _, args, result: seen.update(x=args[0], y=result))
    with torch.no_grad():
        vae.decode(vae.encode(pixels()[:, :, None]).mode())
    hook.remove()
    tensors = Checkpoint(TINY).tensors("vae", f"{name}.")
    return {key.removeprefix(f"{name}."): tensor.float() for key, tensor in tensors.items()}, seen["x"], seen["y"]


@exercise("06.4")
def residual(answer):
    """residual(x, tensors): random weights with and without a change of width, then a trained block."""
    for wide in (True, False, True):
        inner = random.randint(3, 6)
        outer = inner + wide * random.randint(1, 4)
        tensors = {}
        for i, (a, b) in enumerate(((inner, outer), (outer, outer)), 1):
            tensors[f"norm{i}.gamma"] = 1 + 0.3 * torch.randn(a, 1, 1, 1)
            tensors[f"conv{i}.weight"], tensors[f"conv{i}.bias"] = torch.randn(b, a, 3, 3, 3) / 5, torch.randn(b)
        if wide:
            tensors["conv_shortcut.weight"] = torch.randn(outer, inner, 1, 1, 1)
            tensors["conv_shortcut.bias"] = torch.randn(outer)
        x = 2 * torch.randn(2, inner, 5, 7)
        mistakes = {diagnosis: block_of(x, tensors, **change) for diagnosis, change in BLOCKS.items()}
        given = {key: tensor.clone() for key, tensor in tensors.items()}
        got = ask(answer, x.clone(), given, library="vae.py")
        expect(got, block_of(x, tensors), mistakes, tolerance=1e-4, where=f"{inner} to {outer} channels")
    tensors, x, y = trained()
    got = ask(answer, x.clone(), dict(tensors), library="vae.py")
    expect(got, y, tolerance=1e-3, where="the trained block")
    return f"On the trained block it agrees to {(got - y).abs().max():.0e}; the largest number is {y.abs().max():.0f}."


# ---------------------------------------------------------------------------------------------------- 06.5


class _Edge(nn.ZeroPad2d):  # spoiler: the fault of exercise 06.5
    def forward(self, x):
        return F.pad(x, self.padding, mode="replicate")

    def _get_name(self):
        return "ZeroPad2d"


def _vae() -> AutoencoderKLQwenImage:
    return Checkpoint(TINY).load(AutoencoderKLQwenImage, "vae")


def broken() -> nn.Module:
    """The tiny encoder with one fault."""
    encoder = _vae().encoder
    encoder.down_blocks[5].resample[0] = _Edge((0, 1, 0, 1))
    return encoder


def right() -> nn.Module:
    """The tiny encoder."""
    return _vae().encoder


def pixels() -> torch.Tensor:
    """A scene as the encoder takes it: (1, 3, 96, 96)."""
    import numpy as np

    return image_to_pixels(draw(sample_scene(np.random.default_rng(4), least=3)))[:, :, 0]


CAUSES = {
    "A": "then the padded picture would have two more rows, and it has one",
    "B": "put ones through the padding: is there a zero on the left?",
    "D": "the stride belongs to the convolution, and the finder stops before it",
    "E": "taps belong to a convolution, and the finder stops before it",
}


@exercise("06.5")
def cause(finding):
    """(name of the sub-module, letter)."""
    smaller = "inside it there is a smaller one that differs already"
    names = {
        "": "look at the first sub-module that differs, not at the whole",
        "down_blocks.5": smaller,
        "down_blocks.5.resample": smaller,
        "down_blocks.5.resample.1": "it differs because what it is given differs",
        "down_blocks.2.resample.0": "that one agrees: the fault is in the second halving",
    }
    expect_finding(
        finding,
        "two: the sub-module's name, a letter",
        name=("down_blocks.5.resample.0", names),
        cause=("C", CAUSES),
    )


# ---------------------------------------------------------------------------------------------------- 06.6


def dropped(z: torch.Tensor, channel: int, value: float) -> torch.Tensor:
    z = z.clone()
    z[:, channel] = value
    return z


@exercise("06.6")
def drop(answer):
    """drop(latents, channel, mean): one channel at its mean, the others and the given tensor as they were."""
    for _ in range(4):
        B, C = random.sample(range(3, 7), 2)
        z, mean = torch.randn(B, C, 1, 4, 6), torch.randn(C).tolist()
        channel = random.randrange(min(B, C))
        want, given = dropped(z, channel, mean[channel]), z.clone()
        batch = z.clone()
        batch[channel] = mean[channel]
        mistakes = {
            "0 is not the middle of this channel; its mean is": dropped(z, channel, 0.0),
            "the mean of another channel, or of all": dropped(z, channel, sum(mean) / C),
            "that is the batch axis: channels are axis 1": batch,
            "nothing was dropped": z,
            "every channel but this one should stay": torch.tensor(mean).view(1, C, 1, 1, 1).expand_as(z),
            "the mean of these latents is not that of many pictures": dropped(z, channel, z[:, channel].mean().item()),
        }
        got = ask(answer, given, channel, mean, library="vae.py")
        expect(given, z, where="the latents you were given were changed in place")
        expect(got, want, mistakes, where=f"latents {tuple(z.shape)}, channel {channel}")

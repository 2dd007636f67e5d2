"""Plausible wrong answers to the exercises of chapter 06, and the words of the diagnosis that each must get."""

import torch
import torch.nn.functional as F
from einops import rearrange

from checks import Answers


def packer(tokens="h w", numbers="c dy dx", rows="(h dy)", columns="(w dx)", frame=" 1"):
    there, back = f"b c 1 {rows} {columns} -> b ({tokens}) ({numbers})", f"b c{frame} {rows} {columns}"

    def pack(z, p):
        return rearrange(z, there, dy=p, dx=p)

    def unpack(t, h, w, p):
        return rearrange(t, f"b ({tokens}) ({numbers}) -> {back}", h=h // p, w=w // p, dy=p, dx=p)

    return pack, unpack


def mixed(**changes):
    """The right pack with a wrong unpack."""
    return Answers((packer()[0], packer(**changes)[1]))


def library_pack(z, p):
    from minqwen.images import pack_latents

    return pack_latents(z)


def kernel(zeros, first):
    return lambda weight, before: zeros(weight) if before == "zeros" else first(weight)


def last(w):
    return w[:, :, -1]


def total(w):
    return w.sum(dim=2)


def block(tap=-1, root=True, silu=True, before=True, add=True, gamma=True, bring=True, whole=False):
    def residual(x, tensors):
        h = x
        for i in (1, 2):
            g = tensors[f"norm{i}.gamma"]
            dims = (1, 2, 3) if whole else 1
            h = h / h.square().mean(dim=dims, keepdim=True).sqrt() if root else F.normalize(h, dim=1)
            h = h * g.view(-1, 1, 1) if gamma else h
            h = F.silu(h) if silu and before else h
            h = F.conv2d(h, tensors[f"conv{i}.weight"][:, :, tap], tensors[f"conv{i}.bias"], padding=1)
            h = F.silu(h) if silu and not before else h
        if bring and "conv_shortcut.weight" in tensors:
            x = F.conv2d(x, tensors["conv_shortcut.weight"][:, :, 0], tensors["conv_shortcut.bias"])
        return h + x if add else h

    return residual


def library_block(x, tensors):
    from minqwen.vae import ResidualBlock

    module = ResidualBlock(x.shape[1], tensors["conv1.weight"].shape[0])
    module.load_state_dict(tensors)
    with torch.no_grad():
        return module(x)


def set_to(value, axis=1):
    def answer(latents, channel, mean):
        z = latents.clone()
        z.select(axis, channel).fill_(value(latents, channel, mean))
        return z

    return answer


def in_place(latents, channel, mean):
    latents[:, channel] = mean[channel]
    return latents


NAME = "down_blocks.5.resample.0"

WRONG = {
    "numbers": [
        ("not down", (1344, 768, 4128, 22, 20736)),
        ("steps of 32", (1360, 768, 4080, 22, 20736)),
        ("round to a step", (1365, 768, 4128, 22, 20736)),
        ("from the unrounded width", (1376, 774, 4128, 22, 20736)),
        ("a token holds 2×2", (1376, 768, 16512, 22, 20736)),
        ("not 32", (1376, 768, 1032, 22, 20736)),
        ("a place's channels together", (1376, 768, 4128, 37, 20736)),
        ("upper right", (1376, 768, 4128, 21, 20736)),
        ("two taps of three", (1376, 768, 4128, 22, 62208)),
        ("the silent ones", (1376, 768, 4128, 22, 41472)),
        ("expected five numbers", (1376, 768)),
    ],
    "packing": [
        ("not each place's channels", Answers(packer(numbers="dy dx c"))),
        ("dy and dx are exchanged", Answers(packer(numbers="c dx dy"))),
        ("tokens go row by row", Answers(packer(tokens="w h"))),
        ("should be neighbours", Answers(packer(rows="(dy h)", columns="(dx w)"))),
        ("unpack does not undo pack: numbers of a token", mixed(numbers="dy dx c")),
        ("unpack does not undo pack: in a token", mixed(numbers="c dx dy")),
        ("unpack does not undo pack: tokens", mixed(tokens="w h")),
        ("the time axis is missing", mixed(frame="")),
        ("write it yourself", Answers((library_pack, packer()[1]))),
    ],
    "flat": [
        ("none that meets zeros", kernel(total, total)),
        ("every tap that meets the picture counts", kernel(last, last)),
        ("the taps add up", kernel(last, lambda w: w.mean(dim=2))),
        ("looks furthest back", kernel(lambda w: w[:, :, 0], total)),
        ("the convolution is causal", kernel(lambda w: w[:, :, w.shape[2] // 2], total)),
        ("the time axis goes", kernel(lambda w: w[:, :, -1:], total)),
        ("3 taps", kernel(lambda w: w[:, :, 2], lambda w: 3 * w[:, :, 2])),
    ],
    "residual": [
        ("this is the first", block(tap=0)),
        ("this is the middle one", block(tap=1)),
        ("√C times", block(root=False)),
        ("SiLU, is missing", block(silu=False)),
        ("before the convolution", block(before=False)),
        ("the input is not added", block(add=False)),
        ("gamma", block(gamma=False)),
        ("over its channels", block(whole=True)),
        ("your code raised RuntimeError", block(bring=False)),
        ("write it yourself", library_block),
    ],
    "cause": [
        ("a smaller one that differs already", (("down_blocks.5", "C"))),
        ("a smaller one that differs already", (("down_blocks.5.resample", "C"))),
        ("what it is given differs", (("down_blocks.5.resample.1", "C"))),
        ("the second halving", (("down_blocks.2.resample.0", "C"))),
        ("not at the whole", (("", "C"))),
        ("two more rows", ((NAME, "A"))),
        ("a zero on the left", ((NAME, "B"))),
        ("the stride belongs", ((NAME, "D"))),
        ("taps belong", ((NAME, "E"))),
        ("expected two", NAME),
    ],
    "drop": [
        ("0 is not the middle", set_to(lambda z, c, m: 0.0)),
        ("or of all", set_to(lambda z, c, m: sum(m) / len(m))),
        ("the batch axis", set_to(lambda z, c, m: m[c], axis=0)),
        ("nothing was dropped", lambda z, c, m: z.clone()),
        ("changed in place", in_place),
        ("should stay", lambda z, c, m: torch.tensor(m).view(1, -1, 1, 1, 1).expand_as(z)),
        ("not that of many pictures", set_to(lambda z, c, m: z[:, c].mean())),
    ],
}

"""Plausible wrong answers to the exercises of chapter 09, and the words of the diagnosis that each must get."""

import math

import torch
import torch.nn.functional as F

from checks import Answers


def levels(last=None, most=(8192, 0.9), up=1, shift=True, stretch=True, zero=True, dtype=torch.float32):
    def answer(steps, tokens):
        s = torch.linspace(1, 1 / steps if last is None else last, steps)
        a = math.exp(up * (0.5 + (most[1] - 0.5) * (tokens - 256) / (most[0] - 256))) if shift else 1
        s = a * s / (1 + (a - 1) * s)
        if stretch and (steps > 1 or stretch == "always"):
            s = 1 - (1 - s) * 0.98 / (1 - s[-1])
        return (torch.cat([s, torch.zeros(1)]) if zero else s).to(dtype)

    return answer


def library_levels(steps, tokens):
    from minqwen.sampling import get_sigmas

    return get_sigmas(steps, tokens)


def best(half=0.5, sign=1, divided=True, weights="softmax"):
    def answer(x, sigma, pictures):
        z = (x[:, None] - (1 - sigma) * pictures) / sigma
        distance = (z if divided else sigma * z).square().sum(-1)
        if weights == "softmax":
            likely = (-half * distance).softmax(-1)
        elif weights == "densities":
            density = (-half * distance).exp()
            likely = density / density.sum(-1, keepdim=True)
        elif weights == "alike":
            likely = torch.full_like(distance, 1 / len(pictures))
        else:
            likely = F.one_hot(distance.argmin(-1), len(pictures)).float()
        return sign * (likely[..., None] * (z - pictures)).sum(1)

    return answer


def following(shift_first=False, silu=True, one=1, swap=False, sign=1, length="token", all_the_way=False, guided=True):
    def answer(hidden, temb, tensors, x, sigma, after, scale):
        temb = F.silu(temb) if silu else temb
        halves = F.linear(temb, tensors["norm_out.linear.weight"], tensors["norm_out.linear.bias"])
        halves = halves[:, None].chunk(2, -1)
        grow, shift = reversed(halves) if shift_first else halves
        hidden = F.layer_norm(hidden, hidden.shape[-1:], eps=1e-6) * (one + grow) + shift
        v = F.linear(hidden, tensors["proj_out.weight"], tensors["proj_out.bias"])
        plus, minus = v.flip(0).split(1) if swap else v.split(1)
        c = minus + (scale if guided else 1) * (plus - minus)
        if length == "token":
            c = F.normalize(c, dim=-1) * plus.norm(dim=-1, keepdim=True)
        if length == "picture":
            c = c / c.norm() * plus.norm()
        return x + sign * ((0 if all_the_way else after) - sigma) * c

    return answer


def library_following(hidden, temb, tensors, x, sigma, after, scale):
    from minqwen.sampling import guide

    return x + (after - sigma) * guide(hidden[:1, :, :64], hidden[1:, :, :64], scale)


def euler(x, v, sigma, after, velocity):
    return x + (after - sigma) * v


def heun(last=False, still=False, middle=False, half=0.5, again=False):
    def answer(x, v, sigma, after, velocity):
        step = after - sigma
        if after == 0 and not last:
            return x + step * v
        if middle:
            return x + step * velocity(x + step / 2 * v, (sigma + after) / 2)
        first = velocity(x, sigma) if again else v
        return x + step * half * (first + velocity(x if still else x + step * v, after))

    return answer


SHAPES = [(1, 4, 4), (1, 6, 8)]

WRONG = {
    "numbers": [
        ("without the words too", (50, 0.5, 0.02, 0.7, 5)),
        ("nothing is asked there", (102, 0.5, 0.02, 0.7, 5)),
        ("in the same call", (200, 0.5, 0.02, 0.7, 5)),
        ("pushes down", (100, 0.1, 0.02, 0.7, 5)),
        ("that is before the stretch", (100, 0.5, 0.1, 0.7, 5)),
        ("FLUX's 4096", (100, 0.5, 0.02, 1.1717, 5)),
        ("e^mu is not asked for", (100, 0.5, 0.02, 2.01375, 5)),
        ("scale it back", (100, 0.5, 0.02, 0.7, 15)),
        ("expected five numbers", (100, 0.5)),
    ],
    "levels": [
        ("no terminal stretch", levels(stretch=False)),
        ("FLUX's constants", levels(most=(4096, 1.15))),
        ("there is no shift", levels(shift=False)),
        ("the shift goes down", levels(up=-1)),
        ("down to 1/S, not to 0", levels(last=1e-9)),
        ("divides 0 by 0", levels(stretch="always")),
        ("the 0 at the end is missing", levels(zero=False)),
        ("should be float32", levels(dtype=torch.float64)),
        ("write it yourself", library_levels),
    ],
    "best_velocity": [
        ("the sign", best(sign=-1)),
        ("not equally likely", best(weights="alike")),
        ("the likeliest picture alone", best(weights="nearest")),
        ("the half is missing", best(half=1.0)),
        ("the division is missing", best(divided=False)),
        ("take the softmax of their logarithms", best(weights="densities")),
    ],
    "next_latents": [
        ("the scale comes first", following(shift_first=True)),
        ("SiLU of temb", following(silu=False)),
        ("modulation is 1 + scale", following(one=0)),
        ("row 0 is the prediction with words", following(swap=True)),
        ("walk against the velocity", following(sign=-1)),
        ("token by token", following(length=None)),
        ("not that of all together", following(length="picture")),
        ("not all the way", following(all_the_way=True)),
        ("there is no guidance", following(guided=False)),
        ("write it yourself", library_following),
    ],
    "cause": [
        ("the two samplers agree", Answers((("schedule", "A"), [(1, 4, 4)], 64))),
        ("the transformer differs because", Answers((("transformer.transformer_blocks.0", "A"), SHAPES, 64))),
        ("name the first of all", Answers((("guidance", "A"), SHAPES, 64))),
        ("without references too", Answers((("schedule", "B"), SHAPES, 64))),
        ("is not given the words", Answers((("schedule", "C"), SHAPES, 64))),
        ("print the levels", Answers((("schedule", "D"), SHAPES, 64))),
        ("the target alone", Answers((("schedule", "A"), SHAPES, 16))),
    ],
    "heun": [
        ("this is Euler", euler),
        ("a velocity at level 0", heun(last=True)),
        ("the point that the Euler step reached", heun(still=True)),
        ("in the middle of the step", heun(middle=True)),
        ("not their sum", heun(half=1)),
        ("should take", heun(again=True)),
        ("returns the next latents", lambda *now: None),
    ],
}

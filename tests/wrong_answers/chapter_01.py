"""Wrong answers to chapter 01's exercises, each with words of the diagnosis that it must get."""

import math

import torch
import torch.nn.functional as F

from minqwen import timestep


def angles(sigma, dim, scale=1000, shift=0):
    half = dim // 2
    return scale * sigma[:, None] * 10000.0 ** (-torch.arange(half) / (half - shift))


def sines_first(sigma, dim):
    return torch.cat([angles(sigma, dim).sin(), angles(sigma, dim).cos()], -1)


def no_scale(sigma, dim):
    return torch.cat([angles(sigma, dim, 1).cos(), angles(sigma, dim, 1).sin()], -1)


def other_divisor(sigma, dim):
    return torch.cat([angles(sigma, dim, shift=1).cos(), angles(sigma, dim, shift=1).sin()], -1)


def alternating(sigma, dim):
    return torch.stack([angles(sigma, dim).cos(), angles(sigma, dim).sin()], -1).flatten(1)


def librarys(sigma, dim):
    return timestep.get_timestep_embedding(sigma, dim, True, 0, 1000)


def through(act, bias=1.0):
    def mlp(x, w):
        hidden = act(x @ w["linear_1.weight"].T + bias * w["linear_1.bias"])
        return hidden @ w["linear_2.weight"].T + bias * w["linear_2.bias"]

    return mlp


WRONG = {
    "same": [
        ("half a turn", math.pi / 100),
        ("that is the angle", 2 * math.pi),
        ("in degrees", 3.6),
        ("the fastest clock's", 0.0062832),
    ],
    "waves": [
        ("sines come first", sines_first),
        ("factor of 1000 is missing", no_scale),
        ("divides by dim/2 - 1", other_divisor),
        ("cosine and sine alternate", alternating),
        ("write it yourself", librarys),
    ],
    "mlp": [
        ("that is ReLU", through(F.relu)),
        ("here it is GELU", through(F.gelu)),
        ("SiLU between the two layers is missing", through(lambda x: x)),
        ("biases are missing", through(F.silu, 0.0)),
        ("your code raised", lambda x, w: x @ w["linear_1.weight"]),
    ],
    "found": [
        ("do its inputs agree", ("timestep_embedder.linear_1", "inside")),
        ("an earlier one differs", ("timestep_embedder.linear_2", "before")),
        ("linear_1 finishes first", ("timestep_embedder", "before")),
        ("answer with two strings", "timestep_embedder.linear_1"),
    ],
    "seen": [
        ("rounds once", lambda s: (1000 * s).bfloat16().float()),
        ("rounds σ itself", lambda s: 1000 * s.bfloat16().float()),
        ("nothing is rounded", lambda s: 1000 * s),
        ("float16, not bfloat16", lambda s: ((1000 * s).half() / 1000).float() * 1000),
    ],
}

"""The checks of chapter 01's exercises."""

import math

import torch
from safetensors import safe_open
from torch import nn

from checks import Wrong, ask, exercise, expect
from course import TINY

WEIGHTS = TINY / "transformer" / "diffusion_pytorch_model.safetensors"
LIBRARY = "timestep.py"


def _waves(sigma, dim, base=10000.0, scale=1000.0, shift=0):
    half = dim // 2
    angles = [[scale * s * base ** (-k / (half - shift)) for k in range(half)] for s in sigma.tolist()]
    angles = torch.tensor(angles, dtype=torch.float64)
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


@exercise("01.1")
def same(answer):
    """The smallest level above 0 at which clock 32's cosine has the value that it has at 0."""
    full = 2 * math.pi / 100  # 10000^(-32/128) is a tenth
    mistakes = {
        "that is half a turn: the cosine there is -1": math.pi / 100,
        "that is the angle: which σ gives it?": 2 * math.pi,
        "that is in degrees": 360 / 100,
        "that is the fastest clock's, k = 0": 2 * math.pi / 1000,
    }
    expect(answer, full, mistakes, tolerance=1e-5)


@exercise("01.2")
def waves(answer):
    """The waves of random levels, for random widths."""
    for _ in range(4):
        batch, dim = int(torch.randint(1, 6, ())), 2 * int(torch.randint(2, 60, ()))
        sigma = torch.rand(batch)
        want = _waves(sigma, dim)
        mistakes = {
            "the sines come first here; these weights want cosines first": want.roll(dim // 2, -1),
            "the factor of 1000 is missing": _waves(sigma, dim, scale=1),
            "the exponent divides by dim/2 - 1; the released model divides by dim/2": _waves(sigma, dim, shift=1),
            "cosine and sine alternate; the released model wants all cosines first": torch.stack(
                want.chunk(2, -1), -1
            ).flatten(1),
        }
        # float32 angles up to 1000 are exact to about 1e-4
        got = ask(answer, sigma.clone(), dim, library=LIBRARY)
        expect(got, want, mistakes, tolerance=3e-4, where=f"{batch} levels, dim {dim}")


@exercise("01.3")
def mlp(answer):
    """The trained MLP on the waves of random levels."""
    prefix = "time_text_embed.timestep_embedder."
    with safe_open(WEIGHTS, framework="pt") as file:
        w = {n.removeprefix(prefix): file.get_tensor(n).float() for n in file.keys() if n.startswith(prefix)}
    x = _waves(torch.rand(int(torch.randint(2, 6, ()))), 256)

    def through(act, bias=1.0):
        hidden = nn.functional.linear(x, w["linear_1.weight"], bias * w["linear_1.bias"])
        return nn.functional.linear(act(hidden), w["linear_2.weight"], bias * w["linear_2.bias"])

    def nothing(hidden):
        return hidden

    want = through(nn.functional.silu)
    size = want.abs().max()
    mistakes = {
        "that is ReLU or GELU; the model uses SiLU, x times sigmoid(x)": through(nn.functional.relu) / size,
        "that is ReLU or GELU; here it is GELU, the model uses SiLU": through(nn.functional.gelu) / size,
        "the SiLU between the two layers is missing": through(nothing) / size,
        "the biases are missing": through(nn.functional.silu, bias=0.0) / size,
        "there is a second SiLU behind the second layer": nn.functional.silu(want) / size,
    }
    got = ask(answer, x.clone(), dict(w), library=LIBRARY)
    got = got / size if isinstance(got, torch.Tensor) else got
    expect(got, want / size, mistakes, where=f"waves {tuple(x.shape)}; numbers as shares of the largest")


class _Embedder(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(256, 32), nn.Linear(32, 32)

    def forward(self, x):
        return self.linear_2(nn.functional.silu(self.linear_1(x)))


class _Projection(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.timestep_embedder, self.scale = _Embedder(), scale

    def forward(self, sigma, like):
        return self.timestep_embedder(_waves(sigma, 256, scale=self.scale).to(like.dtype))


def broken():
    """The right module and one with a bug, of the same weights."""
    right, wrong = _Projection(1000), _Projection(1)
    wrong.load_state_dict(right.state_dict())
    return right, wrong


@exercise("01.4")
def found(answer):
    """The first sub-module that differs, and where the fault lies."""
    mistakes = {
        "that is only the first that you would look at: do its inputs agree?": ("timestep_embedder.linear_1", "inside"),
        "an earlier one differs already": ("timestep_embedder.linear_2", "before"),
        "an earlier one differs already: linear_1 finishes first": ("timestep_embedder", "before"),
        "an earlier one differs already, and linear_2 is innocent": ("timestep_embedder.linear_2", "inside"),
    }
    if not isinstance(answer, tuple | list) or len(answer) != 2:
        raise Wrong('answer with two strings, ("name", "inside") or ("name", "before")')
    expect(tuple(answer), ("timestep_embedder.linear_1", "before"), mistakes)


@exercise("01.5")
def seen(answer):
    """What two roundings to bf16 leave of a level."""
    sigma = torch.cat([torch.rand(200), torch.tensor([0.9909883, 1.0, 0.0])])
    want = ((1000 * sigma).bfloat16() / 1000).float() * 1000
    mistakes = {
        "that rounds once: the quotient is rounded too": (1000 * sigma).bfloat16().float(),
        "that rounds σ itself; the scheduler rounds 1000·σ first": 1000 * sigma.bfloat16().float(),
        "nothing is rounded": 1000 * sigma,
        "the last product is in bf16; it should be in float32": ((1000 * sigma).bfloat16() / 1000 * 1000).float(),
        "that is in float16, not bfloat16": ((1000 * sigma).half() / 1000).float() * 1000,
    }
    expect(ask(answer, sigma.clone(), library=LIBRARY), want, mistakes, tolerance=1e-3, where="203 levels")
    return f"Of 10,001 levels {len((torch.linspace(0, 1, 10001).mul(1000).bfloat16() / 1000).unique())} are left."

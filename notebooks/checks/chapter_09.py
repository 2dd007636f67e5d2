"""The checks of chapter 09: levels, the best velocity, from hidden states to latents, a broken sampler, Heun."""

import math
import random
from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from numpy.random import default_rng
from torch import nn

from checks import Wrong, ask, exercise, expect, expect_finding, expect_five
from course import TINY
from minqwen.checkpoint import Checkpoint
from minqwen.difference import record
from minqwen.images import calculate_dimensions, pack_latents
from minqwen.pipeline import QwenImagePipeline
from minqwen.prompt import pad_prompts
from minqwen.sampling import denoise
from minqwen.transformer import QwenImageTransformer2DModel
from minqwen.world import sample_edit

# ---------------------------------------------------------------------------------------------------- 09.1


@exercise("09.1")
def numbers(answer):
    """Velocities of a guided edit; a shifted level; a last level; a mu; a guided number."""
    wrong = [
        {"guidance needs a velocity without the words too": 50, "the schedule ends at 0; nothing is asked there": 102,
         "the reference is read in the same call as the target": 200},
        {"this pushes down; a shift above 1 pushes up": 1 / 10, "that is 3 times 0.25; it should stay below 1": 0.75},
        {"that is before the stretch": 0.1, "the last level before 0 is asked for, not 0 itself": 0.0,
         "that is the shift without the stretch": 0.1819},
        {"these are FLUX's 4096 and 1.15": 0.5 + 0.65 * (4224 - 256) / (4096 - 256),
         "the line starts at 256 tokens": 0.7129, "e^mu is not asked for": math.exp(0.7)},
        {"scale it back to the length of the velocity with words": 15.0,
         "this points to the velocity without words": -5.0,
         "go away from the velocity without words, not towards it": -15.0},
    ]  # fmt: skip
    names = ["velocities", "shifted level", "last level", "mu", "guided number"]
    expect_five(answer, (100, 0.5, 0.02, 0.7, 5.0), wrong, names, tolerance=2e-3)


# ---------------------------------------------------------------------------------------------------- 09.2


def released(steps, tokens, end=None, most=(8192, 0.9), shift=True, down=False, stretch=0.02, zero=True):
    """The released levels in Python's own numbers, or a mistaken form of them."""
    last = 1 / steps if end is None else end
    even = [1 + (last - 1) * i / max(steps - 1, 1) for i in range(steps)]
    a = math.exp(0.5 + (most[1] - 0.5) * (tokens - 256) / (most[0] - 256)) if shift else 1.0
    a = 1 / a if down else a
    moved = [a * s / (1 + (a - 1) * s) for s in even]
    if stretch and steps > 1:
        moved = [1 - (1 - s) * (1 - stretch) / (1 - moved[-1]) for s in moved]
    return torch.tensor(moved + [0.0] * zero, dtype=torch.float32)


@exercise("09.2")
def levels(answer):
    """levels(steps, tokens) for random steps and sizes, and for one step."""
    cases = [(4, 4096), (50, 256), *((random.randint(2, 80), random.randint(16, 12000)) for _ in range(6)), (1, 4096)]
    for steps, tokens in cases:
        want = released(steps, tokens)
        got = ask(answer, steps, tokens, library="sampling.py")
        if not isinstance(got, torch.Tensor):
            raise Wrong(f"expected a tensor of {steps + 1} levels, got {str(got)[:60]}")
        if got.dtype != torch.float32:
            raise Wrong(f"the levels should be float32, these are {got.dtype}")
        if steps == 1 and not got.isfinite().all():
            raise Wrong("one step: the stretch divides 0 by 0; leave it out there")
        if len(got) == steps and torch.allclose(got, want[:-1], atol=1e-4):
            raise Wrong("the 0 at the end is missing: S steps need S + 1 levels")
        wrong = {
            "no terminal stretch: the last level before 0 should be 0.02": released(steps, tokens, stretch=None),
            "these are FLUX's constants, 4096 and 1.15": released(steps, tokens, most=(4096, 1.15)),
            "there is no shift": released(steps, tokens, shift=False),
            "the shift goes down: it should push the levels up": released(steps, tokens, down=True),
            "start from S even levels down to 1/S, not to 0": released(steps, tokens, end=1e-9),
        }  # fmt: skip
        expect(got, want, wrong, tolerance=2e-5, where=f"{steps} steps, {tokens} tokens")


# ---------------------------------------------------------------------------------------------------- 09.3


def mean_velocity(x, sigma, pictures, power=0.5, all_alike=False, nearest=False, divided=True):
    z = (x[:, None] - (1 - sigma) * pictures) / sigma  # (B, K, D): the noise that each picture would need
    distance = z.square().sum(-1) * (1 if divided else sigma**2)
    likely = (-power * distance).softmax(-1)
    if all_alike:
        likely = torch.full_like(likely, 1 / len(pictures))
    if nearest:
        likely = F.one_hot(distance.argmin(-1), len(pictures)).to(x.dtype)
    return (likely[..., None] * (z - pictures)).sum(1)


@exercise("09.3")
def best_velocity(answer):
    """best_velocity(x, sigma, pictures) at high and at low noise."""
    for sigma in (1.0, 0.7, random.uniform(0.5, 0.9), 0.02):
        B, K, D = random.randint(5, 7), random.randint(3, 6), random.randint(1, 3)
        pictures = torch.randn(K, D, dtype=torch.float64)
        x = (1 - sigma) * pictures[torch.randint(K, (B,))] + max(sigma, 0.4) * torch.randn(B, D, dtype=torch.float64)
        x[0] = pictures.amax(0) + 2  # off all pictures: at low noise every density rounds to 0
        want = mean_velocity(x, sigma, pictures).float()
        got = ask(answer, x.float(), sigma, pictures.float(), library="sampling.py")
        if isinstance(got, torch.Tensor) and not got.isfinite().all():
            raise Wrong(f"not finite at sigma {sigma}: all densities round to 0; take the softmax of their logarithms")
        wrong = {
            "the sign: noise minus picture": -want,
            "pictures are not equally likely once x is seen": mean_velocity(x, sigma, pictures, all_alike=True).float(),
            "this takes the likeliest picture alone": mean_velocity(x, sigma, pictures, nearest=True).float(),
            "the density of noise z is exp(-|z|²/2): the half is missing": mean_velocity(
                x, sigma, pictures, power=1.0
            ).float(),
            "compare noises, (x - (1 - sigma) picture) / sigma: the division is missing": mean_velocity(
                x, sigma, pictures, divided=False
            ).float(),
        }  # fmt: skip
        close = 2e-3 * want.abs().max().clamp(min=1).item()
        expect(got, want, wrong, tolerance=close, where=f"sigma {sigma:.2f}, {K} pictures of {D} numbers")


# ---------------------------------------------------------------------------------------------------- 09.4


@cache
def _pipe() -> QwenImagePipeline:
    return QwenImagePipeline.from_pretrained(TINY, device="cpu")


@cache
def trained() -> tuple:
    """What enters the tiny transformer's last norm at σ = 0.8, the weights behind it, the latents, both velocities."""
    pipe, task = _pipe(), sample_edit(default_rng(4))
    prompts = [pipe.encode_prompt(words, [task.source]) for words in (task.instruction, " ")]
    h, w = task.source.height // 16, task.source.width // 16
    x = torch.randn(1, h * w, 64, generator=torch.Generator().manual_seed(2))
    tokens = torch.cat([x, pack_latents(pipe.encode_image(task.source))], dim=1).expand(2, -1, -1)
    sigma, shapes = torch.tensor([0.8]), [[(1, h, w)] * 2]
    kept = record(pipe.transformer, tokens, *pad_prompts(prompts), sigma, shapes)
    hidden, temb = kept["norm_out < 0"][:, : h * w].clone(), kept["time_text_embed > 0"].clone()
    names = ("norm_out.", "proj_out.")
    tensors = {n: t.clone() for n, t in pipe.transformer.state_dict().items() if n.startswith(names)}
    return hidden, temb, tensors, x, kept["proj_out > 0"][:, : h * w].clone()


def stepped(velocities, x, sigma, after, scale, length="token", swap=False, sign=1.0):
    positive, negative = velocities.flip(0).split(1) if swap else velocities.split(1)
    guided = negative + scale * (positive - negative)
    if length == "token":
        guided = guided / guided.norm(dim=-1, keepdim=True) * positive.norm(dim=-1, keepdim=True)
    if length == "picture":
        guided = guided / guided.norm() * positive.norm()
    return x + sign * (after - sigma) * guided


def velocities_of(hidden, temb, tensors, shift_first=False, silu=True, one=1.0):
    temb = F.silu(temb) if silu else temb
    halves = F.linear(temb, tensors["norm_out.linear.weight"], tensors["norm_out.linear.bias"])[:, None].chunk(2, -1)
    scale, shift = reversed(halves) if shift_first else halves
    hidden = F.layer_norm(hidden, hidden.shape[-1:], eps=1e-6) * (one + scale) + shift
    return F.linear(hidden, tensors["proj_out.weight"], tensors["proj_out.bias"])


@exercise("09.4")
def next_latents(answer):
    """next_latents(hidden, temb, tensors, x, sigma, after, scale) with the trained weights and real hidden states."""
    hidden, temb, tensors, x, velocities = trained()
    apart = (velocities_of(hidden, temb, tensors) - velocities).abs().max()
    assert apart < 1e-4, "the check's own formula should be the transformer's"
    for sigma, after, scale in ((0.8, 0.74, 4.0), (0.8, random.uniform(0.1, 0.7), random.uniform(1.5, 6))):
        how = (x, sigma, after, scale)
        want = stepped(velocities, *how)
        other = lambda how=how, **change: stepped(velocities_of(hidden, temb, tensors, **change), *how)  # noqa: E731
        wrong = {
            "in this norm the scale comes first, then the shift": other(shift_first=True),
            "SiLU of temb comes before the linear layer": other(silu=False),
            "modulation is 1 + scale, so that scale 0 changes nothing": other(one=0.0),
            "row 0 is the prediction with words, row 1 the one without": stepped(velocities, *how, swap=True),
            "walk against the velocity: after - sigma is below 0": stepped(velocities, *how, sign=-1.0),
            "the guided velocity should have the length of the one with words, token by token": stepped(
                velocities, *how, length=None
            ),
            "keep the length of each token, not that of all together": stepped(velocities, *how, length="picture"),
            "a step goes from sigma to after, not all the way": stepped(velocities, x, sigma, 0.0, scale),
            "there is no guidance in this": stepped(velocities, x, sigma, after, 1.0),
        }  # fmt: skip
        given = {name: tensor.clone() for name, tensor in tensors.items()}
        got = ask(answer, hidden.clone(), temb.clone(), given, x.clone(), sigma, after, scale, library="sampling.py")
        expect(got, want, wrong, tolerance=1e-4, where=f"sigma {sigma:.2f} to {after:.2f}, scale {scale:.1f}")
    return f"Latents of the trained model agree to {(got - want).abs().max():.0e}."


# ---------------------------------------------------------------------------------------------------- 09.5


class _Schedule(nn.Module):
    def forward(self, steps, shapes):
        return released(steps, self.count(shapes))

    def count(self, shapes):
        return math.prod(shapes[0])


class _Broken(_Schedule):  # spoiler: the fault of exercise 09.5
    def count(self, shapes):
        return sum(math.prod(shape) for shape in shapes)


class _Guidance(nn.Module):
    def forward(self, positive, negative, scale):
        combined = negative + scale * (positive - negative)
        return F.normalize(combined, dim=-1) * positive.norm(dim=-1, keepdim=True)


class _Step(nn.Module):
    def forward(self, x, velocity, change):
        return x + change * velocity


class Sampler(nn.Module):
    """A sampler whose parts are sub-modules: schedule, transformer, guidance, step."""

    def __init__(self, schedule: nn.Module):
        super().__init__()
        self.schedule, self.guidance, self.step = schedule, _Guidance(), _Step()
        self.transformer = Checkpoint(TINY).load(QwenImageTransformer2DModel, "transformer")

    def forward(self, x, reference, embeds, steps, scale, shapes):
        for sigma, after in pairwise(self.schedule(steps, shapes)):
            tokens = torch.cat([x, reference], dim=1).expand(2, -1, -1)
            velocities = self.transformer(tokens, embeds, None, sigma[None], [shapes])[:, : x.shape[1]]
            x = self.step(x, self.guidance(*velocities.split(1), scale), after - sigma)
        return x


def broken() -> Sampler:
    """A sampler over the tiny transformer with one fault."""
    return Sampler(_Broken())


def right() -> Sampler:
    """A sampler over the tiny transformer."""
    return Sampler(_Schedule())


def inputs(shapes: list[tuple[int, int, int]], steps: int = 4, scale: float = 4.0) -> tuple:
    """What a Sampler takes, with random numbers, for [(frames, rows, columns), ...], the target first."""
    generator = torch.Generator().manual_seed(0)
    sizes = [math.prod(shape) for shape in shapes]
    x = torch.randn(1, sizes[0], 64, generator=generator)
    reference = torch.randn(1, sum(sizes[1:]), 64, generator=generator)
    width = Checkpoint(TINY).config("transformer/config.json")["joint_attention_dim"]
    embeds = torch.randn(2, 9, width, generator=generator)
    return x, reference, embeds, steps, scale, list(shapes)


CAUSES = {
    "B": "then it would be wrong without references too",
    "C": "the schedule is not given the words",
    "D": "then the last level before 0 would not be 0.02; print the levels",
    "E": "then it would be wrong without references too, and by much more",
}


@exercise("09.5")
def cause(finding, shapes, count):
    """(name of the sub-module, letter); shapes that show the fault; how many tokens it counts for 4×4 and 6×8."""
    if not (isinstance(shapes, list) and shapes and all(isinstance(s, tuple) and len(s) == 3 for s in shapes)):
        raise Wrong("shapes should be a list such as [(1, 4, 4)]")
    if len(shapes) == 1:
        raise Wrong("on these shapes the two samplers agree: what does an edit have that a drawing has not?")
    downstream = "that part differs because its inputs do; name the first of all"
    names = {
        "transformer*": "the transformer differs because what it is given differs; which part finishes before it?",
        "step": downstream,
        "guidance": downstream,
    }
    expect_finding(
        finding,
        "two: the sub-module's name and a letter",
        name=("schedule", names),
        cause=("A", CAUSES),
    )
    counts = {"that is the target alone, which would be right": 16, "that is the reference alone": 48}
    expect(count, 64, counts, tolerance=0.5, where="tokens")


# ---------------------------------------------------------------------------------------------------- 09.6


def drawing(seed: int = 0) -> tuple:
    """The tiny model drawing nothing in particular: velocity(x, sigma), starting noise, decode(latents) -> picture."""
    pipe = _pipe()
    embeds, mask = pipe.encode_prompt(" ")
    width, height = calculate_dimensions(pipe.area, 1.0)
    h, w = height // 16, width // 16

    @torch.inference_mode()
    def velocity(x, sigma):
        return pipe.transformer(x, embeds, mask, torch.tensor([float(sigma)]), [[(1, h, w)]])

    noise = torch.randn(1, 16, 1, 2 * h, 2 * w, generator=torch.Generator().manual_seed(seed))
    return velocity, pack_latents(noise), lambda latents: pipe.decode(latents, width, height)


def heun_by(velocity, x, sigmas, last="euler", second="moved", half=0.5):
    for sigma, after in pairwise(sigmas):
        first = velocity(x, sigma)
        if after == 0 and last == "euler":
            x = x + (after - sigma) * first
            continue
        moved = x + (after - sigma) * first
        where = {"moved": (moved, after), "still": (x, after), "middle": ((x + moved) / 2, (sigma + after) / 2)}[second]
        mean = velocity(*where) if second == "middle" else half * (first + velocity(*where))
        x = x + (after - sigma) * mean
    return x


@exercise("09.6")
def heun(answer):
    """heun_step(x, v, sigma, after, velocity) in denoise: right numbers with 2S - 1 velocities, none of them at 0."""
    for steps in (1, 2, random.randint(3, 7)):
        x, pull, asked = torch.randn(2, 5, 4), torch.randn(4, 4) / 2, []

        def velocity(x, sigma, pull=pull):
            return (x @ pull) * (0.3 + sigma) + sigma**2

        def counted(x, sigma, asked=asked, velocity=velocity):
            asked.append(float(sigma))
            return velocity(x, float(sigma))

        def step(*now, shape=x.shape):
            got = ask(answer, *now)
            if not isinstance(got, torch.Tensor) or got.shape != shape:
                raise Wrong(f"a step returns the next latents, {tuple(shape)}, this returned {str(got)[:60]}")
            return got

        sigmas = released(steps, 4096, stretch=None).tolist()
        got = denoise(counted, x.clone(), sigmas, step)
        if 0.0 in asked:
            raise Wrong("this asks for a velocity at level 0, where nobody trained the network; end with an Euler step")
        by = lambda walk=(velocity, x, sigmas), **change: heun_by(*walk, **change)  # noqa: E731
        wrong = {
            "this is Euler: one velocity a step": denoise(velocity, x, sigmas),
            "ask the second velocity at the point that the Euler step reached": by(second="still"),
            "this asks in the middle of the step; Heun asks at both ends": by(second="middle"),
            "take the mean of the two velocities, not their sum": by(half=1.0),
        }
        expect(got, by(), wrong if steps > 1 else None, where=f"{steps} steps")
        if len(asked) != 2 * steps - 1:
            raise Wrong(f"{steps} steps should take {2 * steps - 1} velocities, this asked for {len(asked)}")

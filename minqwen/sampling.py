"""From noise to picture: which noise levels to visit, how to step between them, how to lean on the prompt.

    steps S, image tokens Ni  ->  sigmas (S + 1,), from 1 down to 0
    noise (1, Ni, 64), velocity(latents, sigma), sigmas  ->  latents (1, Ni, 64) of a picture

The model predicts a velocity, noise minus picture; following it backwards from pure noise (sigma 1) in S straight
steps ends at a picture (sigma 0). Larger pictures spend more of their steps at high noise.
`denoise` is the only loop. It knows nothing of prompts and guidance, and the velocity knows nothing of the schedule;
another sampler is another function in place of `euler_step`.
The surprise: guidance keeps the length that the prediction had without it, token by token.
Matches diffusers' FlowMatchEulerDiscreteScheduler and QwenImagePipeline (tests/test_sampling.py). Chapter 09.
"""

import math
from collections.abc import Callable, Iterable
from itertools import pairwise
from numbers import Integral

import torch
import torch.nn.functional as F

from minqwen.files import expect_numbers

SCHEDULER = "FlowMatchEulerDiscreteScheduler"
Velocity = Callable[[torch.Tensor, float], torch.Tensor]  # latents, sigma -> noise minus picture
Callback = Callable[[int, float, torch.Tensor, torch.Tensor], None]  # step, sigma, latents, velocity


def get_sigmas(
    num_inference_steps: int, image_seq_len: int, shift_terminal: float | None = 0.02, **schedule
) -> torch.Tensor:
    """Noise levels of a run: (S + 1,) float32, falling from 1 to 0.

    image_seq_len counts the target's tokens only. shift_terminal: the last noise level before 0. The keywords are
    those of scheduler_config.json; `resolution_shift` has the others.
    One step goes straight from 1 to 0; there the terminal stretch would divide 0 by 0, as it does in diffusers.
    Raises ValueError for fewer than one step and for schedules that are not computed here.
    """
    if not (isinstance(num_inference_steps, Integral) and num_inference_steps >= 1):
        raise ValueError(f"num_inference_steps must be a whole number, at least 1, got {num_inference_steps!r}")
    expect_numbers(shift_terminal=shift_terminal or 0)
    if not 0 <= (shift_terminal or 0) < 1:
        raise ValueError(f"shift_terminal is a noise level below 1, got {shift_terminal}")
    sigmas = torch.linspace(1, 1 / num_inference_steps, num_inference_steps, dtype=torch.float64)
    sigmas = time_shift(sigmas, resolution_shift(image_seq_len, **schedule))
    if shift_terminal and num_inference_steps > 1:
        sigmas = 1 - (1 - sigmas) * (1 - shift_terminal) / (1 - sigmas[-1])
    return torch.cat([sigmas, sigmas.new_zeros(1)]).float()


def resolution_shift(
    image_seq_len: int,
    base_image_seq_len: int = 256,  # tokens at which mu is base_shift
    base_shift: float = 0.5,
    max_image_seq_len: int = 8192,  # tokens at which mu is max_shift
    max_shift: float = 0.9,
    shift: float = 1.0,  # used where use_dynamic_shifting is off
    use_dynamic_shifting: bool = True,
    time_shift_type: str = "exponential",
    num_train_timesteps: int = 1000,  # of no matter here, like the next: a config has them
    shift_terminal: float | None = 0.02,
    **others,
) -> float:
    """e^mu: how far the noise levels of a picture of so many tokens are shifted (see `time_shift`).

    The keywords are those of scheduler_config.json, the defaults the released values (the fallbacks in diffusers'
    code are FLUX's and differ). mu is a straight line through two points; where both are one, it is base_shift.
    Raises ValueError for schedules that are not computed here.
    """
    if others.get("_class_name", SCHEDULER) != SCHEDULER:
        raise ValueError(f"the scheduler is a {others['_class_name']}; minqwen computes {SCHEDULER} only")
    on = [key for key, value in others.items() if value and not key.startswith("_")]  # a switch that is off is fine
    if on or time_shift_type != "exponential" or not isinstance(use_dynamic_shifting, bool):
        raise ValueError(f"scheduler config not computed here: {on or (time_shift_type, use_dynamic_shifting)}")
    if not use_dynamic_shifting:
        expect_numbers(shift=shift)
        if shift <= 0:
            raise ValueError(f"shift must be above 0, got {shift}")
        return shift
    ends = {"base_image_seq_len": base_image_seq_len, "max_image_seq_len": max_image_seq_len}
    expect_numbers(base_shift=base_shift, max_shift=max_shift, **ends)
    length = max_image_seq_len - base_image_seq_len
    slope = (max_shift - base_shift) / length if length else 0.0
    mu = base_shift + slope * (image_seq_len - base_image_seq_len)
    if abs(mu) > 20:  # e^20 leaves one noise level of all
        raise ValueError(f"base_shift and max_shift make mu {mu:g} at {image_seq_len} tokens, more than 20")
    return math.exp(mu)


def time_shift(sigmas: torch.Tensor, shift: float) -> torch.Tensor:
    """Push noise levels in [0, 1] upwards for shift > 1, keeping 0 and 1: shift * s / (1 + (shift - 1) * s)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def euler_step(
    latents: torch.Tensor, v: torch.Tensor, sigma: float, sigma_next: float, velocity: Velocity | None = None
) -> torch.Tensor:
    """One straight step along the velocity v. Latents stay float32 whatever the model computes in.

    velocity is for samplers that ask again within a step; this one does not.
    """
    return latents + (sigma_next - sigma) * v.float()


def denoise(
    velocity: Velocity,
    latents: torch.Tensor,
    sigmas: Iterable[float] | torch.Tensor,
    step: Callable[..., torch.Tensor] = euler_step,
    callback: Callback | None = None,
) -> torch.Tensor:
    """Walk from noise to a picture's latents: the loop of every sampler.

    velocity(latents, sigma): the model's prediction, guided or not. sigmas: S + 1 noise levels (see `get_sigmas`).
    step(latents, v, sigma, sigma_next, velocity): the latents at the next level; it may ask for more velocities.
    callback(i, sigma, latents, v) runs in step i, after the prediction v and before the step.
    """
    levels = [float(sigma) for sigma in sigmas]
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        v = velocity(latents, sigma)
        if callback is not None:
            callback(i, sigma, latents, v)
        latents = step(latents, v, sigma, sigma_next, velocity)
    return latents


def guide(positive: torch.Tensor, negative: torch.Tensor, true_cfg_scale: float) -> torch.Tensor:
    """Classifier-free guidance: away from the negative prompt, at the length of the positive prediction.

    positive, negative (B, N, 64): velocities under the two prompts  ->  (B, N, 64); scale 1 changes nothing.
    The length is taken over the 64 numbers of each token; a token of zeros stays zero
    (NaN in diffusers). Source: Ho and Salimans 2022; diffusers' QwenImagePipeline.
    """
    positive, negative = positive.float(), negative.float()
    combined = negative + true_cfg_scale * (positive - negative)
    return F.normalize(combined, dim=-1) * positive.norm(dim=-1, keepdim=True)

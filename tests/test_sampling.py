"""sampling.py: schedule, steps and guidance equal diffusers' scheduler and pipelines; one loop serves any sampler."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from reference import difference

from minqwen.sampling import denoise, euler_step, get_sigmas, guide, resolution_shift, time_shift

RELEASED = {
    "_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": "0.34.0.dev0", "base_image_seq_len": 256,
    "base_shift": 0.5, "invert_sigmas": False, "max_image_seq_len": 8192, "max_shift": 0.9,
    "num_train_timesteps": 1000, "shift": 1.0, "shift_terminal": 0.02, "stochastic_sampling": False,
    "time_shift_type": "exponential", "use_beta_sigmas": False, "use_dynamic_shifting": True,
    "use_exponential_sigmas": False, "use_karras_sigmas": False,
}  # fmt: skip
LIGHTNING = RELEASED | {"base_shift": math.log(3), "max_shift": math.log(3), "shift_terminal": None}
# width, height, the first four noise levels of 50 steps, the last three before 0
TABLE = [
    (1024, 1024, [1, 0.989701, 0.979191, 0.968465], [0.095499, 0.058476, 0.02]),
    (1328, 1328, [1, 0.990988, 0.981768, 0.972332], [0.105449, 0.063783, 0.02]),
    (1664, 928, [1, 0.990612, 0.981014, 0.971199], [0.102282, 0.062088, 0.02]),
    (1472, 1104, [1, 0.990753, 0.981296, 0.971622], [0.103438, 0.062706, 0.02]),
    (1584, 1056, [1, 0.990834, 0.981459, 0.971868], [0.104124, 0.063073, 0.02]),
    (512, 512, [1, 0.988064, 0.975926, 0.96358], [0.085736, 0.053324, 0.02]),
    (256, 256, [1, 0.987615, 0.975031, 0.962245], [0.083478, 0.05214, 0.02]),
]
SHORT = {
    40: [1, 0.986964, 0.973593, 0.959875],
    8: [1, 0.916024, 0.820046, 0.709295],
    4: [1, 0.766709, 0.455614, 0.02, 0],
}


def scheduler(config: dict, steps: int, tokens: int) -> FlowMatchEulerDiscreteScheduler:
    """diffusers' scheduler, set as its pipelines set it."""
    reference = FlowMatchEulerDiscreteScheduler(**{k: v for k, v in config.items() if not k.startswith("_")})
    slope = (config["max_shift"] - config["base_shift"]) / (config["max_image_seq_len"] - config["base_image_seq_len"])
    mu = tokens * slope + config["base_shift"] - slope * config["base_image_seq_len"]
    reference.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), mu=mu)
    return reference


@pytest.mark.parametrize("width, height, first, last", TABLE)
def test_published_schedules_of_50_steps(width, height, first, last):
    sigmas = get_sigmas(50, (width // 16) * (height // 16), **RELEASED)
    assert sigmas[:4].tolist() == pytest.approx(first, abs=2e-6)
    assert sigmas[-4:].tolist() == pytest.approx([*last, 0], abs=2e-6)


@pytest.mark.parametrize("steps", SHORT)
def test_published_schedules_of_fewer_steps(steps):
    assert get_sigmas(steps, 4096)[: len(SHORT[steps])].tolist() == pytest.approx(SHORT[steps], abs=2e-6)


def test_equals_the_reference_for_any_steps_and_sizes(rng):
    for _ in range(30):
        steps, tokens = rng.randint(2, 100), rng.randint(1, 12000)
        config = rng.choice([RELEASED, LIGHTNING])
        assert difference(get_sigmas(steps, tokens, **config), scheduler(config, steps, tokens).sigmas) <= 1e-5


def test_lightning_schedules():
    assert get_sigmas(4, 4096, **LIGHTNING).tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    eight = [1, 0.954545, 0.9, 0.833333, 0.75, 0.642857, 0.5, 0.3, 0]
    assert get_sigmas(8, 1000, **LIGHTNING).tolist() == pytest.approx(eight, abs=1e-6)


def test_one_step_goes_straight_to_the_picture():
    """In diffusers the terminal stretch divides 0 by 0 here."""
    assert get_sigmas(1, 4096).tolist() == [1, 0]


def test_levels_fall_from_one_to_zero_in_float32(rng):
    for _ in range(20):
        steps = rng.randint(1, 100)
        sigmas = get_sigmas(steps, rng.randint(1, 70_000))
        assert sigmas.dtype == torch.float32 and sigmas.shape == (steps + 1,)
        assert sigmas[0] == 1 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()


def test_larger_pictures_spend_more_steps_at_high_noise():
    middles = [get_sigmas(50, tokens)[25].item() for tokens in (16, 256, 4096, 8192, 65536)]
    assert middles == sorted(middles) and len(set(middles)) == 5


def test_the_shift_multiplies_the_odds_and_keeps_the_ends(rng):
    a, s = rng.uniform(0.2, 5), torch.rand(9, dtype=torch.float64)
    moved = time_shift(s, a)
    assert difference(moved / (1 - moved), a * s / (1 - s)) <= 1e-6 * float((a * s / (1 - s)).max())
    assert time_shift(torch.tensor([0.0, 1.0]), a).tolist() == pytest.approx([0, 1])


def test_a_static_shift_is_used_only_without_dynamic_shifting():
    plain = torch.linspace(1, 0.1, 10)
    static = get_sigmas(10, 4096, shift=3.0, use_dynamic_shifting=False, shift_terminal=None)
    assert difference(static[:-1], time_shift(plain, 3.0)) <= 1e-6
    assert torch.equal(get_sigmas(10, 4096, shift=3.0), get_sigmas(10, 4096))


@pytest.mark.parametrize("tokens, shift", [(256, 1.64872), (1024, 1.71379), (4096, 2.0008), (6889, 2.30326)])
def test_published_shifts(tokens, shift):
    assert resolution_shift(tokens, **RELEASED) == pytest.approx(shift, abs=1e-5)


def test_a_schedule_whose_two_ends_are_one_has_one_shift():
    ends = {"base_image_seq_len": 1024, "max_image_seq_len": 1024}
    assert {resolution_shift(tokens, **ends) for tokens in (16, 1024, 4096)} == {math.exp(0.5)}


def test_a_switch_of_another_version_may_be_there_if_it_is_off():
    assert torch.equal(get_sigmas(4, 16, use_flow_sigmas=False, variance_type=None), get_sigmas(4, 16))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_inference_steps": 0}, "at least 1"),
        ({"use_karras_sigmas": True}, "karras"),
        ({"time_shift_type": "linear"}, "linear"),
        ({"frobnicate": 1}, "frobnicate"),
        ({"num_inference_steps": 2.5}, "whole number"),
        ({"num_inference_steps": "4"}, "whole number"),
        ({"base_shift": None}, "base_shift must be a finite number, got None"),
        ({"max_shift": "0.9"}, "max_shift must be"),
        ({"max_image_seq_len": math.nan}, "max_image_seq_len must be"),
        ({"shift": [3.0], "use_dynamic_shifting": False}, "shift must be"),
        ({"use_dynamic_shifting": None}, "not computed"),
        ({"shift_terminal": 1}, "below 1"),
        ({"shift_terminal": "x"}, "shift_terminal must be"),
        ({"_class_name": ["FlowMatchEulerDiscreteScheduler"]}, "the scheduler is a"),
        ({"_class_name": "UniPCMultistepScheduler"}, "UniPCMultistepScheduler"),
    ],
)
def test_other_schedules_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        get_sigmas(**{"num_inference_steps": 4, "image_seq_len": 16} | options)


def test_a_step_equals_the_reference(rng):
    steps, tokens = rng.randint(2, 30), rng.randint(1, 6000)
    reference, sigmas = scheduler(RELEASED, steps, tokens), get_sigmas(steps, tokens, **RELEASED).tolist()
    x = y = torch.randn(2, 5, 64)
    for step, t in enumerate(reference.timesteps):
        v = torch.randn_like(x)
        x = euler_step(x, v, sigmas[step], sigmas[step + 1])
        y = reference.step(v, t, y, return_dict=False)[0]
        assert difference(x, y) <= 1e-5


def test_latents_stay_in_float32_behind_a_bf16_model():
    assert euler_step(torch.zeros(1, 1, 4), torch.ones(1, 1, 4).bfloat16(), 1.0, 0.9).dtype == torch.float32


def test_guidance_is_the_pipelines_formula(rng):
    positive, negative, scale = torch.randn(2, 7, 64), torch.randn(2, 7, 64), rng.uniform(1, 8)
    combined = negative + scale * (positive - negative)
    want = combined * (torch.norm(positive, dim=-1, keepdim=True) / torch.norm(combined, dim=-1, keepdim=True))
    got = guide(positive, negative, scale)
    assert difference(got, want) <= 1e-6
    assert difference(got.norm(dim=-1), positive.norm(dim=-1)) <= 1e-4  # the length of each token is kept
    assert difference(guide(positive, negative, 1.0), positive) <= 1e-5


def test_guidance_leaves_a_token_of_zeros_alone():
    """NaN in diffusers."""
    token = torch.zeros(1, 2, 64)
    token[:, 1] = 1
    assert torch.equal(guide(token, torch.zeros_like(token), 4.0)[:, 0], torch.zeros(1, 64))


def test_guidance_is_computed_in_float32():
    positive, negative = torch.randn(1, 5, 64).bfloat16(), torch.randn(1, 5, 64).bfloat16()
    got = guide(positive, negative, 4.0)
    assert got.dtype == torch.float32 and torch.equal(got, guide(positive.float(), negative.float(), 4.0))


def test_walking_along_the_straight_path_ends_at_the_picture(rng):
    """Where the velocity is that of one pair of picture and noise, any number of steps arrives."""
    picture, noise = torch.randn(2, 5, 64), torch.randn(2, 5, 64)
    end = denoise(lambda x, sigma: noise - picture, noise, get_sigmas(rng.randint(1, 30), 4096))
    assert difference(end, picture) <= 1e-5


def test_the_loop_hands_on_every_level_once():
    asked, called, stepped = [], [], []

    def velocity(x, sigma):
        asked.append(sigma)
        return x + 1

    def step(x, v, sigma, sigma_next, ask):
        assert torch.equal(v, x + 1) and ask is velocity
        stepped.append((sigma, sigma_next))
        return x + 2

    end = denoise(velocity, torch.zeros(3), [1.0, 0.5, 0.0], step, lambda *now: called.append(now))
    assert asked == [1.0, 0.5] and stepped == [(1.0, 0.5), (0.5, 0.0)] and torch.equal(end, torch.full((3,), 4.0))
    assert [(i, sigma, x[0].item(), v[0].item()) for i, sigma, x, v in called] == [(0, 1.0, 0, 1), (1, 0.5, 2, 3)]
    asked.clear()
    assert torch.equal(denoise(velocity, torch.zeros(3), torch.tensor([1.0, 0.5, 0.0]), step), end)
    assert asked == [1.0, 0.5] and all(type(sigma) is float for sigma in asked)


def heun_step(latents, v, sigma, sigma_next, velocity):
    """The mean of the velocities at both ends of the Euler step."""
    there = velocity(euler_step(latents, v, sigma, sigma_next), sigma_next)
    return euler_step(latents, (v + there) / 2, sigma, sigma_next)


@pytest.mark.parametrize("step, velocities, order", [(euler_step, 1, 1), (heun_step, 2, 2)])
def test_a_sampler_is_one_function(step, velocities, order):
    """On dx/dsigma = x cos(sigma) the end is known; twice the steps leave 1/2 or 1/4 of the error."""
    asked, errors = [], []

    def velocity(x, sigma):
        asked.append(sigma)
        return x * math.cos(sigma)

    start = torch.tensor([1.0, -2.0])
    for steps in (10, 20):
        end = denoise(velocity, start, torch.linspace(1, 0, steps + 1), step)
        errors.append(difference(end, start * math.exp(-math.sin(1))))
    assert len(asked) == velocities * 30
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.1)

"""sampling.py: the noise levels, the Euler step and the guidance equal diffusers' scheduler and pipeline."""

import inspect
import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler as Scheduler
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from reference import TOLERANCE, difference

from minqwen.sampling import euler_step, get_sigmas, guide, time_shift

RELEASED = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.34.0.dev0",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "invert_sigmas": False,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "stochastic_sampling": False,
    "time_shift_type": "exponential",
    "use_beta_sigmas": False,
    "use_dynamic_shifting": True,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}
LIGHTNING = RELEASED | {"base_shift": math.log(3), "max_shift": math.log(3), "shift_terminal": None}

# tokens, e^mu, sigmas 1 to 3 of 50 steps, the last three before 0: QWEN_IMAGE.md B.8
FIFTY_STEPS = {
    "1024x1024": (4096, 2.0008, (0.989701, 0.979191, 0.968465), (0.095499, 0.058476, 0.02)),
    "1328x1328": (6889, 2.30326, (0.990988, 0.981768, 0.972332), (0.105449, 0.063783, 0.02)),
    "1664x928": (6032, 2.20589, (0.990612, 0.981014, 0.971199), (0.102282, 0.062088, 0.02)),
    "1472x1104": (6348, 2.2413, (0.990753, 0.981296, 0.971622), (0.103438, 0.062706, 0.02)),
    "1584x1056": (6534, 2.26241, (0.990834, 0.981459, 0.971868), (0.104124, 0.063073, 0.02)),
    "512x512": (1024, 1.71379, (0.988064, 0.975926, 0.96358), (0.085736, 0.053324, 0.02)),
    "256x256": (256, 1.64872, (0.987615, 0.975031, 0.962245), (0.083478, 0.05214, 0.02)),
}
# the start and the end of the schedule at 1024x1024 for fewer steps
FEWER_STEPS = {
    40: ((1, 0.986964, 0.973593, 0.959875), (0.113533, 0.067881, 0.02, 0)),
    8: ((1, 0.916024, 0.820046, 0.709295), (0.427347, 0.244054, 0.02, 0)),
    4: ((1, 0.766709, 0.455614), (0.02, 0)),
}
LIGHTNING_STEPS = {
    4: (1, 0.9, 0.75, 0.5, 0),
    8: (1, 0.954545, 0.9, 0.833333, 0.75, 0.642857, 0.5, 0.3, 0),
}


def reference_schedule(config: dict, steps: int, tokens: int) -> Scheduler:
    """As QwenImagePipeline sets its scheduler up."""
    scheduler = Scheduler.from_config(config)
    keys = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    mu = calculate_shift(tokens, *(config[key] for key in keys))
    linear = torch.linspace(1, 1 / steps, steps, dtype=torch.float64).numpy()
    scheduler.set_timesteps(sigmas=linear, mu=mu if config["use_dynamic_shifting"] else None)
    return scheduler


@pytest.mark.parametrize("size", FIFTY_STEPS)
def test_fifty_steps_at_the_released_sizes(size):
    tokens, shift, first, last = FIFTY_STEPS[size]
    width, height = map(int, size.split("x"))
    assert tokens == (width // 16) * (height // 16)
    sigmas = get_sigmas(50, tokens, **RELEASED)
    assert sigmas.shape == (51,) and sigmas.dtype == torch.float32
    torch.testing.assert_close(sigmas[:4], torch.tensor((1,) + first), atol=1e-6, rtol=0)
    torch.testing.assert_close(sigmas[-4:], torch.tensor(last + (0,)), atol=1e-6, rtol=0)
    unstretched = get_sigmas(2, tokens, **RELEASED | {"shift_terminal": None})[1]  # 1/2 becomes shift / (shift + 1)
    assert unstretched / (1 - unstretched) == pytest.approx(shift, abs=1e-5)


@pytest.mark.parametrize("steps", FEWER_STEPS)
def test_fewer_steps(steps):
    first, last = FEWER_STEPS[steps]
    sigmas = get_sigmas(steps, 4096, **RELEASED)
    torch.testing.assert_close(sigmas[: len(first)], torch.tensor(first), atol=1e-6, rtol=0)
    torch.testing.assert_close(sigmas[-len(last) :], torch.tensor(last), atol=1e-6, rtol=0)


@pytest.mark.parametrize("steps", LIGHTNING_STEPS)
def test_lightning_schedule(rng, steps):
    """The shift is 3 at every size, and nothing is stretched."""
    sigmas = get_sigmas(steps, rng.randint(1, 20000), **LIGHTNING)
    torch.testing.assert_close(sigmas, torch.tensor(LIGHTNING_STEPS[steps]), atol=1e-6, rtol=0)


def test_the_defaults_are_the_released_config(rng):
    defaults = {k: p.default for k, p in inspect.signature(get_sigmas).parameters.items() if k in RELEASED}
    assert defaults.items() <= RELEASED.items()
    steps, tokens = rng.randint(2, 60), rng.randint(1, 10000)
    assert torch.equal(get_sigmas(steps, tokens), get_sigmas(steps, tokens, **RELEASED))


@pytest.mark.parametrize("terminal", [0.02, None, 0.1])
@pytest.mark.parametrize("dynamic", [True, False])
def test_equals_the_reference_scheduler(rng, dynamic, terminal):
    for _ in range(20):
        steps, tokens = rng.randint(2, 100), rng.randint(1, 20000)
        shift = rng.choice([1.0, 3.0, rng.uniform(0.5, 6)])
        config = RELEASED | {"use_dynamic_shifting": dynamic, "shift": shift, "shift_terminal": terminal}
        sigmas = get_sigmas(steps, tokens, **config)
        assert difference(sigmas, reference_schedule(config, steps, tokens).sigmas) <= 1e-6
        assert sigmas[0] == 1 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()


def test_a_static_shift_ignores_the_picture_size():
    config = RELEASED | {"use_dynamic_shifting": False, "shift": 3.0, "shift_terminal": None}
    assert torch.equal(get_sigmas(4, 256, **config), get_sigmas(4, 8192, **config))
    torch.testing.assert_close(get_sigmas(4, 256, **config), torch.tensor(LIGHTNING_STEPS[4]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("config", [RELEASED, LIGHTNING, RELEASED | {"use_dynamic_shifting": False}])
def test_one_step_goes_straight_from_noise_to_picture(config):
    """diffusers divides 0 by 0 here."""
    assert get_sigmas(1, 4096, **config).tolist() == [1, 0]


@pytest.mark.parametrize("steps", [0, -1])
def test_fewer_than_one_step_is_refused(steps):
    with pytest.raises(ValueError, match=f"at least 1, got {steps}"):
        get_sigmas(steps, 4096)


@pytest.mark.parametrize(
    "change",
    [
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"use_beta_sigmas": True},
        {"invert_sigmas": True},
        {"stochastic_sampling": True},
        {"time_shift_type": "linear"},
        {"sigma_wobble": 0.5},
        {"use_flow_sigmas": False},
    ],
    ids=lambda change: next(iter(change)),
)
def test_schedules_that_are_not_computed_are_refused_by_name(change):
    (key, value), = change.items()
    with pytest.raises(ValueError, match=value if isinstance(value, str) else key):
        get_sigmas(4, 4096, **RELEASED | change)


def test_a_scheduler_of_another_class_is_refused():
    with pytest.raises(ValueError, match="UniPCMultistepScheduler"):
        get_sigmas(4, 4096, **RELEASED | {"_class_name": "UniPCMultistepScheduler"})


def test_time_shift_keeps_the_ends_and_can_be_undone(rng):
    shift, sigmas = rng.uniform(0.3, 5), torch.rand(20, dtype=torch.float64)
    assert time_shift(torch.tensor([0.0, 1.0]), shift).tolist() == [0, 1]
    torch.testing.assert_close(time_shift(time_shift(sigmas, shift), 1 / shift), sigmas)


def test_euler_step_equals_the_reference_scheduler(rng):
    steps, tokens = rng.randint(2, 12), rng.randint(256, 8192)
    scheduler, sigmas = reference_schedule(RELEASED, steps, tokens), get_sigmas(steps, tokens).tolist()
    ours = theirs = torch.randn(2, 9, 64)
    for i, t in enumerate(scheduler.timesteps):
        velocity = torch.randn(2, 9, 64)
        ours = euler_step(ours, velocity, sigmas[i], sigmas[i + 1])
        theirs = scheduler.step(velocity, t, theirs, return_dict=False)[0]
        assert difference(ours, theirs) <= TOLERANCE


def test_latents_stay_float32_whatever_the_velocity_is():
    latents = torch.randn(1, 5, 64)
    velocity = torch.randn(1, 5, 64, dtype=torch.bfloat16)
    stepped = euler_step(latents, velocity, 0.7, 0.5)
    assert stepped.dtype == torch.float32
    assert difference(stepped, latents - 0.2 * velocity.float()) <= 1e-6


def test_a_true_velocity_leads_to_the_picture_in_any_number_of_steps(rng):
    noise, picture = torch.randn(2, 1, 5, 64)
    sigmas = get_sigmas(rng.randint(1, 30), 4096).tolist()
    latents = noise
    for now, following in zip(sigmas, sigmas[1:], strict=False):
        latents = euler_step(latents, noise - picture, now, following)
    assert difference(latents, picture) <= TOLERANCE


def test_guide_equals_the_pipelines_formula(rng):
    scale = rng.uniform(1.1, 8)
    positive, negative = torch.randn(2, 3, 7, 64)
    combined = negative + scale * (positive - negative)  # QwenImagePipeline.__call__
    cond_norm = torch.norm(positive, dim=-1, keepdim=True)
    noise_norm = torch.norm(combined, dim=-1, keepdim=True)
    assert difference(guide(positive, negative, scale), combined * (cond_norm / noise_norm)) <= TOLERANCE


def test_guidance_keeps_the_length_of_each_token(rng):
    positive, negative = torch.randn(2, 3, 7, 64) * torch.rand(7, 1) * 5
    guided = guide(positive, negative, rng.uniform(1.1, 8))
    torch.testing.assert_close(guided.norm(dim=-1), positive.norm(dim=-1))
    assert difference(guided, positive) > 0.01


def test_scale_one_changes_nothing():
    positive, negative = torch.randn(2, 3, 7, 64)
    assert difference(guide(positive, negative, 1.0), positive) <= 1e-6


def test_guidance_of_a_token_without_velocity_is_no_nan():
    positive, negative = torch.randn(2, 1, 3, 64)
    positive[0, 1] = negative[0, 1] = 0
    guided = guide(positive, negative, 4.0)
    assert guided.isfinite().all() and (guided[0, 1] == 0).all()

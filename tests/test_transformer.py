"""transformer.py: the whole model equals diffusers' for random configs, shapes, masks and variants."""

import pytest
import torch
from diffusers import QwenImageTransformer2DModel as Reference
from reference import TOLERANCE, copy_weights, difference, random_inputs, randomise_, small_transformer_config

from minqwen.transformer import QwenImageTransformer2DModel

GRIDS = {
    "one image": [(1, 4, 6)],
    "odd grid": [(1, 5, 7)],
    "two references of different parity": [(1, 4, 6), (1, 5, 3), (1, 2, 7)],
    "several frames": [(3, 2, 5)],
}


def both(config):
    reference = randomise_(Reference(**config))
    return reference, copy_weights(reference, QwenImageTransformer2DModel(**config))


@torch.no_grad()
@pytest.mark.parametrize("zero_cond_t", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
def test_equals_the_reference(rng, grid, masked, zero_cond_t):
    config = small_transformer_config(rng, zero_cond_t=zero_cond_t)
    reference, ours = both(config)
    inputs = random_inputs(rng, config, GRIDS[grid], batch=2)
    if masked:
        inputs["encoder_hidden_states_mask"] = torch.rand(inputs["encoder_hidden_states"].shape[:2]) > 0.4
    assert difference(ours(**inputs), reference(**inputs).sample) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_a_batch_gives_each_prompt_the_result_that_it_gets_alone(rng, zero_cond_t):
    config = small_transformer_config(rng, zero_cond_t=zero_cond_t)
    _, ours = both(config)
    inputs = random_inputs(rng, config, [(1, 3, 5), (1, 2, 2)], batch=3)
    lengths = [7, 1, 4]
    text = torch.randn(3, 7, config["joint_attention_dim"])
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    together = ours(**inputs | {"encoder_hidden_states": text, "encoder_hidden_states_mask": mask})
    for i, length in enumerate(lengths):
        one = {k: v[i : i + 1] for k, v in inputs.items()} | {"encoder_hidden_states": text[i : i + 1, :length]}
        assert difference(ours(**one), together[i : i + 1]) <= TOLERANCE


@torch.no_grad()
def test_a_mask_of_ones_equals_no_mask(rng):
    config = small_transformer_config(rng)
    _, ours = both(config)
    inputs = random_inputs(rng, config, [(1, 3, 5)], batch=2)
    ones = torch.ones(inputs["encoder_hidden_states"].shape[:2])
    assert difference(ours(**inputs, encoder_hidden_states_mask=ones), ours(**inputs)) <= TOLERANCE


@torch.no_grad()
def test_bf16_is_no_further_from_the_truth_than_the_reference(rng):
    """Errors of both are random; summed over a few models ours must not be the larger."""
    mine = theirs = 0.0
    for _ in range(6):
        config = small_transformer_config(rng, num_layers=4, num_attention_heads=4, in_channels=32, out_channels=8)
        reference, ours = both(config)
        inputs = random_inputs(rng, config, [(1, 8, 9), (1, 5, 5)], batch=2)
        truth = ours(**inputs)
        halves = {k: v.bfloat16() if torch.is_tensor(v) and k != "timestep" else v for k, v in inputs.items()}
        mine += (ours.bfloat16()(**halves) - truth).square().mean().item()
        theirs += (reference.bfloat16()(**halves).sample - truth).square().mean().item()
    assert mine <= theirs


def test_stale_keys_of_the_released_config_are_ignored():
    released = {"_class_name": "QwenImageTransformer2DModel", "pooled_projection_dim": 768, "guidance_embeds": False}
    with torch.device("meta"):
        QwenImageTransformer2DModel(**released, num_layers=1)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"use_layer3d_rope": True}, "Layered"),
        ({"use_additional_t_cond": True}, "Layered"),
        ({"guidance_embeds": True}, "guidance"),
        ({"frobnicate": 3}, "frobnicate"),
        ({"axes_dims_rope": [16, 16, 16]}, "sum"),
    ],
)
def test_other_variants_are_refused_by_name(config, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        QwenImageTransformer2DModel(**{"num_layers": 1} | config)


@pytest.mark.parametrize("shapes", [None, [[(1, 2, 2)]], [[(1, 3, 5)], [(1, 5, 3)]]])
def test_world_that_do_not_fit_are_refused(rng, shapes):
    config = small_transformer_config(rng)
    inputs = random_inputs(rng, config, [(1, 3, 5)], batch=2)
    with pytest.raises(ValueError, match="shapes"):
        QwenImageTransformer2DModel(**config)(**inputs | {"img_shapes": shapes})

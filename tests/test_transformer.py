"""transformer.py: the whole model equals diffusers' for random configs, shapes, masks and variants.

And with modulations made apart it gives the very same numbers, without the layers that make them.
"""

import inspect
import random

import pytest
import torch
from diffusers import QwenImageTransformer2DModel as Reference
from reference import TOLERANCE, copy_weights, difference, random_inputs, randomise_, small_transformer_config

from minqwen.block import QwenImageTransformerBlock
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
def test_bf16_is_no_further_from_the_truth_than_the_reference():
    """Errors of both look random; summed over a few models, always the same ones, ours must not be the larger."""
    mine, theirs, rng = 0.0, 0.0, random.Random(0)
    torch.manual_seed(0)
    for _ in range(3):
        config = small_transformer_config(rng, num_layers=2, num_attention_heads=4, in_channels=32, out_channels=8)
        reference, ours = both(config)
        inputs = random_inputs(rng, config, [(1, 5, 7), (1, 3, 3)], batch=2)
        truth = ours(**inputs)
        halves = {k: v.bfloat16() if torch.is_tensor(v) and k != "timestep" else v for k, v in inputs.items()}
        mine += (ours.bfloat16()(**halves) - truth).square().mean().item()
        theirs += (reference.bfloat16()(**halves).sample - truth).square().mean().item()
    assert mine <= theirs


# ------------------------------------------------------------------------------------- modulations made apart


@pytest.fixture(params=[False, True], ids=["one level", "zero_cond_t"])
def tuned(rng, request):
    """A model and inputs of two samples at different noise levels, with a reference picture."""
    config = small_transformer_config(rng, num_layers=2, zero_cond_t=request.param)
    model = randomise_(QwenImageTransformer2DModel(**config))
    return model, random_inputs(rng, config, [(1, 3, 5), (1, 2, 2)], batch=2)


def without_their_layers(model, how):
    for module in (*model.transformer_blocks, model, model.norm_out):
        for name in ("img_mod", "txt_mod", "time_text_embed", "linear"):
            if hasattr(module, name) and how == "meta":
                getattr(module, name).to("meta")
            elif hasattr(module, name):
                setattr(module, name, None)


@torch.no_grad()
@pytest.mark.parametrize("how", ["none", "meta"])
def test_ready_made_modulations_give_the_same_numbers_without_the_layers_that_make_them(tuned, how):
    model, inputs = tuned
    want = model(**inputs)
    temb = model.embed_timestep(inputs["timestep"], inputs["hidden_states"])
    of_exit = model.norm_out.modulations(temb[: len(inputs["timestep"])])
    modulations = [block.modulations(temb) for block in model.transformer_blocks], of_exit
    without_their_layers(model, how)
    del inputs["timestep"]  # not read either
    assert torch.equal(model(**inputs, modulations=modulations), want)
    if how == "none":
        with pytest.raises(TypeError, match="NoneType"):  # the layers are gone indeed
            model(**inputs, timestep=torch.ones(2))


@torch.no_grad()
def test_a_table_of_all_levels_is_made_block_by_block_and_one_row_of_it_serves_a_batch(tuned):
    model, inputs = tuned
    levels = torch.linspace(0.1, 1, 5)
    temb = model.embed_timestep(levels, inputs["hidden_states"])
    table = []
    for block in model.transformer_blocks:  # in a module of its own, which holds the modulation's weights alone
        weights = {name: tensor for name, tensor in block.state_dict().items() if "_mod." in name}
        with torch.device("meta"):
            heads, width = block.attn.heads, len(block.attn.norm_q.weight)
            bare = QwenImageTransformerBlock(heads * width, heads, width, zero_cond_t=block.zero_cond_t)
        bare.load_state_dict(weights, strict=False, assign=True)
        table.append(bare.modulations(temb))
    exits = model.norm_out.modulations(temb[: len(levels)])
    for i, level in enumerate(levels):
        row = slice(i, None, len(levels))  # with zero_cond_t two rows: the level's and that of noise 0
        modulations = [(img[row], txt[row]) for img, txt in table], exits[row]
        want = model(**inputs | {"timestep": level.expand(2)})
        assert difference(model(**inputs | {"timestep": None}, modulations=modulations), want) <= TOLERANCE


@torch.no_grad()
def test_one_noise_level_serves_a_whole_batch(tuned):
    model, inputs = tuned
    one, each = (model(**inputs | {"timestep": t}) for t in (torch.tensor([0.7]), torch.tensor([0.7, 0.7])))
    assert difference(one, each) <= TOLERANCE


def test_a_missing_noise_level_is_refused(tuned):
    model, inputs = tuned
    with pytest.raises(ValueError, match="timestep is missing"):
        model(**inputs | {"timestep": None})


# ------------------------------------------------------------------------------------------------------ config


# without its 60 layers, which take a second to build
RELEASED = {"attention_head_dim": 128, "axes_dims_rope": [16, 56, 56], "guidance_embeds": False, "in_channels": 64,
            "joint_attention_dim": 3584, "num_attention_heads": 24, "num_layers": 0, "out_channels": 16,
            "patch_size": 2, "pooled_projection_dim": 768}  # fmt: skip


def test_keys_of_the_released_config_that_nobody_reads_are_ignored_and_config_is_the_released_one():
    for_the_writer = {"_class_name": "QwenImageTransformer2DModel", "_diffusers_version": "0.34.0.dev0"}
    with torch.device("meta"):
        model = QwenImageTransformer2DModel(**RELEASED | for_the_writer)
    assert model.config == RELEASED | {"zero_cond_t": False}


def test_config_holds_every_keyword_as_given_or_by_default(rng):
    defaults = {
        key: parameter.default
        for key, parameter in inspect.signature(QwenImageTransformer2DModel).parameters.items()
        if parameter.default is not parameter.empty
    }
    given = small_transformer_config(rng, zero_cond_t=True)
    with torch.device("meta"):
        assert QwenImageTransformer2DModel(num_layers=0).config == defaults | {"num_layers": 0}
        assert QwenImageTransformer2DModel(**given).config == defaults | given


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
def test_shapes_that_do_not_fit_are_refused(rng, shapes):
    config = small_transformer_config(rng)
    inputs = random_inputs(rng, config, [(1, 3, 5)], batch=2)
    with pytest.raises(ValueError, match="shapes"):
        QwenImageTransformer2DModel(**config)(**inputs | {"img_shapes": shapes})

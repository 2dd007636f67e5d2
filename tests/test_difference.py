"""difference.py: the first sub-module that differs is named, and whether the fault lies in it or in front of it."""

import copy

import pytest
import torch
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock as Reference
from reference import copy_weights, randomise_
from safetensors.torch import load_file, save_file
from torch import nn

from minqwen import attention
from minqwen.block import QwenImageTransformerBlock
from minqwen.difference import first_difference, record


@pytest.fixture
def pair():
    """Our block, the reference's with the same weights, and inputs that both take."""
    reference = randomise_(Reference(24, 2, 12))
    ours = copy_weights(reference, QwenImageTransformerBlock(24, 2, 12))
    angles = torch.randn(6, 6), torch.randn(4, 6)
    inputs = {
        "hidden_states": torch.randn(1, 6, 24),
        "encoder_hidden_states": torch.randn(1, 4, 24),
        "temb": torch.randn(1, 24),
    }
    real = {"image_rotary_emb": tuple((a.cos(), a.sin()) for a in angles)}
    turned = {"image_rotary_emb": tuple(torch.polar(torch.ones_like(a), a) for a in angles)}
    mask = {"encoder_hidden_states_mask": None}
    return ours, record(ours, **inputs, **real), record(reference, **inputs, **turned, **mask), inputs | real


def test_equal_modules_have_no_difference(pair):
    ours, mine, reference, inputs = pair
    assert first_difference(mine, reference) is None
    assert first_difference(ours, reference, **inputs) is None
    assert first_difference(ours, copy.deepcopy(ours), **inputs) is None


def test_a_wrong_weight_is_found_where_it_is(pair):
    ours, _, reference, inputs = pair
    ours.attn.norm_k.weight.data[3] += 1
    found = first_difference(ours, reference, **inputs)
    assert found.name == "attn.norm_k" and found.inputs_agree and found.absolute > 1e-3
    assert "attn.norm_k" in str(found) and "look inside" in str(found)


def test_wrong_code_between_two_modules_is_told_from_a_wrong_module(pair, monkeypatch):
    ours, _, reference, inputs = pair
    halves = lambda x, freqs: attention.F.normalize(x)  # noqa: E731  any wrong rotation
    monkeypatch.setattr(attention, "apply_rotary_emb_qwen", halves)
    found = first_difference(ours, reference, **inputs)
    assert found.name in ("attn.to_out.0", "attn.to_add_out") and not found.inputs_agree
    assert found.last_equal == "attn.norm_added_k" and "attn.norm_added_k" in str(found)


def test_dtype_shapes_and_sizes_of_the_error_are_named():
    mine, reference = nn.Linear(3, 2), nn.Linear(3, 2)
    mine.load_state_dict(reference.state_dict())
    mine.bias.data[1] += 0.5
    found = first_difference(mine, reference, torch.zeros(1, 3))
    assert found.absolute == pytest.approx(0.5) and found.mine == "(1, 2) float32"
    assert found.relative == pytest.approx(0.5 / reference.bias.abs().max().item())
    other = first_difference(
        record(mine.bfloat16(), torch.zeros(1, 3).bfloat16()), record(reference, torch.zeros(1, 3))
    )
    assert other.mine == "(1, 2) bfloat16" and other.reference == "(1, 2) float32"
    wide = first_difference(record(nn.Linear(3, 4), torch.zeros(1, 3)), record(reference, torch.zeros(1, 3)))
    assert wide.absolute == float("inf") and "(1, 4)" in str(wide)


def test_not_a_number_is_a_difference_unless_both_have_it():
    mine, reference = nn.Identity(), nn.Identity()
    bad, good = torch.tensor([float("nan"), float("inf")]), torch.tensor([1.0, float("inf")])
    assert first_difference(record(mine, bad), record(reference, good)).absolute == float("inf")
    assert first_difference(mine, reference, bad) is None


def test_recorded_activations_survive_a_file(pair, tmp_path):
    ours, _, reference, inputs = pair
    save_file(reference, tmp_path / "activations.safetensors")
    stored = load_file(tmp_path / "activations.safetensors")
    assert first_difference(ours, stored, **inputs) is None
    ours.img_mlp.net[2].weight.data *= 1.01
    assert first_difference(ours, stored, **inputs).name == "img_mlp.net.2"


def test_a_module_that_runs_twice_is_told_apart():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x):
            return self.layer(self.layer(x))

    assert [k for k in record(Twice(), torch.ones(1, 2)) if ">" in k] == ["layer > 0", "layer#2 > 0", " > 0"]


def test_nothing_in_common_is_an_error():
    with pytest.raises(ValueError, match="in common"):
        first_difference({"a > 0": torch.ones(1)}, {"b > 0": torch.ones(1)})


def test_hooks_are_gone_after_an_error():
    module = nn.Linear(2, 2)
    with pytest.raises(RuntimeError):
        record(module, torch.ones(1, 3))
    assert not module._forward_hooks

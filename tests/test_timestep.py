"""timestep.py: the waves and the MLP equal diffusers' in every option."""

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding as reference_embedding
from diffusers.models.transformers.transformer_qwenimage import QwenTimestepProjEmbeddings as Reference
from reference import TOLERANCE, copy_weights, difference, randomise_

from minqwen.timestep import QwenTimestepProjEmbeddings, get_timestep_embedding


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shift", [0, 1])
def test_waves_equal_the_reference(rng, flip, shift):
    for _ in range(10):
        dim = rng.randint(6, 300)  # odd widths too
        options = dict(
            flip_sin_to_cos=flip,
            downscale_freq_shift=shift,
            scale=rng.choice([1, 7.5, 1000]),
            max_period=rng.choice([100, 10000]),
        )
        t = torch.rand(rng.randint(1, 5))
        assert (
            difference(get_timestep_embedding(t, dim, **options), reference_embedding(t, dim, **options)) <= TOLERANCE
        )


def test_cosines_come_first_in_the_released_form():
    waves = get_timestep_embedding(torch.zeros(1), 256, flip_sin_to_cos=True, downscale_freq_shift=0, scale=1000)
    assert waves[0, :128].eq(1).all() and waves[0, 128:].eq(0).all()


def test_slowest_and_fastest_wave_by_hand():
    t = torch.tensor([0.5])
    waves = get_timestep_embedding(t, 256, flip_sin_to_cos=True, downscale_freq_shift=0, scale=1000)
    assert waves[0, 0] == pytest.approx(torch.cos(torch.tensor(500.0)).item(), abs=1e-6)
    assert waves[0, 127] == pytest.approx(torch.cos(torch.tensor(500 * 10000 ** (-127 / 128))).item(), abs=1e-6)


@pytest.mark.parametrize("bad", [torch.zeros(2, 2), torch.tensor(0.5)])
def test_wrong_rank_is_refused(bad):
    with pytest.raises(ValueError, match=r"\(B,\)"):
        get_timestep_embedding(bad, 8)


def test_width_without_a_frequency_is_refused():
    with pytest.raises(ValueError, match="embedding_dim"):
        get_timestep_embedding(torch.zeros(1), 2)


def test_module_equals_the_reference(rng):
    dim = rng.randint(4, 200)
    reference = randomise_(Reference(dim))
    ours = copy_weights(reference, QwenTimestepProjEmbeddings(dim))
    t, like = torch.rand(3), torch.zeros(1)
    assert difference(ours(t, like), reference(t, like)) <= TOLERANCE


def test_bf16_is_no_further_from_the_truth_than_the_reference():
    torch.manual_seed(0)
    reference = randomise_(Reference(64))
    ours = copy_weights(reference, QwenTimestepProjEmbeddings(64))
    t = torch.rand(64)
    truth = ours(t, t)
    half = torch.zeros(1, dtype=torch.bfloat16)
    theirs = reference.bfloat16()(t.bfloat16(), half)  # diffusers' model rounds sigma before it gets here
    mine = ours.bfloat16()(t, half)
    assert (mine - truth).norm() <= (theirs - truth).norm()

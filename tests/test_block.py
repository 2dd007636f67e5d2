"""block.py: one double-stream block equals diffusers', 2511's two modulations and fp16's limit included."""

import pytest
import torch
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope as ReferenceRope
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock as Reference
from reference import TOLERANCE, copy_weights, difference, randomise_

from minqwen.block import QwenImageTransformerBlock, clip_fp16
from minqwen.rope import QwenEmbedRope


@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_equals_the_reference(rng, zero_cond_t):
    axes = [2 * rng.randint(1, 4) for _ in range(3)]
    heads, width = rng.randint(1, 3), sum(axes)
    dim = heads * width
    reference = randomise_(Reference(dim, heads, width, zero_cond_t=zero_cond_t))
    ours = copy_weights(reference, QwenImageTransformerBlock(dim, heads, width, zero_cond_t=zero_cond_t))
    shapes, length = [(1, 5, 7), (1, 2, 3)], rng.randint(1, 9)
    img, txt, temb = torch.randn(2, 41, dim), torch.randn(2, length, dim), torch.randn(4 if zero_cond_t else 2, dim)
    mask = torch.rand(2, length) > 0.5
    want = reference(
        hidden_states=img,
        encoder_hidden_states=txt,
        encoder_hidden_states_mask=mask,
        temb=temb,
        image_rotary_emb=ReferenceRope(10000, axes, True)([shapes], max_txt_seq_len=length, device=img.device),
        modulate_index=torch.tensor([[0] * 35 + [1] * 6] * 2) if zero_cond_t else None,
    )
    got = ours(img, txt, temb, mask, QwenEmbedRope(10000, axes)(shapes, length), target_tokens=35)
    assert max(map(difference, got, want)) <= TOLERANCE


def test_ready_made_modulations_give_the_same_numbers_and_their_layers_may_be_gone(rng):
    for zero_cond_t in (False, True):
        block = randomise_(QwenImageTransformerBlock(12, 2, 6, zero_cond_t=zero_cond_t))
        img, txt, temb = torch.randn(2, 7, 12), torch.randn(2, 3, 12), torch.randn(4 if zero_cond_t else 2, 12)
        want = block(img, txt, temb, target_tokens=4)
        modulations = block.modulations(temb)
        assert [tuple(m.shape) for m in modulations] == [(len(temb), 72), (2, 72)]
        del block.img_mod, block.txt_mod
        got = block(img, txt, None, target_tokens=4, modulations=modulations)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_float16_stays_finite_where_it_would_overflow():
    huge = torch.tensor([70000.0, -70000.0]).half()
    assert huge.isinf().all() and clip_fp16(huge).tolist() == [65504, -65504]
    assert clip_fp16(torch.tensor([70000.0])).item() == 70000

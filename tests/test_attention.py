"""attention.py: one softmax over [text, image] equals diffusers' processor; masks hide what they should."""

import torch
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope as ReferenceRope
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
from reference import TOLERANCE, copy_weights, difference, randomise_

from minqwen.attention import QwenDoubleStreamAttention
from minqwen.rope import QwenEmbedRope


def both(rng):
    axes = [2 * rng.randint(1, 4) for _ in range(3)]
    heads, width = rng.randint(1, 4), sum(axes)
    reference = randomise_(QwenImageTransformerBlock(heads * width, heads, width).attn)
    ours = copy_weights(reference, QwenDoubleStreamAttention(heads * width, heads, width))
    return reference, ours, axes, heads * width


def test_equals_the_reference(rng):
    for masked in (False, True):
        reference, ours, axes, dim = both(rng)
        shapes, length = [(1, 5, 7), (1, 4, 3)], rng.randint(2, 9)
        img, txt = torch.randn(2, 47, dim), torch.randn(2, length, dim)
        mask = torch.rand(2, length) > 0.5 if masked else None  # a mask with holes
        want = reference(
            hidden_states=img,
            encoder_hidden_states=txt,
            encoder_hidden_states_mask=mask,
            image_rotary_emb=ReferenceRope(10000, axes, True)([shapes], max_txt_seq_len=length, device=img.device),
        )
        got = ours(img, txt, mask, QwenEmbedRope(10000, axes)(shapes, length))
        assert max(map(difference, got, want)) <= TOLERANCE


def test_without_rotation_shuffled_image_tokens_come_out_shuffled(rng):
    _, ours, _, dim = both(rng)
    img, txt, order = torch.randn(1, 6, dim), torch.randn(1, 3, dim), torch.randperm(6)
    assert difference(ours(img[:, order], txt)[0], ours(img, txt)[0][:, order]) <= TOLERANCE


def test_masked_text_is_seen_by_nobody(rng):
    _, ours, _, dim = both(rng)
    img, txt, mask = torch.randn(1, 6, dim), torch.randn(1, 3, dim), torch.tensor([[1, 0, 1]])
    before = ours(img, txt, mask)[0]
    txt[:, 1] = 100.0
    assert torch.equal(ours(img, txt, mask)[0], before)

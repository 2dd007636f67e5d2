"""rope.py: tables and rotation equal diffusers', in complex and in real form."""

import pytest
import torch
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope as Reference
from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen as reference_apply
from reference import TOLERANCE, difference

from minqwen.rope import QwenEmbedRope, apply_rotary_emb_qwen


def random_shapes(rng, images):
    return [(rng.randint(1, 3), rng.randint(1, 9), rng.randint(1, 9)) for _ in range(images)]


@pytest.mark.parametrize("scale_rope", [True, False])
@pytest.mark.parametrize("images", [1, 2, 3])
def test_tables_equal_the_reference(rng, scale_rope, images):
    for _ in range(5):
        axes = [2 * rng.randint(1, 8) for _ in range(3)]
        shapes, length = random_shapes(rng, images), rng.randint(1, 20)
        reference = Reference(10000, axes, scale_rope)
        vid, txt = reference(shapes if images == 1 else [shapes], max_txt_seq_len=length, device=torch.device("cpu"))
        complex_vid, complex_txt = QwenEmbedRope(10000, axes, scale_rope, use_real=False)(shapes, [1, length])
        assert difference(torch.view_as_real(complex_vid), torch.view_as_real(vid)) <= TOLERANCE
        assert difference(torch.view_as_real(complex_txt), torch.view_as_real(txt)) <= TOLERANCE
        for table, (cos, sin) in zip((vid, txt), QwenEmbedRope(10000, axes, scale_rope)(shapes, length), strict=True):
            assert difference(cos, table.real) <= TOLERANCE and difference(sin, table.imag) <= TOLERANCE


def test_released_tables_equal_the_reference_on_large_grids():
    shapes = [(1, 83, 83), (1, 64, 64)]  # 1328^2, an odd grid, with a reference picture of 1024^2
    vid, txt = Reference(10000, [16, 56, 56], True)([shapes], max_txt_seq_len=1024, device=torch.device("cpu"))
    (cos, sin), (txt_cos, txt_sin) = QwenEmbedRope()(shapes, 1024)
    assert max(difference(cos, vid.real), difference(sin, vid.imag)) <= TOLERANCE
    assert max(difference(txt_cos, txt.real), difference(txt_sin, txt.imag)) <= TOLERANCE


def test_centred_positions_of_odd_and_even_grids():
    rope = QwenEmbedRope()
    assert rope.axis_positions(83).tolist() == list(range(-42, 41))
    assert rope.axis_positions(4).tolist() == [-2, -1, 0, 1]
    assert QwenEmbedRope(scale_rope=False).axis_positions(3).tolist() == [0, 1, 2]


def test_text_starts_behind_the_largest_image_not_only_the_target():
    (_, (cos, _)) = QwenEmbedRope()([(1, 4, 4), (1, 6, 20)], 1)
    assert cos[0, 0] == pytest.approx(torch.cos(torch.tensor(10.0)).item(), abs=1e-6)


def test_the_cache_gives_the_same_table_and_stays_small():
    rope = QwenEmbedRope(axes_dim=(2, 2, 2))
    first = rope([(1, 3, 5)], 4)[0][0]
    assert torch.equal(rope([(1, 3, 5)], 4)[0][0], first) and len(rope.rope_cache) == 1
    for n in range(1, 70):
        rope([(1, 1, n)], 1)
    assert len(rope.rope_cache) <= 64
    assert torch.equal(rope([(1, 3, 5)], 4)[0][0], first)


@pytest.mark.parametrize("compiling", [False, True])
def test_rotation_equals_the_reference_in_both_forms(rng, monkeypatch, compiling):
    """On a CPU the real form is computed as the complex one, except where torch.compile looks on."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    B, N, H, D = 2, rng.randint(1, 9), rng.randint(1, 4), 2 * rng.randint(1, 9)
    x, angles = torch.randn(B, N, H, D), torch.randn(N, D // 2) * 10
    table = torch.polar(torch.ones_like(angles), angles)
    want = reference_apply(x, table, use_real=False)
    assert difference(apply_rotary_emb_qwen(x, (angles.cos(), angles.sin())), want) <= TOLERANCE
    assert difference(apply_rotary_emb_qwen(x, table, use_real=False), want) <= TOLERANCE


def test_scores_depend_on_relative_positions_only():
    rope = QwenEmbedRope(axes_dim=(4, 6, 6))
    cos, sin = (t.view(9, 9, 8) for t in rope([(1, 9, 9)], 1)[0])
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(a, b):
        turned = [apply_rotary_emb_qwen(x, (cos[p][None], sin[p][None])) for x, p in ((q, a), (k, b))]
        return (turned[0] * turned[1]).sum().item()

    assert score((1, 2), (3, 5)) == pytest.approx(score((5, 4), (7, 7)), abs=1e-4)


def test_bf16_comes_back_as_bf16():
    x = torch.randn(1, 3, 2, 8, dtype=torch.bfloat16)
    angles = torch.randn(3, 4)
    assert apply_rotary_emb_qwen(x, (angles.cos(), angles.sin())).dtype == torch.bfloat16


def test_odd_axis_is_refused():
    with pytest.raises(ValueError, match="even"):
        QwenEmbedRope(axes_dim=(3, 2, 2))

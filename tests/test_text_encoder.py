"""The text encoder against transformers, on random sizes, prompts and images.

The reference is always given `mm_token_type_ids`, without which transformers 5 numbers image tokens as if
they were words (diffusers#14194), and is compared where the mask is True: what stands in the padding means
nothing.
"""

import copy
import random

import pytest
import torch
from transformers import Qwen2_5_VLConfig
from transformers import Qwen2_5_VLForConditionalGeneration as Reference

from minqwen.text_encoder import Qwen2_5_VLTextEncoder, mrope_positions, released_name

IMAGE = 30  # the image token's id; words are 0 to 29


def small_config(rng) -> dict:
    """A random small configuration as transformers 5 saves it: nested."""
    sections = [rng.randint(1, 4) for _ in range(3)]
    kv_heads, heads = rng.randint(1, 2), rng.randint(1, 2)
    hidden, shared_by = 2 * sum(sections), rng.randint(1, 3)
    return {
        "model_type": "qwen2_5_vl",
        "image_token_id": IMAGE,
        "video_token_id": IMAGE + 1,
        "text_config": {
            "model_type": "qwen2_5_vl_text",
            "vocab_size": IMAGE + 2,
            "hidden_size": hidden * kv_heads * shared_by,
            "intermediate_size": rng.randint(20, 60),
            "num_hidden_layers": rng.randint(1, 3),
            "num_attention_heads": kv_heads * shared_by,
            "num_key_value_heads": kv_heads,
            "rms_norm_eps": 1e-6,
            "hidden_act": "silu",
            "use_sliding_window": False,
            "rope_parameters": {
                "mrope_section": sections,
                "rope_theta": rng.choice([1e4, 1e6]),
                "rope_type": "default",
            },
        },
        "vision_config": {
            "depth": 2,
            "hidden_size": heads * 16,
            "intermediate_size": 20,
            "num_heads": heads,
            "patch_size": 2,
            "window_size": 8,  # 2×2 merged tokens
            "fullatt_block_indexes": [1],
            "out_hidden_size": hidden * kv_heads * shared_by,
        },
    }


def as_released(config: dict) -> dict:
    """The same configuration as the released file has it: flat, with an unreliable nested copy."""
    text, rope = dict(config["text_config"]), dict(config["text_config"]["rope_parameters"])
    del text["rope_parameters"], text["model_type"]
    flat = text | {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"mrope_section": rope["mrope_section"], "rope_type": "default", "type": "default"},
        "image_token_id": IMAGE,
        "sliding_window": 32768,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vision_config": config["vision_config"] | {"model_type": "qwen2_5_vl", "in_chans": 3},
    }
    unreliable = {"image_token_id": None, "sliding_window": None, "rms_norm_eps": 0.5}
    return flat | {"text_config": flat | unreliable}


def reference_and_ours(config: dict):
    reference = Reference(Qwen2_5_VLConfig(**copy.deepcopy(config))).eval()
    for name, p in reference.named_parameters():
        scale = 0.2 if p.ndim == 1 else 1.0 if "embed_tokens" in name else 0.7 * p[0].numel() ** -0.5
        p.data = torch.randn_like(p) * scale + (1.0 if p.ndim == 1 and "bias" not in name else 0.0)
    ours = Qwen2_5_VLTextEncoder(**config).eval()
    ours.load_state_dict(reference.state_dict(), strict=True)
    return reference, ours


def random_batch(rng, merged: list[list[tuple[int, int]]], padding: str = "right") -> dict:
    """For each row words, and images of the given merged sizes among them."""
    rows, grids = [], []
    for sizes in merged:
        row = [rng.randrange(IMAGE) for _ in range(rng.randint(1, 9))]
        for h, w in sizes:
            row += [IMAGE] * (h * w) + [rng.randrange(IMAGE) for _ in range(rng.randint(1, 9))]
            grids.append((1, 2 * h, 2 * w))
        rows.append(row)
    longest = max(map(len, rows))
    fill = [[0] * (longest - len(row)) for row in rows]
    join = (lambda row, fill: row + fill) if padding == "right" else (lambda row, fill: fill + row)
    pairs = list(zip(rows, fill, strict=True))
    batch = {
        "input_ids": torch.tensor([join(row, fill) for row, fill in pairs]),
        "attention_mask": torch.tensor([join([1] * len(row), fill) for row, fill in pairs]),
    }
    if grids:
        batch["image_grid_thw"] = torch.tensor(grids)
        batch["pixel_values"] = torch.randn(int(batch["image_grid_thw"].prod(-1).sum()), 3 * 2 * 2 * 2)
    return batch


@torch.no_grad()
def reference_hidden(reference, batch: dict) -> torch.Tensor:
    types = (batch["input_ids"] == IMAGE).int()
    return reference(**batch, mm_token_type_ids=types, output_hidden_states=True).hidden_states[-1]


WORDS_ONLY, TWO_IMAGES, BATCH = [[]], [[(2, 5), (3, 3)]], [[(3, 1)], [(2, 4), (5, 5)]]


@torch.no_grad()
@pytest.mark.parametrize("form", ["nested", "released"])
@pytest.mark.parametrize(
    "merged, padding",
    [
        (WORDS_ONLY, "right"),
        (TWO_IMAGES, "right"),
        ([[], [], []], "right"),
        (BATCH, "right"),
        (BATCH, "left"),
        ([[], [(4, 2)]], "right"),
    ],
)
def test_equals_transformers(rng, merged, padding, form):
    config = small_config(rng)
    reference, _ = reference_and_ours(config)
    ours = Qwen2_5_VLTextEncoder(**(config if form == "nested" else as_released(config))).eval()
    ours.load_state_dict(reference.state_dict())
    batch = random_batch(rng, merged, padding)
    valid = batch["attention_mask"].bool()
    hidden = ours(**batch)
    assert hidden.isfinite().all() and hidden.shape == (*valid.shape, ours.hidden_size)
    assert (hidden - reference_hidden(reference, batch))[valid].abs().max() <= 1e-5, config


@torch.no_grad()
def test_batched_equals_single(rng):
    _, ours = reference_and_ours(small_config(rng))
    batch = random_batch(rng, BATCH)
    hidden, valid = ours(**batch), batch["attention_mask"].bool()
    grids, patches = batch["image_grid_thw"], batch["pixel_values"]
    first = int(grids[0].prod())
    for row, (grid, pixels) in enumerate([(grids[:1], patches[:first]), (grids[1:], patches[first:])]):
        alone = ours(batch["input_ids"][row][valid[row]][None], None, pixels, grid)
        assert (hidden[row][valid[row]] - alone[0]).abs().max() <= 1e-5


@torch.no_grad()
def test_bfloat16_is_no_further_from_the_truth_than_the_reference():
    """Mean square over four models, always the same ones, with 20 % of slack: single roundings are luck."""
    error, reference_error = 0.0, 0.0
    for seed in range(4):
        torch.manual_seed(seed)
        rng = random.Random(seed)
        reference, ours = reference_and_ours(small_config(rng))
        reference, ours = reference.bfloat16(), ours.bfloat16()
        batch = random_batch(rng, BATCH)
        valid = batch["attention_mask"].bool()
        rough, rough_reference = ours(**batch)[valid], reference_hidden(reference, batch)[valid]
        truth = reference_hidden(reference.float(), batch)[valid]
        assert rough.dtype == torch.bfloat16
        error += (rough - truth).pow(2).mean().item()
        reference_error += (rough_reference - truth).pow(2).mean().item()
    assert error <= 1.2 * reference_error


def test_positions_of_an_image():
    """Three words, an image of 4×4 tokens, three words."""
    ids = torch.tensor([[1, 2, 3] + [IMAGE] * 16 + [4, 5, 6]])
    t, h, w = mrope_positions(ids, None, torch.tensor([[1, 8, 8]]), IMAGE)[:, 0].tolist()
    assert t == [0, 1, 2] + [3] * 16 + [7, 8, 9]
    assert h == [0, 1, 2] + [3] * 4 + [4] * 4 + [5] * 4 + [6] * 4 + [7, 8, 9]
    assert w == [0, 1, 2] + [3, 4, 5, 6] * 4 + [7, 8, 9]


@pytest.mark.parametrize("padding", ["right", "left"])
def test_positions_equal_transformers(rng, padding):
    reference, _ = reference_and_ours(small_config(rng))
    merged = [[(rng.randint(1, 6), rng.randint(1, 6)) for _ in range(rng.randint(1, 3))] for _ in range(3)]
    batch = random_batch(rng, merged, padding)
    ids, mask, grids = batch["input_ids"], batch["attention_mask"], batch["image_grid_thw"]
    expected, _ = reference.model.get_rope_index(ids, (ids == IMAGE).int(), grids, attention_mask=mask)
    given = mask.clone()
    assert torch.equal(mrope_positions(ids, given, grids, IMAGE)[:, mask.bool()], expected[:, mask.bool()])
    assert torch.equal(given, mask)  # the caller's mask is left alone


def test_names_and_shapes_at_the_released_size():
    """728 of the released 729 tensors: all but lm_head, which predicts words."""
    vision = Qwen2_5_VLConfig().vision_config.to_dict() | {"hidden_size": 1280}
    text = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
    text |= {"num_attention_heads": 28, "num_key_value_heads": 4}
    with torch.device("meta"):
        ours = Qwen2_5_VLTextEncoder()
        reference = Reference(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    expected = {released_name(name): tuple(t.shape) for name, t in reference.state_dict().items()}
    assert expected.pop(None) == (152064, 3584)
    assert {name: tuple(t.shape) for name, t in ours.state_dict().items()} == expected
    assert len(expected) == 728
    assert sum(p.numel() for p in ours.parameters()) == 8_292_166_656 - 544_997_376
    assert not list(ours.buffers())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("names", ["released", "transformers 5"])
def test_loads_either_naming(rng, names, assign):
    config = small_config(rng)
    reference, ours = reference_and_ours(config)
    weights = dict(reference.state_dict())
    if names == "released":
        weights = {released_name(name) or name: w for name, w in weights.items()}
        assert "lm_head.weight" in weights and "model.embed_tokens.weight" in weights
    before = list(weights)
    with torch.device("meta" if assign else "cpu"):
        encoder = Qwen2_5_VLTextEncoder(**config)
    encoder.load_state_dict(weights, strict=True, assign=assign)
    assert list(weights) == before  # the caller's dictionary is left alone
    batch = random_batch(rng, TWO_IMAGES)
    with torch.no_grad():
        assert torch.equal(encoder.eval()(**batch), ours(**batch))


def test_loading_is_strict(rng):
    config = small_config(rng)
    weights = Qwen2_5_VLTextEncoder(**config).state_dict()
    norm = weights["model.norm.weight"]
    for wrong, message in [
        ({k: v for k, v in weights.items() if k != "model.norm.weight"}, "Missing key.*model.norm.weight"),
        (weights | {"model.layers.99.bias": norm}, "Unexpected key.*model.layers.99.bias"),
        (weights | {"model.norm.weight": norm[:-1]}, "size mismatch for model.norm.weight"),
        (weights | {"model.language_model.norm.weight": norm}, "Unexpected key.*language_model.norm"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            Qwen2_5_VLTextEncoder(**config).load_state_dict(wrong)


def test_flat_keys_win_and_the_released_values_are_the_defaults():
    with torch.device("meta"):
        encoder = Qwen2_5_VLTextEncoder(
            vocab_size=100, text_config={"vocab_size": 200, "num_hidden_layers": 3, "image_token_id": None}
        )
    assert (encoder.vocab_size, len(encoder.model.layers)) == (100, 3)
    assert (encoder.hidden_size, encoder.image_token_id, encoder.visual.spatial_merge_size) == (3584, 151655, 2)
    assert encoder.model.norm.eps == 1e-6 and encoder.model.rope_theta == 1e6


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("model_type", "qwen3_vl", "model_type = 'qwen3_vl'"),
        ("hidden_act", "gelu", "hidden_act = 'gelu'"),
        ("use_sliding_window", True, "use_sliding_window"),
        ("rope_scaling", {"type": "yarn", "factor": 4.0}, "rope_type = 'yarn'"),
        ("rope_scaling", {"type": "mrope", "mrope_section": [1, 1, 1]}, "mrope_section"),
        ("num_key_value_heads", 3, "sizes do not fit"),
        ("vision_config", {"out_hidden_size": 99}, "out_hidden_size is 99"),
    ],
)
def test_refuses_what_it_does_not_compute(key, value, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        Qwen2_5_VLTextEncoder(**{"num_hidden_layers": 1, key: value})


def test_image_tokens_must_match_the_images(rng):
    _, ours = reference_and_ours(small_config(rng))
    batch = random_batch(rng, TWO_IMAGES)
    with pytest.raises(ValueError, match="hold 19 image tokens, id 30; the images make 0"):
        ours(batch["input_ids"], batch["attention_mask"])
    batch["input_ids"][batch["input_ids"] == IMAGE] = 1
    with pytest.raises(ValueError, match="hold 0 image tokens.* make 19"):
        ours(**batch)


def test_every_weight_is_trained(rng):
    _, ours = reference_and_ours(small_config(rng))
    batch = random_batch(rng, BATCH, "left")
    ours.train()(**batch)[batch["attention_mask"].bool()].pow(4).mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in ours.parameters())

"""Patches and vision tower against transformers, on random sizes and random grids, in fp32."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel as Reference,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as reference_smart_resize

from minqwen.vision import (
    Qwen2_5_VLVisionTower,
    image_layout,
    image_patches,
    load_image_settings,
    run_lengths,
    smart_resize,
)

# ---- patches


@pytest.mark.parametrize(
    "size, expected",
    [
        ((1024, 1024), (1036, 1036)),
        ((896, 1184), (896, 1176)),
        ((384, 384), (392, 392)),
        ((320, 448), (308, 448)),
        ((288, 512), (280, 504)),
        ((10, 20), (56, 84)),
    ],
)
def test_smart_resize(size, expected):
    assert smart_resize(*size) == expected


def test_smart_resize_equals_transformers(rng):
    for _ in range(500):
        h, w = (int(10 ** rng.uniform(0, 4)) for _ in range(2))
        limits = rng.choice([(3136, 12845056), (3136, 1003520), (50_000, 60_000)])
        if max(h, w) > 200 * min(h, w):
            with pytest.raises(ValueError, match="at most 200 times"):
                smart_resize(h, w, 28, *limits)
        else:
            assert smart_resize(h, w, 28, *limits) == reference_smart_resize(h, w, 28, *limits)


def test_patches_equal_transformers(rng):
    limits = rng.choice([(3136, 12845056), (3136, 20_000), (50_000, 80_000)])
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": limits[0], "longest_edge": limits[1]})
    for _ in range(4):
        width, height = rng.randint(20, 300), rng.randint(20, 300)
        image = Image.frombytes("RGB", (width, height), rng.randbytes(3 * width * height))
        expected = processor(image, return_tensors="pt")
        patches, grid = image_patches(image, min_pixels=limits[0], max_pixels=limits[1])
        assert [list(grid)] == expected.image_grid_thw.tolist()
        assert patches.dtype == torch.float32 and patches.shape == (grid[1] * grid[2], 1176)
        assert (patches - expected.pixel_values).abs().max() <= 1e-6


def test_a_picture_of_1024_pixels_is_not_shrunk():
    """transformers' class default would; the released processors' limit does not."""
    assert image_patches(Image.new("RGB", (1024, 1024)))[1] == (1, 74, 74)


def test_patches_want_rgb(rng):
    with pytest.raises(TypeError, match="PIL image, got ndarray"):
        image_patches(np.zeros((9, 9, 3)))
    with pytest.raises(ValueError, match="RGBA.*load_image"):
        image_patches(Image.new("RGBA", (99, 99)))


def test_image_settings(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither preprocessor_config.json nor processor_config.json"):
        load_image_settings(tmp_path / "nowhere")
    inner = {"size": {"shortest_edge": 1, "longest_edge": 5}, "patch_size": 7, "image_mean": [0, 0, 0]}
    expected = {"min_pixels": 1, "max_pixels": 5, "patch_size": 7, "image_mean": [0, 0, 0]}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": inner}))
    assert load_image_settings(tmp_path) == expected
    old = tmp_path / "preprocessor_config.json"  # read first; min_pixels and max_pixels go before size
    old.write_text(json.dumps(inner | {"min_pixels": 3, "max_pixels": None}))
    assert load_image_settings(tmp_path) == expected | {"min_pixels": 3}
    for wrong in ({"resample": 2}, {"do_rescale": False}, {"do_normalize": False}, {"rescale_factor": 1.0}):
        old.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} = .* is computed here"):
            load_image_settings(tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"patch_size": "14"}, {"patch_size": 0}, {"patch_size": 10**9}, {"merge_size": [2]}, {"min_pixels": 2.5},
        {"size": 9}, {"max_pixels": -1}, {"image_mean": [0.5, 0.5]}, {"image_mean": "ab"}, {"image_mean": [0, 0, 1e99]},
        {"image_std": [1, 1, 0]}, {"image_std": 1}, {"min_pixels": 9, "max_pixels": 4}, {"image_processor": None},
    ],
)  # fmt: skip
def test_image_settings_that_cannot_be_used_name_their_file(tmp_path, wrong):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(wrong))
    with pytest.raises(ValueError, match="preprocessor_config.json: "):
        load_image_settings(tmp_path)


# ---- the tower


def small_config(rng) -> dict:
    heads, patch = rng.randint(1, 3), rng.choice([2, 4, 14])
    depth = rng.randint(2, 4)
    return {
        "depth": depth,
        "hidden_size": heads * rng.choice([12, 16, 20]),
        "intermediate_size": rng.randint(10, 40),
        "num_heads": heads,
        "patch_size": patch,
        "window_size": rng.choice([2, 3, 4]) * 2 * patch,
        "fullatt_block_indexes": rng.sample(range(depth), rng.randint(1, depth - 1)),
        "out_hidden_size": rng.randint(8, 24),
    }


def randomise(module: torch.nn.Module) -> torch.nn.Module:
    """Norm weights around 1, biases and matrices of a size that makes a mistake show."""
    for name, p in module.named_parameters():
        scale = 0.2 if p.ndim == 1 else 0.7 * p[0].numel() ** -0.5
        p.data = torch.randn_like(p) * scale + (1.0 if p.ndim == 1 and "bias" not in name else 0.0)
    return module.eval()


def reference_and_ours(config: dict):
    reference = randomise(Reference(Qwen2_5_VLVisionConfig(**config)))
    ours = Qwen2_5_VLVisionTower(**config)
    ours.load_state_dict(reference.state_dict(), strict=True)
    return reference, ours.eval()


def random_grid(rng, merged=None) -> tuple[int, int, int]:
    h, w = merged or (rng.randint(1, 9), rng.randint(1, 9))
    return (1, 2 * h, 2 * w)


def random_patches(config: dict, grid_thw: torch.Tensor) -> torch.Tensor:
    return torch.randn(int(grid_thw.prod(-1).sum()), 3 * 2 * config["patch_size"] ** 2)


@torch.no_grad()
@pytest.mark.parametrize(
    "merged",
    [
        [(1, 1)],
        [(8, 4)],  # divisible by a window of 2 or 4: the reference adds a row of empty windows
        [(5, 7), (3, 9)],  # odd, two images of different size
        [(4, 4), (4, 4), (6, 1)],  # equal neighbours share a batch
        None,  # random
    ],
)
def test_equals_transformers(rng, merged):
    config = small_config(rng)
    reference, ours = reference_and_ours(config)
    merged = merged or [None] * rng.randint(1, 4)
    grids = torch.tensor([random_grid(rng, size) for size in merged])
    patches = random_patches(config, grids)
    expected = reference(patches, grid_thw=grids).pooler_output
    assert (ours(patches, grids) - expected).abs().max() <= 1e-5, (config, grids.tolist())


@torch.no_grad()
def test_images_do_not_see_each_other(rng):
    config = small_config(rng)
    _, ours = reference_and_ours(config)
    grids = torch.tensor([random_grid(rng) for _ in range(3)])
    patches = random_patches(config, grids)
    alone = [ours(rows, grid[None]) for rows, grid in zip(patches.split(grids.prod(-1).tolist()), grids, strict=True)]
    assert (ours(patches, grids) - torch.cat(alone)).abs().max() <= 1e-5


def test_layout_of_an_image():
    """7×6 squares in windows of 4×4: one full window, and the rest at the right, below, and in the corner."""
    positions, order, lengths = image_layout(gh=14, gw=12, merge=2, window=4)
    assert positions[0].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]  # patches arrive square by square
    assert positions[6].tolist() == [[2, 0], [2, 1], [3, 0], [3, 1]]
    assert lengths == [3 * 2 * 4, 4 * 2 * 4, 3 * 4 * 4, 4 * 4 * 4]
    assert order[-16:].tolist() == [row * 6 + col for row in range(4) for col in range(4)]
    assert sorted(order.tolist()) == list(range(42))
    assert run_lengths([64, 64, 32]) == [(2, 64), (1, 32)]


def test_released_names_and_shapes():
    with torch.device("meta"):
        ours, reference = Qwen2_5_VLVisionTower(), Reference(Qwen2_5_VLVisionConfig(hidden_size=1280))
    shapes = {name: tuple(t.shape) for name, t in ours.state_dict().items()}
    assert shapes == {name: tuple(t.shape) for name, t in reference.state_dict().items()}
    assert shapes["patch_embed.proj.weight"] == (1280, 3, 2, 14, 14)
    assert sum(p.numel() for p in ours.parameters()) == 676_550_144


def test_config_keys():
    """Old and new names of the same thing, and keys that do not touch the computation."""
    small = {"depth": 1, "hidden_size": 8, "num_heads": 1, "intermediate_size": 8, "out_hidden_size": 8}
    tower = Qwen2_5_VLVisionTower(**small, in_chans=4, tokens_per_second=2, spatial_patch_size=14)
    assert tower.patch_embed.proj.in_channels == 4
    rope = {"rope_type": "axial", "rope_theta": 500.0}
    assert Qwen2_5_VLVisionTower(**small, rope_parameters=rope).rope_theta == 500.0
    for wrong in ({"hidden_act": "gelu"}, {"rope_parameters": {"rope_type": "yarn"}}, {"hidden_size": 6}):
        with pytest.raises(ValueError, match="silu|axial|multiple of 4"):
            Qwen2_5_VLVisionTower(**(small | wrong))


def test_patches_and_grids_must_fit(rng):
    config = small_config(rng)
    _, ours = reference_and_ours(config)
    grids = torch.tensor([[1, 4, 6]])
    patches = random_patches(config, grids)
    with pytest.raises(ValueError, match="call for"):
        ours(patches[:-4], grids)
    with pytest.raises(ValueError, match="call for"):
        ours(patches[:, :-1], grids)
    for wrong in ([[2, 4, 3]], [[1, 8, 3]]):
        with pytest.raises(ValueError, match="multiples of 2"):
            ours(patches, torch.tensor(wrong))


def test_every_weight_is_trained(rng):
    config = small_config(rng)
    _, ours = reference_and_ours(config)
    grids = torch.tensor([random_grid(rng, (3, 2))])
    ours(random_patches(config, grids), grids).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in ours.parameters())

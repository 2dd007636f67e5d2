"""The VAE against diffusers' AutoencoderKLQwenImage, which runs the same weights in three dimensions."""

import random

import pytest
import torch
from diffusers import AutoencoderKLQwenImage as Reference
from safetensors.torch import load_file, save_file

from minqwen.vae import AutoencoderKLQwenImage, CausalConv2d

SMALL = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 2], "num_res_blocks": 1, "temperal_downsample": [False, True]}


def random_config(rng: random.Random) -> dict:
    levels = rng.choice([3, 4])
    return {
        "base_dim": rng.choice([6, 8, 12]),
        "z_dim": rng.choice([3, 4, 16]),
        "dim_mult": [1] + [rng.choice([1, 2, 4]) for _ in range(levels - 1)],
        "num_res_blocks": rng.choice([1, 2]),
        "temperal_downsample": [rng.random() < 0.5 for _ in range(levels - 1)],
    }


def pair(config: dict) -> tuple[AutoencoderKLQwenImage, Reference]:
    """Both models with the same weights, none of which is at a value that hides a mistake."""
    reference = Reference(**config).eval().requires_grad_(False)
    for parameter in reference.parameters():
        parameter += 0.05 * torch.randn_like(parameter)
    with torch.device("meta"):
        vae = AutoencoderKLQwenImage(**config)
    vae.load_state_dict(reference.state_dict(), strict=True, assign=True)
    return vae.requires_grad_(False), reference


def random_pixels(rng: random.Random, factor: int) -> torch.Tensor:
    return torch.rand(2, 3, 1, factor * rng.randint(3, 7), factor * rng.randint(3, 7)) * 2 - 1


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return (a.float() - b.float()).abs().max().item()


def rms(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.float() - b.float()).square().mean().sqrt().item()


# ---- the numbers


@pytest.mark.parametrize("draw", range(4))
def test_encode_and_decode_equal_diffusers(rng, draw):
    config = random_config(rng)
    vae, reference = pair(config)
    pixels = random_pixels(rng, vae.factor)
    ours, theirs = vae.encode(pixels), reference.encode(pixels).latent_dist
    assert far(ours.mean, theirs.mean) <= 1e-5, config
    assert far(ours.logvar, theirs.logvar) <= 1e-5, config
    assert far(ours.mode(), theirs.mode()) <= 1e-5, config
    seed = rng.randrange(2**31)
    latents = theirs.sample(torch.Generator().manual_seed(seed))
    assert far(ours.sample(torch.Generator().manual_seed(seed)), latents) <= 1e-5, config
    picture = vae.decode(latents)
    # random weights amplify rounding, each side up to 6e-6 in 120 draws: so only ours is rounded here, not both
    assert far(picture, reference.double().decode(latents.double()).sample) <= 1e-5, config
    assert picture.std() > 0.05  # else the comparison says little


def test_logvar_and_pictures_are_clamped_like_diffusers(rng):
    vae, reference = pair(SMALL)
    for model in (vae, reference):
        model.quant_conv.weight *= 1000
        model.decoder.conv_out.weight *= 1000
    pixels = random_pixels(rng, 4)
    ours, theirs = vae.encode(pixels), reference.encode(pixels).latent_dist
    assert ours.logvar.min() == -30 and ours.logvar.max() == 20
    assert far(ours.logvar, theirs.logvar) <= 1e-2
    picture = vae.decode(torch.randn(1, 4, 1, 5, 6))
    assert picture.min() == -1 and picture.max() == 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_further_from_fp32_than_diffusers_is(dtype):
    """Models of the released depth, and always the same ones: how a single number is rounded is luck."""
    ours = theirs = 0
    for seed in (1, 3):
        torch.manual_seed(seed)
        vae, reference = pair({"base_dim": 8, "z_dim": 4})
        pixels = torch.rand(1, 3, 1, 24, 32) * 2 - 1
        latents = vae.encode(pixels).mean
        picture = vae.decode(latents)
        vae, reference, pixels, half = vae.to(dtype), reference.to(dtype), pixels.to(dtype), latents.to(dtype)
        assert vae.encode(pixels).mean.dtype == vae.decode(half).dtype == dtype
        ours += rms(vae.encode(pixels).mean, latents) / latents.std()
        theirs += rms(reference.encode(pixels).latent_dist.mean, latents) / latents.std()
        ours += rms(vae.decode(half), picture) / picture.std()
        theirs += rms(reference.decode(half).sample, picture) / picture.std()
    assert ours <= theirs


def test_normalize_and_its_inverse():
    vae = AutoencoderKLQwenImage(**SMALL, latents_mean=[1, 2, 3, 4], latents_std=[1, 2, 4, 8])
    latents = torch.randn(2, 4, 1, 3, 5)
    normal = vae.normalize(latents)
    assert torch.allclose(normal[:, 2], (latents[:, 2] - 3) / 4)
    assert far(vae.denormalize(normal), latents) < 1e-6
    assert vae.normalize(latents.bfloat16()).dtype == torch.bfloat16


def test_every_parameter_that_a_picture_uses_gets_a_gradient(rng):
    vae = AutoencoderKLQwenImage(**SMALL)
    posterior = vae.encode(random_pixels(rng, 4))
    (vae.decode(posterior.sample()).square().mean() + posterior.logvar.square().mean()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in vae.parameters())


# ---- the state dict


def shapes(model: torch.nn.Module) -> dict:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def test_names_and_shapes_at_the_released_size():
    with torch.device("meta"):
        vae, reference = AutoencoderKLQwenImage(), Reference()
    assert shapes(vae) == shapes(reference)
    assert len(shapes(vae)) == 194
    assert sum(tensor.numel() for tensor in vae.state_dict().values()) == 126_892_531
    assert sum(parameter.numel() for parameter in vae.parameters()) == 44_599_603  # what one frame reads


def test_names_and_shapes_of_random_sizes(rng):
    config = random_config(rng)
    assert shapes(AutoencoderKLQwenImage(**config)) == shapes(Reference(**config))


@pytest.mark.parametrize("assign", [True, False])
def test_weights_are_the_last_temporal_slice_in_memory_of_their_own(assign):
    weights = Reference(**SMALL).bfloat16().state_dict()
    vae = AutoencoderKLQwenImage(**SMALL)
    vae.load_state_dict(weights, assign=assign)
    convs = [(name, module) for name, module in vae.named_modules() if isinstance(module, CausalConv2d)]
    assert convs
    for name, conv in convs:
        stored = weights[f"{name}.weight"]
        assert torch.equal(conv.weight, stored[:, :, -1].to(conv.weight.dtype))
        assert conv.weight.dtype == (torch.bfloat16 if assign else torch.float32)
        assert conv.weight.is_contiguous()
        assert conv.weight.untyped_storage().nbytes() == conv.weight.nbytes  # the slices beside it can be freed


def test_a_file_saved_here_opens_in_diffusers_and_paints_the_same(tmp_path, rng):
    torch.manual_seed(rng.randrange(2**31))
    vae = AutoencoderKLQwenImage(**SMALL).requires_grad_(False)
    save_file(vae.state_dict(), tmp_path / "vae.safetensors")
    reference = Reference(**SMALL).eval()
    reference.load_state_dict(load_file(tmp_path / "vae.safetensors"), strict=True)
    latents = torch.randn(1, 4, 1, 5, 7)
    with torch.no_grad():
        assert far(vae.decode(latents), reference.decode(latents).sample) <= 1e-5


def test_what_no_frame_reads_is_saved_as_zeros_of_the_models_dtype():
    weights = AutoencoderKLQwenImage(**SMALL).bfloat16().state_dict()
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert not weights["encoder.conv_in.weight"][:, :, :-1].any()
    time_convs = [name for name in weights if "time_conv" in name]
    assert len(time_convs) == 4 and not any(weights[name].any() for name in time_convs)


CHECKED = [
    "encoder.conv_in.weight",
    "encoder.norm_out.gamma",
    "encoder.mid_block.attentions.0.to_qkv.bias",
    "decoder.up_blocks.0.upsamplers.0.time_conv.weight",
    "encoder.down_blocks.3.time_conv.bias",
]


@pytest.mark.parametrize("name", CHECKED)
def test_a_missing_tensor_is_named(name):
    vae = AutoencoderKLQwenImage(**SMALL)
    weights = vae.state_dict()
    del weights[name]
    with pytest.raises(RuntimeError, match=rf"Missing key.*{name}"):
        vae.load_state_dict(weights)


@pytest.mark.parametrize("name", CHECKED)
def test_a_wrong_shape_is_named(name):
    vae = AutoencoderKLQwenImage(**SMALL)
    weights = vae.state_dict()
    weights[name] = weights[name][1:]
    with pytest.raises(RuntimeError, match=f"size mismatch for {name}"):
        vae.load_state_dict(weights)


@pytest.mark.parametrize("name", ["encoder.extra.weight", "decoder.conv_in.time_conv.weight",
                                  "encoder.down_blocks.1.time_conv.weight"])  # fmt: skip
def test_an_unexpected_tensor_is_named(name):
    vae = AutoencoderKLQwenImage(**SMALL)
    with pytest.raises(RuntimeError, match=rf"Unexpected key.*{name}"):
        vae.load_state_dict({**vae.state_dict(), name: torch.zeros(3)})


def test_two_dimensional_weights_are_not_the_released_layout():
    vae = AutoencoderKLQwenImage(**SMALL)
    weights = vae.state_dict()
    weights["encoder.conv_in.weight"] = weights["encoder.conv_in.weight"][:, :, -1]
    with pytest.raises(RuntimeError, match="size mismatch for encoder.conv_in.weight"):
        vae.load_state_dict(weights)


# ---- what is refused


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"base_width": 96}, "base_width"),
        ({"input_channels": 4}, "input_channels = 4, only 3 is computed"),
        ({"attn_scales": [1.0]}, "attn_scales"),
        ({"dropout": 0.1}, "dropout"),
        ({"dim_mult": [1, 2]}, "temperal_downsample"),
    ],
)
def test_configs_that_are_not_supported_say_why(config, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        AutoencoderKLQwenImage(**config)


def test_the_notes_in_a_config_file_are_ignored():
    AutoencoderKLQwenImage(**SMALL, _class_name="AutoencoderKLQwenImage", _diffusers_version="0.34.0.dev0",
                           attn_scales=[], dropout=0.0, input_channels=3)  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 2, 16, 16), "one frame, got .1, 3, 2"),
        ((1, 3, 16, 16), r"\(1, 3, 16, 16\)"),
        ((1, 4, 1, 16, 16), "expected"),
        ((1, 3, 1, 16, 18), "multiples of 4, got 18 x 16"),
    ],
)
def test_pixels_that_are_no_single_picture_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderKLQwenImage(**SMALL).encode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 4, 2, 4, 4), (1, 4, 4, 4), (1, 16, 1, 4, 4)])
def test_latents_that_are_no_single_picture_are_refused(shape):
    with pytest.raises(ValueError):
        AutoencoderKLQwenImage(**SMALL).decode(torch.zeros(shape))


# ---- tiles


def smooth_picture(height: int, width: int) -> torch.Tensor:
    y, x = torch.meshgrid(torch.linspace(0, 3, height), torch.linspace(0, 4, width), indexing="ij")
    return torch.stack([torch.sin(x + y), torch.cos(x * y / 2), torch.sin(2 * x - y)])[None, :, None]


def test_a_picture_within_one_tile_is_the_same_either_way(rng):
    vae, _ = pair(SMALL)
    pixels = random_pixels(rng, 4)
    assert far(vae.encode(pixels, tile=32).mean, vae.encode(pixels).mean) <= 1e-6
    latents = vae.encode(pixels).mean
    assert far(vae.decode(latents, tile=32), vae.decode(latents)) <= 1e-6


def test_tiles_are_nearer_to_the_whole_picture_than_cuts_are():
    """Attention sees one tile at a time, so even the best tiles differ a little from the whole."""
    torch.manual_seed(0)  # no law for every random net: its largest step may lie away from every seam
    vae, _ = pair(SMALL)
    pixels = smooth_picture(84, 108)  # no multiple of the tile
    latents = vae.encode(pixels).mean

    def cut(work, x, side):
        return torch.cat([torch.cat([work(t) for t in row.split(side, 4)], 4) for row in x.split(side, 3)], 3)

    def worst_step(x, whole):  # what the eye sees: a step between neighbours that the whole picture does not have
        return max((x - whole).diff(dim=side).abs().max() for side in (3, 4))

    for whole, tiled, pieces in [
        (latents, vae.encode(pixels, tile=32).mean, cut(lambda x: vae.encode(x).mean, pixels, 32)),
        (vae.decode(latents), vae.decode(latents, tile=32), cut(vae.decode, latents, 8)),
    ]:
        assert rms(tiled, whole) < rms(pieces, whole)
        assert worst_step(tiled, whole) < worst_step(pieces, whole)


@pytest.mark.parametrize("way", ["encode", "decode"])
def test_with_tiles_the_largest_activation_does_not_grow(way):
    vae, _ = pair(SMALL)

    def largest(height: int, width: int) -> int:
        sizes = []
        hooks = [m.register_forward_hook(lambda _m, _i, out: sizes.append(out.numel())) for m in vae.modules()]
        if way == "encode":
            vae.encode(torch.zeros(1, 3, 1, height, width), tile=64)
        else:
            vae.decode(torch.zeros(1, 4, 1, height // 4, width // 4), tile=64)
        for hook in hooks:
            hook.remove()
        return max(sizes)

    assert largest(64, 64) == largest(160, 200)


def test_tiles_pass_gradients_too():
    vae = AutoencoderKLQwenImage(**SMALL)
    vae.decode(vae.encode(smooth_picture(72, 40), tile=32).mean, tile=32).mean().backward()
    assert vae.encoder.conv_in.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("tile", [0, 30, 16, -64])
def test_a_tile_that_is_no_tile_is_refused(tile):
    with pytest.raises(ValueError, match="tile must be"):
        AutoencoderKLQwenImage(**SMALL).encode(torch.zeros(1, 3, 1, 64, 64), tile=tile)

"""Pictures in, pictures out: sizes, modes, resizing, packing; against diffusers where diffusers has an answer."""

import math

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_dimensions as reference_dimensions
from PIL import Image

from minqwen.images import (
    calculate_dimensions,
    image_to_pixels,
    load_image,
    pack_latents,
    pixels_to_image,
    resize_image,
    unpack_latents,
)


def noise_image(width: int, height: int, mode: str = "RGB") -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    levels = torch.randint(0, 256, (height, width, channels), dtype=torch.uint8).numpy()
    return Image.merge(mode, [Image.fromarray(levels[..., n]) for n in range(channels)])


# ---- sizes


@pytest.mark.parametrize(
    ("side", "ratio", "size"),
    [
        (1024, 1, (1024, 1024)), (1024, 4 / 3, (1184, 896)), (1024, 16 / 9, (1376, 768)),
        (1024, 3 / 2, (1248, 832)), (1024, 21 / 9, (1568, 672)),
        (384, 1, (384, 384)), (384, 4 / 3, (448, 320)), (384, 16 / 9, (512, 288)),
        (384, 3 / 2, (480, 320)), (384, 21 / 9, (576, 256)),
    ],
)  # fmt: skip
def test_the_sizes_that_qwen_image_works_at(side, ratio, size):
    assert calculate_dimensions(side * side, ratio) == size


def test_sizes_equal_diffusers_but_for_sides_below_32(rng):
    for _ in range(200):
        area, ratio = rng.randrange(200, 4_000_000), math.exp(rng.uniform(-5, 5))
        expected = tuple(max(32, side) for side in reference_dimensions(area, ratio))
        assert calculate_dimensions(area, ratio) == expected


def test_halves_round_to_even():
    assert calculate_dimensions(48 * 48, 1) == (64, 64)  # 1.5 -> 2
    assert calculate_dimensions(80 * 80, 1) == (64, 64)  # 2.5 -> 2


@pytest.mark.parametrize(("area", "ratio"), [(0, 1), (-5, 1), (math.nan, 1), (math.inf, 1)])
def test_an_area_that_is_no_area_is_refused(area, ratio):
    with pytest.raises(ValueError, match="area"):
        calculate_dimensions(area, ratio)


@pytest.mark.parametrize("ratio", [0, -1, 201, 1 / 201, math.nan, math.inf])
def test_a_ratio_that_is_no_picture_is_refused(ratio):
    with pytest.raises(ValueError, match="width / height"):
        calculate_dimensions(1024 * 1024, ratio)


# ---- every kind of picture becomes upright RGB


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "YCbCr", "HSV", "L"])
def test_colour_modes_convert_as_pil_converts_them(mode):
    image = noise_image(5, 7, mode)
    assert load_image(image).tobytes() == image.convert("RGB").tobytes()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LA", "PA", "La", "RGBA",
                                  "RGBa", "I", "I;16", "I;16L", "I;16B"])  # fmt: skip
def test_every_mode_becomes_rgb_of_the_same_size(mode):
    image = load_image(Image.new(mode, (5, 7)))
    assert (image.mode, image.size) == ("RGB", (5, 7))


@pytest.mark.parametrize("mode", ["F", "LAB"])
def test_modes_without_an_agreed_range_are_refused(mode):
    with pytest.raises(ValueError, match=mode):
        load_image(Image.new(mode, (5, 7)))


def test_transparency_shows_white_and_half_transparency_mixes():
    rgba = Image.new("RGBA", (3, 1), (200, 0, 0, 255))
    rgba.putpixel((1, 0), (200, 0, 0, 0))
    rgba.putpixel((2, 0), (0, 0, 0, 128))
    image = load_image(rgba)
    assert image.getpixel((0, 0)) == (200, 0, 0)
    assert image.getpixel((1, 0)) == (255, 255, 255)
    assert image.getpixel((2, 0)) == pytest.approx((127, 127, 127), abs=1)
    assert load_image(Image.new("LA", (1, 1), (0, 0))).getpixel((0, 0)) == (255, 255, 255)


def test_opaque_rgba_is_untouched():
    image = noise_image(5, 7)
    rgba = image.copy()
    rgba.putalpha(255)
    assert load_image(rgba).tobytes() == image.tobytes()


def test_a_palette_with_a_transparent_colour_shows_white(tmp_path):
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "palette.png", transparency=1)
    image = load_image(tmp_path / "palette.png")
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [(10, 20, 30), (255, 255, 255)]


def test_sixteen_bit_grey_keeps_its_range(tmp_path):
    Image.fromarray(np.array([[0, 257, 32896, 65535]], dtype=np.uint16)).save(tmp_path / "grey.png")
    image = load_image(tmp_path / "grey.png")
    assert [image.getpixel((x, 0)) for x in range(4)] == [(v, v, v) for v in (0, 1, 128, 255)]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_phone_photos_come_upright(tmp_path, orientation):
    upright = Image.new("RGB", (64, 32), "red")
    upright.paste("blue", (0, 0, 32, 16))  # blue in the top left corner alone
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # EXIF value -> the PIL transpose that a camera did
    stored = upright.transpose(Image.Transpose(back[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "photo.png", exif=exif)
    assert load_image(tmp_path / "photo.png").tobytes() == upright.tobytes()


def test_paths_may_be_strings_and_bad_ones_are_told_apart(tmp_path):
    noise_image(5, 7).save(tmp_path / "fine.png")
    assert load_image(str(tmp_path / "fine.png")).size == (5, 7)
    with pytest.raises(FileNotFoundError, match="nowhere.png"):
        load_image(tmp_path / "nowhere.png")
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "half.png").write_bytes((tmp_path / "fine.png").read_bytes()[:100])
    for name in ("text.png", "half.png", "."):
        with pytest.raises(ValueError, match="cannot read"):
            load_image(tmp_path / name)


@pytest.mark.parametrize("wrong", [None, 3, b"bytes", np.zeros((4, 4, 3))])
def test_what_is_no_picture_is_refused_by_type(wrong):
    with pytest.raises(TypeError, match=type(wrong).__name__):
        load_image(wrong)


# ---- pixels


def test_resizing_equals_diffusers(rng):
    image = noise_image(rng.randrange(20, 200), rng.randrange(20, 200))
    width, height = rng.randrange(8, 150), rng.randrange(8, 150)
    expected = VaeImageProcessor().resize(image, height=height, width=width)
    assert resize_image(image, width, height).tobytes() == expected.tobytes()


def test_pixels_equal_diffusers_bit_by_bit():
    image = noise_image(24, 16)
    pixels = image_to_pixels(image)
    assert pixels.shape == (1, 3, 1, 16, 24) and pixels.dtype == torch.float32
    assert torch.equal(pixels[:, :, 0], VaeImageProcessor().preprocess(image))


def test_a_picture_survives_the_way_in_and_out():
    image = noise_image(24, 16)
    assert pixels_to_image(image_to_pixels(image)).tobytes() == image.tobytes()


def test_pictures_out_equal_diffusers_beyond_the_range_too():
    pixels = torch.randn(1, 3, 1, 16, 24)
    expected = VaeImageProcessor().postprocess(pixels[:, :, 0])[0]
    assert pixels_to_image(pixels).tobytes() == expected.tobytes()


def test_bad_pixels_are_refused():
    with pytest.raises(ValueError, match="load_image"):
        image_to_pixels(Image.new("RGBA", (8, 8)))
    with pytest.raises(ValueError, match="shape"):
        pixels_to_image(torch.zeros(2, 3, 1, 8, 8))
    with pytest.raises(ValueError, match="NaN"):
        pixels_to_image(torch.full((1, 3, 1, 8, 8), math.nan))


# ---- packing


def test_packing_equals_diffusers_and_comes_back(rng):
    B, C, h, w = rng.randint(1, 3), rng.choice([4, 16]), 2 * rng.randint(1, 9), 2 * rng.randint(1, 9)
    latents = torch.randn(B, C, 1, h, w)
    packed = pack_latents(latents)
    assert torch.equal(packed, QwenImagePipeline._pack_latents(latents, B, C, h, w))
    assert torch.equal(unpack_latents(packed, h, w), QwenImagePipeline._unpack_latents(packed, h * 8, w * 8, 8))
    assert torch.equal(unpack_latents(packed, h, w), latents)


def test_the_channel_of_a_token_is_c4_dy2_dx():
    latents = torch.arange(16 * 6 * 10).view(1, 16, 1, 6, 10)
    packed = pack_latents(latents)
    for y, x, c, dy, dx in [(0, 0, 0, 0, 1), (2, 4, 15, 1, 0), (1, 3, 7, 1, 1)]:
        assert packed[0, y * 5 + x, c * 4 + dy * 2 + dx] == latents[0, c, 0, 2 * y + dy, 2 * x + dx]


@pytest.mark.parametrize(("h", "w"), [(5, 6), (6, 5), (0, 4)])
def test_odd_sizes_are_refused(h, w):
    with pytest.raises(ValueError, match="even"):
        pack_latents(torch.zeros(1, 16, 1, h, w))
    with pytest.raises(ValueError, match="even"):
        unpack_latents(torch.zeros(1, 9, 64), h, w)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\(1, 16, 4, 4\)"):
        pack_latents(torch.zeros(1, 16, 4, 4))
    with pytest.raises(ValueError, match="pack into"):
        unpack_latents(torch.zeros(1, 9, 64), 4, 4)

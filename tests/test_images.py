"""Pictures in, pictures out: sizes, modes, resizing, packing; against diffusers where diffusers has an answer."""

import io
import math
import re
import struct
import zlib

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


@pytest.mark.parametrize(("area", "ratio"), [(0, 1), (-5, 1), (math.nan, 1), (math.inf, 1), (2**26 + 1, 1)])
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
    (tmp_path / "empty.png").touch()
    for name in ("text.png", "half.png", "empty.png", "."):
        with pytest.raises(ValueError, match=f"cannot read {re.escape(str(tmp_path / name))} as a picture: "):
            load_image(tmp_path / name)
    for name in ("x" * 300 + ".png", "nul\0.png"):  # no system has a file of this name
        with pytest.raises(FileNotFoundError, match="no such picture"):
            load_image(tmp_path / name)


@pytest.mark.parametrize("error", [AssertionError, OSError, SyntaxError, KeyError, struct.error, MemoryError,
                                   RecursionError, zlib.error, EOFError, Image.DecompressionBombError])  # fmt: skip
@pytest.mark.parametrize("words", ["", "first\nsecond"])
def test_whatever_a_decoder_raises_is_one_line_with_the_path(tmp_path, monkeypatch, error, words):
    def broken(*_):
        raise error(words) if words else error

    noise_image(5, 7).save(tmp_path / "fine.png")
    image = Image.open(tmp_path / "fine.png")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load_prepare", broken)
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load_prepare", broken)
    for given in (tmp_path / "fine.png", str(tmp_path / "fine.png"), image):
        with pytest.raises(ValueError, match=r"fine\.png as a picture: .*\w") as caught:
            load_image(given)
        assert "\n" not in str(caught.value)
        assert words.replace("\n", " ") in str(caught.value) or error is KeyError


def test_a_picture_of_too_many_pixels_is_named(tmp_path, monkeypatch):
    noise_image(50, 70).save(tmp_path / "big.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"big\.png as a picture: Image size \(3500 pixels\) exceeds limit"):
        load_image(tmp_path / "big.png")


# ---- metadata cost no picture


def exif(*entries, order="<", upright=6) -> bytes:
    """EXIF with an orientation and other entries: (tag, type, count, four bytes)."""
    entries = [(0x0112, 3, 1, struct.pack(f"{order}HH", upright, 0)), *entries]
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(entries))
    body = b"".join(struct.pack(f"{order}HHI", *entry[:3]) + entry[3] for entry in sorted(entries))
    return head + body + bytes(4)


def segment(marker: int, content: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(content) + 2) + content


def jpeg(*segments: bytes) -> bytes:
    """32 x 16 pixels, red, without JFIF's resolution."""
    out = io.BytesIO()
    Image.new("RGB", (32, 16), "red").save(out, "JPEG")
    plain = out.getvalue()
    return plain[:2] + b"".join(segments) + plain[20:]


def chunk(kind: bytes, content: bytes, crc: int | None = None) -> bytes:
    crc = zlib.crc32(kind + content) if crc is None else crc
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)


def png(rows: list[bytes], width: int, bits: int, colour: int, *chunks: bytes, after: tuple[bytes, ...] = ()) -> bytes:
    """colour: 0 is grey, 2 RGB. chunks, after: what stands before and behind the pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, len(rows), bits, colour, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + pixels + b"".join(after) + chunk(b"IEND", b"")


WRONG_ENTRIES = [
    (0x0100, 2, 4, b"abc\0"), (0x011A, 2, 4, b"72\0\0"), (0x010F, 11, 1, struct.pack("<f", 1.5)),  # of a wrong type
    (0x00FE, 1, 5, b"abc\0"), (0x010E, 2, 2**31, bytes(4)), (0x0110, 12, 2**32 - 1, b"\xff" * 4),  # beyond the end
    (0x0128, 99, 1, bytes(4)), (0x8769, 4, 1, b"\xff" * 4), (0x8825, 2, 3, b"abc\0"), (0, 0, 0, bytes(4)),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Tag data larger", "ignore:.*[Mm]etadata", "ignore:.*EXIF")
@pytest.mark.parametrize("entry", WRONG_ENTRIES)
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_a_wrong_entry_of_exif_costs_neither_picture_nor_orientation(tmp_path, suffix, order, entry):
    path, data = tmp_path / f"photo.{suffix}", exif(entry, order=order)
    if suffix == "jpg":
        path.write_bytes(jpeg(segment(0xE1, b"Exif\0\0" + data)))
    else:
        Image.new("RGB", (32, 16), "red").save(path, exif=b"Exif\0\0" + data)
    for image in (load_image(path), load_image(Image.open(path))):
        assert image.size == (16, 32) and not image.info and not image.getexif()
        assert load_image(image).size == (16, 32)  # and is not turned again


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Tag data larger", "ignore:.*[Mm]etadata", "ignore:.*EXIF")
def test_no_entry_of_exif_costs_the_picture(tmp_path, rng):
    tags = [*range(254, 340), 347, 512, 513, 514, 529, 532, 700, 33432, 34665, 34675, 34853, 36864, 37500, 40965, 50341]
    path = tmp_path / "photo.jpg"
    for _ in range(1500):
        tag = rng.choice([tag for tag in tags if tag != 0x0112])
        entry = (tag, rng.randrange(20), rng.choice([0, 1, 2, 5, 1000, 2**32 - 1]), rng.randbytes(4))
        path.write_bytes(jpeg(segment(0xE1, b"Exif\0\0" + exif(entry))))
        assert load_image(path).size == (16, 32), entry


NO_ORIENTATION = [(2, 1, b"6\0\0\0"), (5, 1, bytes(4)), (3, 9, b"\xff" * 4), (12, 1, bytes(4)), (77, 1, b"6666")]


@pytest.mark.parametrize("entry", NO_ORIENTATION)
def test_an_orientation_that_cannot_be_read_leaves_the_picture_as_it_is(tmp_path, entry):
    data = exif()[:10] + struct.pack("<HHI", 0x0112, *entry[:2]) + entry[2] + bytes(4)
    (tmp_path / "photo.jpg").write_bytes(jpeg(segment(0xE1, b"Exif\0\0" + data)))
    assert load_image(tmp_path / "photo.jpg").size == (32, 16)


SEGMENTS = [
    (0xE0, b"JFIF"), (0xE2, b"ICC_PROFILE\0"), (0xE2, b"MPF\0II*\0"), (0xE2, b"MPF\0" + bytes(40)), (0xEE, b"Adobe"),
    (0xED, b"Photoshop 3.0\x008BIM\3\xed\0\0"), (0xE1, b"http://ns.adobe.com/xap/1.0/\0\xff"), (0xFE, b""),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Image appears to be a malformed MPO")
@pytest.mark.parametrize(("marker", "content"), SEGMENTS)
def test_a_damaged_segment_of_a_jpeg_costs_neither_picture_nor_orientation(tmp_path, marker, content):
    path, note, upright = tmp_path / "photo.jpg", segment(marker, content), segment(0xE1, b"Exif\0\0" + exif())
    for segments, size in (([note], (32, 16)), ([upright, note], (16, 32)), ([note, upright], (16, 32))):
        path.write_bytes(jpeg(*segments))
        image = load_image(path)
        assert image.size == size
        assert image.getpixel((3, 3)) == pytest.approx((255, 0, 0), abs=2)


LARGE = zlib.compress(bytes(2 << 20))
CHUNKS = [
    (b"zTXt", b"workflow\0\0" + LARGE), (b"iTXt", b"workflow\0\1\0\0\0" + LARGE), (b"iCCP", b"profile\0\0" + LARGE),
    (b"zTXt", b"workflow\0\0" + LARGE[:99]), (b"zTXt", b"workflow\0\7"), (b"iCCP", b"profile\0\5"), (b"iCCP", b""),
    (b"tEXt", b""), (b"tEXt", b"exif\0junk"), (b"tEXt", b"Raw profile type exif\0\n\n\nzz"), (b"eXIf", b"junk"),
    (b"gAMA", b""), (b"cHRM", b"1"), (b"pHYs", b"1"), (b"sRGB", b""), (b"acTL", b"1"), (b"fcTL", b"2" * 26),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "content"), CHUNKS)
def test_a_large_or_damaged_chunk_of_a_png_costs_neither_picture_nor_orientation(tmp_path, kind, content):
    path, rows = tmp_path / "drawn.png", [bytes(range(12)), bytes(range(12, 24))]
    plain = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    upright = chunk(b"eXIf", exif())
    for crc in (None, 0):
        note = chunk(kind, content, crc)
        for data in (png(rows, 4, 8, 2, note), png(rows, 4, 8, 2, after=(note,))):
            path.write_bytes(data)
            assert np.array_equal(load_image(path), plain)
        if kind == b"eXIf" or content.startswith((b"exif", b"Raw")):
            continue  # which of the two is right, nobody knows
        for data in (png(rows, 4, 8, 2, upright, note), png(rows, 4, 8, 2, note, after=(upright,))):
            path.write_bytes(data)
            assert np.array_equal(load_image(path), np.rot90(plain, -1))


def test_a_damaged_chunk_of_exif_still_tells_the_orientation(tmp_path):
    (tmp_path / "drawn.png").write_bytes(png([bytes(12)], 4, 8, 2, chunk(b"eXIf", exif(), crc=0)))
    assert load_image(tmp_path / "drawn.png").size == (1, 4)


def test_damaged_pixels_are_refused_with_damaged_metadata_too(tmp_path):
    large = chunk(b"zTXt", b"workflow\0\0" + LARGE)
    for n, data in enumerate([png([bytes(12)], 9, 8, 2, large), png([bytes(12)], 4, 8, 2, large)[:-30]]):
        (tmp_path / f"{n}.png").write_bytes(data)
        with pytest.raises(ValueError, match=rf"cannot read .*{n}\.png"):
            load_image(tmp_path / f"{n}.png")


# ---- a transparent colour, at every number of bits


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_transparent_grey_shows_white_at_every_depth(tmp_path, bits):
    top = 2**bits - 1
    for key in sorted({0, 1, top // 2, top}):
        others = sorted({level for level in (0, 1, top // 3, top // 2, top // 2 + 1, top - 1, top) if level != key})
        row = [key, *others, key]
        packed = "".join(f"{level:0{bits}b}" for level in row)
        packed = packed.ljust(-(-len(packed) // 8) * 8, "0")
        packed = int(packed, 2).to_bytes(len(packed) // 8, "big")
        path = tmp_path / f"{key}.png"
        path.write_bytes(png([packed], len(row), bits, 0, chunk(b"tRNS", struct.pack(">H", key))))
        grey = [255 if level == key else round(level * 255 / top) for level in row]
        for image in (load_image(path), load_image(str(path)), load_image(Image.open(path))):
            assert [pixel for pixel, *_ in np.asarray(image)[0]] == grey


@pytest.mark.parametrize("bits", [8, 16])
def test_a_transparent_colour_shows_white_at_every_depth(tmp_path, bits):
    """Of 16 bits the upper half counts, as it does for what is shown."""
    key = (1, 2, 3) if bits == 8 else (0x0100, 0x0200, 0x03FF)
    colours = [key, (key[0] + 1, *key[1:]), (*key[:2], key[2] - 1), (200, 100, 50), key]
    row = b"".join(level.to_bytes(bits // 8, "big") for colour in colours for level in colour)
    data = png([row], len(colours), bits, 2, chunk(b"tRNS", struct.pack(">HHH", *key)))
    (tmp_path / "key.png").write_bytes(data)
    high = [tuple(level >> (bits - 8) for level in colour) for colour in colours]
    wanted = [(255, 255, 255) if shown == high[0] else shown for shown in high]
    for image in (load_image(tmp_path / "key.png"), load_image(Image.open(tmp_path / "key.png"))):
        assert [image.getpixel((x, 0)) for x in range(len(colours))] == wanted


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

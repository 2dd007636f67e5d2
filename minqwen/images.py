"""Pictures at the border: PIL on the outside, tensors on the inside, and the token layout of latents.

    PIL RGB (W, H)  <->  pixels (1, 3, 1, H, W) float32 in [-1, 1]
    latents (B, 16, 1, h, w)  <->  packed (B, (h/2)(w/2), 64), channel c*4 + dy*2 + dx

The surprise: the two sides of a working size are rounded to 32 separately, so a picture's proportions change
by a few per cent on the way in; that is part of the "zoom" that people see in edits.
Matches diffusers' VaeImageProcessor and its packing (tests/test_images.py). diffusers neither turns
phone photos upright nor takes anything but RGB; `load_image` sees to both. Chapter 06.
"""

import io
import math
import os
import re
import struct
from contextlib import suppress
from numbers import Real
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import ExifTags, Image, ImageOps

STEP = 32  # the VAE's 8 times the packing's 2 would ask for 16; Qwen-Image rounds to 32
MAX_RATIO = 200
UNSEEN = 32 * 32  # the size at which no picture is too long, for what the text encoder does not look at
MAX_AREA = 2**26  # pixels
MAX_SIDE = 2**14
PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")  # what a PNG cannot do without


def calculate_dimensions(area: int, ratio: float) -> tuple[int, int]:
    """The working size (width, height) in pixels near `area` pixels with `ratio` = width / height.

    Multiples of 32, never below 32; halves round to even, as Python's round does. ValueError for an area that
    is not from 1 to 2**26 or a ratio outside 1/200 to 200. Source: diffusers' pipeline_qwenimage_edit.py.
    """
    if not (isinstance(area, Real) and 0 < area <= MAX_AREA):
        raise ValueError(f"area must be a number of pixels up to {MAX_AREA}, got {area!r}")
    if not 1 / MAX_RATIO <= ratio <= MAX_RATIO:
        raise ValueError(f"width / height must be 1/{MAX_RATIO} to {MAX_RATIO}, got {ratio}: crop first")
    width = math.sqrt(area * ratio)
    height = width / ratio
    return max(STEP, round(width / STEP) * STEP), max(STEP, round(height / STEP) * STEP)


def expect_no_strip(width: int, height: int, area: int) -> None:
    """Raise ValueError for a picture that is too long, given or once its sides are multiples of 32 near an area."""
    within = 1 / MAX_RATIO <= width / height <= MAX_RATIO
    sides = calculate_dimensions(area, width / height) if within else (width, height)
    if max(sides) > MAX_RATIO * min(sides):
        raise ValueError(f"{width}x{height} pixels: one side is over {MAX_RATIO} times the other at work, crop first")


def load_image(image: Image.Image | str | Path) -> Image.Image:
    """Any picture as upright RGB: EXIF orientation applied, transparency onto white, 16 bits scaled to 8.

    Takes a path or a PIL image; of an animation, the first frame. The result carries no metadata, and what is wrong
    with them costs no picture. FileNotFoundError for a missing file, TypeError for what is neither a path nor a PIL
    image; ValueError, which names the path, when it cannot be read as a picture, has too many pixels (more than
    2 * Image.MAX_IMAGE_PIXELS) or a mode (F, LAB) that says too little about its colours.
    """
    if not isinstance(image, Image.Image | str | Path):
        raise TypeError(f"expected a PIL image or a path, got {type(image).__name__}")
    path = getattr(image, "filename", "") if isinstance(image, Image.Image) else image
    if image is path and not os.path.exists(path):
        raise FileNotFoundError(f"no such picture: {path}")
    try:
        return _upright_rgb(Image.open(path) if image is path else image)
    except Exception as error:  # decoders raise nearly everything
        with suppress(Exception):
            return _upright_rgb(_open_bare(path))
        why = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"cannot read {path or 'this image'} as a picture: {why}") from error


def _open_bare(path: str | Path) -> Image.Image:
    """A PNG or JPEG file without texts, profiles and thumbnails, of which Pillow found one damaged or too large."""
    data = Path(path).read_bytes() if os.path.getsize(path) < 2**30 else b""
    png = data.startswith(b"\x89PNG")
    at = 8 if png else 2
    bare = bytearray(data[:at])
    while at + 8 < len(data) and data[at : at + 2] != b"\xff\xda":  # from there on all is JPEG's pixels
        name, size = struct.unpack_from(">I4s", data, at)[::-1] if png else struct.unpack_from(">2sH", data, at)
        end = at + size + (12 if png else 2)
        if name in PIXELS or (not png and name < b"\xff\xe0") or (name == b"\xff\xee" and size == 14):
            bare += data[at:end]
        at = end
    image = Image.open(io.BytesIO(bare + data[at:]))
    image.info["xmp"] = data  # the orientation may stand there, or in
    if exif := re.search(rb"(?:Exif\0\0|eXIf)(?=II|MM)", data):
        image.info["exif"] = data[exif.end() :]
    return image


def _upright_rgb(image: Image.Image) -> Image.Image:
    key, tile = image.info.get("transparency"), getattr(image, "tile", None)
    kind = tile[0][3] if tile and key is not None else None  # the file's bits, known until the pixels are read
    if kind in ("L;2", "L;4"):  # Pillow makes 8 bits of the pixels, and not of the colour that is transparent
        image.info["transparency"] = key * (85 if kind == "L;2" else 17)
    if kind == "RGB;16B" or (isinstance(key, tuple) and max(key) > 255):
        image.info["transparency"] = tuple(level >> 8 for level in key)
    image.load()  # a cut-off file shows itself only when its pixels are read
    rgb, orientation = _to_rgb(image), _orientation(image)
    rgb.info.clear()
    rgb.getexif()[ExifTags.Base.Orientation] = orientation
    return ImageOps.exif_transpose(rgb)


def _orientation(image: Image.Image) -> int | None:
    with suppress(Exception):
        if found := image.getexif().get(ExifTags.Base.Orientation):
            return found
        # Pillow does not see what stands behind a damaged entry
        exif = image.info["exif"].removeprefix(b"Exif\0\0")
        order = "<" if exif.startswith(b"II") else ">"
        start = struct.unpack_from(f"{order}I", exif, 4)[0]
        count = struct.unpack_from(f"{order}H", exif, start)[0]
        entries = struct.iter_unpack(f"{order}HHIHxx", exif[start + 2 : start + 2 + 12 * count])
        return next(value for tag, _, _, value in entries if tag == ExifTags.Base.Orientation)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):  # 16-bit grey; convert() would cut off above 255
        grey = np.asarray(image).astype(np.float64).clip(0, 65535) / 257
        grey[grey == image.info.get("transparency", -1) / 257] = 255
        return Image.fromarray(grey.round().astype(np.uint8)).convert("RGB")
    if image.mode in ("F", "LAB"):
        raise ValueError(f"no agreed way from mode {image.mode} to RGB: convert the picture yourself first")
    if image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image  # La goes nowhere but to LA
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def resize_image(image: Image.Image, width: int, height: int) -> Image.Image:
    """The picture at exactly width x height pixels, by Lanczos, whatever that does to its aspect ratio."""
    return image.resize((width, height), resample=Image.Resampling.LANCZOS)


def image_to_pixels(image: Image.Image) -> torch.Tensor:
    """An RGB picture as (1, 3, 1, H, W) float32 in [-1, 1]. ValueError for other modes: see `load_image`."""
    if image.mode != "RGB":
        raise ValueError(f"expected an RGB picture, got mode {image.mode}: pass it through load_image first")
    pixels = torch.from_numpy(np.array(image, dtype=np.float32) / 255)
    return rearrange(2 * pixels - 1, "h w c -> 1 c 1 h w")


def pixels_to_image(pixels: torch.Tensor) -> Image.Image:
    """(1, 3, 1, H, W) in [-1, 1], any dtype or device, as a PIL picture; values outside are cut off.

    ValueError for another shape, and for NaN, which would otherwise come out as black.
    """
    if pixels.ndim != 5 or pixels.shape[:3] != (1, 3, 1):
        raise ValueError(f"expected pixels of shape (1, 3, 1, H, W), got {tuple(pixels.shape)}")
    pixels = rearrange(pixels.detach().float().cpu(), "1 c 1 h w -> h w c")
    if pixels.isnan().any():
        raise ValueError("the pixels hold NaN: the autoencoder's weights do, or they overflow, as in float16")
    levels = ((pixels * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(levels.numpy())


def pack_latents(latents: torch.Tensor) -> torch.Tensor:
    """(B, C, 1, h, w) -> (B, (h/2)(w/2), C*4): each 2x2 patch becomes one token, channel c*4 + dy*2 + dx.

    ValueError when h or w is odd or there is more than one frame.
    """
    if latents.ndim != 5 or latents.shape[2] != 1:
        raise ValueError(f"expected latents of shape (B, C, 1, h, w), got {tuple(latents.shape)}")
    _check_even(*latents.shape[-2:])
    return rearrange(latents, "b c 1 (h dy) (w dx) -> b (h w) (c dy dx)", dy=2, dx=2)


def unpack_latents(packed: torch.Tensor, h: int, w: int) -> torch.Tensor:
    """(B, (h/2)(w/2), C*4) -> (B, C, 1, h, w), where h and w are the latents' own height and width.

    ValueError when h or w is odd or does not fit the number of tokens.
    """
    _check_even(h, w)
    tokens = (h // 2) * (w // 2)
    if packed.ndim != 3 or packed.shape[1] != tokens or packed.shape[2] % 4:
        raise ValueError(f"latents of {h} x {w} pack into (B, {tokens}, C*4), got {tuple(packed.shape)}")
    return rearrange(packed, "b (h w) (c dy dx) -> b c 1 (h dy) (w dx)", h=h // 2, dy=2, dx=2)


def _check_even(h: int, w: int) -> None:
    if h % 2 or w % 2 or h < 2 or w < 2:
        raise ValueError(f"h and w must be even to be packed 2x2, got {h} x {w}: size pictures in 16s")

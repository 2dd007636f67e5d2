"""Figures of chapter 06: pictures, their latents, and pictures again.

Most of them draw the small autoencoder that the lesson trains on crops of a photo; an encoder's first two numbers are
then a point in a plane. Those of the shipped checkpoint ask the autoencoder for its sizes.
"""

import math
from collections.abc import Sequence
from functools import cache
from unittest.mock import patch

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from course import BLUE, GREEN, GREY, ORANGE, RED, ROOT, show, style
from figures.small_model import WISH, given, model
from minqwen.images import image_to_pixels, pixels_to_image
from minqwen.vae import LATENTS_MEAN, LATENTS_STD, AutoencoderKLQwenImage

PHOTO = ROOT / "data/pictures/coffee.png"
STEPS = 4  # of an edit of the scene
Pair = tuple[nn.Module, nn.Module]  # encoder and decoder, as the lesson trains them


# ------------------------------------------------------------------------------------------------------ instruments


def autoencoder() -> AutoencoderKLQwenImage:
    return model().vae


@cache
def large_photo() -> Image.Image:
    return Image.open(PHOTO).convert("RGB")


def photo() -> Tensor:
    """The photo at half its size, (3, height, width), from -1 to 1."""
    picture = large_photo()
    return image_to_pixels(picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.LANCZOS))[0, :, 0]


def decibels(a: Tensor, b: Tensor) -> float:
    """How alike two pictures in [-1, 1] are; 10 more is a tenth of the mean squared difference."""
    return 10 * math.log10(4 / (a - b).square().mean().item())


def shrunk(picture: Image.Image, numbers: float = 16 / 64) -> Image.Image:
    """A picture made smaller until it has this many numbers for each pixel of the original, and enlarged again."""
    scale = math.sqrt(numbers / 3)
    small = picture.resize([round(side * scale) for side in picture.size], Image.Resampling.LANCZOS)
    return small.resize(picture.size, Image.Resampling.BICUBIC)


def through(picture: Image.Image) -> Image.Image:
    """A picture encoded and decoded by the shipped autoencoder."""
    return pixels_to_image(autoencoder().decode(autoencoder().encode(image_to_pixels(picture)).mode()))


def edit(wish: str = WISH, **changes) -> Image.Image:
    """The shipped checkpoint's edit of the scene, with functions of its autoencoder replaced."""
    with patch.multiple(autoencoder(), **changes) if changes else patch.dict({}):
        noise = torch.Generator().manual_seed(0)
        settings = {"num_inference_steps": STEPS, "true_cfg_scale": 1.0, "progress": False, "generator": noise}
        return model().edit(given(), wish, **settings)


def codes(encoder: nn.Module, crops: Tensor) -> Tensor:
    """The first two numbers that an encoder gives for each crop: (crops, 2)."""
    with torch.no_grad():
        return encoder(crops)[:, :2].flatten(1)


def painted(decoder: nn.Module, points: Tensor) -> Tensor:
    """What a decoder paints for points of the plane: (points, 3, 16, 16)."""
    with torch.no_grad():
        return decoder(points[..., None, None]).clamp(-1, 1)


def sheet(crops: Tensor, columns: int) -> np.ndarray:
    """Crops side by side in rows, with a white line between, as one picture in [0, 1]."""
    framed = nn.functional.pad(crops, (0, 1, 0, 1), value=1.0)
    rows = framed.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    return (rows.numpy() + 1) / 2


def bare(*axes) -> None:
    for axis in axes:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)


# ---------------------------------------------------------------------------------------------------------- drawings


def there_and_back() -> None:
    """A picture, the channels of its latents, and what the decoder paints from them."""
    style()
    pixels = image_to_pixels(given())
    z = autoencoder().encode(pixels).mode()
    back = autoencoder().decode(z)
    figure = plt.figure(figsize=(9.2, 3.1))
    left, arrow, middle, other, right = figure.subfigures(1, 5, width_ratios=[1, 0.42, 1.15, 0.42, 1])
    for part, name in ((arrow, "encoder"), (other, "decoder")):
        axis = part.subplots()
        axis.annotate("", xy=(1, 0.5), xytext=(0, 0.5), arrowprops={"arrowstyle": "-|>", "lw": 2, "color": ORANGE})
        axis.text(0.5, 0.56, name, ha="center", fontsize=10, weight="bold")
        axis.axis("off")
    for part, picture, title in ((left, pixels, "a picture"), (right, back, "painted from the latents")):
        axis = part.subplots()
        axis.imshow(pixels_to_image(picture))
        axis.set_title(f"{title}\n{picture.shape[4]} × {picture.shape[3]} pixels of 3 numbers")
        bare(axis)
    middle.suptitle(f"its latents\n{z.shape[4]} × {z.shape[3]} places of {z.shape[1]} numbers", fontsize=10)
    most = math.ceil(z.abs().max().item())
    middle.supxlabel(f"black is −{most}, white is {most}", fontsize=9)
    for axis, channel in zip(middle.subplots(4, -(-z.shape[1] // 4)).flat, z[0, :, 0], strict=True):
        axis.imshow(channel, cmap="gray", vmin=-most, vmax=most)
        bare(axis)
    plt.show()


def shrunk_and_encoded() -> None:
    """A scene and a photo, shrunk to as many numbers as their latents have, and through the shipped autoencoder."""
    picture = large_photo()
    cut = picture.resize((480, 320), Image.Resampling.LANCZOS).crop((190, 40, 382, 232))
    pictures, titles = [], []
    for name, whole in (("a drawing", given()), ("a photo", cut)):
        others = {"shrunk": shrunk(whole), "autoencoder": through(whole)}
        pictures += [whole, *others.values()]
        titles += [name]
        for way, other in others.items():
            titles.append(f"{way}\n{decibels(image_to_pixels(whole), image_to_pixels(other)):.1f} dB")
    show(pictures, titles, size=1.6)


def crops_and_back(picture: Tensor, crops: Tensor, pair: Pair, count: int = 10) -> float:
    """The photo, crops of it, and what the two networks make of them; their decibels, over all crops."""
    encoder, decoder = pair
    again = painted(decoder, codes(encoder, crops))
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 2.4), width_ratios=[1, 2.6])
    axes[0].imshow((picture.permute(1, 2, 0) + 1) / 2)
    axes[0].set_title("the photo")
    axes[1].imshow(sheet(torch.cat([crops[:count], again[:count]]), count))
    axes[1].set_title("above: crops that training did not draw; below: each painted from its two numbers")
    bare(*axes)
    plt.show()
    return decibels(again, crops)


def planes(pairs: dict[str, Pair], crops: Tensor, count: int = 24) -> None:
    """Where encoders put the crops in the plane, where noise lies, and what decoders paint of noise."""
    noise = torch.randn(count, 2, generator=torch.Generator().manual_seed(5))
    if len(pairs) == 1:
        figure, axes = plt.subplots(1, 2, figsize=(9.2, 3.4), width_ratios=[1, 1.5])
        axes = axes[:, None]
    else:
        figure, axes = plt.subplots(2, len(pairs), figsize=(9.2, 4.6), height_ratios=[2.2, 1])
    found = [codes(encoder, crops) for encoder, _ in pairs.values()]
    reach = math.ceil(max(3.0, *(points.abs().max().item() for points in found)))
    colours = (crops.mean((2, 3)).numpy() + 1) / 2
    for column, (name, (_, decoder)) in enumerate(pairs.items()):
        cloud, sheet_ = axes[:, column]
        cloud.scatter(*found[column].T, s=7, c=colours, lw=0)
        cloud.set_facecolor("#dddddd")
        for radius, style_ in ((1, "-"), (2, "--")):
            cloud.add_patch(plt.Circle((0, 0), radius, fill=False, color=BLUE, lw=1.6, ls=style_))
        cloud.set(title=name, xlabel="first number", ylabel="" if column else "second number", aspect="equal")
        ticks = range(-reach // 2 * 2, reach + 1, 2)
        limits = (-reach - 0.5, reach + 0.5)
        cloud.set(xlim=limits, ylim=limits, xticks=ticks, yticks=ticks)
        sheet_.imshow(sheet(painted(decoder, noise), 8))
        sheet_.set_title(f"the decoder, given {count} points of noise")
        bare(sheet_)
    plt.show()


def prices(clouds: Sequence[tuple[float, float]]) -> None:
    """Bells of these means and deviations beside that of the noise, each with its KL term."""
    x = np.linspace(-4, 4, 600)
    figure, axes = plt.subplots(1, len(clouds), figsize=(9.2, 2.5))
    bell = lambda mean, std: np.exp(-(((x - mean) / std) ** 2) / 2) / std / math.sqrt(2 * math.pi)  # noqa: E731
    for axis, (mean, std) in zip(axes, clouds, strict=True):
        price = (mean**2 + std**2 - 1 - 2 * math.log(std)) / 2
        axis.fill_between(x, bell(0, 1), color=BLUE, alpha=0.25, lw=0, label="noise")
        axis.plot(x, bell(mean, std), color=ORANGE, lw=2, label="one crop")
        top = 1 if std > 0.4 else 1.2 * bell(mean, std).max()  # a narrow bell is too high for the common scale
        scale = "" if top == 1 else " (other scale)"
        axis.set(title=f"mean {mean:g}, deviation {std:g}\ncosts {price:.2f}{scale}", xlabel="the number")
        axis.set(ylim=(0, top), xticks=(-4, -2, 0, 2, 4))
    axes[0].set_ylabel("how likely (density)")
    axes[0].legend(loc="upper left")
    plt.show()


def between(pairs: dict[str, Pair], crops: Tensor, a: int, b: int, count: int = 9) -> None:
    """Two crops, and what decoders paint for points on the straight line between them."""
    figure, axes = plt.subplots(len(pairs), 1, figsize=(9.2, 0.25 + 0.85 * len(pairs)))
    for axis, (name, (encoder, decoder)) in zip(axes, pairs.items(), strict=True):
        start, end = codes(encoder, crops[[a, b]])
        share = torch.linspace(0, 1, count)[:, None]
        way = painted(decoder, (1 - share) * start + share * end)
        axis.imshow(sheet(torch.cat([crops[a : a + 1], way, crops[b : b + 1]]), count + 2))
        bare(axis)
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=10)
        axis.axvline(16.5, color="white", lw=7)
        axis.axvline(17 * (count + 1) - 0.5, color="white", lw=7)
    axes[0].set_title("crop A · from A's numbers to B's in equal steps · crop B")
    plt.show()


def architecture(side: int = 1024) -> None:
    """The levels of the released encoder and decoder for a picture: sides and channels."""
    widths, z = (96, 192, 384, 384), 16
    figure, axis = plt.subplots(figsize=(9.4, 3.5))
    sides = [side // 2**level for level in range(4)]
    shapes = [("picture", side, 3)] + [("", s, w) for s, w in zip(sides, widths, strict=True)]
    shapes += [("latents", sides[-1], z)]
    shapes += [("", s, w) for s, w in zip(sides[::-1], widths[::-1], strict=True)] + [("picture", side, 3)]
    for x, (name, s, w) in enumerate(shapes):
        height = 0.55 + 0.55 * math.log2(s / sides[-1])
        colour = {"picture": "#fff3d6", "latents": "#f9dede"}.get(name, "#dceaf7" if x < 5 else "#dcefdc")
        axis.add_patch(plt.Rectangle((x - 0.36, -height / 2), 0.72, height, facecolor=colour, edgecolor=GREY))
        axis.text(x, 0, f"{s}²\n× {w}", ha="center", va="center", fontsize=9)
        if name:
            axis.text(x, 1.3, name, ha="center", fontsize=9, weight="bold")
        if x:
            ends = {"xy": (x - 0.37, 0), "xytext": (x - 0.63, 0)}
            axis.annotate("", **ends, arrowprops={"arrowstyle": "->", "color": GREY})
    for x in (1.5, 2.5, 3.5):
        axis.text(x, -1.32, "half", ha="center", fontsize=9, color=BLUE)
    for x in (6.5, 7.5, 8.5):
        axis.text(x, -1.32, "double", ha="center", fontsize=9, color=GREEN)
    for x in (4, 6):
        axis.text(x, -0.62, "attention", ha="center", fontsize=8, color=RED)
    axis.text(2.5, 1.3, "encoder", ha="center", fontsize=9, weight="bold", color=BLUE)
    axis.text(7.5, 1.3, "decoder", ha="center", fontsize=9, weight="bold", color=GREEN)
    axis.set(xlim=(-0.6, 10.6), ylim=(-1.5, 1.55))
    axis.axis("off")
    plt.show()


def one_frame() -> None:
    """What the three taps of a causal convolution meet, for a frame of a clip and for a picture."""
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 2.6))
    frames = {"frame 2 of a clip": ("frame 0", "frame 1", "frame 2"), "a picture": ("empty", "empty", "the picture")}
    for axis, (title, names) in zip(axes, frames.items(), strict=True):
        for x, name in enumerate(names):
            empty = name == "empty"
            box = plt.Rectangle((x - 0.36, 0), 0.72, 0.8, facecolor="white" if empty else "#dceaf7", edgecolor=GREY)
            box.set_linestyle(":" if empty else "-")
            axis.add_patch(box)
            axis.text(x, 0.4, name, ha="center", va="center", fontsize=10, color=GREY if empty else "black")
            axis.text(x, -0.62, f"tap {x}", ha="center", va="center", fontsize=10, weight="bold")
            style_ = {"arrowstyle": "->", "color": GREY if empty else BLUE, "ls": ":" if empty else "-", "lw": 1.5}
            axis.annotate("", xy=(x, -0.48), xytext=(x, -0.03), arrowprops=style_)
            axis.text(x + 0.08, -0.26, "times 0" if empty else "", va="center", fontsize=10, color=GREY)
        axis.set(xlim=(-0.5, 2.5), ylim=(-0.8, 0.95), title=title)
        axis.axis("off")
    plt.show()


def channels() -> None:
    """Mean and deviation of each channel of the released latents, beside those of noise."""
    figure, axis = plt.subplots(figsize=(9.2, 2.7))
    axis.axhspan(-1, 1, color=BLUE, alpha=0.2, lw=0, label="noise: mean 0, deviation 1")
    axis.errorbar(range(len(LATENTS_MEAN)), LATENTS_MEAN, LATENTS_STD, fmt="o", color=ORANGE, capsize=4, lw=2,
                  label="the released latents")  # fmt: skip
    axis.axhline(0, color=GREY, lw=0.8)
    axis.set(xlabel="channel", ylabel="mean ± deviation", xticks=range(len(LATENTS_MEAN)), ylim=(-4, 6))
    axis.legend(loc="upper right", ncols=2)
    plt.show()


def packing(order: str = "c dy dx") -> None:
    """Two channels of 4x6 latents, and the first numbers of the six tokens that they become."""
    figure, axes = plt.subplots(1, 3, figsize=(9.4, 2.4), width_ratios=[1, 1, 2.3])
    for c in range(2):
        axes[c].imshow(np.arange(24).reshape(4, 6) // 12 * 3 + np.arange(6)[None] // 2, cmap="Pastel1", vmax=8)
        for y, x in np.ndindex(4, 6):
            axes[c].text(x, y, 4 * c + y % 2 * 2 + x % 2, ha="center", va="center", fontsize=9)
        axes[c].set(title=f"channel {c} of the latents")
    axes[2].imshow(np.repeat(np.arange(6)[:, None], 8, axis=1), cmap="Pastel1", vmax=8, aspect="auto")
    for token, n in np.ndindex(6, 8):
        axes[2].text(n, token, n, ha="center", va="center", fontsize=9)
    axes[2].axvline(3.5, color="black", lw=1)
    bare(*axes)
    axes[2].set(title="six tokens, the first 8 of their 64 numbers", yticks=range(6), ylabel="token")
    axes[2].set(xticks=(1.5, 5.5))
    axes[2].set_xticklabels(["from channel 0", "from channel 1"])
    axes[2].tick_params(length=0)
    plt.show()


def scale_forgotten() -> dict[str, dict[str, float]]:
    """An edit as it should be, and with the scale of the latents forgotten; mean differences, in levels of 255."""
    same = lambda latents: latents  # noqa: E731
    broken = {
        "as it should be": {},
        "forgotten for the\ngiven picture": {"normalize": same},
        "forgotten before\nthe decoder": {"denormalize": same},
        "forgotten twice": {"normalize": same, "denormalize": same},
    }
    edits = [edit(**change) for change in broken.values()]
    show([given(), *edits], [f"given, and\n“{WISH}”", *broken], size=1.8)
    levels = np.array([np.asarray(picture, float) for picture in edits])
    off = np.abs(levels - levels[0]).mean(axis=3)
    half = off.shape[1] // 2  # the fox stands at the top left, the tree and the cake below
    parts = {"fox": off[:, :half, :half], "tree and cake": off[:, half:]}
    means = {part: levels_off.mean(axis=(1, 2)).round(1).tolist() for part, levels_off in parts.items()}
    names = [name.replace("\n", " ") for name in broken]
    return {name: {part: mean[n] for part, mean in means.items()} for n, name in enumerate(names) if n}

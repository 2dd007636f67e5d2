"""Figures of chapter 00: a picture, noise, and what lies between them.

What depends on the weights that ship stands in the constants at the top. In the tier full the released model takes the
place of data/tiny, with a photo and a sentence of its own.
"""

import textwrap
from functools import cache

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from course import BLUE, GREEN, GREY, ORANGE, RED, show
from figures.small_model import FULL, WHOLE_SCENE
from figures.small_model import WHOLE_WISH as WISH
from figures.small_model import whole_model as model
from minqwen.images import image_to_pixels
from minqwen.world.scenes import portrait

STEPS = 20  # of an edit
ROUNDING = 32 if FULL else 1  # levels of 255 by which two ways to compute the same picture may differ: bf16, or float32

GALLERY = (
    "remove the cake", "add a rocket at the top right", "make the background pink", "swap the cat and the tree",
)  # fmt: skip
DRAWN = "a panda at the top left and a rocket at the bottom right on a white background"

SHAPES = {  # pictures of 8 by 8 pixels for the small network of the lesson
    "heart": ".##..##. ######## ######## ######## .######. ..####.. ...##... ........",
    "ring": "..####.. .##..##. ##....## ##....## ##....## ##....## .##..##. ..####..",
    "cross": "##....## ###..### .######. ..####.. ..####.. .######. ###..### ##....##",
    "arrow": "...##... ..####.. .######. ######## ...##... ...##... ...##... ...##...",
    "house": "...##... ..####.. .######. ######## .######. .##..##. .##..##. .##..##.",
    "smile": "..####.. .#....#. #.#..#.# #......# #.#..#.# #..##..# .#....#. ..####..",
}
LIGHT = {"words": "#dcefdc", "picture": "#dceaf7", "core": "#f9dede", "loop": "#fff3d6", "plain": "#f2f2f2"}


# ------------------------------------------------------------------------------------------------------ instruments


@cache
def given() -> Image.Image:
    return Image.open(WHOLE_SCENE)


def shapes() -> Tensor:
    """Six pictures, (6, 8, 8): ink is 1, paper is -1."""
    rows = [[[1.0 if dot == "#" else -1.0 for dot in row] for row in shape.split()] for shape in SHAPES.values()]
    return torch.tensor(rows)


def cat() -> Tensor:
    """A picture of 96 by 96 pixels, (3, 96, 96), from -1 to 1."""
    tile = portrait("cat").resize((96, 96), Image.LANCZOS)
    ground = Image.new("RGBA", tile.size, (205, 226, 246, 255))
    ground.alpha_composite(tile)
    return image_to_pixels(ground.convert("RGB"))[0, :, 0]


def apart(a: Image.Image, b: Image.Image) -> int:
    """The largest difference of two pictures, in levels of 255."""
    return np.abs(np.asarray(a, int) - np.asarray(b, int)).max().item()


def clear(network, pictures: Tensor, size: int = 64) -> dict[int, int]:
    """How many walks of 1, 4 and 20 steps from noise end with every pixel on the side where one picture has it."""
    counts, generator = {}, torch.Generator().manual_seed(5)
    start = torch.randn(size, *pictures.shape[1:], generator=generator)
    for steps in (1, 4, 20):
        x = start
        for i in range(steps):
            x = x - network(x, 1 - i / steps) / steps
        same = (x[:, None].sign() == pictures.sign()).flatten(2).all(-1)  # (noises, pictures)
        counts[steps] = same.any(-1).sum().item()
    return counts


# ---------------------------------------------------------------------------------------------------------- drawings


def tidy(axis, title: str = "", size: float = 10) -> None:
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=size)
    axis.spines[:].set_visible(False)


def paint(axis, x: Tensor) -> None:
    """Numbers as a picture: -1 to 1 are black to white in colours, paper to ink in one channel."""
    if x.ndim == 3:
        return axis.imshow(((x.permute(1, 2, 0) + 1) / 2).clamp(0, 1).numpy())
    return axis.imshow(x.detach().numpy(), cmap="gray_r", vmin=-1, vmax=1)


def one_edit() -> None:
    """The given picture, the sentence, the result."""
    settings = {"num_inference_steps": STEPS, "progress": FULL, "generator": torch.Generator().manual_seed(0)}
    show([given(), model().edit(given(), WISH, **settings)], ["given", f"“{WISH}”"], size=3)


def one_answer(pictures: Tensor, answer: Tensor) -> None:
    """Pictures that are all right, and the one answer that is nearest to all of them."""
    figure, axes = plt.subplots(1, len(pictures) + 2, figsize=(9.4, 1.7), width_ratios=[1] * len(pictures) + [0.5, 1])
    for axis, picture, name in zip(axes, pictures, SHAPES, strict=False):
        paint(axis, picture)
        tidy(axis, name)
    paint(axes[-1], answer)
    tidy(axes[-1], "the best\nsingle answer")
    tidy(axes[-2])
    for axis in (*axes[:-2], axes[-1]):
        framed(axis)
    plt.show()


def framed(axis) -> None:
    axis.spines[:].set(visible=True, color=GREY, linewidth=0.8)


def row(pictures: list[Tensor], levels: list[float]) -> None:
    """Pictures side by side, with their noise levels."""
    figure, axes = plt.subplots(1, len(pictures), figsize=(9.4, 2.3))
    for axis, picture, sigma in zip(axes, pictures, levels, strict=True):
        paint(axis, picture)
        tidy(axis, f"σ = {sigma:g}")
    plt.show()


def plane(picture: Tensor, noise: Tensor, mixes: list[Tensor], levels: list[float]) -> None:
    """A picture of two pixels, noise, their mixes and the arrow, in the plane of the two pixels."""
    figure, axis = plt.subplots(figsize=(6.4, 4.0))
    (px, py), (nx, ny) = picture.tolist(), noise.tolist()
    arrow = {"arrowstyle": "-|>", "color": RED, "lw": 2, "shrinkA": 6, "shrinkB": 6, "mutation_scale": 16}
    axis.annotate("", xy=(nx, ny), xytext=(px, py), arrowprops=arrow)
    for (x, y), sigma in zip([mix.tolist() for mix in mixes], levels, strict=True):
        axis.plot(x, y, "o", color={0: BLUE, 1: GREY}.get(sigma, ORANGE), markersize=9, zorder=3)
        axis.annotate(f"σ = {sigma:g}", (x, y), (-8, -15), textcoords="offset points", ha="right", fontsize=9)
    axis.annotate("picture", (px, py), (10, 6), textcoords="offset points", color=BLUE, fontsize=11, weight="bold")
    axis.annotate("noise", (nx, ny), (-6, 10), textcoords="offset points", color="#555555", fontsize=11, weight="bold")
    middle = ((px + nx) / 2 + 0.12, (py + ny) / 2 + 0.14)
    vx, vy = (noise - picture).tolist()
    axis.annotate(f"v = noise − picture\n   = ({vx:.1f}, {vy:.1f})", middle, color=RED, fontsize=11)
    axis.set(xlabel="first pixel", ylabel="second pixel", xlim=(-0.85, 1.25), ylim=(-0.5, 0.9), aspect="equal")
    axis.set_title("every mix lies on the line from the picture to the noise")
    axis.grid(alpha=0.25)
    plt.show()


def shown_and_pointed(rows: list[tuple[float, Tensor, Tensor]]) -> None:
    """For each noise level what the network sees, and the picture to which its arrow points back."""
    figure, axes = plt.subplots(2, len(rows), figsize=(9.4, 3.9))
    for (sigma, x, guess), (upper, lower) in zip(rows, axes.T, strict=True):
        for axis, picture, title in ((upper, x, f"σ = {sigma:g}"), (lower, guess, "")):
            paint(axis, picture)
            tidy(axis, title)
            framed(axis)
    axes[0, 0].set_ylabel("the mix\nx", fontsize=10)
    axes[1, 0].set_ylabel("where its arrow\npoints back to\nx − σ · v", fontsize=10)
    plt.show()


def by_steps(results: dict[int, Tensor]) -> None:
    """What several numbers of steps make of the same noises, one row each."""
    count = len(next(iter(results.values())))
    figure, axes = plt.subplots(len(results), count, figsize=(9.4, 1.2 * len(results)))
    for (steps, pictures), line in zip(results.items(), axes, strict=True):
        for axis, picture in zip(line, pictures, strict=True):
            paint(axis, picture)
            tidy(axis)
            framed(axis)
        label = f"{steps} step{'s' if steps > 1 else ''}"
        line[0].set_ylabel(label, fontsize=10, rotation=0, ha="right", va="center")
    figure.suptitle("each column begins with another noise", fontsize=10)
    plt.show()


def pixels_latents_tokens(latents: Tensor, image: Image.Image) -> None:
    """The given picture, its latents as a picture, and the latents cut into tokens."""
    z = latents[0, :, 0].float().cpu()  # (16, H/8, W/8)
    spread = z.flatten(1).T - z.flatten(1).mean(1)
    axes_of = torch.linalg.svd(spread, full_matrices=False)[2][:3]  # the three directions in which they differ most
    colours = (spread @ axes_of.T).unflatten(0, z.shape[1:])
    colours = (colours / (4 * colours.std()) + 0.5).clamp(0, 1).numpy()
    h, w = z.shape[1] // 2, z.shape[2] // 2
    figure, axes = plt.subplots(1, 3, figsize=(9.4, 3.5))
    axes[0].imshow(image)
    axes[1].imshow(colours)
    axes[2].imshow(colours)
    tidy(axes[0], f"pixels\n{image.width} × {image.height}, 3 numbers each")
    tidy(axes[1], f"latents\n{z.shape[2]} × {z.shape[1]}, {len(z)} numbers each")
    tidy(axes[2], f"tokens\n{w} × {h}, {4 * len(z)} numbers each")
    for k in range(h + 1):
        axes[2].axhline(2 * k - 0.5, color="black", lw=2.5 if h < 12 else 0.5, clip_on=False)
    for k in range(w + 1):
        axes[2].axvline(2 * k - 0.5, color="black", lw=2.5 if w < 12 else 0.5, clip_on=False)
    plt.show()


def beside(results: dict[str, Image.Image]) -> None:
    """Pictures with their names."""
    show(list(results.values()), list(results), size=9.4 / max(4, len(results)))


def on_the_way(rows: list[tuple[float, Tensor, Tensor]], size: tuple[int, int], most: int = 7) -> None:
    """The mix at several noise levels of an edit, and the picture to which the arrow points back there."""
    rows = [rows[k] for k in np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(int)]
    rows = [(sigma, *(model().decode(z, *size) for z in both)) for sigma, *both in rows]
    figure, axes = plt.subplots(2, len(rows), figsize=(9.4, 3.0))
    for (sigma, now, guess), (upper, lower) in zip(rows, axes.T, strict=True):
        upper.imshow(now)
        lower.imshow(guess)
        tidy(upper, f"σ = {sigma:.2f}")
        tidy(lower)
    axes[0, 0].set_ylabel("x", fontsize=11, rotation=0, ha="right", va="center")
    axes[1, 0].set_ylabel("x − σ · v", fontsize=11, rotation=0, ha="right", va="center")
    plt.show()


def the_map(sizes: dict[str, str] | None = None) -> None:
    """What the chapters build. The loop calls the transformer and stands outside of it. sizes: shapes to write in."""
    figure, axis = plt.subplots(figsize=(9.6, 4.9) if sizes is None else (9.6, 5.6))
    sizes = sizes or {}

    def box(x: float, y: float, w: float, h: float, title: str, detail: str, colour: str) -> None:
        detail = "\n".join(line for line in (detail, sizes.get(title, "")) if line)
        axis.add_patch(plt.Rectangle((x, y), w, h, facecolor=LIGHT[colour], edgecolor="#444444", lw=1))
        top = y + h / 2 + 0.13 * (detail.count("\n") + 1 if detail else 0)
        axis.text(x + w / 2, top, title, ha="center", va="center", fontsize=10, weight="bold")
        axis.text(x + w / 2, top - 0.17, detail, ha="center", va="top", fontsize=9, linespacing=1.3)

    def arrow(a: tuple, b: tuple, label: str = "", at: tuple = (0, 0), colour: str = "#444444") -> None:
        axis.annotate("", xy=b, xytext=a, arrowprops={"arrowstyle": "->", "color": colour, "lw": 1.5})
        label = label + ("\n" + sizes[label] if label in sizes else "")
        if label:
            axis.text(*at, label, ha="center", va="bottom", fontsize=9.5, color=colour)

    inside = "for all blocks:\nnoise level (01)\nand positions (02);\n60 blocks (04), in each:\nattention (03)"
    box(0, 4.15, 1.8, 1.0, "words", "", "plain")
    box(0, 2.55, 1.8, 1.0, "given picture", "", "plain")
    box(0, 0.4, 1.8, 1.0, "noise", "", "plain")
    box(2.5, 4.15, 2.2, 1.0, "text encoder", "chapter 07", "words")
    box(2.5, 2.55, 2.2, 1.0, "autoencoder in", "chapter 06", "picture")
    box(6.2, 2.45, 3.2, 2.7, "transformer · 05", inside.replace("60", sizes.get("blocks", "60")), "core")
    box(6.2, 0.2, 3.2, 1.35, "the loop · 09", "x  ←  x + (σ next − σ) · v", "loop")
    box(10.3, 0.4, 2.2, 1.0, "autoencoder out", "chapter 06", "picture")
    box(13.0, 0.4, 1.7, 1.0, "new picture", "", "plain")
    arrow((1.8, 4.65), (2.5, 4.65))
    arrow((1.8, 3.4), (2.6, 4.15))
    arrow((1.8, 3.05), (2.5, 3.05))
    arrow((4.7, 4.65), (6.2, 4.65), "prompt", (5.4, 4.7))
    arrow((4.7, 3.05), (6.2, 3.05), "tokens", (5.4, 3.1))
    arrow((1.8, 0.9), (6.2, 0.9), "x at σ = 1", (4.0, 0.95))
    arrow((7.0, 1.55), (7.0, 2.45), "x, σ", (6.6, 1.9), RED)
    arrow((8.6, 2.45), (8.6, 1.55), "v", (8.85, 1.9), RED)
    axis.text(7.8, 1.9, "each step", ha="center", va="bottom", fontsize=9.5, color=RED)
    arrow((9.4, 0.9), (10.3, 0.9), "x at\nσ = 0", (9.85, 0.95))
    arrow((12.5, 0.9), (13.0, 0.9))
    box(10.3, 4.15, 4.4, 1.0, "computed once · 08", "prompts and latents, for training", "plain")
    box(10.3, 2.7, 4.4, 1.0, "teaching it something · 10", "an adapter in the transformer", "plain")
    arrow((12.5, 4.15), (12.5, 3.7))
    arrow((10.3, 3.2), (9.4, 3.2))
    axis.set(xlim=(-0.1, 14.8), ylim=(0.1, 5.25))
    axis.axis("off")
    plt.show()


def channels(latents: Tensor) -> None:
    """The 16 latent channels of the given picture, blue below zero and red above."""
    figure, axes = plt.subplots(2, 8, figsize=(9.4, 2.9))
    for k, (axis, channel) in enumerate(zip(axes.flat, latents[0, :, 0].float().cpu(), strict=True)):
        drawn = axis.imshow(channel, cmap="coolwarm", vmin=-3, vmax=3)
        tidy(axis, f"channel {k}")
    figure.colorbar(drawn, ax=axes, label="latent", shrink=0.8)
    plt.show()


def parts_of_the_released_model(billions: dict[str, float]) -> None:
    """How many parameters the parts have."""
    figure, axis = plt.subplots(figsize=(8, 2.8))
    colours = [RED] * 3 + [GREEN] * 2 + [BLUE]
    bars = axis.barh(list(billions), list(billions.values()), color=colours)
    axis.bar_label(bars, labels=[f"{n:.2f}" for n in billions.values()], padding=3)
    axis.invert_yaxis()
    axis.set(xlabel="billion parameters")
    axis.set_title("red: the transformer, green: the text encoder, blue: the autoencoder")
    plt.show()


def gallery() -> None:
    """One edit of each kind of sentence that the small model knows, and a drawing from words alone."""
    if FULL:
        return print("Nothing is shown here in the tier full: these are sentences that the small model knows.")
    settings = {"num_inference_steps": STEPS, "progress": False}
    pictures = [model().edit(given(), wish, **settings, generator=torch.Generator().manual_seed(1)) for wish in GALLERY]
    pictures.append(model().generate(DRAWN, **settings, generator=torch.Generator().manual_seed(0)))
    titles = [textwrap.fill(words, 22) for words in (*GALLERY, DRAWN)]
    show(pictures, titles, size=2.2)
    return None

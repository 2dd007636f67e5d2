"""Figures of chapter 01: clocks that tell a network how much noise there is.

Those of the trained model come from data/tiny, a small model of the same architecture. Other time embeddings are put in
the place of its own (`told_by`); how wrong its answers then are is measured on mixtures made here (`error`).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from unittest.mock import patch

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from course import BLUE, GREEN, GREY, ORANGE, RED, ROOT, show
from figures.small_model import WISH, given, model
from minqwen.images import pack_latents

STEPS = 8  # of an edit
NOISES = 4  # so many different noises are mixed into its result
PHOTO, CORNER = ROOT / "data/pictures/coffee.png", (70, 0, 470, 400)
LEVELS = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.8, 0.9, 1.0)

Embed = Callable[[Tensor], Tensor]  # levels (B,) -> temb (B, C)


# ------------------------------------------------------------------------------------------------------ instruments


@contextmanager
def told_by(embed: Embed | None) -> Iterator[None]:
    """Inside, the small model learns the noise level from another function; None leaves it its own."""
    module = model().transformer.time_text_embed
    own = module.forward

    def forward(level: Tensor, like: Tensor) -> Tensor:
        return own(level, like) if embed is None else embed(level.float())

    with patch.object(module, "forward", forward), torch.no_grad():
        yield


def always(level: float) -> Embed:
    """Says the same level whatever the truth is."""
    own = model().transformer.time_text_embed.forward
    return lambda sigma: own(torch.full_like(sigma, level), torch.zeros(1))


def edit(embed: Embed | None = None, steps: int = STEPS) -> Image.Image:
    """The edit, always from the same noise."""
    settings = {"num_inference_steps": steps, "true_cfg_scale": 1.0, "progress": False}
    with told_by(embed):
        return model().edit(given(), WISH, generator=torch.Generator().manual_seed(0), **settings)


@cache
def mixture() -> tuple:
    """What mixtures are made of: the edit's result and the given picture as tokens, noises, and the words."""
    pipe, result = model(), edit(steps=20)
    old = given().convert("RGB").resize(result.size)
    grid = (1, result.height // 16, result.width // 16)
    with torch.inference_mode():
        embeds, mask = pipe.encode_prompt(WISH, [old])
        picture, reference = (pack_latents(pipe.encode_image(p)) for p in (result, old))
    noises = [torch.randn(picture.shape, generator=torch.Generator().manual_seed(i)) for i in range(NOISES)]
    return picture, reference, torch.cat(noises), embeds, mask, [[grid, grid]]


def error(level: float, embed: Embed | None = None) -> float:
    """How wrong the small model's velocity is on mixtures of this level: mean square, as a share of the velocity's."""
    picture, reference, noise, embeds, mask, shapes = mixture()
    B, N = noise.shape[:2]
    tokens = torch.cat([(1 - level) * picture + level * noise, reference.expand(B, -1, -1)], dim=1)
    mask = None if mask is None else mask.expand(B, -1)
    with told_by(embed), torch.inference_mode():
        answer = model().transformer(tokens, embeds.expand(B, -1, -1), mask, torch.full((B,), level), shapes)[:, :N]
    right = noise - picture
    return ((answer - right).square().mean() / right.square().mean()).item()


def change(a: Image.Image, b: Image.Image) -> float:
    """Mean difference of two pictures, in levels of 255."""
    return np.abs(np.asarray(a, float) - np.asarray(b, float)).mean().item()


def zigzag(corners: int = 41, points: int = 401) -> tuple[Tensor, Tensor]:
    """Levels from 0 to 1, and the heights of a line through corners that chance has chosen; each (points,)."""
    heights = torch.rand(corners, generator=torch.Generator().manual_seed(0)) * 2 - 1
    sigma = torch.linspace(0, 1, points)
    place = sigma * (corners - 1)
    left = place.floor().long().clamp(max=corners - 2)
    return sigma, torch.lerp(heights[left], heights[left + 1], place - left)


# ---------------------------------------------------------------------------------------------------------- drawings


def dial(axis, angle: float, colour: str, length: float = 0.86, width: float = 2.4) -> None:
    """A clock with one hand, which starts at the top and turns clockwise."""
    x, y = length * math.sin(angle), length * math.cos(angle)
    if not axis.patches:
        axis.add_patch(plt.Circle((0, 0), 1, facecolor="#f6f6f6", edgecolor=GREY, lw=1))
        axis.plot([0, 0], [0.9, 1], color=GREY, lw=1)
    axis.plot([0, x], [0, y], color=colour, lw=width, solid_capstyle="round")
    axis.plot(x, y, "o", color=colour, ms=width + 2)
    axis.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), xticks=[], yticks=[], aspect="equal")
    axis.spines[:].set_visible(False)


def told_by_clocks(levels: Sequence[float] = (1.0, 0.8, 0.6, 0.4, 0.2, 0.0), turns=(0.5, 1, 2, 4)) -> None:
    """A photo at several noise levels, and below each four clocks that say the level."""
    photo = np.asarray(Image.open(PHOTO).convert("RGB").crop(CORNER).resize((96, 96))) / 127.5 - 1
    noise = np.random.default_rng(0).standard_normal(photo.shape)
    heights = [1.75] + [1] * len(turns)
    _, axes = plt.subplots(len(heights), len(levels), figsize=(9.2, 5.2), height_ratios=heights)
    for column, level in enumerate(levels):
        top = axes[0, column]
        top.imshow(((1 - level) * photo + level * noise).clip(-1, 1) / 2 + 0.5)
        top.set(xticks=[], yticks=[], title=f"noise level {level:g}")
        top.spines[:].set_visible(False)
        for row, speed in enumerate(turns, start=1):
            dial(axes[row, column], 2 * math.pi * speed * level, BLUE)
    for row, speed in enumerate(turns, start=1):
        axes[row, 0].set_ylabel(f"{name_of(speed)}\nfrom 0 to 1", rotation=0, ha="right", va="center", labelpad=6)
    plt.show()


def name_of(turns: float) -> str:
    return "½ turn" if turns == 0.5 else f"{turns:g} turn{'s' if turns > 1 else ''}"


def always_told(*levels: float) -> None:
    """The edit by a model that is told the truth, and by one that is told the same level at every step."""
    pictures = [given(), edit(), *(edit(always(level)) for level in levels)]
    titles = [
        "the given picture",
        f"“{WISH}”,\ntold the truth",
        *(f"told {level:g}\nat every step" for level in levels),
    ]
    show(pictures, titles, size=1.9)


def errors(variants: dict[str, Embed | None], title: str, colours: Sequence[str] = (BLUE, RED, ORANGE, GREEN)) -> dict:
    """How wrong the small model's answers are over the true noise level, for several ways of telling it; drawn."""
    wrong = {name: [error(level, embed) for level in LEVELS] for name, embed in variants.items()}
    figure, axis = plt.subplots(figsize=(8.4, 3.1))
    for (name, values), colour in zip(wrong.items(), colours, strict=False):
        style = "o--" if len(axis.lines) == 3 else "o-"  # the last of four may lie on the first
        axis.plot(LEVELS, values, style, color=colour, ms=4, lw=2, label=name)
    axis.set(xlabel="true noise level σ", ylabel="error of the answer", ylim=(0, None), title=title)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    plt.show()
    return wrong


def curve_and_fit(sigma: Tensor, curve: Tensor, fitted: Tensor, title: str, axis=None) -> None:
    """A curve over the noise level, and what a network has made of it."""
    alone = axis is None
    if alone:
        _, axis = plt.subplots(figsize=(8.4, 2.7))
    axis.plot(sigma, curve, color=GREY, lw=1.2, label="wanted")
    axis.plot(sigma, fitted, color=BLUE, lw=2, label="learned")
    axis.set(xlabel="noise level σ", ylabel="answer", ylim=(-1.25, 1.25), title=title)
    if alone:
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
        plt.show()


def fits(sigma: Tensor, curve: Tensor, fitted: dict[str, Tensor]) -> None:
    """The same curve, learned from several inputs by the same network."""
    _, axes = plt.subplots(2, 2, figsize=(9.4, 4.8), sharex=True, sharey=True)
    for axis, (name, values) in zip(axes.flat, fitted.items(), strict=True):
        curve_and_fit(sigma, curve, values, name, axis)
        axis.label_outer()
    axes[0, 1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    plt.show()


def dials(turns: Sequence[float], sigmas: Sequence[float]) -> None:
    """Clocks of several speeds at two noise levels, with the two numbers that say where a hand points."""
    _, axes = plt.subplots(1, len(turns), figsize=(9.2, 3.2))
    for axis, speed in zip(axes, turns, strict=True):
        lines = []
        for sigma, colour, length, width in zip(sigmas, (BLUE, ORANGE), (0.86, 0.58), (5, 2), strict=True):
            angle = 2 * math.pi * speed * sigma
            dial(axis, angle, colour, length, width)
            cosine, sine = (round(f(angle), 2) + 0.0 for f in (math.cos, math.sin))  # no -0.00
            lines.append((f"σ = {sigma:g}:  {cosine:.2f} and {sine:.2f}", colour))
        for row, (line, colour) in enumerate(lines):
            axis.text(0, -1.35 - 0.28 * row, line, ha="center", color=colour, fontsize=10)
        axis.set(title=name_of(speed), ylim=(-1.75, 1.1))
    plt.show()


def four_of_128(waves_of: Embed, chosen: Sequence[int] = (0, 32, 64, 96)) -> None:
    """Four of the clocks over all noise levels, each as its cosine and its sine."""
    sigma = torch.linspace(0, 1, 4001)
    waves = waves_of(sigma)
    half = waves.shape[1] // 2
    _, axes = plt.subplots(2, 2, figsize=(9.4, 4.2), sharex=True, sharey=True)
    for axis, k in zip(axes.flat, chosen, strict=True):
        turns = 1000 * 10000 ** (-k / half) / (2 * math.pi)
        for column, colour, name in ((k, BLUE, "cosine"), (half + k, ORANGE, "sine")):
            axis.plot(sigma, waves[:, column], color=colour, lw=0.5 if turns > 50 else 1.6, label=name)
        axis.set(xlabel="noise level σ", ylabel="value", title=f"clock {k}: {turns:.3g} turns")
        axis.label_outer()
    axes[0, 1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    plt.show()


def near_and_far(waves_of: Embed, start: float = 0.5, drawn: float = 0.2) -> tuple[Tensor, dict[str, Tensor]]:
    """How far the numbers of higher levels are from those of 0.5: one fast clock, one slow clock, all of them.

    Up to a gap of `drawn` it is drawn; the gaps up to level 1 and the distances are returned.
    """
    gap = torch.linspace(0, 1 - start, 10001)
    near = gap <= drawn
    base, moved = waves_of(torch.tensor([start])), waves_of(start + gap)
    kinds = {"clock 0, the fastest": ([0, 128], RED), "clock 96": ([96, 224], GREY), "all 128": (range(256), BLUE)}
    distances = {}
    figure, axis = plt.subplots(figsize=(8.4, 3))
    for name, (columns, colour) in kinds.items():
        columns = list(columns)
        distances[name] = (moved[:, columns] - base[:, columns]).norm(dim=-1) / (len(columns) / 2) ** 0.5
        axis.plot(gap[near], distances[name][near], color=colour, lw=2.4 if len(columns) > 2 else 1.2, label=name)
    axis.set(xlabel=f"how far the other level lies from σ = {start:g}", ylabel="distance of the\nnumbers, per clock")
    axis.set(ylim=(0, 2.1), title="neighbours should differ, and nothing far away should look the same")
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    plt.show()
    return gap, distances


def way_of_sigma(C: int) -> None:
    """From the noise level to temb, with shapes."""
    boxes = [
        ("σ", "(B,)", "#ffffff"), ("angles", "1000 · σ · speed\n(B, 128)", "#fff3d6"),
        ("cosines, sines", "(B, 256)", "#fff3d6"), ("linear_1", "(B, C)", "#f9dede"), ("SiLU", "(B, C)", "#fff3d6"),
        ("linear_2", "(B, C)", "#f9dede"), ("temb", f"(B, C)\nhere C = {C}", "#ffffff"),
    ]  # fmt: skip
    figure, axis = plt.subplots(figsize=(9.4, 1.9))
    for x, (name, detail, colour) in enumerate(boxes):
        axis.add_patch(plt.Rectangle((x - 0.43, -0.42), 0.86, 0.84, facecolor=colour, edgecolor=GREY))
        axis.text(x, 0.17, name, ha="center", va="center", fontsize=9, weight="bold")
        axis.text(x, -0.14, detail, ha="center", va="center", fontsize=8)
        if x:
            axis.annotate("", xy=(x - 0.43, 0), xytext=(x - 0.57, 0), arrowprops={"arrowstyle": "->", "color": GREY})
    fixed = [(0.57, 2.43, "fixed: nothing is learned"), (3.57, 4.43, "fixed")]
    for left, right, name in [*fixed, (2.57, 3.43, "learned"), (4.57, 5.43, "learned")]:
        axis.plot([left, right], [0.62, 0.62], color=GREY, lw=1)
        axis.text((left + right) / 2, 0.72, name, ha="center", fontsize=9, color=GREY)
    axis.set(xlim=(-0.5, 6.5), ylim=(-0.55, 0.95))
    axis.axis("off")
    plt.show()


def temb_over_sigma(waves_of: Embed, read: Embed, count: int = 4) -> None:
    """Some numbers of temb over the noise levels that a walk passes: those that move most, and unlike each other.

    On the right the fast half of the clocks stands at its mean. Each block puts temb through a SiLU first, which makes
    nothing of its large negative numbers; so it is drawn here.
    """
    sigma = torch.linspace(0.02, 1, 400)
    waves, still = waves_of(sigma), waves_of(torch.linspace(0, 1, 1001)).mean(0)
    fast = torch.arange(len(still) // 2).repeat(2) < len(still) // 4
    with torch.no_grad():
        whole, slow = (F.silu(read(each)) for each in (waves, torch.where(fast, still, waves)))
    moved, calm = whole - whole.mean(0), slow - slow.mean(0)
    size = moved.norm(dim=0)
    alike = (moved.T @ moved / (size[:, None] * size)).abs()
    chosen = [size.argmax().item()]
    while len(chosen) < count:  # the one least like those that are chosen already
        unlike = alike[:, chosen].amax(1).masked_fill(size < size.quantile(0.7), 2)
        chosen.append(unlike.argmin().item())
    figure, axes = plt.subplots(1, 2, figsize=(9.4, 3.3), sharey=True)
    for axis, values, title in zip(axes, (moved, calm), ("all clocks run", "the fast half stands"), strict=True):
        axis.plot(sigma, (values / moved.abs().amax(0))[:, chosen], lw=1.6)
        axis.set(xlabel="noise level σ", title=title)
    axes[0].set_ylabel("value, less its mean")
    figure.suptitle(f"{count} of the {len(size)} numbers of temb after the SiLU, scaled to at most 1 on the left")
    plt.show()


def drawn_by(variants: dict[str, Embed | None], level: float = 0.35) -> dict[str, float]:
    """The edit by several time embeddings, each with the error of the first answers below; the errors."""
    wrong = {name: error(level, embed) for name, embed in variants.items()}
    show([edit(embed) for embed in variants.values()],
         [f"{name}\nerror at σ = {level:g}: {percent(wrong[name])}" for name in variants], size=2.2)  # fmt: skip
    return wrong


def percent(share: float) -> str:
    return f"{share:.1%}" if share < 0.1 else f"{share:.0%}" if share < 10 else "over 1000%"

"""Figures of chapter 08: what the frozen networks say, computed once and kept.

Sizes are those of the released files. What is measured is measured on data/tiny, a small model of the same
architecture, with a data set that is drawn here; what depends on its world stands in the constants below.
"""

import copy
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from course import BLUE, GREEN, GREY, RED, TINY
from minqwen import precompute as library
from minqwen.finetune import flow_loss, make_batch
from minqwen.images import load_image
from minqwen.pipeline import QwenImagePipeline
from minqwen.vision import smart_resize
from minqwen.world import WORLD, sample_edit

COUNT, SEED = 6, 73  # of the data set
STORED = {"transformer": 40.86, "text encoder": 16.58, "VAE": 0.25}  # GB, the released files, bf16
# 10**12 operations of a step that trains all weights of the released transformer, forward and backward, counted in the
# appendix: an edit at 1024² pixels
OPERATIONS = {"VAE": 5.7, "text encoder": 27.6, "transformer": 594.4}
COLOURS = {"transformer": RED, "text encoder": GREEN, "VAE": BLUE}
LIGHT = {"transformer": "#f9dede", "text encoder": "#dcefdc", "VAE": "#dceaf7", "rest": "#f0f0f0"}
SIDE, CAPTION, WIDTH = 1024, 20, 3584  # pixels; tokens of a caption; numbers in a vector of the released encoder


# ------------------------------------------------------------------------------------------------------ instruments


@cache
def model() -> QwenImagePipeline:
    """The small trained model, not frozen: a step of its training is timed."""
    return QwenImagePipeline.from_pretrained(TINY, device="cpu", dtype=torch.float32)


_KEPT = []  # folders live as long as the kernel


def empty_folder() -> Path:
    """A new one, which is deleted in the end."""
    _KEPT.append(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
    return Path(_KEPT[-1].name)


def a_data_set(count: int = COUNT, seed: int = SEED, place: Path | None = None) -> Path:
    """images/1.png with images/1.txt beside it, control/1.png, and so on; always the same, short ones first."""
    place, rng, english = place or empty_folder(), np.random.default_rng(seed), replace(WORLD, chinese=0)
    edits = sorted((sample_edit(rng, world=english) for _ in range(count)), key=lambda edit: len(edit.instruction))
    for part in ("images", "control"):
        (place / part).mkdir(parents=True)
    for n, edit in enumerate(edits, start=1):
        edit.target.save(place / f"images/{n}.png")
        edit.source.save(place / f"control/{n}.png")
        (place / f"images/{n}.txt").write_text(edit.instruction + "\n", encoding="utf-8")
    return place


def renamed(paths: list[Path]) -> list[Path]:
    """Copies with other names."""
    place = empty_folder()
    return [Path(shutil.copy(path, place / f"another name {n}.png")) for n, path in enumerate(paths)]


def one_pixel(paths: list[Path]) -> list[Path]:
    """The same pictures, but in the last one a pixel has another colour."""
    *others, last = paths
    picture, new = Image.open(last).convert("RGB"), empty_folder() / last.name
    picture.putpixel((0, 0), tuple(255 - c for c in picture.getpixel((0, 0))))
    picture.save(new)
    return [*others, new]


def retrained(pipe: QwenImagePipeline, part: str) -> QwenImagePipeline:
    """The same pipeline with one number changed in one part, "text_encoder", "transformer" or "vae.decoder"."""
    other, (name, *inner) = copy.copy(pipe), part.split(".")
    setattr(other, name, copy.deepcopy(getattr(pipe, name)))
    module = getattr(other, name)
    for step in inner:
        module = getattr(module, step)
    with torch.no_grad():
        list(module.parameters())[-1].view(-1)[0] += 0.01
    return other


@contextmanager
def another_encoder(pipe: QwenImagePipeline) -> Iterator[None]:
    """While it is open, the pipeline's text encoder is another one: all its last weights are a tenth larger."""
    weight = pipe.text_encoder.model.norm.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1.1)
    try:
        yield
    finally:
        with torch.no_grad():
            weight.copy_(before)


def fastest(works: dict[str, Callable], rounds: int = 8) -> dict[str, float]:
    """Milliseconds of the quickest call of each, after one that is not timed; the rounds take turns."""
    taken = {name: [] for name in works}
    for _ in range(rounds + 1):
        for name, work in works.items():
            begun = time.perf_counter()
            work()
            taken[name].append(1000 * (time.perf_counter() - begun))
    return {name: min(found[1:]) for name, found in taken.items()}


def a_step(pipe: QwenImagePipeline, data: Path, name: str) -> dict[str, Callable]:
    """The parts of one training step on one sample."""
    target, given = (load_image(data / part / f"{name}.png") for part in ("images", "control"))
    caption = (data / f"images/{name}.txt").read_text(encoding="utf-8").strip()
    latents, control = (pipe.encode_image(picture).clone() for picture in (target, given))
    embeds, empty = (pipe.encode_prompt(words, given)[0].clone() for words in (caption, " "))
    batch = make_batch([library.Sample(name, latents, (control,), embeds, empty)])
    noise, sigma = torch.randn(batch.target.shape, generator=torch.Generator().manual_seed(0)), torch.tensor([0.7])

    def learn():
        pipe.transformer.zero_grad()
        flow_loss(pipe.transformer, batch, sigma, noise).mean().backward()

    pictures = lambda: (pipe.encode_image(target), pipe.encode_image(given))  # noqa: E731
    return {"VAE": pictures, "text encoder": lambda: pipe.encode_prompt(caption, given), "transformer": learn}


# ---------------------------------------------------------------------------------------------------------- drawings


def box(axis, x, y, width, height, text="", colour="white", size=9, **more) -> None:
    edge = {"edgecolor": more.pop("edge", GREY), "lw": more.pop("lw", 0.8), "ls": more.pop("ls", "-")}
    axis.add_patch(plt.Rectangle((x, y), width, height, facecolor=colour, **edge))
    axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, **more)


def arrow(axis, start, end, **more) -> None:
    axis.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "->", "color": "#555555", "lw": 1.3} | more)


def three_networks() -> None:
    """Text encoder, VAE and transformer, their areas in proportion to their files, and what passes between them."""
    figure, axis = plt.subplots(figsize=(9.8, 4.6))
    scale = 0.088  # area of a GB in the drawing's units
    tall = {"transformer": 2.3, "text encoder": 1.15, "VAE": 0.15}
    wide = {name: size * scale / tall[name] for name, size in STORED.items()}
    box(axis, -0.15, -0.45, 4.85, 4.35, "", "#f7f9fc", edge=BLUE, ls="--", lw=1.2)
    axis.text(-0.02, 3.68, "frozen: the same answer in every epoch", fontsize=10, color=BLUE, va="center")
    x, y = 2.0, 2.1
    box(axis, x, y, wide["text encoder"], tall["text encoder"], "text\nencoder\n16.6 GB", LIGHT["text encoder"], 10)
    axis.text(0.1, 2.68, "caption,\ngiven picture", fontsize=9.5, va="center")
    arrow(axis, (1.2, 2.68), (x - 0.05, 2.68))
    axis.text(3.5, 2.68, "vectors", fontsize=9.5, va="center")
    middle = 0.8
    box(axis, 2.55, middle - 0.075, wide["VAE"], tall["VAE"], "", LIGHT["VAE"])
    axis.text(2.6, middle + 0.2, "VAE, 0.25 GB", ha="center", fontsize=9.5)
    axis.text(0.1, middle, "given picture,\ntarget picture", fontsize=9.5, va="center")
    arrow(axis, (1.3, middle), (2.48, middle))
    axis.text(3.5, middle, "latents", fontsize=9.5, va="center")
    left, low = 5.7, 0.55
    name = "transformer\n40.9 GB"
    box(axis, left, low, wide["transformer"], tall["transformer"], name, LIGHT["transformer"], 11, edge=RED, lw=2)
    axis.text(left, low + tall["transformer"] + 0.2, "trained: changes after every step", fontsize=10, color=RED)
    for start, end in (((4.2, 2.68), 2.3), ((4.2, middle), 1.2)):
        arrow(axis, start, (left - 0.05, end))
    axis.text(left + wide["transformer"] / 2, -0.25, "noise, new in every step", ha="center", fontsize=9.5)
    arrow(axis, (left + wide["transformer"] / 2, -0.05), (left + wide["transformer"] / 2, low - 0.05))
    right = left + wide["transformer"]
    arrow(axis, (right + 0.05, 1.7), (right + 0.5, 1.7))
    axis.text(right + 0.57, 1.7, "velocity,\nits error,\na small change\nof the weights", fontsize=9.5, va="center")
    axis.set(xlim=(-0.25, right + 1.75), ylim=(-0.6, 4))
    axis.set_aspect("equal")
    axis.axis("off")
    plt.show()


def memory_over_time() -> None:
    """Which weights have to be loaded when, at the released size."""
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.2), sharey=True)
    parts = ("transformer", "text encoder", "VAE")
    for axis, phases, title in (
        (axes[0], [((0, 10), parts, "training")], "asked in every step"),
        (axes[1], [((0, 2), parts[1:], "before"), ((2, 10), parts[:1], "training")], "asked once, before training"),
    ):
        for (begin, end), loaded, label in phases:
            height = 0.0
            for part in loaded:
                size = STORED[part]
                axis.fill_between([begin, end], height, height + size, color=LIGHT[part], ec=COLOURS[part], lw=1.2)
                if size > 1:
                    words = f"{part}\n{size:.1f} GB".replace("text ", "text\n" if end < 5 else "text ")
                    axis.text((begin + end) / 2, height + size / 2, words, ha="center", va="center", fontsize=9.5)
                height += size
            axis.text((begin + end) / 2, height + 1.5, f"{height:.1f} GB", ha="center", fontsize=10.5, weight="bold")
            axis.text((begin + end) / 2, -3.5, label, ha="center", va="center", fontsize=9.5)
        axis.set(xticks=[], ylim=(-6, 66), xlim=(0, 10), title=title)
        axis.set_xlabel("time, not to scale")
        axis.axhline(0, color=GREY, lw=0.8)
    axes[0].set(ylabel="GB of weights", yticks=range(0, 61, 20))
    plt.show()


def timeline(steps: int = 4) -> float:
    """Training steps one behind the other, with and without the frozen networks; how many times as fast."""
    took = fastest(a_step(model(), a_data_set(1), "1"))
    figure, axes = plt.subplots(1, 2, figsize=(9.8, 2.5), sharey=True)
    for axis, spans in zip(axes, (took, OPERATIONS), strict=True):
        for row, asked in ((1, ("VAE", "text encoder", "transformer")), (0, ("transformer",))):
            begin = 0.0
            for step in range(steps):
                for part in asked:
                    label = part if row and not step else None
                    axis.barh(row, spans[part], 0.6, left=begin, color=COLOURS[part], edgecolor="white", label=label)
                    begin += spans[part]
    axes[0].set(yticks=[0, 1], yticklabels=["kept", "asked in\nevery step"])
    axes[0].set(xlabel="milliseconds", title=f"the small model, measured: {steps} steps")
    axes[1].set(xlabel="10¹² operations", title=f"the released model, counted: {steps} steps")
    figure.legend(*axes[0].get_legend_handles_labels(), ncols=3, loc="outside lower center", fontsize=9)
    plt.show()
    return sum(took.values()) / took["transformer"]


def bytes_of_a_sample() -> None:
    """The four tensors of a sample at the released size, as squares whose area is their bytes."""
    latents, (rows, columns) = 16 * (SIDE // 8) ** 2 * 2, smart_resize(SIDE, SIDE)
    seen = (rows // 28) * (columns // 28) + 2 + 5
    parts = [("target's\nlatents", latents, BLUE), ("given picture's\nlatents", latents, BLUE)]
    parts += [(f"vectors of a caption\nof {CAPTION} tokens", (seen + CAPTION) * WIDTH * 2, GREEN)]
    parts += [("vectors of the\nempty prompt", (seen + 1) * WIDTH * 2, GREEN)]
    figure, axis = plt.subplots(figsize=(8.6, 2.9))
    x = 0.0
    for name, size, colour in parts:
        side = (size / 1e6) ** 0.5
        slot = max(side, 2.2)
        axis.add_patch(plt.Rectangle((x + (slot - side) / 2, 0), side, side, facecolor=colour, alpha=0.75))
        axis.text(x + slot / 2, side + 0.15, f"{size / 1e6:.1f} MB", ha="center", fontsize=10, weight="bold")
        axis.text(x + slot / 2, -0.2, name, ha="center", va="top", fontsize=9)
        x += slot + 0.35
    axis.set(xlim=(-0.1, x), ylim=(-1.1, 3.7))
    axis.set_aspect("equal")
    axis.axis("off")
    plt.show()


def two_folders(data: Path, captions: dict[str, str], count: int = 3) -> None:
    """The first samples of a data set: given picture, caption, target picture, with the names of their files."""
    names = list(captions)[:count]
    figure, axes = plt.subplots(count, 3, figsize=(9, 1.75 * count), width_ratios=[1, 2.2, 1])
    for row, name in zip(axes, names, strict=True):
        for axis, part in ((row[0], "control"), (row[2], "images")):
            axis.imshow(Image.open(data / part / f"{name}.png"))
            axis.set_title(f"{part}/{name}.png", fontsize=9)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        row[1].axis("off")
        row[1].text(0.5, 0.95, f"images/{name}.txt", ha="center", fontsize=9)
        words = captions[name].split()
        half = len(words) // 2 if len(captions[name]) > 34 else len(words)
        text = f"“{' '.join(words[:half])}\n{' '.join(words[half:])}".strip() + "”"
        row[1].text(0.5, 0.55, text, ha="center", va="center", fontsize=11)
        row[1].annotate("", (0.97, 0.2), (0.03, 0.2), arrowprops={"arrowstyle": "->", "color": GREY, "lw": 1.5})
    plt.show()


def draw_or_mean(mean: float, deviation: float, draws: Tensor) -> None:
    """One latent number: its cloud, and how far the average over the epochs is from the mean."""
    figure, axes = plt.subplots(1, 2, figsize=(9.4, 2.8))
    x = np.linspace(mean - 4 * deviation, mean + 4 * deviation, 300)
    axes[0].fill_between(x, np.exp(-0.5 * ((x - mean) / deviation) ** 2), color=BLUE, alpha=0.25, lw=0)
    axes[0].axvline(mean, color=BLUE, lw=2, label="the mean")
    axes[0].axvline(float(draws[0]), color=RED, lw=2, label="the first draw")
    axes[0].plot(draws[:20], np.full(len(draws[:20]), 0.03), "|", color="#444444", ms=12, label="more draws")
    axes[0].set(
        xlabel="one number of the latents",
        ylabel="how likely",
        yticks=[],
        title="what the VAE says of one number",
        ylim=(0, 1.45),
    )
    axes[0].legend(loc="upper left")
    epochs = torch.arange(1, len(draws) + 1)
    axes[1].plot(epochs, (draws.cumsum(0) / epochs - mean).abs(), color=GREY, label="a new draw in each epoch")
    axes[1].plot(epochs, (draws[0] - mean).abs().expand(len(draws)), color=RED, label="one draw, kept")
    axes[1].plot(epochs, torch.zeros(len(draws)), color=BLUE, label="the mean, kept")
    axes[1].set(xlabel="epochs", ylabel="distance from the mean", title="the average over all epochs so far")
    highest = max((draws[:9].cumsum(0) / epochs[:9] - mean).abs().max(), deviation)
    axes[1].set_ylim(-0.03 * deviation, 1.9 * highest)
    axes[1].legend(loc="upper right")
    plt.show()


def _tiles(picture: Image.Image) -> list[Image.Image]:
    """The parts of a picture that become one token each."""
    rows, columns = smart_resize(picture.height, picture.width)
    large = picture.resize((columns, rows))
    return [large.crop((x, y, x + 28, y + 28)) for y in range(0, rows, 28) for x in range(0, columns, 28)]


def _pieces(words: str) -> list[str]:
    """The tokens of a prompt that stand behind the picture: its own and the template's last."""
    ids = model().tokenizer.encode(words).ids
    texts = [model().tokenizer.decode([i], skip_special_tokens=False) for i in ids]
    return [text.replace(" ", "␣") for text in texts]


def _a_prompt(axis, y: float, picture: Image.Image | None, words: str, end: float | None = None) -> float:
    """One row of tokens: the picture's, as tiles between two marks, then the words, then five of the template."""
    x = 0.0
    if picture is not None:
        box(axis, x, y, 0.5, 0.8, "‹", LIGHT["rest"], 11)
        x += 0.55
        for tile in _tiles(picture):
            axis.imshow(tile, extent=(x, x + 0.8, y, y + 0.8), aspect="auto", zorder=2)
            axis.add_patch(plt.Rectangle((x, y), 0.8, 0.8, fill=False, edgecolor=GREY, lw=0.8, zorder=3))
            x += 0.85
        box(axis, x, y, 0.5, 0.8, "›", LIGHT["rest"], 11)
        x += 0.55
    for piece in _pieces(words):
        width = 0.17 * max(len(piece), 2) + 0.15
        box(axis, x, y, width, 0.8, piece, LIGHT["text encoder"], 8.5)
        x += width + 0.05
    box(axis, x, y, 1.5, 0.8, "end (5)", LIGHT["rest"], 8.5)
    return x + 1.5


def two_prompts(picture: Image.Image, words: str, caption: Tensor, empty: Tensor) -> int:
    """The tokens of a caption and of the empty prompt with the same picture; how many of their vectors agree."""
    apart = (caption[0, : empty.shape[1]] - empty[0]).abs().amax(-1)
    equal = int((apart > 1e-4).nonzero()[0])
    figure, axis = plt.subplots(figsize=(9.6, 2.7))
    ends = [_a_prompt(axis, 2.1, picture, words), _a_prompt(axis, 0, picture, " ")]
    split = 2 * 0.55 + 0.85 * len(_tiles(picture)) - 0.02
    axis.plot([0, split], [1.75, 1.75], color=BLUE, lw=2)
    axis.text(split / 2, 1.6, "the same vectors", ha="center", va="top", fontsize=9.5, color=BLUE)
    axis.plot([split + 0.07, max(ends)], [1.75, 1.75], color=RED, lw=2)
    axis.text((split + max(ends)) / 2, 1.6, "other vectors", ha="center", va="top", fontsize=9.5, color=RED)
    for y, label in ((2.5, "with its caption"), (0.4, "empty prompt")):
        axis.text(-0.2, y, label, ha="right", va="center", fontsize=9.5)
    axis.set(xlim=(-2.7, max(ends) + 0.1), ylim=(-0.1, 3.0))
    axis.set_aspect("equal")
    axis.axis("off")
    plt.show()
    return equal


def empty_prompts(pictures: list[Image.Image]) -> None:
    """The empty prompt of a drawing, and of edits of some pictures."""
    rows = [None, *pictures]
    figure, axis = plt.subplots(figsize=(8.6, 0.95 * len(rows)))
    ends = [_a_prompt(axis, -1.15 * n, picture, " ") for n, picture in enumerate(rows)]
    for n in range(len(rows)):
        label = f"an edit of picture {n}" if n else "a drawing"
        axis.text(-0.25, 0.4 - 1.15 * n, label, ha="right", va="center", fontsize=9.5)
    axis.set(xlim=(-2.9, max(ends) + 0.1), ylim=(-1.15 * len(rows) + 1.05, 0.9))
    axis.set_aspect("equal")
    axis.axis("off")
    plt.show()


def toy_hashes(words: list[str]) -> None:
    """The number that is carried through the letters of each word."""
    figure, axis = plt.subplots(figsize=(8.2, 0.95 * len(words)))
    for row, word in enumerate(words):
        y, number = -1.15 * row, 0
        for n, letter in enumerate(word):
            value = ord(letter) - 96
            x = 2.4 * n
            box(axis, x, y, 0.62, 0.7, number, "white", 11)
            new = (3 * number + value) % 100
            arrow(axis, (x + 0.67, y + 0.35), (x + 2.35, y + 0.35))
            axis.text(x + 1.5, y + 0.43, f"{letter} = {value}", ha="center", fontsize=10, color=GREEN)
            axis.text(x + 1.5, y + 0.22, f"3·{number} + {value}", ha="center", va="top", fontsize=9)
            number = new
        box(axis, 2.4 * len(word), y, 0.75, 0.7, number, "#fff3d6", 12, weight="bold")
    axis.set(xlim=(-0.1, 2.4 * max(map(len, words)) + 0.9), ylim=(-1.15 * len(words) + 1.0, 0.85))
    axis.set_aspect("equal")
    axis.axis("off")
    plt.show()


def names_after_changes(names: dict[str, str]) -> None:
    """What was changed, and the first letters of the name that follows; the first row is the unchanged one."""
    first, figure = next(iter(names.values())), plt.figure(figsize=(8.4, 0.36 * len(names) + 0.5))
    axis = figure.add_subplot()
    for row, (change, name) in enumerate(names.items()):
        same = name == first
        axis.text(0, -row, change, fontsize=10, va="center")
        mono = {"family": "monospace", "fontsize": 10, "va": "center"}
        axis.text(4.9, -row, f"{name[:16]}…", color=BLUE if same else RED, **mono)
        word = "" if row == 0 else "the same name" if same else "another name: computed anew"
        axis.text(7.6, -row, word, fontsize=10, va="center", color=BLUE if same else RED)
    axis.set(xlim=(-0.1, 10.8), ylim=(-len(names) + 0.4, 0.7))
    axis.axis("off")
    plt.show()


def two_runs(names: list[str], *runs: list[tuple[str, bool]]) -> None:
    """Which samples each run computed, found, or did not come to."""
    figure, axis = plt.subplots(figsize=(7.8, 0.75 * len(runs) + 0.6))
    for row, run in enumerate(runs):
        reached = dict(run)
        for n, name in enumerate(names):
            text = "not reached" if name not in reached else "found" if reached[name] else "computed"
            colour = {"not reached": "white", "found": LIGHT["VAE"], "computed": "#fff3d6"}[text]
            box(axis, n, -row, 0.92, 0.72, text, colour, 8.5, color=GREY if text == "not reached" else "black")
        axis.text(-0.15, 0.36 - row, f"run {row + 1}", ha="right", va="center", fontsize=10)
        if len(run) < len(names):
            axis.plot([len(run) - 0.04] * 2, [-row - 0.06, -row + 0.78], color=RED, lw=3)
            axis.text(len(run) - 0.04, -row + 0.82, "killed here", ha="center", fontsize=9, color=RED)
    for n, name in enumerate(names):
        axis.text(n + 0.46, -len(runs) + 0.85, f"sample {name}", ha="center", va="top", fontsize=9)
    axis.set(xlim=(-0.8, len(names)), ylim=(-len(runs) + 0.5, 1.1))
    axis.axis("off")
    plt.show()


def out_of_date(counts: dict[str, dict[str, int]], of: int) -> None:
    """How many samples get wrong vectors after each change: counts[how files are named][what changed]."""
    figure, axis = plt.subplots(figsize=(7.6, 2.5))
    changes = list(next(iter(counts.values())))
    for k, (name, found) in enumerate(counts.items()):
        places = np.arange(len(changes)) + 0.4 * k - 0.2
        axis.barh(places, found.values(), 0.34, color=(RED, BLUE)[k], label=name)
        for place, number in zip(places, found.values(), strict=True):
            axis.text(number + 0.08, place, f"{number} of {of}", va="center", fontsize=10, color=(RED, BLUE)[k])
    axis.set(yticks=range(len(changes)), yticklabels=changes, xlim=(0, of + 1), xlabel="samples that get wrong vectors")
    axis.tick_params(axis="y", labelsize=9.5)
    axis.invert_yaxis()
    axis.legend(title="files are named", loc="center right", bbox_to_anchor=(1, 0.6))
    plt.show()

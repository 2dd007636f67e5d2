"""Figures of chapter 05: what goes into the transformer, what comes out, and where two transformers part.

Those of the trained model come from data/tiny, a small model of the same architecture. Its doors are shut by hooks that
change what a sub-module returns (`instead`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from math import prod
from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from course import BLUE, GREY, ORANGE, RED, show
from figures.small_model import WISH
from figures.small_model import given as scene
from figures.small_model import model as pipeline
from minqwen.difference import record
from minqwen.images import pack_latents
from minqwen.world import sample_edit

STEPS = 8  # of an edit
STOP = 3  # the step at which `one_moment` stops it
FITTED_ON, LEVELS = 64, (1.0, 0.8, 0.6, 0.3)  # edits, noise levels of each, on which read-outs are fitted
LIGHT = {"words": "#dcefdc", "picture": "#dceaf7", "given": "#fbe7cf", "both": "#fff3d6", "time": "#f9dede"}
KINDS = {"modulation": "_mod.", "attention": ".attn.", "MLP": "_mlp."}


# ------------------------------------------------------------------------------------------------------ instruments


@cache
def given() -> Image.Image:
    """The picture to edit, as the pipeline resizes it."""
    return pipeline().resize_references([scene()])[0][0]


def edit(model: nn.Module | None = None, callback: Callable | None = None) -> Image.Image:
    """The edit of the given picture, always from the same noise; by another transformer if one is handed over."""
    pipe = pipeline()
    before = pipe.transformer
    pipe.transformer = model or before
    try:
        settings = {"num_inference_steps": STEPS, "true_cfg_scale": 1.0, "progress": False, "callback": callback}
        return pipe.edit(given(), WISH, generator=torch.Generator().manual_seed(0), **settings)
    finally:
        pipe.transformer = before


def grid() -> tuple[int, int, int]:
    """The picture in tokens: frames, rows, columns."""
    return 1, given().height // 16, given().width // 16


@cache
def encoded() -> tuple[Tensor, Tensor]:
    """What does not change during an edit: the tokens of the given picture, the vectors of the words."""
    pipe = pipeline()
    return pack_latents(pipe.encode_image(given())).clone(), pipe.encode_prompt(WISH, [given()])[0].clone()


def one_moment(step: int = STOP) -> tuple[Tensor, Tensor, Tensor, float, list]:
    """What the transformer is given at one step of an edit: noisy tokens, the given picture's, words, σ, shapes."""
    seen = []
    edit(callback=lambda k, sigma, latents, _: seen.append((latents.clone(), sigma)))
    reference, words = encoded()
    return seen[step][0], reference, words, seen[step][1], [grid()] * 2


def picture_of(latents: Tensor) -> Image.Image:
    """Tokens of latents, (1, Ni, 64), as the autoencoder shows them."""
    return pipeline().decode(latents, *given().size)


@contextmanager
def instead(model: nn.Module, name: str, change: Callable) -> Iterator[None]:
    """Inside, the sub-module of that name returns change(its result)."""
    hook = model.get_submodule(name).register_forward_hook(lambda _, args, result: change(result))
    try:
        yield
    finally:
        hook.remove()


def apart(a: Image.Image, b: Image.Image) -> float:
    """Mean difference of two pictures, in levels of 255."""
    return np.abs(np.asarray(a, float) - np.asarray(b, float)).mean().item()


@torch.no_grad()
def states_of(tokens: Tensor, words: Tensor, mask, sigma: Tensor, shapes: list) -> tuple[list[Tensor], Tensor]:
    """The image stream behind the entrance and behind each block, and temb."""
    model = pipeline().transformer
    img, txt = model.img_in(tokens), model.txt_in(model.txt_norm(words))
    temb, tables = model.time_text_embed(sigma, img), model.pos_embed(shapes, txt.shape[1])
    states = [img]
    for block in model.transformer_blocks:
        txt, img = block(img, txt, temb, mask, tables)
        states.append(img)
    return states, temb


@cache
def fitted() -> list[Tensor]:
    """For each depth the matrix that reads the velocity best out of the normed stream there (least squares)."""
    pipe, rng, generator = pipeline(), np.random.default_rng(1), torch.Generator().manual_seed(1)
    sigma, inside, wanted = torch.tensor(LEVELS), [], []
    for _ in range(FITTED_ON):
        task = sample_edit(rng)
        words, _ = pipe.encode_prompt(task.instruction, [task.source])
        clean, reference = (pack_latents(pipe.encode_image(x)) for x in (task.target, task.source))
        shapes = [(1, task.target.height // 16, task.target.width // 16)] * 2
        noise = torch.randn(len(sigma), *clean.shape[1:], generator=generator)
        noisy = (1 - sigma[:, None, None]) * clean + sigma[:, None, None] * noise
        rows = [x.expand(len(sigma), -1, -1) for x in (reference, words)]
        states, _ = states_of(torch.cat([noisy, rows[0]], 1), rows[1], None, sigma, shapes)
        inside.append([state[:, : clean.shape[1]] for state in states])
        wanted.append((noise - clean).flatten(0, 1))
    y, found = torch.cat(wanted).double(), []
    for depth in zip(*inside, strict=True):
        x = torch.cat([features(state).flatten(0, 1) for state in depth])
        found.append(torch.linalg.solve(x.T @ x + torch.eye(x.shape[1]).double(), x.T @ y))
    return found


def features(state: Tensor) -> Tensor:
    """A normed stream and a column of ones, in double."""
    normed = F.layer_norm(state, state.shape[-1:]).double()
    return torch.cat([normed, torch.ones_like(normed[..., :1])], -1)


# ---------------------------------------------------------------------------------------------------------- drawings


def box(axis, x: float, y: float, width: float, height: float, text: str, colour: str, size: float = 9, **kwargs):
    """A box with its middle at (x, y)."""
    corner = x - width / 2, y - height / 2
    axis.add_patch(plt.Rectangle(corner, width, height, facecolor=colour, edgecolor=GREY, zorder=2))
    axis.text(x, y, text, ha="center", va="center", fontsize=size, zorder=3, **kwargs)


def arrow(axis, start: tuple[float, float], end: tuple[float, float], colour: str = GREY, **kwargs) -> None:
    axis.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "->", "color": colour, "lw": 1.4} | kwargs)


def sheet(width: float, height: float, inches: float = 9.4):
    """An empty axis, one unit as wide as high."""
    figure, axis = plt.subplots(figsize=(inches, inches * height / width))
    axis.axis("off")
    return axis


def lay(axis, picture, x: float, y: float, side: float) -> None:
    """A picture with its middle at (x, y)."""
    axis.imshow(picture, extent=(x - side / 2, x + side / 2, y - side / 2, y + side / 2), zorder=2)
    axis.add_patch(plt.Rectangle((x - side / 2, y - side / 2), side, side, fill=False, edgecolor=GREY, zorder=3))


def in_and_out() -> None:
    """What the transformer is given in the middle of an edit, and what becomes of its answer."""
    noisy, reference, words, sigma, shapes = one_moment()
    with torch.no_grad():
        answer = pipeline().transformer(torch.cat([noisy, reference], 1), words, None, torch.tensor([sigma]), [shapes])
    velocity = answer[:, : noisy.shape[1]]
    axis = sheet(13.2, 5.6)
    rows = {f"the new picture,\nstill {sigma:.0%} noise": 4.55, "the given picture": 3.05}
    for (name, y), picture in zip(rows.items(), (picture_of(noisy), given()), strict=True):
        axis.text(1.85, y, name, ha="right", va="center", fontsize=9)
        lay(axis, picture, 2.75, y, 1.3)
        arrow(axis, (3.5, y), (4.5, 3.4 + 0.25 * (y - 3)))
    for name, text, y in (("the sentence", f"“{WISH}”", 1.75), ("the noise level", f"σ = {sigma:.2f}", 0.85)):
        axis.text(0.55, y, name, ha="center", va="center", fontsize=9)
        box(axis, 2.5, y, 2.0, 0.62, fill(text, 18), "white")
        arrow(axis, (3.55, y), (4.5, 2.45 - 0.3 * (1.75 - y)))
    box(axis, 5.7, 2.9, 2.3, 2.6, "the\ntransformer", LIGHT["both"], 12, weight="bold")
    arrow(axis, (6.9, 2.9), (7.6, 2.9))
    side = shapes[0][1] * 2, shapes[0][2] * 2
    map_of = velocity.view(shapes[0][1], shapes[0][2], -1, 2, 2).permute(2, 0, 3, 1, 4).reshape(-1, *side)[0]
    most = map_of.abs().max().item()
    coloured = plt.get_cmap("coolwarm")(map_of.numpy() / most / 2 + 0.5)
    lay(axis, coloured, 8.45, 2.9, 1.5)
    axis.text(8.45, 3.95, "the velocity\n(one of its 16 channels)", ha="center", va="bottom", fontsize=9)
    arrow(axis, (9.3, 2.9), (11.2, 2.9))
    axis.text(10.25, 3.05, "new picture\nminus\nσ · velocity", ha="center", va="bottom", fontsize=9)
    lay(axis, picture_of(noisy - sigma * velocity), 12.05, 2.9, 1.5)
    axis.text(12.05, 3.95, "its guess at the\nfinished picture", ha="center", va="bottom", fontsize=9)
    axis.set(xlim=(-0.2, 13), ylim=(0.3, 5.5), aspect="equal")
    plt.show()


def without_one_input() -> None:
    """The same edit with all inputs, and without one of four."""
    model, tokens = pipeline().transformer, prod(grid())
    nothing = torch.zeros_like
    unturned = lambda tables: tuple((torch.ones_like(cos), nothing(sin)) for cos, sin in tables)  # noqa: E731
    inputs = {
        "the words": ("txt_in", nothing),
        "the given picture": ("img_in", lambda x: torch.cat([x[:, :tokens], nothing(x[:, tokens:])], dim=1)),
        "the noise level": ("time_text_embed", nothing),
        "the positions": ("pos_embed", unturned),
    }
    pictures = [given(), edit()]
    for name, change in inputs.values():
        with instead(model, name, change):
            pictures.append(edit())
    titles = ["the given picture", f"all inputs:\n“{WISH}”", *(f"without\n{name}" for name in inputs)]
    show(pictures, titles, size=1.75)


def one_token(number: int | None = None) -> None:
    """A token of the given picture: its place, its pixels, its 64 numbers, and what img_in makes of them."""
    _, rows, columns = grid()
    number = columns + 1 if number is None else number
    row, column = divmod(number, columns)
    token = encoded()[0][0, number]
    with torch.no_grad():
        wide = pipeline().transformer.img_in(token)
    figure, axes = plt.subplots(1, 4, figsize=(9.6, 2.9), width_ratios=(1.25, 1, 1.15, 1.6))
    axes[0].imshow(given(), extent=(0, columns, rows, 0))
    axes[0].set(xticks=range(columns + 1), yticks=range(rows + 1), title="the given picture,\ncut into tokens")
    axes[0].grid(color=GREY, lw=0.8)
    axes[0].add_patch(plt.Rectangle((column, row), 1, 1, fill=False, edgecolor=RED, lw=2.5, zorder=3))
    axes[1].imshow(given().crop((16 * column, 16 * row, 16 * column + 16, 16 * row + 16)))
    axes[1].set(title=f"its token {number}:\n16 × 16 pixels")
    cells, most = token.view(4, 4, 2, 2), token.abs().max().item()
    for channel, patch in enumerate(cells.reshape(16, 2, 2)):
        y, x = divmod(channel, 4)
        extent = (x + 0.04, x + 0.96, y + 0.96, y + 0.04)
        axes[2].imshow(patch, cmap="coolwarm", vmin=-most, vmax=most, extent=extent)
    axes[2].set(xlim=(0, 4), ylim=(4, 0), title="16 channels of 2 × 2:\n64 numbers")
    axes[3].bar(range(len(wide)), wide, color=BLUE, width=1)
    axes[3].set(xlabel="number", ylabel="value", title=f"behind img_in:\n{len(wide)} numbers")
    for axis in axes[:3]:
        axis.tick_params(length=0, labelbottom=False, labelleft=False)
    for axis in axes[1:3]:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(axis is axes[1])
    plt.show()


def way_of_a_token(states: list[Tensor], number: int = 0) -> float:
    """One token behind the entrance and behind each block, in the plane in which it moves most; the share it holds."""
    points = torch.stack([state[0, number] for state in states]).double()  # (blocks + 1, C)
    moves = points - points.mean(0)
    _, sizes, axes_ = torch.linalg.svd(moves, full_matrices=False)
    plane = moves @ axes_[:2].T
    plane = (plane - plane[0]) * torch.where(plane[-1] < plane[0], -1, 1)
    figure, axis = plt.subplots(figsize=(9.2, 3.6))
    for k, (start, end) in enumerate(zip(plane[:-1].tolist(), plane[1:].tolist(), strict=True)):
        arrow(axis, start, end, BLUE, lw=2.2)
        right, up = (b - a for a, b in zip(start, end, strict=True))
        across = np.array([-up, right]) / np.hypot(right, up)
        middle = [(a + b) / 2 for a, b in zip(start, end, strict=True)]
        axis.annotate(str(k), middle, xytext=11 * across, textcoords="offset points", ha="center", va="center",
                      fontsize=10, weight="bold", color=BLUE)  # fmt: skip
    axis.plot(*plane.T.tolist(), "o", color=GREY, ms=5, zorder=3)
    axis.annotate("img_in", plane[0].tolist(), xytext=(8, -4), textcoords="offset points", fontsize=9)
    axis.annotate("to the exit", plane[-1].tolist(), xytext=(8, -4), textcoords="offset points", fontsize=9)
    axis.set(xlabel="along the first direction", ylabel="along the second")
    axis.set(aspect="equal", title="one token on its way through the stack: arrow 0 is what block 0 adds")
    axis.margins(0.14, 0.18)
    plt.show()
    return (sizes[:2].square().sum() / sizes.square().sum()).item()


def append_and_cut(of: tuple[int, int] = (4, 4)) -> None:
    """The sequence in an edit: the new picture's tokens, the given picture's behind them; only the former are kept."""
    axis = sheet(13, 4.2)
    for row, y in enumerate((3.0, 0.5)):
        for k in range(sum(of)):
            ours = k < of[0]
            x = 3.2 + 0.75 * k + 0.5 * (not ours)
            colour = BLUE if ours else ORANGE
            kept = ours or row == 0
            face = {"facecolor": colour, "alpha": 0.6} if kept else {"facecolor": "white", "linestyle": "--"}
            axis.add_patch(plt.Rectangle((x - 0.28, y - 0.28), 0.56, 0.56, edgecolor=colour, **face))
            if not kept:
                axis.plot([x - 0.2, x + 0.2], [y - 0.2, y + 0.2], color=GREY, lw=1)
            arrow(axis, *(((x, 2.65), (x, 2.2)) if row == 0 else ((x, 1.35), (x, 0.85))))
    box(axis, 6.1, 1.78, 6.8, 0.8, "all blocks: each token reads every token; then the exit", LIGHT["both"])
    box(axis, 0.9, 1.78, 1.5, 0.8, "words", LIGHT["words"])
    arrow(axis, (1.7, 1.78), (2.65, 1.78))
    left, right = 3.2 + 0.75 * (of[0] - 1) / 2, 3.7 + 0.75 * (of[0] + (of[1] - 1) / 2)
    for x, y, text, colour in (
        (left, 3.55, "new picture, noisy", BLUE),
        (right, 3.55, "given picture, clean", ORANGE),
        (left, -0.1, "velocity: kept", BLUE),
        (right, -0.1, "thrown away", ORANGE),
    ):
        axis.text(x, y, text, ha="center", va="center", fontsize=10, color=colour)
    for y, text in ((3.0, "in:\n64 numbers\na token"), (0.5, "out:\n64 numbers\na token")):
        axis.text(10.3, y, text, ha="left", va="center", fontsize=9)
    axis.set(xlim=(-0.1, 12), ylim=(-0.4, 3.9), aspect="equal")
    plt.show()


def whole_transformer() -> None:
    """All parts with the names of the weights and the released sizes."""
    axis = sheet(14, 6)
    words, picture, time, both = (LIGHT[key] for key in ("words", "picture", "time", "both"))
    box(axis, 1.2, 4.2, 2.2, 0.9, "words\n(B, Nt, 3584)", words)
    box(axis, 4.2, 4.2, 2.2, 0.9, "txt_norm, txt_in\n(B, Nt, C)", words)
    box(axis, 1.2, 2.3, 2.2, 1.1, "new picture\nand given picture\n(B, Ni, 64)", picture)
    box(axis, 4.2, 2.3, 2.2, 0.9, "img_in\n(B, Ni, C)", picture)
    box(axis, 1.2, 0.5, 2.2, 0.8, "noise level σ\n(B,)", time)
    box(axis, 4.2, 0.5, 2.2, 0.8, "time_text_embed\ntemb (B, C)", time)
    box(axis, 1.2, 5.8, 2.2, 0.8, "frames, rows, columns\nof each picture", "white", 8)
    box(axis, 4.2, 5.8, 2.2, 0.8, "pos_embed\nangles", "white")
    for x, name in ((6.6, "block 0"), (7.9, "block 1"), (9.1, "..."), (10.3, "block 59")):
        if name == "...":
            axis.text(x, 3.25, name, ha="center", va="center", fontsize=14)
            continue
        box(axis, x, 3.25, 0.85, 2.9, name, both, rotation=90)
        arrow(axis, (x, 5.8), (x, 4.75))
        arrow(axis, (x, 0.5), (x, 1.75))
    for y in (4.2, 2.3):
        arrow(axis, (2.35, y), (3.05, y))
        for start, end in ((5.35, 6.13), (7.07, 7.43), (8.37, 8.75), (9.4, 9.83)):
            arrow(axis, (start, y), (end, y))
    for y in (0.5, 5.8):
        arrow(axis, (2.35, y), (3.05, y))
    axis.plot([5.3, 10.3], [5.8, 5.8], color=GREY, lw=1.4)
    axis.plot([5.3, 11.9], [0.5, 0.5], color=GREY, lw=1.4)
    arrow(axis, (11.9, 0.5), (11.9, 1.8))
    arrow(axis, (10.77, 4.2), (11.2, 4.2))
    axis.text(11.3, 4.2, "the words\nend here", ha="left", va="center", fontsize=9)
    arrow(axis, (10.77, 2.3), (11.25, 2.3))
    box(axis, 11.9, 2.3, 1.2, 0.9, "norm_out", picture)
    arrow(axis, (12.55, 2.3), (13.0, 2.3))
    box(axis, 13.65, 2.3, 1.2, 0.9, "proj_out\n(B, Ni, 64)", picture)
    axis.annotate("", xy=(13.65, 3.5), xytext=(13.65, 2.8), arrowprops={"arrowstyle": "->", "color": GREY})
    axis.text(13.65, 3.95, "cut: velocity\nof the new\npicture", ha="center", va="center", fontsize=9, weight="bold")
    axis.set(xlim=(0, 14.4), ylim=(0, 6.3))
    plt.show()


def velocity_forms() -> float:
    """Pure noise and an edit: the guess when the stack is left after each block; the error of an answer of zeros.

    Once by the model's own exit, which was trained behind the last block, once by an exit fitted for that depth.
    """
    noise, reference, words, sigma, shapes = one_moment(step=0)
    states, temb = states_of(torch.cat([noise, reference], 1), words, None, torch.tensor([sigma]), shapes)
    model, result = pipeline().transformer, edit()
    true = noise - pack_latents(pipeline().encode_image(result))
    states = [state[:, : noise.shape[1]] for state in states]
    own = [model.proj_out(model.norm_out(state, temb)) for state in states]
    best = [(features(state) @ matrix).float() for state, matrix in zip(states, fitted(), strict=True)]
    errors = [[(v - true).square().mean().item() for v in row] for row in (own, best)]
    names = ["img_in", *(f"block {k}" for k in range(len(states) - 1))]
    figure, axes = plt.subplots(2, len(states) + 1, figsize=(9.6, 2.95))
    for k, (velocities, name) in enumerate([(own, "the model's\nown exit"), (best, "an exit fitted\nto the place")]):
        for axis, v, error in zip(axes[k], velocities, errors[k], strict=False):
            axis.imshow(picture_of(noise - sigma * v))
            axis.set(xlabel=f"error {error:.2g}")
        axes[k, 0].set_ylabel(name, rotation=0, ha="right", va="center")
        axes[k, -1].imshow(result)
    for axis, title in zip(axes[0], [*names, "the edit"], strict=True):
        axis.set(title=title)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    plt.show()
    return true.square().mean().item()


def count(model: nn.Module) -> dict[tuple[str, str], int]:
    """The parameters by kind and stream; ("rest", "") is what belongs to no block."""
    found = {(kind, stream): 0 for kind in KINDS for stream in ("image", "text")} | {("rest", ""): 0}
    for name, parameter in model.named_parameters():
        kind = next((kind for kind, mark in KINDS.items() if mark in name), "rest")
        text = any(mark in name for mark in ("txt_", "add_", "added"))
        found[(kind, "text" if text else "image") if kind != "rest" else ("rest", "")] += parameter.numel()
    return found


def twenty_billion(model: nn.Module) -> None:
    """All parameters as an area, by kind and stream."""
    numbers = count(model)
    total, rest = sum(numbers.values()), numbers.pop(("rest", ""))
    shades = {"image": ("#cfe2f3", "#9fc5e8", "#6fa8dc"), "text": ("#d9ead3", "#b6d7a8", "#93c47d")}
    figure, axis = plt.subplots(figsize=(8.6, 4.2))
    for x, (stream, colours) in enumerate(shades.items()):
        width = sum(n for (_, s), n in numbers.items() if s == stream) / total
        bottom = 0.0
        for kind, colour in zip(KINDS, colours, strict=True):
            height = numbers[kind, stream] / total / width
            axis.add_patch(plt.Rectangle((x * width, bottom), width, height, facecolor=colour, edgecolor="white", lw=2))
            label = f"{stream} {kind}\n{numbers[kind, stream] / 1e9:.2f} billion"
            axis.text((x + 0.5) * width, bottom + height / 2, label, ha="center", va="center", fontsize=10)
            bottom += height
    axis.add_patch(plt.Rectangle((1 - rest / total, 0), rest / total, 1, facecolor=RED))
    label = f"doors and exit:\n{rest / 1e9:.2f} billion,\nthe red line"
    axis.text(1.02, 0.5, label, fontsize=9, color=RED, va="center")
    axis.set(xlim=(0, 1.24), ylim=(1, 0), title=f"{total / 1e9:.2f} billion numbers: equal areas are equal numbers")
    axis.axis("off")
    plt.show()


def name_as_path(name: str) -> None:
    """A tensor's name as a way through the modules."""
    parts = name.split(".")
    siblings = [["img_in", "txt_in", "norm_out", "..."], ["0", "1", "2", "..."], ["img_mod", "img_mlp", "..."],
                ["to_k", "to_v", "..."], ["bias"]]  # fmt: skip
    told = ["the stack\nof blocks", "one of the\nblocks", "its\nattention", "the matrix\nfor queries", "its\nnumbers"]
    axis = sheet(13.2, 4.6)
    box(axis, 0.8, 3.2, 1.5, 0.7, "model", LIGHT["both"])
    wide = [2.9, 0.9, 1.3, 1.3, 1.5]
    x, last = 1.55, 1.55
    for part, width, others, words in zip(parts, wide, siblings, told, strict=True):
        x = last + 0.75 + width / 2
        box(axis, x, 3.2, width, 0.7, part, LIGHT["picture"], 10, weight="bold")
        arrow(axis, (last + 0.05, 3.2), (x - width / 2 - 0.05, 3.2))
        axis.text(x, 4.05, words, ha="center", va="center", fontsize=9, color=BLUE)
        for k, other in enumerate(others):
            axis.text(x, 2.4 - 0.5 * k, other, ha="center", va="center", fontsize=9, color=GREY)
        last = x + width / 2
    axis.set(xlim=(0, last + 0.1), ylim=(0.6, 4.5))
    plt.show()


def edits_by(models: dict[str, nn.Module]) -> dict[str, float]:
    """The same edit by several transformers, the first of them the right one; how far each is from the first."""
    pictures = [edit(model) for model in models.values()]
    away = {name: apart(picture, pictures[0]) for name, picture in zip(models, pictures, strict=True)}
    titles = [f"{name}\n{off:.1f} of 255 away (mean)" if k else name for k, (name, off) in enumerate(away.items())]
    show(pictures, titles, size=2.4)
    return away


def where_they_part(broken: dict[str, nn.Module], right: nn.Module, inputs: dict) -> None:
    """How far each sub-module's result is from the right model's, in the order in which they finish."""
    good = record(right, **inputs)
    figure, axes = plt.subplots(len(broken), 1, figsize=(9.4, 2.1 * len(broken)), sharex=True, squeeze=False)
    for axis, (name, model) in zip(axes[:, 0], broken.items(), strict=True):
        mine = record(model, **inputs)
        keys = [key for key in mine if key.endswith(" > 0")]
        off = [((mine[key] - good[key]).abs().max() / good[key].abs().max()).item() for key in keys]
        first = next(k for k, value in enumerate(off) if value > 1e-5)
        axis.bar(range(len(off)), [100 * value for value in off], width=1, color=RED)
        label = keys[first].removesuffix(" > 0").replace("transformer_blocks", "blocks")
        before = first > len(off) / 4  # room for the label: nothing differs there
        axis.annotate(label, (first, 100 * off[first]), xytext=(-14 if before else 14, 0), textcoords="offset points",
                      ha="right" if before else "left", va="center", color=RED, fontsize=9,
                      arrowprops={"arrowstyle": "->", "color": RED})  # fmt: skip
        axis.set(ylabel="difference, %\nof the largest", title=name, xlim=(-1, len(off)))
    axes[-1, 0].set(
        xlabel="parts of the model, in the order in which they finish; the last is the answer for all tokens"
    )
    plt.show()

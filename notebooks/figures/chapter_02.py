"""Figures of chapter 02: where a token stands.

Most are drawn by formula, or with a toy: one attention without heads that is trained in a second or two to move a
picture by one square (`Mover`). Two of the lesson's and most of its appendix come from data/tiny, the small model of
the same architecture; what depends on it stands in the constants below.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from unittest.mock import patch

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import FancyArrowPatch
from PIL import Image
from torch import Tensor, nn

from course import BLUE, GREEN, GREY, ORANGE, RED, ROOT, show
from figures.small_model import WISH, given, model
from minqwen import attention
from minqwen.images import pack_latents

STEPS = 8  # of an edit
Place = Callable[[Tensor, list], Tensor]  # queries or keys (B, N, H, D) and the pictures' shapes -> the same, placed


# -------------------------------------------------------------------------------------------------- the small model


@contextmanager
def swapped(tables: Callable | None = None, turn: Callable | None = None) -> Iterator[None]:
    """Inside, the small model takes its tables from tables(shapes, text_length), and turns by turn(x, table)."""
    rope = model().transformer.pos_embed
    tables, turn = tables or rope.forward, turn or attention.apply_rotary_emb_qwen
    with patch.object(rope, "forward", tables), patch.object(attention, "apply_rotary_emb_qwen", turn):
        yield


def edit(
    wish: str = WISH,
    tables: Callable | None = None,
    turn: Callable | None = None,
    picture: Image.Image | None = None,
    seed: int = 0,
) -> Image.Image:
    """The edit of a picture, from the noise of a seed."""
    settings = {"num_inference_steps": STEPS, "true_cfg_scale": 1.0, "progress": False}
    with swapped(tables, turn):
        return model().edit(picture or given(), wish, generator=torch.Generator().manual_seed(seed), **settings)


def tokens_of(picture: Image.Image) -> tuple[Tensor, tuple[int, int, int]]:
    """A picture as the small model's tokens, (1, N, C), and its grid (T, h, w)."""
    z = model().encode_image(picture)
    return pack_latents(z), (z.shape[2], z.shape[3] // 2, z.shape[4] // 2)


def one_frame(shapes, text_length, device=None):
    """The small model's tables with all pictures in frame 0."""
    rope = model().transformer.pos_embed
    table = rope.video_freqs
    with patch.object(rope, "video_freqs", lambda f, h, w, i, device=None: table(f, h, w, 0, device)):
        return type(rope).forward(rope, shapes, text_length, device)


# ----------------------------------------------------------------------------------------------------------- the toy


class Mover(nn.Module):
    """One attention over the squares of two pictures; a token is a colour, and so is its value."""

    def __init__(self, width: int = 128):
        super().__init__()
        self.to_q, self.to_k = nn.Linear(3, width), nn.Linear(3, width)

    def forward(self, tokens: Tensor, place: Place, shapes: list) -> Tensor:
        q, k = (place(layer(tokens)[:, :, None], shapes)[:, :, 0] for layer in (self.to_q, self.to_k))
        return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ tokens


def one_to_the_right(out: Tensor, tokens: Tensor, h: int, w: int) -> tuple[Tensor, Tensor]:
    """What the new picture became, and what it should be: the given one, moved; without the first column."""
    new, old = out[:, : h * w].unflatten(1, (h, w)), tokens[:, h * w :].unflatten(1, (h, w))
    return new[:, :, 1:], old[:, :, :-1]


@cache
def trained(place: Place, side: int = 4, steps: int = 100) -> Mover:
    """A mover that was trained on random colours, 16 pairs of pictures a step."""
    generator, shapes = torch.Generator().manual_seed(0), [(1, side, side)] * 2
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        mover = Mover()
        optimizer = torch.optim.Adam(mover.parameters(), lr=0.1)
        for _ in range(steps):
            tokens = torch.rand(16, 2 * side * side, 3, generator=generator)
            got, want = one_to_the_right(mover(tokens, place, shapes), tokens, side, side)
            optimizer.zero_grad()
            (got - want).square().mean().backward()
            optimizer.step()
    return mover.requires_grad_(False)


HEART = ["..........", ".rr....rr.", "rrrr..rrrr", "rrrrrrrrrr", ".rrrrrrrr.", "...rrrr...", "....rr....", ".........."]
COLOURS = {".": (0.95, 0.90, 0.75), "r": (0.82, 0.20, 0.25)}


@cache
def task(large: bool = False) -> tuple[Tensor, tuple[int, int]]:
    """Tokens of a new picture, which is noise, and of a given one, of clear colours or with a heart."""
    generator = torch.Generator().manual_seed(4)
    clear = torch.tensor([[0.85, 0.2, 0.2], [0.95, 0.8, 0.2], [0.2, 0.6, 0.3], [0.25, 0.45, 0.8], [0.95, 0.95, 0.95]])
    old = clear[torch.randint(5, (4, 4), generator=generator)]
    if large:
        old = torch.tensor([[COLOURS[square] for square in row] for row in HEART])
    return torch.cat([torch.rand(old.shape, generator=generator), old]).reshape(1, -1, 3), old.shape[:2]


def moved(mover: Mover, place: Place, large: bool = False) -> tuple[np.ndarray, float]:
    """What a mover makes of the task, and how far it is off: the mean distance of a number between 0 and 1."""
    tokens, (h, w) = task(large)
    got, want = one_to_the_right(mover(tokens, place, [(1, h, w)] * 2), tokens, h, w)
    return got[0].clamp(0, 1).numpy(), (got - want).abs().mean().item()


def squares(axis, colours: np.ndarray, title: str, columns: int) -> None:
    """A grid of coloured squares; a column that does not count is left empty, on the left."""
    h, w = colours.shape[:2]
    axis.imshow(colours, extent=(columns - w, columns, h, 0))
    for x in range(columns - w, columns + 1):
        axis.axvline(x, color="white", lw=1)
    for y in range(h + 1):
        axis.axhline(y, color="white", lw=1)
    if w < columns:
        empty = {"facecolor": "none", "edgecolor": GREY, "hatch": "//", "lw": 0.8}
        axis.add_patch(plt.Rectangle((0.06, 0.06), 0.88, h - 0.12, **empty))
    axis.set(xlim=(0, columns), ylim=(h, 0), xticks=[], yticks=[], title=title, aspect="equal")
    axis.spines[:].set_visible(False)


def move_to_the_right(place: Place, title: str, larger: bool = False) -> None:
    """What a mover is given, what it should make of it, what it makes; larger: also a picture of another size."""
    mover = trained(place)
    figure, axes = plt.subplots(1 + larger, 4, figsize=(9.2, 2.7 + 2.1 * larger), squeeze=False)
    for row, large in zip(axes, (False, True), strict=False):
        tokens, (h, w) = task(large)
        new, old = tokens[0].view(2, h, w, 3).numpy()
        result, off = moved(mover, place, large)
        named = ["the new picture,\nnoise", "the given picture", "wanted:\none to the right", f"{title}\n"]
        titles = [*(["", "", ""] if large else named[:3]), f"{'' if large else named[3]}off by {off:.2f} of 1"]
        for axis, colours, name in zip(row, (new, old, old[:, :-1], result), titles, strict=True):
            squares(axis, colours, name, w)
        row[0].set_ylabel(f"{h} rows of {w}")
    plt.show()


def movers(cases: dict[str, tuple[Place, Place]]) -> None:
    """The task as movers solve it that were trained with one placing and are run with another."""
    tokens, (h, w) = task(large=True)
    figure, axes = plt.subplots(1, 1 + len(cases), figsize=(9.4, 2.6))
    squares(axes[0], tokens[0].view(2, h, w, 3).numpy()[1, :, :-1], "wanted", w)
    for axis, (name, (at_training, now)) in zip(axes[1:], cases.items(), strict=True):
        result, off = moved(trained(at_training), now, large=True)
        squares(axis, result, f"{name}\noff by {off:.2f} of 1", w)
    plt.show()


# ---------------------------------------------------------------------------------------------------------- drawings


def squares_in_a_heap(side: int = 4) -> None:
    """A photo cut into squares; the squares without their order; and each with a label that says where it stood."""
    photo = Image.open(ROOT / "data/pictures/coffee.png").crop((100, 0, 500, 400)).resize((40 * side, 40 * side))
    pieces = np.asarray(photo).reshape(side, 40, side, 40, 3).swapaxes(1, 2).reshape(-1, 40, 40, 3)
    order = np.random.default_rng(1).permutation(side * side)
    figure, axes = plt.subplots(1, 3, figsize=(9.8, 3.3), gridspec_kw={"wspace": 0.12})
    titles = ["a picture, cut into squares", "what attention is given", "what this chapter adds"]
    for number, (axis, title) in enumerate(zip(axes, titles, strict=True)):
        for place in range(side * side):
            piece = place if number == 0 else order[place]
            (y, x), (row, column) = divmod(place, side), divmod(piece, side)
            gap = 1.08 if number == 0 else 1.35
            axis.imshow(pieces[piece], extent=(gap * x, gap * x + 1, gap * y + 1, gap * y))
            if number == 2:
                box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5}
                text = f"row {row}\ncolumn {column}"
                axis.text(gap * x + 0.5, gap * y + 0.5, text, ha="center", va="center", fontsize=7.5, bbox=box)
        end = gap * (side - 1) + 1
        axis.set(xlim=(-0.1, end + 0.1), ylim=(end + 0.1, -0.1), xticks=[], yticks=[], title=title)
        axis.spines[:].set_visible(False)
    plt.show()


def arrow(axis, tip, colour: str, name: str, at: float = 0.85) -> None:
    style = {"arrowstyle": "-|>", "mutation_scale": 14, "shrinkA": 0, "shrinkB": 0}
    axis.add_patch(FancyArrowPatch((0, 0), tuple(tip), color=colour, lw=2, **style))
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    place = np.asarray(tip) * (1 + at / np.linalg.norm(tip))
    axis.text(*place, name, color=colour, ha="center", va="center", fontsize=9, bbox=box)


def quarter_turns(q: Tensor, k: Tensor, turned: Callable, pairs: list[tuple[int, int]]) -> None:
    """A query and a key as arrows at several positions, and their products."""
    figure, axes = plt.subplots(1, len(pairs), figsize=(9.6, 2.9))
    for axis, (m, n) in zip(axes, pairs, strict=True):
        tips = turned(q, m), turned(k, n)
        for tip, name, colour in zip(tips, (f"q at {m}", f"k at {n}"), (BLUE, RED), strict=True):
            arrow(axis, tip.tolist(), colour, name)
        axis.axhline(0, color=GREY, lw=0.6, zorder=0)
        axis.axvline(0, color=GREY, lw=0.6, zorder=0)
        axis.set(xlim=(-4.9, 4.9), ylim=(-4.4, 4.4), aspect="equal", xticks=(-3, 0, 3), yticks=(-3, 0, 3))
        axis.set(xlabel="first number", title=f"score {tips[0] @ tips[1]:+.0f}")
    axes[0].set_ylabel("second number")
    plt.show()


def dials(w: Tensor, pairs: tuple[int, ...] = (0, 4, 8, 16), places: tuple[int, ...] = (0, 1, 2, 4, 8, 16, 32, 64)):
    """Hands of dials: four pairs of an axis, fast to slow, at several positions."""
    figure, axis = plt.subplots(figsize=(9.2, 4.2))
    for row, j in enumerate(pairs):
        colour = (RED, ORANGE, GREEN, BLUE)[row]
        for x, position in enumerate(places):
            angle = position * w[j].item()
            axis.add_patch(plt.Circle((x, -row), 0.38, fill=False, color=GREY, lw=1))
            tip = x + 0.36 * np.cos(angle), -row + 0.36 * np.sin(angle)
            style = {"arrowstyle": "-|>", "mutation_scale": 11, "shrinkA": 0, "shrinkB": 0}
            axis.add_patch(FancyArrowPatch((x, -row), tip, color=colour, lw=2, **style))
        turn = f"pair {j}\na turn takes {2 * np.pi / w[j].item():,.0f} tokens"
        axis.text(-0.65, -row, turn, ha="right", va="center", fontsize=9, color=colour)
    for x, position in enumerate(places):
        axis.text(x, 0.6, str(position), ha="center", fontsize=10)
    axis.text(-0.65, 0.6, "position", ha="right", fontsize=10)
    axis.set(xlim=(-3, len(places) - 0.5), ylim=(-len(pairs) + 0.5, 0.9), aspect="equal")
    axis.axis("off")
    plt.show()


def score_by_distance(w: Tensor, far: int = 64) -> None:
    """The score of two equal arrows by their distance: of the fastest pair, of a slow one, and the mean of all."""
    steps = torch.arange(far + 1.0)
    figure, axes = plt.subplots(1, 3, figsize=(9.6, 2.6), sharey=True)
    curves = {"pair 0 alone: it comes back": (0, RED), "pair 16 alone: it hardly moves": (16, BLUE)}
    for axis, (title, (j, colour)) in zip(axes, curves.items(), strict=False):
        axis.plot(steps, (steps * w[j]).cos(), color=colour)
        axis.set_title(title)
    axes[2].plot(steps, (steps[:, None] * w).cos().mean(-1), color="black")
    axes[2].set_title(f"all {len(w)} pairs, their mean")
    for axis in axes:
        axis.set(xlabel="distance in tokens", ylim=(-1.1, 1.1), xticks=range(0, far + 1, 16))
    axes[0].set_ylabel("score, as a share\nof that at distance 0")
    plt.show()


def arrows_of_a_picture(cells: Callable, angles_of: Callable, side: int = 5) -> None:
    """For one pair of each axis: its arrow in every square of two pictures."""
    pairs = {
        "frame: pair 0 of 8": (0, RED),
        "row: pair 3 of 28": (8 + 3, BLUE),
        "column: pair 3 of 28": (8 + 28 + 3, GREEN),
    }
    figure, axes = plt.subplots(2, 3, figsize=(8.4, 5.6))
    for frame, row in enumerate(axes):
        angles = angles_of(cells([frame], range(side), range(side)))  # (N, D/2)
        for axis, (name, (pair, colour)) in zip(row, pairs.items(), strict=True):
            turn = angles[:, pair].view(side, side)
            y, x = np.mgrid[:side, :side]
            style = {"pivot": "middle", "angles": "uv", "color": colour, "scale": side + 2, "width": 0.012}
            axis.quiver(x, y, turn.cos(), turn.sin(), **style)
            axis.set(xlim=(-0.6, side - 0.4), ylim=(side - 0.4, -0.6), aspect="equal")
            axis.set(xticks=range(side), yticks=range(side))
            axis.spines[["top", "right"]].set_visible(True)
            if frame == 0:
                axis.set_title(name)
            else:
                axis.set_xlabel("column")
        row[0].set_ylabel(f"{('the new', 'the given')[frame]} picture\nrow")
    plt.show()


def grid(axis, rows, columns, colour: str, label: str, size: float = 0.9, **style) -> None:
    for y in rows:
        for x in columns:
            corner = (x - size / 2, y - size / 2)
            axis.add_patch(plt.Rectangle(corner, size, size, edgecolor=colour, label=label, **style))
            label = None


def from_corner_or_middle(centred: Callable, small: tuple[int, int] = (4, 4), large: tuple[int, int] = (6, 8)) -> None:
    """Two pictures of different sizes, each square drawn at its row and column."""
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 3.6))
    counts = {"counted from the corner": torch.arange, "counted from the middle": centred}
    for axis, (title, count) in zip(axes, counts.items(), strict=True):
        for (h, w), colour, size, style in ((large, ORANGE, 0.9, {"facecolor": "#fdf0dd", "lw": 1.2}),
                                            (small, BLUE, 0.6, {"facecolor": "#cfe0f1", "lw": 1.2})):  # fmt: skip
            grid(axis, count(h).tolist(), count(w).tolist(), colour, f"a picture of {h}×{w}", size, **style)
        ys, xs = count(large[0]).tolist(), count(large[1]).tolist()
        axis.set(xlim=(xs[0] - 0.7, xs[-1] + 0.7), ylim=(ys[-1] + 0.7, ys[0] - 0.7), aspect="equal")
        axis.set(xticks=xs, yticks=ys, xlabel="column", ylabel="row", title=title)
    axes[1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    plt.show()


def pictures_and_text(images: Tensor, text: Tensor, names: tuple[str, ...]) -> None:
    """Every token at its three positions: seen from the front, and from above."""
    figure, (front, above) = plt.subplots(1, 2, figsize=(9.4, 4.4), layout="constrained")
    sizes, colours = (0.92, 0.62, 0.32), (BLUE, ORANGE, RED)
    for i, (name, colour) in enumerate(zip(names, colours, strict=True)):
        own = images[images[:, 0] == i]
        rows, columns = sorted(set(own[:, 1].tolist())), sorted(set(own[:, 2].tolist()))
        grid(front, rows, columns, colour, f"{name}, frame {i}", sizes[i], facecolor="none", lw=1.5)
        grid(above, [i], columns, colour, None, 0.8, facecolor="none", lw=1.5)
    front.plot(text[:, 2], text[:, 1], "o", color=GREEN, label="words")
    above.plot(text[:, 2], text[:, 0], "o", color=GREEN)
    low, high = images[:, 1:].min().item() - 1, text.max().item() + 1
    front.set(ylabel="row", ylim=(high, low), title="from the front")
    above.set(ylabel="frame", ylim=(-1, high), title="from above")
    for axis in (front, above):
        axis.set(xlabel="column", xlim=(low, high), aspect="equal")
    figure.legend(loc="outside lower center", ncols=4)
    plt.show()


def nearness(sequence_positions: Callable, angles_of: Callable, side: int = 15) -> Tensor:
    """The score between the middle of the new picture and every token, if all had the same query and key."""
    images, text = sequence_positions([(1, side, side)] * 2, side)
    middle = (images == 0).all(-1).nonzero().item()
    images, text = angles_of(images), angles_of(text)
    near, words = ((a - images[middle]).cos().mean(-1) for a in (images, text))
    maps, (row, column) = near.view(2, side, side), divmod(middle, side)
    first = -column - 0.5
    figure, axes = plt.subplots(1, 3, figsize=(9.8, 3.1), width_ratios=[1, 1, 1.25])
    for axis, map_, name in zip(axes, maps, ("the new picture", "the given picture"), strict=False):
        name += f", {side}×{side}"
        extent = (first, first + side, first + side, first)
        drawn = axis.imshow(map_, extent=extent, cmap="viridis", vmin=near.min(), vmax=1)
        axis.set(title=name, xlabel="column", ylabel="row", xticks=(-5, 0, 5), yticks=(-5, 0, 5))
    figure.colorbar(drawn, ax=axes[:2], shrink=0.75, label="score (1: itself)")
    at = torch.arange(side) - column
    for map_, name, colour in zip(maps, ("the new picture", "the given picture"), (BLUE, ORANGE), strict=True):
        axes[2].plot(at, map_[row], "o-", ms=3, color=colour, label=f"row 0 of {name}")
    axes[2].plot(side // 2 + torch.arange(side), words, "o-", ms=3, color=GREEN, label=f"{side} words")
    axes[2].set(xlabel="column, or position of a word", ylabel="score", title="the same numbers as curves")
    axes[2].legend(loc="upper right", fontsize=7.5)
    axes[2].set_ylim(None, 1.12)
    plt.show()
    return maps[:, row, column : column + 2]


def broken_edits(turn_halves: Callable) -> None:
    """Two edits by the small model: as it was trained, with halves turned, with both pictures in one frame."""

    def halves(x, table):
        cos, sin = table
        return turn_halves(x, torch.atan2(sin, cos))

    pictures, titles, seed = [], [], 1
    for wish in (WISH, "remove the cake"):  # in one frame the first is nearly right, from most noises
        swaps = ({}, {"turn": halves}, {"tables": one_frame})
        pictures += [given(), *(edit(wish, seed=seed, **each) for each in swaps)]
        titles += ["the given picture", f"“{wish}”", "halves turned", "both pictures\nin frame 0"]
    show(pictures, titles, size=2.2, rows=2)


# ------------------------------------------------------------------------------------------------------- the appendix


def velocity_error(tasks: list, tables: Callable | None = None, turn: Callable | None = None) -> float:
    """How far the small model's velocity is off on known edits, as a share of the velocity's mean square."""
    noise, wrong, size = torch.Generator().manual_seed(0), 0.0, 0.0
    with torch.inference_mode(), swapped(tables, turn):
        for prompt, target, reference, shapes in tasks:
            for sigma in (0.9, 0.6):  # the share of noise in the new picture; the given one stays clean
                z = torch.randn(target.shape, generator=noise)
                tokens = torch.cat([(1 - sigma) * target + sigma * z, reference], dim=1)
                v = model().transformer(tokens, *prompt, torch.tensor([sigma]), [shapes])[:, : target.shape[1]]
                wrong, size = wrong + (v - (z - target)).square().mean(), size + (z - target).square().mean()
    return (wrong / size).item()


def known_edits(edits: list) -> list:
    """Edits of the toy world, as `velocity_error` takes them."""
    found = []
    for one in edits:
        (target, grid_), (reference, other) = tokens_of(one.target), tokens_of(one.source)
        found.append((model().encode_prompt(one.instruction, [one.source]), target, reference, [grid_, other]))
    return found


def bars(values: dict[str, float], label: str, marked: tuple[str, ...] = ()) -> None:
    figure, axis = plt.subplots(figsize=(8, 0.38 * len(values) + 0.8))
    drawn = axis.barh(list(values), list(values.values()), color=[BLUE if name in marked else GREY for name in values])
    axis.bar_label(drawn, fmt="%.3f", padding=3)
    axis.invert_yaxis()
    axis.set(xlabel=label, xlim=(0, 1.15 * max(values.values())))
    plt.show()

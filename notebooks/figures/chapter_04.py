"""Figures of chapter 04: what a block adds, and how the noise level changes what it does.

Toys are trained on pictures of 16 pixels; what is drawn of the trained model comes from data/tiny. Its modulations are
changed by putting another function in the place of the library's (`changed`).
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from unittest.mock import patch

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor, nn

from course import BLUE, GREEN, GREY, ORANGE, RED, show
from figures.chapter_03 import edit
from figures.small_model import WISH, given, model
from minqwen import block as library
from minqwen.images import pack_latents, pixels_to_image, unpack_latents
from minqwen.sampling import denoise, get_sigmas
from minqwen.world import Edit, judge, sample_edit

STEPS, STOPS = 20, (4, 18)  # of the edit that is stopped after each block, and where
FIXED = (0.95, 0.5, 0.2)  # noise levels that a model is told throughout
BLOCK = 3  # the block that the lesson looks into
TASKS, LEVELS = 8, (0.9, 0.6, 0.3)  # edits that are counted, and noise levels at which the velocity is measured
PARTS = {"image, attention": ("image", 2), "image, MLP": ("image", 5),
         "text, attention": ("text", 2), "text, MLP": ("text", 5)}  # fmt: skip
NAMES = ("shift", "scale", "gate")
LIGHT = {"image": "#dceaf7", "text": "#dcefdc", "both": "#fff3d6", "time": "#f9dede"}


# ------------------------------------------------------------------------------------------------------ instruments


def blocks() -> nn.ModuleList:
    return model().transformer.transformer_blocks


def size_of(x: Tensor) -> Tensor:
    """The root mean square over the channels."""
    return x.square().mean(-1).sqrt()


def waves(sigma: Tensor, count: int = 8) -> Tensor:
    """A small timestep embedding for the toys: (B, 1) -> (B, 8) cosines, slow to fast."""
    return torch.cos(sigma * torch.pi * torch.arange(1, count + 1))


def temb_of(sigmas: Tensor | float) -> Tensor:
    """The trained model's own embedding of noise levels: (B,) -> (B, C)."""
    with torch.no_grad():
        return model().transformer.time_text_embed(torch.as_tensor(sigmas).view(-1), torch.zeros(1))


OWN = library.QwenImageTransformerBlock.modulations


@contextmanager
def changed(rule: Callable) -> Iterator[None]:
    """Inside, rule(depth, stream, six vectors) -> six vectors stands between each block and its modulations."""

    def modulations(self, temb):
        depth = [id(block) for block in blocks()].index(id(self))
        both = zip(("image", "text"), OWN(self, temb), strict=True)
        return tuple(torch.cat(rule(depth, stream, list(v.chunk(6, dim=-1))), dim=-1) for stream, v in both)

    with patch.object(library.QwenImageTransformerBlock, "modulations", modulations):
        yield


@contextmanager
def told(sigma: float) -> Iterator[None]:
    """Inside, all blocks of the trained model are told one noise level, whatever the true one is."""
    temb = temb_of(sigma)
    with patch.object(
        library.QwenImageTransformerBlock, "modulations", lambda self, given: OWN(self, temb.expand_as(given))
    ):
        yield


@cache
def one_block(number: int = BLOCK) -> tuple:
    """What a block is given in the middle of an edit: (block, image, text, temb, tables)."""
    found, block = [], blocks()[number]
    hook = block.register_forward_pre_hook(lambda _, args: found.append(args))
    try:
        edit()
    finally:
        hook.remove()
    img, txt, temb, _, tables, *_ = (arg for arg in found[len(found) // 2])
    tables = [[t.clone() for t in table] for table in tables]  # no inference tensors
    return block, img.clone(), txt.clone(), temb.clone(), tables


def train(
    net: nn.Module, pictures: Callable, steps: int = 100, rate: float = 3e-3, told: bool = True, seed: int = 1
) -> list[float]:
    """Trains net(x, temb) -> picture with Adam; the losses. Not told: temb is 0 throughout."""
    optimizer, generator = torch.optim.Adam(net.parameters(), rate), torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        x, sigma, picture = pictures(128, net.first.in_features, generator)
        loss = (net(x, waves(sigma) * told) - picture).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def best_guess(x: Tensor, sigma: Tensor | float) -> Tensor:
    """The mean of a pixel that was -1 or 1, given what is left of it: no answer has a smaller squared error."""
    return torch.tanh(x * (1 - sigma) / sigma**2)


class Eight:
    """Edits that the model gets right: drawn and judged all in one batch, and the squared error of the velocity on
    their targets."""

    def __init__(self, count: int = TASKS):
        pipe, rng = model(), np.random.default_rng(4)
        self.tasks: list[Edit] = [sample_edit(rng) for _ in range(3 * count)]
        prompts = [pipe.encode_prompt(t.instruction, [t.source])[0] for t in self.tasks]
        longest = max(p.shape[1] for p in prompts)
        self.words = torch.cat([F.pad(p, (0, 0, 0, longest - p.shape[1])) for p in prompts])  # (B, Nt, C)
        self.mask = torch.arange(longest) < torch.tensor([[p.shape[1]] for p in prompts])
        self.source, self.target = (
            torch.cat([pack_latents(pipe.encode_image(getattr(t, side))) for t in self.tasks])
            for side in ("source", "target")
        )
        self.noise = torch.randn(self.target.shape, generator=torch.Generator().manual_seed(0))
        width, height = self.tasks[0].source.size
        self.grid = (1, height // 16, width // 16)
        self.tokens = self.target.shape[1]
        kept = [i for i, fits in enumerate(self.judged()) if fits][:count]
        self.tasks = [self.tasks[i] for i in kept]
        for name in ("words", "mask", "source", "target", "noise"):
            setattr(self, name, getattr(self, name)[kept])

    @torch.inference_mode()
    def velocity(self, x: Tensor, sigma: float) -> Tensor:
        shapes = [[self.grid, self.grid]] * len(self.tasks)
        tokens, level = torch.cat([x, self.source], dim=1), torch.tensor([sigma])
        return model().transformer(tokens, self.words, self.mask, level, shapes)[:, : self.tokens]

    @torch.inference_mode()
    def drawn(self, steps: int = 3) -> list[Image.Image]:
        pipe = model()
        x = denoise(self.velocity, self.noise, get_sigmas(steps, self.tokens, **pipe.schedule))
        latents = pipe.vae.denormalize(unpack_latents(x, 2 * self.grid[1], 2 * self.grid[2]))
        return [pixels_to_image(one) for one in pipe.vae.decode(latents).split(1)]

    def judged(self) -> list[bool]:
        """Which of them the judge finds right."""
        return [judge(picture, task) for picture, task in zip(self.drawn(), self.tasks, strict=True)]

    def right(self) -> int:
        """How many the judge finds right."""
        return sum(self.judged())

    def error(self) -> float:
        """Squared error of the velocity on noisy targets, as a share of its mean square: 1 is an answer of zeros."""
        truth = self.noise - self.target
        mixed = [(1 - s) * self.target + s * self.noise for s in LEVELS]
        wrong = sum((self.velocity(x, s) - truth).square().mean() for x, s in zip(mixed, LEVELS, strict=True))
        return (wrong / len(LEVELS) / truth.square().mean()).item()


@cache
def eight() -> Eight:
    return Eight()


@cache
def streams() -> list[tuple[Tensor, Tensor]]:
    """Image and text stream of eight edits at one noise level, at each depth: what enters the first block, and on."""
    found, edits = [], eight()
    hooks = [blocks()[0].register_forward_pre_hook(lambda _, args: found.append(args[:2]))]
    hooks += [block.register_forward_hook(lambda _, args, out: found.append(out[::-1])) for block in blocks()]
    try:
        edits.velocity(0.4 * edits.target + 0.6 * edits.noise, 0.6)
    finally:
        for hook in hooks:
            hook.remove()
    return [(img, txt[edits.mask]) for img, txt in found]


def shut(depth: int, part: str):
    """Inside, one gate of one block is 0; part is one of PARTS."""
    stream, place = PARTS[part]
    return changed(lambda d, s, six: [m * 0 if (d, s, i) == (depth, stream, place) else m for i, m in enumerate(six)])


def constant(value: float, *places: int):
    """Inside, some of the six vectors of all streams and blocks are a constant."""
    return changed(lambda depth, stream, six: [m * 0 + value if i in places else m for i, m in enumerate(six)])


def enlarged(factor: float) -> nn.Module:
    """The transformer with both streams larger by a factor: it computes the same, since parts read through norms."""
    copied = copy.deepcopy(model().transformer)
    width = copied.img_in.out_features
    layers = [(copied.img_in, [0]), (copied.txt_in, [0])]
    layers += [(mod[1], [2, 5]) for b in copied.transformer_blocks for mod in (b.img_mod, b.txt_mod)]  # the gates
    for layer, rows in layers:
        for p in (layer.weight.data, layer.bias.data):
            p.unflatten(0, (-1, width))[rows] *= factor
    return copied


def edit_in(transformer: nn.Module, dtype: torch.dtype, clip: bool = True) -> tuple[Image.Image, float, float]:
    """The edit by this transformer in that dtype, black where numbers overflow; the largest number in a stream, at the
    end of any block and in the middle of any."""
    transformer, ends, middles = transformer.to(dtype), [], []
    for b in transformer.transformer_blocks:
        b.register_forward_hook(lambda _, args, out: ends.extend(x.abs().max().item() for x in out))
        for norm in (b.img_norm2, b.txt_norm2):  # the middle is what the second norm is given
            norm.register_forward_pre_hook(lambda _, args: middles.append(args[0].abs().max().item()))

    def run(x, y, *others):
        return transformer(x.to(dtype), y.to(dtype), *others).float()

    unclipped = nullcontext() if clip else patch.object(library, "clip_fp16", lambda x: x)
    with patch.object(model().transformer, "forward", run), unclipped:
        try:
            picture = edit()
        except FloatingPointError:  # without this check in our pipeline one would get a black picture
            picture = Image.new("RGB", given().size)
    return picture, max(ends), max(middles)


# ---------------------------------------------------------------------------------------------------------- drawings


def one_network_two_jobs() -> None:
    """What the model would draw at two steps of an edit, had it stopped after each of its blocks."""
    transformer, caught, rows = model().transformer, [], {}
    width, height = edit().size

    def look(now, sigma, latents, _):
        if now not in STOPS:
            return
        temb = transformer.time_text_embed(torch.tensor([sigma]), latents)
        rows[sigma] = [model().decode(latents, width, height)]
        for img in caught[-len(blocks()) :]:
            velocity = transformer.proj_out(transformer.norm_out(img, temb))[:, : latents.shape[1]]
            rows[sigma].append(model().decode(latents - sigma * velocity, width, height))

    hooks = [block.register_forward_hook(lambda _, args, out: caught.append(out[1])) for block in blocks()]
    settings = {"num_inference_steps": STEPS, "true_cfg_scale": 1.0, "progress": False, "callback": look}
    try:
        with torch.inference_mode():
            model().edit(given(), WISH, generator=torch.Generator().manual_seed(0), **settings)
    finally:
        for hook in hooks:
            hook.remove()
    titles = ["noisy picture", *(f"after block {k}" for k in range(len(blocks())))]
    figure, axes = plt.subplots(len(rows), len(titles) + 1, figsize=(1.45 * len(titles) + 1.5, 1.75 * len(rows)))
    for axis, title in zip(axes[0], ["given", *titles], strict=True):
        axis.set_title(title)
    for row, (sigma, pictures) in zip(axes, rows.items(), strict=True):
        for axis, picture in zip(row, [given(), *pictures], strict=True):
            axis.imshow(picture)
        row[1].set_ylabel(f"σ = {sigma:.2f}", fontsize=10)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    figure.suptitle(f"“{WISH}”", fontsize=11)
    plt.show()


def one_level_throughout() -> None:
    """The same edit by a model that is told the noise level, and by one that is told a fixed one."""
    pictures, titles = [given(), edit()], ["the given picture", "told the noise level\nof each step"]
    for sigma in FIXED:
        with told(sigma):
            pictures.append(edit())
        titles.append(f"told σ = {sigma}\nat every step")
    show(pictures, titles, size=1.9)


def three_noise_levels(levels: tuple[float, ...] = (0.9, 0.6, 0.3), pixel: float = 0.5) -> None:
    """The best guess of a pixel that was -1 or 1, over what is seen of it, at three noise levels."""
    figure, axis = plt.subplots(figsize=(6.4, 3.2))
    x = torch.linspace(-1.5, 1.5, 301)
    for sigma, colour in zip(levels, (RED, ORANGE, BLUE), strict=True):
        axis.plot(x, best_guess(x, sigma), color=colour, lw=2, label=f"σ = {sigma}")
        guess = best_guess(torch.tensor(pixel), sigma).item()
        axis.plot(pixel, guess, "o", color=colour)
        axis.annotate(f"{guess:.2f}", (pixel, guess), (pixel + 0.06, guess - 0.15), color=colour, fontsize=9)
    axis.axvline(pixel, color=GREY, ls=":", lw=1)
    axis.set(xlabel="what is seen of the pixel", ylabel="best guess of the pixel", ylim=(-1.15, 1.15))
    axis.set_title("one noisy pixel, three noise levels, three best guesses")
    axis.legend(loc="upper left")
    plt.show()


def four_numbers(rows: list[tuple[str, Tensor, str]]) -> None:
    """A token of four numbers on its way through a gated step. A row: what it is, the numbers, and its kind."""
    figure, axis = plt.subplots(figsize=(6.6, 0.45 * len(rows) + 0.2))
    colours = {"stream": LIGHT["image"], "read": "#eeeeee", "knob": LIGHT["time"]}
    for row, (name, numbers, kind) in enumerate(rows):
        y, left = -row, 1.1 if kind == "knob" else 0
        axis.text(3.6, y, name, ha="right", va="center", fontsize=10, color=RED if kind == "knob" else "black")
        for x, number in enumerate(numbers.tolist()):
            box = Rectangle((3.9 + 0.95 * x, y - 0.4), 0.9, 0.8, facecolor=colours[kind], lw=0)
            axis.add_patch(box)
            text = f"{round(number, 3):g}"
            axis.text(4.35 + 0.95 * x, y, text, ha="center", va="center", fontsize=10, color=RED if left else "black")
    axis.set(xlim=(0.9, 7.8), ylim=(-len(rows) + 0.4, 0.6))
    axis.axis("off")
    plt.show()


def learning(curves: dict[str, list[float]], pictures: Callable, window: int = 10) -> None:
    """The losses of toys over training, each a mean over some steps, with two marks to compare them with."""
    x, sigma, picture = pictures(20000, 4, torch.Generator().manual_seed(2))
    best = (best_guess(x, sigma) - picture).square().mean().item()
    figure, axis = plt.subplots(figsize=(7.6, 2.9))
    kinds = list(dict.fromkeys(name.split(",")[0] for name in curves))  # a colour for each, dashed if it is shallow
    for name, losses in curves.items():
        colour, style = (RED, BLUE)[kinds.index(name.split(",")[0])], "--" if ", 4 " in name else "-"
        means = torch.tensor(losses)[: len(losses) // window * window].view(-1, window).mean(-1)
        steps = window * (torch.arange(len(means)) + 0.5)
        axis.plot(steps, means, style, marker="o", ms=3, color=colour, label=name)
    for level, name in ((1.0, "answers 0 to everything"), (best, "best that a network told σ can do")):
        axis.axhline(level, color=GREY, ls=":", lw=1)
        axis.text(axis.get_xlim()[1], level + 0.015, name, color=GREY, fontsize=8, ha="right", va="bottom")
    axis.set(xlabel="training steps", ylabel=f"squared error,\nmean of {window} steps", ylim=(0.4, 1.25))
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    plt.show()


def streams_grow() -> None:
    """The mean size of a token in both streams of the trained model, and the same behind the norm."""
    figure, axes = plt.subplots(1, 2, figsize=(8.6, 2.7))
    for column, (name, colour) in enumerate((("picture", BLUE), ("text", GREEN))):
        at = [pair[column] for pair in streams()]
        axes[0].plot([size_of(x).mean() for x in at], "o-", color=colour, label=name)
        normed = [size_of(F.layer_norm(x, x.shape[-1:])).mean() for x in at]
        axes[1].plot(normed, "o-", color=colour, lw=5 - 3 * column, label=name)
    axes[0].set(title="mean size of a token in the stream, at σ = 0.6", ylabel="root mean square", ylim=(0, None))
    axes[1].set(title="the same tokens behind the norm", ylim=(0, 2))
    for axis in axes:
        axis.set(xlabel="blocks passed", xticks=range(len(streams())))
        axis.legend()
    plt.show()


def learned_guesses(nets: dict[str, nn.Module], pictures: Callable, levels: tuple[float, ...] = (0.9, 0.6, 0.3)):
    """What toys answer for a pixel, over what is seen of it, at three noise levels; the best guess is dotted."""
    figure, axes = plt.subplots(1, len(nets), figsize=(4.4 * len(nets), 3.1), sharey=True)
    edges, generator = torch.linspace(-1.5, 1.5, 25), torch.Generator().manual_seed(3)
    for axis, (name, net) in zip(axes, nets.items(), strict=True):
        for sigma, colour in zip(levels, (RED, ORANGE, BLUE), strict=True):
            _, drawn, picture = pictures(6000, net.first.in_features, generator)
            level = torch.full_like(drawn, sigma)
            x = (1 - level) * picture + level * torch.randn(picture.shape, generator=generator)
            with torch.no_grad():
                answer = net(x, waves(level) * (name != "not told"))
            place = torch.bucketize(x.flatten(), edges)
            inside = [answer.flatten()[place == k] for k in range(1, len(edges))]
            kept = [k for k, values in enumerate(inside) if len(values) > 60]
            middle = (edges[1:] + edges[:-1]) / 2
            axis.plot(middle[kept], [inside[k].mean() for k in kept], color=colour, lw=2, label=f"σ = {sigma}")
            axis.plot(middle, best_guess(middle, sigma), ":", color=colour, lw=1.5)
        axis.plot([], [], ":", color=GREY, label="best guess")
        axis.set(xlabel="what is seen of the pixel", title=f"{name} the noise level")
        axis.legend(loc="upper left")
    axes[0].set(ylabel="answer for the pixel, in the mean", ylim=(-1.2, 1.2))
    plt.show()


def knobs(number: int = BLOCK, loud: int = 4) -> None:
    """1 + scale for attention of one block of the trained model over the noise level, a line for each channel."""
    sigmas = torch.linspace(0.02, 1, 50)
    with torch.no_grad():
        scale = 1 + OWN(blocks()[number], temb_of(sigmas))[0].chunk(6, dim=-1)[1]  # (50, C)
    order = (scale.amax(0) - scale.amin(0)).argsort(descending=True).tolist()
    figure, axis = plt.subplots(figsize=(7.2, 3))
    for channel in order[loud:]:
        axis.plot(sigmas, scale[:, channel], color=GREY, lw=0.6, alpha=0.5)
    for channel, colour in zip(order[:loud], (RED, BLUE, GREEN, ORANGE), strict=True):
        axis.plot(sigmas, scale[:, channel], color=colour, lw=2.2)
    axis.set(
        xlabel="noise level σ",
        ylabel="1 + scale",
        title=f"block {number}, picture, scale for attention: a line for each of {len(order)} numbers",
    )
    plt.show()


def gelu_curve() -> None:
    figure, axis = plt.subplots(figsize=(4.6, 2.7))
    x = torch.linspace(-4, 3, 281)
    axis.plot(x, F.relu(x), "--", color=GREY, label="max(x, 0)")
    axis.plot(x, F.gelu(x, approximate="tanh"), color=BLUE, lw=2.2, label="GELU")
    axis.set(xlabel="x", ylabel="what comes out")
    axis.legend()
    plt.show()


def whole_block() -> None:
    """The block as a flow chart: two streams, one attention, and where the six vectors of each stream go."""
    figure, axis = plt.subplots(figsize=(10.4, 5.2))

    def box(x, y, text, colour, width=0.86, height=0.62, size=8.5):
        axis.add_patch(Rectangle((x - width / 2, y - height / 2), width, height, facecolor=colour, edgecolor="#555555"))
        axis.text(x, y, text, ha="center", va="center", fontsize=size)

    def arrow(start, end, colour="#444444", style="-"):
        line = {"arrowstyle": "->", "color": colour, "lw": 1.3, "ls": style, "shrinkA": 0, "shrinkB": 0}
        axis.annotate("", xy=end, xytext=start, arrowprops=line)

    box(2, 0, "joint\nattention\n\n(chapter 03)", LIGHT["both"], height=3.2)
    box(-0.75, 0, "temb\n(B, C)", LIGHT["time"])
    for sign, s, n in ((1, "image", "(B, Ni, C)"), (-1, "text", "(B, Nt, C)")):
        short, colour = {"image": "img", "text": "txt"}[s], LIGHT[s]
        stream, part, mod = 2.25 * sign, 1.2 * sign, 3.2 * sign
        box(
            4.25,
            mod,
            f"{short}_mod: SiLU and a matrix, C to 6C: shift, scale, gate, shift, scale, gate",
            LIGHT["time"],
            7.6,
        )
        axis.plot([-0.75, -0.75], [0.31 * sign, mod], color=RED, lw=1.3)
        arrow((-0.75, mod), (0.45, mod), RED)
        box(0, stream, f"{s}\n{n}", colour)
        box(9.2, stream, f"{s}\n{n}", colour)
        for x, text in ((1, f"{short}_norm1\nshift, scale"), (3.3, "· gate1"), (5, f"{short}_norm2\nshift, scale"),
                        (6.1, f"{short}_mlp"), (7.2, "· gate2")):  # fmt: skip
            box(x, part, text, colour, 0.92 if "norm" in text else 0.78)
        for x in (4.1, 8.0):
            axis.text(x, stream, "+", ha="center", va="center", fontsize=13,
                      bbox={"boxstyle": "circle,pad=0.15", "facecolor": "white", "edgecolor": "#444444"})  # fmt: skip
        arrow((0.43, stream), (3.92, stream))
        arrow((4.28, stream), (7.82, stream))
        arrow((8.18, stream), (8.77, stream))
        for x in (1, 5):  # the parts read the stream
            arrow((x, stream), (x, part + 0.31 * sign))
        for a, b in ((1.46, 1.57), (2.43, 2.91), (5.46, 5.71), (6.49, 6.81)):
            arrow((a, part), (b, part))
        for a, b in ((3.69, 4.1), (7.59, 8.0)):  # what they found is added to it
            axis.plot([a, b], [part, part], color="#444444", lw=1.3)
            arrow((b, part), (b, stream - 0.2 * sign))
        for x, name in ((1.22, "shift1, scale1"), (3.3, "gate1"), (5.22, "shift2, scale2"), (7.2, "gate2")):
            arrow((x, mod - 0.31 * sign), (x, part + 0.31 * sign), RED)
            axis.text(x + 0.07, mod - 0.5 * sign, name, color=RED, fontsize=8, va="center")
    axis.set(xlim=(-1.3, 9.75), ylim=(-3.6, 3.6))
    axis.axis("off")
    plt.show()


def rows_exchanged(order: tuple[int, int, int] = (1, 0, 2)) -> None:
    """The edit with the six vectors taken in the right order and in another; which of shift, scale, gate is taken."""
    with changed(lambda depth, stream, six: [six[3 * half + i] for half in (0, 1) for i in order]):
        wrong = edit()
    title = "read as\n" + ", ".join(NAMES[i] for i in order)
    show([given(), edit(), wrong], ["the given picture", "read as\nshift, scale, gate", title], size=2.2)


def gates_by_block() -> dict[str, Tensor]:
    """The size of each gate of the trained model, over block and noise level: drawn, and returned (blocks, levels)."""
    temb = temb_of(torch.linspace(0.02, 1, 50))
    figure, axes = plt.subplots(1, len(PARTS), figsize=(10.4, 2.6), sharey=True)
    found = {}
    for name, (stream, place) in PARTS.items():
        with torch.no_grad():
            six = [OWN(block, temb)[stream == "text"].chunk(6, dim=-1) for block in blocks()]
        found[name] = torch.stack([size_of(vectors[place]) for vectors in six])
    extent, widest = (-0.5, len(six) - 0.5, 0, 1), max(sizes.max() for sizes in found.values())
    for axis, (name, sizes) in zip(axes, found.items(), strict=True):
        drawn = axis.imshow(sizes.T, origin="lower", extent=extent, aspect="auto", vmin=0, vmax=widest)
        axis.set(title=f"gate of {name}", xlabel="block", xticks=range(len(six)))
    axes[0].set_ylabel("noise level σ")
    figure.colorbar(drawn, ax=axes, label="root mean square")
    plt.show()
    return found


def gates_shut() -> np.ndarray:
    """How many of eight edits come out right when one gate of one block is shut: drawn, and returned."""
    counts = np.zeros((len(PARTS), len(blocks())), int)
    for row, part in enumerate(PARTS):
        for depth in range(len(blocks())):
            with shut(depth, part):
                counts[row, depth] = eight().right()
    figure, axis = plt.subplots(figsize=(7.5, 2.7))
    axis.imshow(counts, cmap="RdYlGn", vmin=0, vmax=TASKS, aspect="auto")
    for (row, depth), count in np.ndenumerate(counts):
        colour = "black" if 1 < count < TASKS - 1 else "white"
        axis.text(depth, row, count, ha="center", va="center", fontsize=10, color=colour)
    axis.set(yticks=range(len(PARTS)), yticklabels=list(PARTS), xticks=range(len(blocks())))
    axis.set(xlabel="block whose gate is shut", title=f"edits right, of {TASKS}")
    plt.show()
    return counts


def bars(values: dict[str, float], label: str) -> None:
    """Numbers on a log scale, the first of them marked."""
    figure, axis = plt.subplots(figsize=(8, 0.32 * len(values) + 0.7))
    drawn = axis.barh([*values], [*values.values()], color=[BLUE] + [GREY] * (len(values) - 1))
    axis.bar_label(drawn, fmt="%.3g", padding=3)
    axis.invert_yaxis()
    axis.set(xscale="log", xlim=(min(values.values()) / 3, max(values.values()) * 5), xlabel=label)
    plt.show()


def both_levels(number: int = BLOCK, level: float = 0.8) -> None:
    """The scale of each image token with zero_cond_t: noisy tokens and clean ones have rows of their own."""
    block, temb, half = blocks()[number], temb_of([level, 0.0]), eight().tokens
    with torch.no_grad(), patch.object(block, "zero_cond_t", True):
        img, _ = OWN(block, temb)  # (2B, 6C)
        scale = block.spread(img, image_tokens=2 * half, target_tokens=half).chunk(6, dim=-1)[1][0]
    figure, axis = plt.subplots(figsize=(7, 2.6))
    drawn = axis.imshow(scale, aspect="auto", cmap="coolwarm", vmin=-1.5, vmax=1.5)
    axis.axhline(half - 0.5, color="black", lw=1)
    axis.set(
        xlabel="channel",
        ylabel="token: new picture,\nthen given picture",
        title=f"scale of each image token, block {number}",
    )
    figure.colorbar(drawn, ax=axis, label="scale")
    plt.show()

"""Figures of chapter 11: where the bytes of the released model lie, four ways to need less of them, several cards.

Sizes are counted on the shapes of the released model, times on the data sheets of some machines; what is edited is the
scene of the lessons, by data/tiny. What depends on its weights stands in the constants.
"""

import copy
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import cache
from io import StringIO

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from course import BLUE, GREEN, GREY, ORANGE, RED, TINY, matrix
from figures.small_model import WISH, given
from figures.small_model import model as pipeline
from minqwen.doctor import Machine, released
from minqwen.images import pack_latents
from minqwen.memory import MODULATION, Shell, unread_layers
from minqwen.pipeline import PARTS, QwenImagePipeline, starting_noise
from minqwen.plans import PIXEL, SPARE, Plan, block_operations, plans
from minqwen.prompt import pad_prompts
from minqwen.sampling import denoise, get_sigmas
from minqwen.world import KINDS, Edit, judge, sample_edit

STEPS = 8  # of an edit, without guidance
COUNT, SEED = 20, 3 * 10**8  # edits that are counted, on scenes that no training used
STRENGTH = 0.15  # of the random adapter: its edits are to differ visibly
LEVEL = 0.7  # the noise level at which velocities are compared

AREA, SIDES = 1024 * 1024, np.arange(512, 1537, 64)  # pixels of the released model; sides of pictures
SHARE = 0.5  # of what a data sheet promises
# GB of card and host; dense bfloat16 operations and bytes of the bus a second, in 10^12 and 10^9; a disk of 3 GB/s
MACHINES = [
    Machine(name, card * 1e9, host * 1e9, SHARE * rate * 1e12, SHARE * link * 1e9, 3e9)
    for name, card, host, rate, link in [
        ("RTX 4060, 8 GB", 8, 32, 30, 16),
        ("RTX 4090, 24 GB", 24, 64, 165, 32),
        ("H100, 80 GB", 80, 128, 989, 64),
    ]
]
BITS = {16: "as released", 8: "8 bits", 4: "4 bits"}
LIGHT = {"blue": "#dceaf7", "green": "#dcefdc", "orange": "#fbe3c3", "red": "#f6dada", "grey": "#eeeeee"}


# ------------------------------------------------------------------------------------------------------ instruments


def pipe_with(transformer: nn.Module) -> QwenImagePipeline:
    """The small model's pipeline with another transformer."""
    pipe = copy.copy(pipeline())
    pipe.transformer = transformer
    if not hasattr(transformer, "img_in"):  # a model inside another: a pipeline looks here for device and dtype
        transformer.img_in = transformer.model.img_in
    return pipe


def settings() -> dict:
    """Of the edit that is compared: always from the same noise."""
    chance = torch.Generator().manual_seed(0)
    return {"num_inference_steps": STEPS, "true_cfg_scale": 1.0, "generator": chance, "progress": False}


def edit(model: nn.Module | QwenImagePipeline) -> Image.Image:
    """What a transformer, or a whole pipeline, makes of the scene."""
    pipe = pipe_with(model) if isinstance(model, nn.Module) else model
    return pipe.edit(given(), WISH, **settings())


def tokens() -> tuple[int, int]:
    """Rows and columns of the scene's tokens."""
    width, height = pipeline().resize_references([given()])[0][0].size
    return height // 16, width // 16


def noise() -> Tensor:
    """With which `edit` begins."""
    return starting_noise(*tokens(), torch.Generator().manual_seed(0))


def sigmas(steps: int = STEPS) -> Tensor:
    """The noise levels of that edit."""
    h, w = tokens()
    return get_sigmas(steps, h * w, **pipeline().schedule)


def apart(one: Image.Image, other: Image.Image) -> int:
    """The largest difference of two pictures, in steps of which 255 lead from black to white."""
    return int(np.abs(np.asarray(one, int) - np.asarray(other, int)).max())


def same(one: Image.Image, other: Image.Image) -> int:
    """That difference, said."""
    print(f"largest difference of an edit's pixels: {apart(one, other)} of 255")
    return apart(one, other)


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The length of the difference, as a share of theirs."""
    return ((ours - theirs).norm() / theirs.norm()).item()


@cache
def tasks() -> list[Edit]:
    """Edits of each kind in turn."""
    rng = np.random.default_rng(SEED)
    return [sample_edit(rng, list(KINDS)[k % len(KINDS)]) for k in range(COUNT)]


@cache
def prepared() -> tuple:
    """What a transformer is given for all of these at once: noise, clean tokens, words, mask, token grids."""
    pipe = pipeline()
    pictures, seen = zip(*(pipe.resize_references([task.source]) for task in tasks()), strict=True)
    prompts = [pipe.encode_prompt(task.instruction, look) for task, look in zip(tasks(), seen, strict=True)]
    clean = torch.cat([pack_latents(pipe.encode_image(each[0])) for each in pictures])
    w, h = (side // 16 for side in pictures[0][0].size)
    start = torch.cat([starting_noise(h, w, torch.Generator().manual_seed(k)) for k in range(COUNT)])
    return start, clean, *pad_prompts(prompts), [[(1, h, w)] * 2] * COUNT


@torch.inference_mode()
def velocity(model: nn.Module, latents: Tensor, sigma: float) -> Tensor:
    """Of all these edits."""
    _, clean, embeds, mask, shapes = prepared()
    levels = torch.full((COUNT,), sigma)
    return model(torch.cat([latents, clean], dim=1), embeds, mask, levels, shapes)[:, : latents.shape[1]]


def velocity_error(model: nn.Module) -> float:
    """How far a transformer's velocity is from the small model's, as a share of it."""
    start = prepared()[0]
    return relative(*(velocity(each, start, LEVEL) for each in (model, pipeline().transformer)))


def count_right(model: nn.Module) -> int:
    """How many of these edits are right."""
    start, _, _, _, [[(_, h, w), _], *_] = prepared()
    levels = get_sigmas(STEPS, h * w, **pipeline().schedule)
    latents = denoise(lambda x, sigma: velocity(model, x, sigma), start, levels)
    pictures = [pipeline().decode(each[None], 16 * w, 16 * h) for each in latents]
    return sum(judge(picture, task) for picture, task in zip(pictures, tasks(), strict=True))


def opened(way: str) -> QwenImagePipeline:
    """The small model as the library holds it: resident, turns or stream."""
    with redirect_stdout(StringIO()):  # a line that says what it needs
        return QwenImagePipeline.from_pretrained(TINY, device="cpu", memory=way)


def weights_in_memory() -> None:
    """In each way, the most bytes of weights that are there whenever a layer of an edit begins: not on the meta device.

    A table, activations, and a block that is on its way do not count.
    """
    for way in ("resident", "turns", "stream"):
        pipe, seen, hooks = opened(way), [], []
        parts = {name: pipe.turns.shells[name].module if pipe.turns else getattr(pipe, name) for name in PARTS}

        def look(*_, parts=parts, seen=seen) -> None:
            there = {name: [t for t in part.state_dict().values() if not t.is_meta] for name, part in parts.items()}
            seen.append({name: sum(t.numel() * t.itemsize for t in tensors) for name, tensors in there.items()})

        for part in parts.values():
            lists = [module for module in part.modules() if isinstance(module, nn.ModuleList)]
            hooks += [layer.register_forward_pre_hook(look) for each in lists for layer in each.children()]
        pipe.edit(given(), WISH, **settings() | {"num_inference_steps": 1})
        for hook in hooks:
            hook.remove()
        most = {name: max(each[name] for each in seen) / 1e6 for name in ("transformer", "vae")}
        told = f"transformer {most['transformer']:4.1f}, autoencoder {most['vae']:.1f}"
        print(f"{way:9} {max(sum(each.values()) for each in seen) / 1e6:4.1f} MB at the most; {told}")


def with_adapter(model: nn.Module) -> nn.Module:
    """The model with a random matrix of rank 1 added to each modulation layer of the picture."""
    adapted, chance = copy.deepcopy(model), torch.Generator().manual_seed(1)
    for block in adapted.transformer_blocks:
        weight = block.img_mod[1].weight  # (6C, C)
        A = torch.randn(1, weight.shape[1], generator=chance)
        B = torch.randn(len(weight), 1, generator=chance)
        weight.data += STRENGTH * B @ A
    return adapted


def opened_without(*without: str) -> QwenImagePipeline:
    """The small model, opened anew without some of its parts."""
    return QwenImagePipeline.from_pretrained(TINY, device="cpu", without=without, memory="resident")


@cache
def shells(bits: int) -> dict[str, Shell]:
    """The parts of the released model, as names and shapes."""
    return released(bits, "cuda")


@cache
def ways(bits: int, area: int = AREA) -> dict[str, Plan]:
    """Resident, turns, stream: what each needs for an edit of so many pixels."""
    return {plan.way: plan for plan in plans(shells(bits), area)}


def operations(side: int) -> float:
    """Of a guided step, an edit of so many pixels a side; the text encoder makes a token of 28 by 28 of them."""
    image, text = 2 * side**2 // 256, 64 + round(side / 28) ** 2
    return 2 * 60 * block_operations(3072, image, text)


def bytes_of(shell: Shell, wanted: Callable[[str], bool]) -> int:
    return sum(shell.size(name) for name in shell.stored if wanted(name))


def without_table(bits: int) -> int:
    """Bytes of a transformer whose modulation, and what nobody reads, stays away."""
    shell = shells(bits)["transformer"]
    unread = unread_layers(shell.stored)
    return bytes_of(shell, lambda name: MODULATION not in name and not name.startswith(unread))


def watched(walk: Callable, bus: float, compute: float, count: int = 6) -> list[tuple[str, int, float, float]]:
    """Who works on which block from when to when, in a walk whose blocks only sleep."""
    noted, begun = [], time.perf_counter()

    def work(lane: str, number: int, seconds: float) -> int:
        start = time.perf_counter()
        time.sleep(seconds)
        noted.append((lane, number, start - begun, time.perf_counter() - begun))
        return number

    for block in walk(lambda k: work("fetch", k, bus), count):
        work("compute", block, compute)
    return noted


# ---------------------------------------------------------------------------------------------------------- drawings


def bare(axes) -> None:
    for axis in np.ravel(axes):
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)


def where_the_bytes_lie() -> None:
    """The released model in gigabytes, beside what machines have."""
    image, text, vae = (shells(16)[name] for name in ("transformer", "text_encoder", "vae"))
    table = text.size("model.embed_tokens.weight")  # the last matrix, as large, is in the files and never used
    parts = [
        ("modulation", bytes_of(image, lambda n: MODULATION in n), RED),
        ("attention", bytes_of(image, lambda n: ".attn." in n), BLUE),
        ("MLPs", bytes_of(image, lambda n: "_mlp." in n), "#6f9fd0"),
        ("", bytes_of(image, lambda n: "transformer_blocks" not in n), GREY),
        ("language model", bytes_of(text, lambda n: "model.layers" in n or n == "model.norm.weight"), GREEN),
        ("words", table, "#8fc49a"),
        ("looks at\npictures", bytes_of(text, lambda n: n.startswith("visual")), "#2f6b3a"),
        ("not\nloaded", table, "white"),
        ("", bytes_of(vae, lambda n: True), ORANGE),
    ]
    places = {"words": 50.5, "looks at\npictures": 54.3, "not\nloaded": 58.5}
    figure, axis = plt.subplots(figsize=(9.4, 4))
    left = 0.0
    for name, size, colour in parts:
        axis.barh(0, size / 1e9, left=left, color=colour, height=0.7, edgecolor=GREY if colour == "white" else "white",
                  lw=0.8, hatch="////" if colour == "white" else "")  # fmt: skip
        if size > 5e9:
            axis.text(left + size / 2e9, 0, f"{name}\n{size / 1e9:.1f}", ha="center", va="center", color="white",
                      fontsize=9)  # fmt: skip
        elif name:
            axis.annotate(f"{name}\n{size / 1e9:.1f}", (left + size / 2e9, 0.35), (places[name], 0.75), ha="center",
                          va="top", fontsize=8, arrowprops={"arrowstyle": "-", "color": GREY})  # fmt: skip
        left += size / 1e9
    whole = {"transformer": sum(p[1] for p in parts[:4]), "text encoder": sum(p[1] for p in parts[4:8])}
    start = 0.0
    for name, size in whole.items():
        axis.plot([start + 0.1, start + size / 1e9 - 0.1], [-0.5, -0.5], color="black", lw=1)
        label = f"{name}, {size / 1e9:.1f} GB"
        axis.text(start + size / 2e9, -0.58, label, ha="center", va="bottom", fontsize=9)
        start += size / 1e9
    axis.text(left + 0.3, 0, f"autoencoder\n{parts[-1][1] / 1e9:.1f}", va="center", fontsize=8)
    rows = [("a laptop", 16e9, LIGHT["grey"]), ("a small graphics card", 8e9, LIGHT["grey"]),
            ("as released", ways(16)["resident"].peak, RED), ("4 bits, by turns", ways(4)["turns"].peak, ORANGE),
            ("4 bits, streamed", ways(4)["stream"].peak, ORANGE)]  # fmt: skip
    for y, (name, size, colour) in enumerate(rows, 1):
        y = 0.65 + y * 0.8 + (0.5 if y > 2 else 0)
        axis.barh(y, size / 1e9, color=colour, height=0.55, edgecolor=GREY, lw=0.6)
        told, wide = f"{name}: {size / 1e9:.1f} GB".replace(".0 GB", " GB"), size > 40e9
        axis.text(
            0.5 if wide else size / 1e9 + 0.5, y, told, va="center", fontsize=9, color="white" if wide else "black"
        )
    axis.text(35, 0.65 + 1.5 * 0.8, "memory of machines", va="center", fontsize=9, style="italic", color=GREY)
    axis.text(35, 0.65 + 4.5 * 0.8 + 0.5, "peak of an edit, 1024×1024 pixels", va="center", fontsize=9, style="italic",
              color=ORANGE)  # fmt: skip
    axis.set(xlim=(0, 64), ylim=(5.7, -0.95), xlabel="GB", yticks=[],
             title=f"the released model, {left:.1f} GB, to scale")  # fmt: skip
    axis.spines["left"].set_visible(False)
    plt.show()


def weights_and_work(weights: dict[str, int], products: dict[str, float]) -> None:
    """The blocks' weights and their multiplications, by kind, as shares."""
    figure, axis = plt.subplots(figsize=(9.2, 2.1))
    colours = {"mod": RED, "attention": BLUE, "mlp": "#6f9fd0"}
    names = {"mod": "modulation", "mlp": "MLP"}
    for y, (counts, of) in enumerate(((weights, "{:.1f} billion weights"), (products, "{:,.0f} billion"))):
        left, total = 0.0, sum(counts.values())
        for kind, colour in colours.items():
            share = 100 * counts[kind] / total
            axis.barh(y, share, left=left, color=colour, height=0.62)
            if share > 5:
                told = f"{names.get(kind, kind)}: {share:.0f} %\n" + of.format(counts[kind] / 1e9)
                axis.text(left + share / 2, y, told, ha="center", va="center", color="white", fontsize=9)
            else:
                told = f"modulation: {share:.3f} %, " + of.format(counts[kind] / 1e9)
                axis.annotate(told, (0.1, y + 0.31), (2, y + 0.62), fontsize=9, color=RED, va="center",
                              arrowprops={"arrowstyle": "-", "color": RED})  # fmt: skip
            left += share
    axis.set(yticks=(0, 1), xlim=(0, 100), ylim=(1.85, -0.45), xlabel="per cent of the 60 blocks")
    axis.set_yticklabels(["weights", "multiplications\nof a pass"], fontsize=9)
    plt.show()


def layer_and_table(W: Tensor, vectors: dict[float, Tensor], table: dict[float, Tensor]) -> None:
    """Left a layer and the only inputs that it will ever see; right its answers, which are fewer numbers."""
    figure, axis = plt.subplots(figsize=(9.2, 2.6))
    x = matrix(axis, W, 0, 3, LIGHT["red"], "the layer, W")
    axis.text(x + 0.4, 2, "·", ha="center", va="center", fontsize=18)
    for level, vector in vectors.items():
        x = matrix(axis, vector[:, None], x + 0.8, 3.5, LIGHT["grey"], f"σ = {level:g}")
    axis.annotate("", (x + 2.6, 2), (x + 0.4, 2), arrowprops={"arrowstyle": "->", "lw": 1.5})
    axis.text(x + 1.5, 2.2, "once", ha="center", fontsize=10)
    x = x + 4.3
    for k, (level, answer) in enumerate(table.items()):
        axis.text(x - 0.2, 2.5 - k, f"σ = {level:g}", ha="right", va="center", fontsize=10)
        right = matrix(axis, answer[None], x, 3 - k, LIGHT["orange"], "the table" if k == 0 else "")
    told = f"{W.numel()} numbers become {sum(map(len, table.values()))}"
    axis.text(right + 0.4, 2, told, va="center", fontsize=10, color=RED)
    axis.set(xlim=(-0.2, right + 4), ylim=(0.3, 4.2), aspect="equal")
    axis.axis("off")
    plt.show()


def rounding(weights: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, bits: int = 4) -> None:
    """Weights between the values that they may have, how far each is moved, and how many get each code."""
    figure = plt.figure(figsize=(9.4, 4.3))
    grid = figure.add_gridspec(2, 2, width_ratios=(2.1, 1), height_ratios=(2, 1))
    top, right = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[:, 1])
    below = figure.add_subplot(grid[1, 0], sharex=top)
    step, places = scale.item(), np.arange(len(weights))
    values = offset.item() + step * np.arange(2**bits)
    top.hlines(values, -1, len(weights), color=GREY, lw=0.5)
    top.plot(places, weights, "o", color=BLUE, ms=3.5)
    top.set(ylabel="weight", title=f"{len(weights)} weights, {2**bits} values (lines)")
    top.tick_params(labelbottom=False)
    below.bar(places, (offset + scale * codes - weights).numpy(), color=RED)
    for sign in (-1, 1):
        below.axhline(sign * step / 2, color=GREY, lw=0.8, ls="--")
    below.set(ylabel="moved by", xlabel="number of the weight", ylim=(-0.75 * step, 0.75 * step))
    below.text(len(weights) - 0.5, 0.53 * step, "half the scale", ha="right", fontsize=8, color=GREY)
    counts = np.bincount(codes.int(), minlength=2**bits)
    bars = right.barh(np.arange(2**bits), counts, color=BLUE)
    right.bar_label(bars, fontsize=8, padding=2)
    right.set(xlabel="weights with this code", ylabel="code", yticks=range(2**bits), title="the middle is crowded")
    plt.show()


def line_through(weights: Tensor, covering: Callable, fit: Callable, bits: int = 2) -> None:
    """The codes of weights, and the line that says which number a code stands for; and both ways on many groups."""
    figure, axes = plt.subplots(1, 3, figsize=(9.4, 3.1))
    codes, ways = np.arange(2**bits), {"range covered": (covering, GREY), "fitted": (fit, ORANGE)}
    many = 0.02 * torch.randn(4096, len(weights), generator=torch.Generator().manual_seed(0))

    def error(way: Callable, weights: Tensor, bits: int) -> tuple[float, Tensor]:
        scale, offset = way(weights, bits)
        q = ((weights - offset) / scale.clamp(min=1e-30)).round().clamp(0, 2**bits - 1)
        return relative(offset + scale * q, weights), q

    for k, (axis, name) in enumerate(zip(axes, ways, strict=False)):
        way, colour = ways[name]
        scale, offset = way(weights, bits)
        off, q = error(way, weights, bits)
        axis.plot(codes, offset.item() + scale.item() * codes, color=colour, lw=2)
        axis.plot(q, weights, "o", color=BLUE, ms=4, alpha=0.7)
        axis.set(xlabel="code", title=f"{name}: off by {off:.1%}", xticks=codes)
        axis.set_ylim(1.2 * weights.min(), 1.2 * weights.max())
        values = [100 * error(way, many, few)[0] for few in (4, 3, 2)]
        bars = axes[2].bar(np.arange(3) + 0.4 * k - 0.2, values, 0.38, color=colour, label=name)
        axes[2].bar_label(bars, fmt="%.1f", fontsize=8, padding=1)
    axes[0].set_ylabel("weight (dot), value of the code (line)")
    axes[2].set(xticks=range(3), xticklabels=("4 bits", "3 bits", "2 bits"), ylabel="relative error, per cent",
                title=f"{len(many):,} groups")  # fmt: skip
    axes[2].legend(loc="upper left")
    plt.show()


def errors_by_group(errors: dict[str, tuple[float, float]]) -> None:
    """The relative error of 4 bits, by how many weights share a scale, without and with large weights."""
    figure, axis = plt.subplots(figsize=(9.2, 2.8))
    for k, (label, colour) in enumerate((("as drawn", BLUE), ("one in 500 is large", RED))):
        values = [100 * error[k] for error in errors.values()]
        bars = axis.bar(np.arange(len(values)) + 0.4 * k - 0.2, values, 0.38, color=colour, label=label)
        axis.bar_label(bars, fmt="%.0f", fontsize=8, padding=1)
    axis.set(xticks=range(len(errors)), ylabel="error of the ordinary\nweights, per cent",
             xlabel="one scale and one offset for", title="4 bits: who shares a scale with a large weight")  # fmt: skip
    axis.set_xticklabels(list(errors), fontsize=9)
    axis.margins(y=0.12)
    axis.legend(loc="upper right")
    plt.show()


def edits_at(models: dict[int, nn.Module]) -> None:
    """The same edit by models of fewer bits, what their velocities are off by, and how many edits are right."""
    figure, axes = plt.subplots(1, 2 + len(models), figsize=(9.4, 2.6))
    whole = pipeline().transformer
    pictures = [given(), edit(whole), *(edit(model) for model in models.values())]
    titles = ["given\n\n", f"as it is\n\n{count_right(whole)} of {COUNT} right"]
    for bits, model in models.items():
        told = f"velocity off by {velocity_error(model):.1%}\n"
        told += f"{count_right(model)} of {COUNT} right"
        titles.append(f"{bits} bits\n{told}")
    for axis, picture, title in zip(axes, pictures, titles, strict=True):
        axis.imshow(picture)
        axis.set_title(title, fontsize=8.5)
    bare(axes)
    plt.show()


def memory_over_time() -> None:
    """What is in memory from the first word to the finished picture, in three ways: weights, activations, table."""
    phases = ["read the words,\nencode the picture", "the steps", "decode"]
    edges = np.array([0, 1.3, 4, 5.1])
    figure, axis = plt.subplots(figsize=(9.4, 3.3))
    drawing = 2 * PIXEL * AREA  # the autoencoder's activations
    for bits, colour in ((16, BLUE), (4, ORANGE)):
        text, vae = (bytes_of(shells(bits)[name], lambda name: True) for name in ("text_encoder", "vae"))
        values = np.array([text + vae + drawing, ways(bits)["turns"].peak, vae + drawing]) / 1e9
        axis.stairs(values, edges, color=colour, lw=2.2, label=f"by turns, {BITS[bits]}")
        for k in range(2 if bits == 16 else 3):
            middle = (edges[k] + edges[k + 1]) / 2
            axis.text(middle, values[k] + 1.2, f"{values[k]:.1f} GB", ha="center", fontsize=9, color=colour)
    resident = ways(16)["resident"].peak / 1e9
    axis.stairs([resident], [0, edges[-1]], color=GREY, lw=2.2, label="all at once, as released")
    axis.text(2.65, resident - 4, f"{resident:.1f} GB", ha="center", fontsize=9, color=GREY)
    axis.axhline(16, color=RED, ls="--", lw=1, zorder=0)
    axis.text(edges[-1] - 0.03, 17, "a laptop's 16 GB", ha="right", fontsize=9, color=RED)
    for k in range(1, 3):
        axis.axvline(edges[k], color=GREY, lw=0.5, ls=":")
    axis.set(xticks=(edges[1:] + edges[:-1]) / 2, ylabel="GB", ylim=(0, 72), xlim=(0, edges[-1]),
             title="memory during an edit of 1024×1024 pixels (widths are not to scale)")  # fmt: skip
    axis.set_xticklabels(phases, fontsize=9)
    axis.legend(loc="upper center", ncols=3)
    plt.show()


def lanes(walk: Callable) -> None:
    """When the bus works and when the processor does, as it is measured: blocks that come fast, and slowly."""
    runs = {"slow arithmetic": watched(walk, 0.05, 0.1), "slow bus": watched(walk, 0.1, 0.05)}
    figure, axes = plt.subplots(len(runs), 1, figsize=(9.4, 3.4), sharex=True)
    for axis, (name, noted) in zip(axes, runs.items(), strict=True):
        for lane, number, start, end in noted:
            y, colour = (1, ORANGE) if lane == "fetch" else (0, BLUE)
            axis.barh(y, end - start, left=start, height=0.72, color=colour, edgecolor="white", lw=1.5)
            axis.text((start + end) / 2, y, str(number), ha="center", va="center", color="white", fontsize=9)
        last = max(end for *_, end in noted)
        axis.axvline(last, color=RED, lw=1)
        axis.text(last + 0.01, 0.5, f"{last:.2f} s", color=RED, va="center", fontsize=9)
        axis.set(yticks=(0, 1), ylim=(-0.5, 1.5), title=name)
        axis.set_yticklabels(["compute block", "fetch block"], fontsize=9)
    axis.set(xlabel="seconds", xlim=(0, 1.1 * max(end for noted in runs.values() for *_, end in noted)))
    plt.show()


def bus_and_arithmetic() -> None:
    """Seconds a step for the arithmetic and for the blocks' way over the bus, by the side of the picture."""
    figure, axes = plt.subplots(1, len(MACHINES), figsize=(9.4, 2.9))
    for axis, machine in zip(axes, MACHINES, strict=True):
        arithmetic = np.array([operations(int(side)) / machine.rate for side in SIDES])
        bus = np.full(len(SIDES), ways(16)["stream"].fetched / machine.link)
        axis.plot(SIDES, arithmetic, color=BLUE, lw=2, label="arithmetic")
        axis.plot(SIDES, bus, color=ORANGE, lw=2, label="blocks over the bus")
        axis.fill_between(SIDES, arithmetic, bus, where=bus > arithmetic, color=ORANGE, alpha=0.25,
                          label="waits for the bus")  # fmt: skip
        axis.axvline(1024, color=GREY, lw=0.8, ls=":")
        axis.set(title=machine.name, xlabel="side of the picture, pixels", ylim=(0, None), xticks=(512, 1024, 1536))
    axes[0].set_ylabel("seconds a guided step")
    axes[0].legend(loc="upper left", fontsize=8)
    plt.show()


def what_fits() -> None:
    """The peak of every way at 16, 8 and 4 bits, and the memory of some machines."""
    figure, axis = plt.subplots(figsize=(9.4, 3.6))
    colours, y, ticks = {16: BLUE, 8: GREEN, 4: ORANGE}, 0, {}
    for bits, name in BITS.items():
        for way, plan in ways(bits).items():
            axis.barh(y, plan.peak / 1e9, color=colours[bits], height=0.7)
            axis.text(plan.peak / 1e9 + 0.5, y, f"{plan.peak / 1e9:.1f}", va="center", fontsize=8,
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})  # fmt: skip
            ticks[y] = f"{name}: {way}"
            y += 1
        y += 0.5
    for size in (8, 16, 24, 80):
        axis.axvline(SPARE * size, color=RED, lw=1, ls="--", zorder=0)
        told = f"{SPARE:.0%} of\n{size} GB" if size < 10 else f"of\n{size} GB"
        axis.text(SPARE * size, -0.75, told, ha="center", fontsize=9, color=RED)
    axis.set(
        yticks=list(ticks), ylim=(y - 0.4, -0.7), xlim=(0, 80), xlabel="GB at the peak, an edit of 1024×1024 pixels"
    )
    axis.set_yticklabels(list(ticks.values()), fontsize=9)
    plt.show()


def old_table(models: dict[str, nn.Module]) -> None:
    """Edits from the same noise, and how far each is from the first."""
    figure, axes = plt.subplots(1, len(models), figsize=(9.4, 2.9))
    pictures = [edit(model) for model in models.values()]
    for axis, name, picture in zip(axes, models, pictures, strict=True):
        axis.imshow(picture)
        told = f"up to {apart(picture, pictures[0])} of 255 from the first" if picture is not pictures[0] else ""
        axis.set_title(f"{name}\n{told}", fontsize=9.5)
    bare(axes)
    plt.show()


def several_cards(block: int, keys: int, result: int) -> None:
    """Four cards: who holds and who borrows what in training, and what moves in an edit; sizes are in bytes."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.4, 4.4), width_ratios=(1, 1.15))
    colours, cards, blocks, now = (BLUE, GREEN, ORANGE, RED), 4, 5, 2
    for card in range(cards):
        left.text(card + 0.45, -0.35, f"card {card}", ha="center", fontsize=9, color=colours[card])
        for row in range(blocks):
            for part, colour in enumerate(colours):
                own, borrowed = part == card, row == now
                left.add_patch(plt.Rectangle((card + part * 0.225, row), 0.225, 0.72, edgecolor=GREY, lw=0.6,
                                             facecolor=colour if own or borrowed else "white",
                                             alpha=0.4 if borrowed and not own else 1))  # fmt: skip
    for row in range(blocks):
        told = f"block {row}\nat work" if row == now else f"block {row}"
        left.text(-0.1, row + 0.36, told, ha="right", va="center", fontsize=8.5)
    told = "dark: a quarter of every matrix, always there\npale: borrowed while the block works\n"
    told += f"{block / 1e9:.2f} GB a block, "
    left.text(
        1.95, blocks + 0.55, told + f"{block * 3 / 4 / 1e9:.2f} of them come", ha="center", va="center", fontsize=9
    )
    left.set(xlim=(-0.75, 4), ylim=(blocks + 1.2, -1.3), title="training: matrices move")
    for half, words in enumerate(("the prompt", "the empty prompt")):
        y = 2.6 * half
        right.add_patch(plt.Rectangle((-0.2, y - 0.55), 4.9, 1.75, facecolor=LIGHT["grey"], edgecolor="none"))
        right.text(2.25, y - 0.3, f"the pass with {words}", ha="center", va="center", fontsize=9)
        for k in range(2):
            card, x = 2 * half + k, 3 * k
            right.add_patch(plt.Rectangle((x, y), 1.5, 1, facecolor=colours[card], edgecolor="none"))
            told = f"card {card}\n{'first' if k == 0 else 'second'} half of\nthe picture"
            right.text(x + 0.75, y + 0.5, told, ha="center", va="center", color="white", fontsize=8.5)
        right.annotate("", (2.95, y + 0.45), (1.55, y + 0.45), arrowprops={"arrowstyle": "<->", "lw": 1.5})
        right.text(2.25, y + 0.36, "keys, values", ha="center", va="bottom", fontsize=8.5)
        right.text(2.25, y + 0.54, f"{keys / 1e6:.0f} MB\neach way,\neach block", ha="center", va="top", fontsize=8)
    right.annotate("", (2.25, 2.0), (2.25, 1.25), arrowprops={"arrowstyle": "<->", "lw": 1.5})
    told = f"results of the passes, {result / 1e6:.1f} MB each, once a step"
    right.text(2.4, 1.62, told, va="center", ha="left", fontsize=8.5)
    right.set(xlim=(-0.3, 5.4), ylim=(4.2, -0.9), title="an edit: tokens move")
    bare((left, right))
    plt.show()

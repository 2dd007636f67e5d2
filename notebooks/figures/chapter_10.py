"""Figures of chapter 10: two thin matrices beside a large one, and what the small model learns with them.

The training set is data/finetune; the model is data/tiny, of which `fresh` gives a copy whose weights may be changed.
What depends on them stands in the constants. Adapters are told by what a caller hands over; nothing here knows how they
are built.
"""

import copy
import textwrap
from collections.abc import Sequence
from functools import cache
from itertools import zip_longest

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from course import BLUE, GREEN, GREY, ORANGE, RED, ROOT, matrix
from figures.small_model import model as pipeline
from minqwen.finetune import flow_loss, make_batch
from minqwen.lora import load_lora
from minqwen.pipeline import QwenImagePipeline
from minqwen.precompute import Sample, encode_sample, find_sources
from minqwen.transformer import QwenImageTransformer2DModel
from minqwen.world import HELD_BACK, KINDS, Edit, sample_edit

SET = ROOT / "data/finetune"
FILE = SET / f"{HELD_BACK}_lora.safetensors"  # made by the two commands of the README, from all of the set
PAIRS, HELD = 48, 16  # samples of the new kind and of all old ones to train on; as many not to train on
LEVELS = (0.8, 0.95)  # noise levels at which a loss is measured
AT = "σ = " + " and ".join(map(str, LEVELS))
EDIT_STEPS = 1  # of an edit, without guidance: enough for the small model (chapter 09)
SEED = 7 * 10**8  # of scenes that no training uses

RELEASED = 20_430_401_088  # numbers in the released transformer; the appendix counts them
WIDTH, BLOCKS, RANK = 3072, 60, 16  # of the released model; the usual rank
ADAPTED = ("to_q", "to_k", "to_v", "to_out.0")  # in each block, of the picture's stream
LIGHT = {"blue": "#dceaf7", "green": "#dcefdc", "orange": "#fbe3c3", "grey": "#eeeeee"}


# ------------------------------------------------------------------------------------------------------ instruments


def fresh() -> QwenImageTransformer2DModel:
    """The small model as it was shipped, to be changed."""
    return copy.deepcopy(pipeline().transformer)


@cache
def taught() -> QwenImageTransformer2DModel:
    """The small model with the file of data/finetune."""
    model = fresh()
    load_lora(model, FILE)
    return model


def pipe_with(transformer: nn.Module) -> QwenImagePipeline:
    """The small model's pipeline with another transformer."""
    pipe = copy.copy(pipeline())
    pipe.transformer = transformer
    return pipe


def edit(model: nn.Module, task: Edit, seed: int = 0, steps: int = EDIT_STEPS) -> Image.Image:
    """What a transformer makes of a task."""
    settings = {"num_inference_steps": steps, "true_cfg_scale": 1.0, "progress": False}
    return pipe_with(model).edit(
        task.source, task.instruction, generator=torch.Generator().manual_seed(seed), **settings
    )


@cache
def tasks(count: int, kind: str = HELD_BACK) -> list[Edit]:
    """Tasks of a kind from outside the set, with more than one thing, in English: matplotlib has no Chinese letters."""
    rng, found = np.random.default_rng(SEED), []
    while len(found) < count:
        task = sample_edit(rng, kind)
        if task.instruction.isascii() and len(task.scene.things) > 1:
            found.append(task)
    return found


def example() -> Edit:
    """The task that is shown while a model learns: a banana, a rocket and a pizza, which all have to move."""
    return tasks(9)[8]


@cache
def all_samples(pairs: int) -> tuple[list[Sample], list[Sample]]:
    """Of the set, the first samples of the new kind, and as many of the old kinds, one of each in turn."""
    sources = find_sources(SET / "images", SET / "control", pipeline().area)
    by_kind = {kind: [s for s in sources if s.name.startswith(f"{kind}_")] for kind in (HELD_BACK, *KINDS)}
    new, count = by_kind.pop(HELD_BACK), pairs + HELD
    old = [source for row in zip_longest(*by_kind.values()) for source in row if source]
    return tuple([encode_sample(pipeline(), s, pipeline().area) for s in part[:count]] for part in (new, old))


def samples(pairs: int = PAIRS) -> list[Sample]:
    """What the lesson trains on: edits of the new kind and, as many, of the old ones."""
    new, old = all_samples(pairs)
    return new[HELD:] + old[HELD:]


def held() -> dict[str, list[Sample]]:
    """What it does not train on."""
    new, old = all_samples(PAIRS)
    return {"new": new[:HELD], "old": old[:HELD]}


@torch.no_grad()
def loss_on(model: nn.Module, chosen: Sequence[Sample], levels: Sequence[float] = LEVELS) -> float:
    """The mean loss on some samples at some noise levels, always with the same noise."""
    batch = make_batch(chosen)
    noise = torch.randn(batch.target.shape, generator=torch.Generator().manual_seed(1))
    return torch.stack([flow_loss(model, batch, torch.full((len(chosen),), s), noise) for s in levels]).mean().item()


def losses_of(model: nn.Module) -> dict[str, float]:
    """The loss on the new kind and on the old ones, of samples that were not trained on."""
    return {name: loss_on(model, chosen) for name, chosen in held().items()}


# ---------------------------------------------------------------------------------------------------------- drawings


def said(task: Edit, width: int = 24) -> str:
    return textwrap.fill(f"“{task.instruction}”", width)


def bare(axes) -> None:
    for axis in np.ravel(axes):
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)


def before_and_after(count: int = 4) -> None:
    """Pictures, what the model makes of an instruction that it was never taught, and the same with the adapter."""
    figure, axes = plt.subplots(3, count, figsize=(2.2 * count + 0.4, 6.4))
    for column, task in enumerate(tasks(count)):
        for row, picture in enumerate((task.source, edit(fresh(), task), edit(taught(), task))):
            axes[row, column].imshow(picture)
        axes[0, column].set(title=said(task))
    for axis, name in zip(axes[:, 0], ("given", "the model\nas it is", "with the\nadapter"), strict=True):
        axis.set_ylabel(name, fontsize=10, rotation=0, ha="right", va="center")
    bare(axes)
    plt.show()


def adapter_numbers(rank: int = RANK) -> int:
    """Of the released model: A and B beside four layers of each block."""
    return BLOCKS * len(ADAPTED) * rank * 2 * WIDTH


def memory() -> None:
    """What has to be kept to train the released model: all of it, or adapters beside frozen weights."""
    ours = adapter_numbers()
    parts = {  # bytes for each number
        "every weight": [("weights", 4 * RELEASED), ("gradient", 4 * RELEASED), ("optimiser", 8 * RELEASED)],
        f"adapters\nof rank {RANK}": [("frozen weights", 2 * RELEASED), ("everything\nfor A and B", 16 * ours)],
    }
    figure, axis = plt.subplots(figsize=(9.2, 2.2))
    for y, pieces in enumerate(parts.values()):
        left = 0.0
        for (piece, size), colour in zip(pieces, (BLUE, ORANGE, RED), strict=False):
            axis.barh(y, size / 1e9, left=left, color=colour, alpha=0.85, height=0.62)
            wide = size > 3e10
            text = f"{piece}\n{size / 1e9:.0f} GB" if wide else f"{piece}: {size / 1e9:.1f} GB"
            x = left + size / 2e9 if wide else left + size / 1e9 + 3
            axis.text(x, y, text, ha="center" if wide else "left", va="center", color="white" if wide else "black",
                      fontsize=9)  # fmt: skip
            left += size / 1e9
    axis.set(yticks=range(len(parts)), xlabel="memory, GB", title="to train the released model")
    axis.set_yticklabels(list(parts), fontsize=9)
    axis.invert_yaxis()
    plt.show()


def width_of_small() -> int:
    config = pipeline().transformer.config
    return config["num_attention_heads"] * config["attention_head_dim"]


def rank_one(W: Tensor, B: Tensor, A: Tensor, scale: float) -> None:
    """W plus a column times a row: the change has as many numbers as W, and is made of six."""
    figure, axis = plt.subplots(figsize=(9.2, 2.5))
    x = matrix(axis, W, 0, 3, LIGHT["blue"], "W, frozen")
    axis.text(x + 0.8, 1.5, f"+  {scale:g} ×", ha="center", va="center", fontsize=13)
    x = matrix(axis, B, x + 1.7, 3, LIGHT["orange"], "B")
    x = matrix(axis, A, x + 0.4, 3, LIGHT["orange"], "A")
    axis.text(x + 0.6, 1.5, "=", ha="center", va="center", fontsize=13)
    x = matrix(axis, W, x + 1.2, 3, LIGHT["blue"], "W")
    axis.text(x + 0.6, 1.5, "+", ha="center", va="center", fontsize=13)
    x = matrix(axis, scale * B @ A, x + 1.2, 3, LIGHT["orange"], f"{scale:g} × B A")
    axis.text(x + 0.6, 1.5, "=", ha="center", va="center", fontsize=13)
    x = matrix(axis, W + scale * B @ A, x + 1.2, 3, LIGHT["green"], "what it does now")
    axis.set(xlim=(-0.2, x + 0.2), ylim=(-0.2, 3.8), aspect="equal")
    axis.axis("off")
    plt.show()


def errors_by_rank(errors: dict[str, tuple[float, float]]) -> None:
    """For each way to learn: the mean square error on the examples, and on new ones."""
    figure, axis = plt.subplots(figsize=(9.2, 2.8))
    for x, (known, new) in enumerate(errors.values()):
        label = None if x else ("its own examples, noisy answers", "new examples, true answers")
        bars = axis.bar([x - 0.2, x + 0.2], [known, new], 0.38, color=[GREY, RED], label=label)
        axis.bar_label(bars, fmt="%.1f", fontsize=8, padding=1)
    axis.set(xticks=range(len(errors)), ylabel="mean square error", title="how wrong the changed layer is")
    axis.set_xticklabels(list(errors), fontsize=9)
    axis.legend()
    plt.show()


def beside_each_other(rank: int) -> None:
    """W with A and B beside it, to scale, for a layer of the small model and one of the released model."""
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 3.6))
    for axis, C, r, name in zip(axes, (width_of_small(), WIDTH), (rank, RANK), ("small", "released"), strict=True):
        thin = r / C
        axis.add_patch(plt.Rectangle((0, 0), 1, 1, facecolor=LIGHT["blue"], edgecolor=GREY))
        axis.add_patch(plt.Rectangle((1.35, 0), thin, 1, facecolor=ORANGE))
        axis.add_patch(plt.Rectangle((1.65, 1 - thin), 1, thin, facecolor=ORANGE))
        axis.text(0.5, 0.5, f"W\n{C} × {C}\n{C * C:,} numbers\nfrozen", ha="center", va="center", fontsize=10)
        axis.text(1.35 + thin / 2, -0.05, f"B\n{C} × {r}", ha="center", va="top", fontsize=10)
        axis.text(2.15, 0.92 - thin, f"A\n{r} × {C}", ha="center", va="top", fontsize=10)
        axis.text(2.15, 0.3, f"A and B: {2 * r * C:,} numbers,\n{2 * r / C:.1%} of W", ha="center", va="center",
                  fontsize=10, color=RED)  # fmt: skip
        axis.text(1.17, 0.5, "+", ha="center", va="center", fontsize=14)
        axis.set(xlim=(-0.05, 2.7), ylim=(-0.3, 1.05), aspect="equal", title=f"a layer of the {name} model, rank {r}")
        axis.axis("off")
    plt.show()


def three_starts(W: Tensor, change: Tensor, rank: int = 2, steps: int = 80) -> None:
    """The toy's loss while it learns, from three ways to begin."""
    n = len(W)
    chance = torch.Generator().manual_seed(5)
    x = torch.randn(64, n, generator=chance)
    y = x @ (W + change).T
    figure, axis = plt.subplots(figsize=(9.2, 2.7))
    starts = {"A and B random": (1, 1, BLUE), "A and B zero": (0, 0, RED), "A random, B zero": (1, 0, GREEN)}
    for name, (a, b, colour) in starts.items():
        A = (a * torch.randn(rank, n, generator=chance) / rank).requires_grad_()
        B = (b * torch.randn(n, rank, generator=chance)).requires_grad_()
        optimizer, losses = torch.optim.Adam([A, B], lr=0.05), []
        for _ in range(steps):
            loss = (x @ (W + B @ A).T - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        axis.plot(losses, color=colour, lw=2, label=name)
        axis.plot(0, losses[0], "o", color=colour)
    with torch.no_grad():
        axis.axhline((x @ change.T).square().mean(), color=GREY, ls=":", lw=1, label="the layer as it was")
    axis.set(
        xlabel="step",
        ylabel="loss",
        title="three ways to begin, on a toy like the one above",
        ylim=(0, None),
        xlim=(-2, None),
    )
    axis.legend(ncols=2)
    plt.show()


def where() -> None:
    """The linear layers of a block, and which of them get an adapter."""
    figure, axis = plt.subplots(figsize=(9.4, 2.9))
    picture = ["img_mod", *ADAPTED, "img_mlp\nnet.0", "img_mlp\nnet.2"]
    text = ["txt_mod", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "txt_mlp\nnet.0", "txt_mlp\nnet.2"]
    streams = {"picture": (1.25, LIGHT["blue"], picture), "text": (0, LIGHT["green"], text)}
    axis.add_patch(plt.Rectangle((0.52, -0.45), 3.96, 2.2, facecolor=LIGHT["grey"], edgecolor="none"))
    axis.text(2.5, 1.83, "attention", ha="center", fontsize=10)
    axis.text(0, 1.83, "modulation", ha="center", fontsize=10)
    axis.text(5.5, 1.83, "MLP", ha="center", fontsize=10)
    for stream, (y, colour, names) in streams.items():
        axis.text(-0.55, y, f"{stream}\nstream", ha="right", va="center", fontsize=10)
        for x, name in enumerate(names):
            axis.add_patch(plt.Rectangle((x - 0.4, y - 0.3), 0.8, 0.6, facecolor=colour, edgecolor=GREY))
            axis.text(x, y, name, ha="center", va="center", fontsize=9)
            if stream == "picture" and name in ADAPTED:
                axis.add_patch(plt.Rectangle((x + 0.28, y - 0.3), 0.04, 0.6, facecolor=ORANGE))
                axis.add_patch(plt.Rectangle((x - 0.4, y + 0.25), 0.8, 0.05, facecolor=ORANGE))
    axis.set(xlim=(-1.4, 6.5), ylim=(-0.5, 2.1))
    axis.axis("off")
    plt.show()


def error_by_level(model: nn.Module, levels: Sequence[float] = (0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 1)) -> None:
    """How wrong the guessed picture is at single noise levels, of the new kind and of the old ones."""
    figure, axis = plt.subplots(figsize=(7.5, 2.9))
    for name, colour, label in (("new", RED, "the new kind"), ("old", GREY, "kinds that it knows")):
        curve = [level**2 * loss_on(model, held()[name], (level,)) for level in levels]
        axis.plot(levels, curve, "o-", color=colour, label=label)
    axis.set(xlabel="noise level σ", ylabel="square error of the guessed picture", ylim=(0, None),
             title="before training: where the model does not know the answer")  # fmt: skip
    axis.legend()
    plt.show()


def course_of(pictures: dict[int, Image.Image], losses: dict[int, dict[str, float]], task: Edit) -> None:
    """One edit at some steps of a training, and the losses on samples that are not trained on."""
    figure = plt.figure(figsize=(9.4, 4.4))
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.05, 1))
    axes = top.subplots(1, 1 + len(pictures))
    titles = [f"given: {said(task, 20)}", *(f"after {step} steps" if step else "before" for step in pictures)]
    for axis, picture, title in zip(axes, (task.source, *pictures.values()), titles, strict=True):
        axis.imshow(picture)
        axis.set(title=title)
    bare(axes)
    axis = bottom.subplots()
    for key, colour, label in (("new", RED, "the new kind"), ("old", GREY, "kinds that it knows")):
        axis.plot(list(losses), [each[key] for each in losses.values()], "o-", color=colour, lw=2, label=label)
    axis.set(xlabel="step", ylabel="loss", ylim=(0, None), title=f"on samples that are not trained on, {AT}")
    axis.legend()
    plt.show()


def row(rank: int | str, trained: Sequence[Tensor], seconds: float, model: nn.Module) -> dict:
    """A line of the sweep's table; of a full fine-tune the rank is no number."""
    numbers, adapter = sum(p.numel() for p in trained), isinstance(rank, int)
    share = 2 * rank / width_of_small() if adapter else 1  # of a square layer: A and B have 2 r C of C C numbers
    size = numbers * (4 if adapter else 2)  # bytes: adapters are kept in float32, whole weights in bf16
    losses = losses_of(model) | {"picture": edit(model, example())}
    return {"rank": rank, "numbers": numbers, "share": share, "size": size, "seconds": seconds, **losses}


def sweep(rows: Sequence[dict]) -> None:
    """The table of a sweep, an edit of each model, and the losses beside those before training."""
    before = losses_of(fresh())
    heads = ("rank", "trained numbers", "of a layer", "file, MB", "CPU seconds", "loss, new kind", "loss, old kinds")
    lines = [heads]
    for each in rows:
        line = (each["rank"], f"{each['numbers']:,}", f"{each['share']:.0%}", f"{each['size'] / 1e6:.2f}")
        lines.append((*line, f"{each['seconds']:.0f}", f"{each['new']:.3f}", f"{each['old']:.3f}"))
    lines.append(("before", "", "", "", "", f"{before['new']:.3f}", f"{before['old']:.3f}"))
    for line in lines:
        print("   ".join(str(cell).rjust(max(6, len(head))) for cell, head in zip(line, heads, strict=True)))
    names, task = ["before", *(str(each["rank"]) for each in rows)], example()
    figure = plt.figure(figsize=(9.2, 5.0))
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.35))
    pictures = top.subplots(1, len(rows) + 1)
    titles = [f"given: {said(task, 20)}", *(f"rank {name}" if name != "all" else "all weights" for name in names[1:])]
    for axis, picture, title in zip(pictures, (task.source, *(each["picture"] for each in rows)), titles, strict=True):
        axis.imshow(picture)
        axis.set_title(title, fontsize=9)
    bare(pictures)
    axes = bottom.subplots(1, 2)
    new, old = ("new", RED, "loss of the new kind"), ("old", GREY, "loss of the old kinds (another scale)")
    for axis, (key, colour, title) in zip(axes, (new, old), strict=True):
        bars = axis.bar(names, [before[key], *(each[key] for each in rows)], color=colour)
        bars[0].set_alpha(0.4)
        axis.set(xlabel="rank", ylabel="loss", title=title)
    plt.show()


def truncated(before: dict[str, Tensor], after: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The weights after a training of which every matrix keeps the `rank` strongest directions of its change alone."""
    kept = dict(after)
    for name, (U, S, V) in directions(before, after).items():
        kept[name] = before[name] + (U[:, :rank] * S[:rank]) @ V[:rank]
    return kept


def directions(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, tuple[Tensor, ...]]:
    """The singular value decomposition of the change of each matrix."""
    return {
        name: torch.linalg.svd(tensor - before[name], full_matrices=False)
        for name, tensor in after.items()
        if tensor.ndim == 2
    }


def what_it_changed(before: nn.Module, after: nn.Module, ranks: Sequence[int] = (0, 1, 2, 4, 16)) -> None:
    """How much of a full fine-tune's change the strongest directions hold, and the loss with them alone."""
    start = {name: tensor.clone() for name, tensor in before.state_dict().items()}
    end = {name: tensor.clone() for name, tensor in after.state_dict().items()}
    model, losses = copy.deepcopy(after), []
    for rank in ranks:
        model.load_state_dict(truncated(start, end, rank))
        losses.append(loss_on(model, held()["new"]))
    shares = {"change": [], "W": []}
    for name, (_, change, _) in directions(start, end).items():
        if name.removesuffix(".weight").endswith(ADAPTED):
            for key, values in (("change", change), ("W", torch.linalg.svdvals(start[name]))):
                shares[key].append(values.square().cumsum(0) / values.square().sum())
    figure, axes = plt.subplots(1, 2, figsize=(9.4, 2.9))
    for key, colour, label in (("change", ORANGE, "of the change"), ("W", BLUE, "of W itself")):
        curve = torch.stack(shares[key]).mean(0)
        axes[0].plot(range(1, len(curve) + 1), curve, color=colour, lw=2, label=label)
    axes[0].set(xlabel="strongest directions that are kept", ylabel="share of the sum of squares", ylim=(0, 1.02),
                xlim=(0, None), title="the attention matrices that we adapt")  # fmt: skip
    axes[0].legend(loc="lower right")
    names = [str(rank) if rank else "0: biases\nand norms" for rank in ranks] + ["all"]
    bars = axes[1].bar(names, [*losses, loss_on(after, held()["new"])], color=ORANGE)
    axes[1].bar_label(bars, fmt="%.3f", fontsize=8)
    axes[1].set(xlabel="directions kept of the change of each matrix", ylabel="loss, new kind",
                title="every matrix of the model, its change cut down")  # fmt: skip
    plt.show()


def scale_forgotten(task: Edit, right: nn.Module, wrong: nn.Module, times: float) -> None:
    """An edit as it is meant, and with adapters that are too strong."""
    figure, axes = plt.subplots(1, 4, figsize=(9.2, 2.9))
    pictures = (task.source, edit(fresh(), task), edit(right, task), edit(wrong, task))
    ignored = f"adapter, alpha ignored:\n{times:g} times too strong"
    titles = (f"given: {said(task)}", "no adapter", "adapter, alpha read", ignored)
    for axis, picture, title in zip(axes, pictures, titles, strict=True):
        axis.imshow(picture)
        axis.set(title=title)
    bare(axes)
    plt.show()


def apart(one: nn.Module, other: nn.Module, task: Edit) -> int:
    """The largest difference between two models' edits, in levels of 255."""
    a, b = (np.asarray(edit(model, task), int) for model in (one, other))
    return int(np.abs(a - b).max())

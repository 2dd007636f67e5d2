"""Figures of chapter 03: who listens to whom.

Those of the trained model come from data/tiny, a small model of the same architecture. Its attention is read by putting
another function in the place of PyTorch's (`watched`), its wires are cut in the same way (`cut`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from unittest.mock import patch

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from course import BLUE, GREEN, GREY, ORANGE, RED, show
from figures.small_model import WISH, given, model
from minqwen import attention as library
from minqwen.prompt import EDIT, tokenize_prompts
from minqwen.world import PLACES

WORD = "fox"  # of WISH
WISHES = {  # and where the fox is wanted
    WISH: "top left",
    "replace the cake with a fox": "bottom right",
    "add a fox at the top right": "top right",
}
SIDE = 6  # tokens on a side of the picture
PICTURE = SIDE * SIDE  # its tokens
STEPS = 8  # of an edit
NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
LIGHT = {"words": "#dcefdc", "picture": "#dceaf7", "both": "#fff3d6"}


# ------------------------------------------------------------------------------------------------------ instruments


def edit(
    wish: str = WISH, picture: Image.Image | None = None, steps: int = STEPS, guidance: float = 1.0
) -> Image.Image:
    """The edit of a picture, always from the same noise."""
    settings = {"num_inference_steps": steps, "true_cfg_scale": guidance, "progress": False}
    return model().edit(picture or given(), wish, generator=torch.Generator().manual_seed(0), **settings)


def words_of(wish: str = WISH, picture: Image.Image | None = None) -> list[str]:
    """The tokens of the text stream: the given picture as the text encoder sees it, the words, the template's end."""
    pipe = model()
    tokens = tokenize_prompts(pipe.tokenizer, [wish], [[picture or given()]], EDIT, 512, pipe.image_settings)
    ids = tokens.input_ids[0, tokens.drop :].tolist()
    return [pipe.tokenizer.decode([i], skip_special_tokens=False).strip() for i in ids]


@contextmanager
def softmax_by(function: Callable) -> Iterator[None]:
    """Inside, every attention calls function(q, k, v, attn_mask) in place of PyTorch's."""
    with patch.object(library, "F", SimpleNamespace(pad=F.pad, scaled_dot_product_attention=function)):
        yield


def weights_of(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)


def watched(wish: str = WISH, picture: Image.Image | None = None, steps: int = STEPS) -> tuple[Image.Image, Tensor]:
    """An edit, and all its attention weights: (S steps, blocks, H, N queries, N keys)."""
    caught = []

    def explicit(q, k, v, attn_mask=None):
        caught.append(weights_of(q, k))
        return caught[-1] @ v

    with softmax_by(explicit):
        result = edit(wish, picture, steps)
    return result, torch.cat(caught).unflatten(0, (steps, -1))


def cut(*wires: tuple[slice, slice]) -> Callable:
    """An attention in which some queries do not see some keys; each wire is (queries, keys)."""

    def mixed(q, k, v, attn_mask=None):
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        for queries, keys in wires:
            scores[..., queries, keys] = -torch.inf
        return scores.softmax(-1) @ v

    return mixed


def inputs_of(run: Callable) -> list[tuple]:
    """Runs something; what each attention was given, in order: (module, image, text, mask, tables)."""
    found = []
    blocks = model().transformer.transformer_blocks
    hooks = [b.attn.register_forward_pre_hook(lambda attn, args: found.append((attn, *args))) for b in blocks]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return found


def one_block(step: int = 4, block: int = 3) -> tuple:
    """What a block of the trained model is given in the middle of an edit: (module, image, text, tables)."""
    calls = inputs_of(edit)
    attn, img, txt, _, tables = calls[step * len(model().transformer.transformer_blocks) + block]
    return attn, img, txt, tables


def parts_of(wish: str = WISH) -> tuple[slice, slice, slice]:
    """Where in the sequence the text, the new picture and the given picture stand."""
    text = len(words_of(wish))
    return slice(0, text), slice(text, text + PICTURE), slice(text + PICTURE, text + 2 * PICTURE)


def heard(wish: str) -> tuple[Image.Image, Tensor]:
    """An edit, and how much each token of the new picture listens to WORD, mean over the steps: (blocks, H, tokens)."""
    result, weights = watched(wish)
    return result, weights.mean(0)[:, :, parts_of(wish)[1], words_of(wish).index(WORD)]


def lead(listens: Tensor, place: str) -> Tensor:
    """By how much the tokens of a place listen more than the others, on average: (..., tokens) -> (...)."""
    half, (row, column) = SIDE // 2, divmod(PLACES.index(place), 2)
    rows, columns = (slice(i * half, (i + 1) * half) for i in (row, column))
    inside = listens.unflatten(-1, (SIDE, SIDE))[..., rows, columns].sum((-1, -2))
    return inside / half**2 - (listens.sum(-1) - inside) / (PICTURE - half**2)


# ---------------------------------------------------------------------------------------------------------- drawings


def lit(axis, picture: Image.Image, weights: Tensor, title: str = "", top: float | None = None) -> None:
    """A picture in grey with a weight for each of its tokens laid over it, the largest in full red."""
    width, height = picture.size
    axis.imshow(np.asarray(picture.convert("L")) / 2 + 127, cmap="gray", vmin=0, vmax=255)
    shown = np.kron(weights.view(SIDE, SIDE).numpy(), np.ones((height // SIDE, width // SIDE)))
    top = top or shown.max()
    axis.imshow(shown, cmap="autumn_r", vmin=0, vmax=top, alpha=0.75 * (shown / top).clip(0, 1))
    axis.set(xticks=[], yticks=[], title=title)


def listening() -> None:
    """Three edits, and which squares of the new picture listen to the word of the new thing."""
    figure, axes = plt.subplots(2, 4, figsize=(9.2, 4.9))
    axes[0, 0].imshow(given())
    axes[0, 0].set(title="the given picture")
    axes[1, 0].axis("off")
    axes[1, 0].text(1, 0.5, f"Which squares listen\nto the word “{WORD}”?", ha="right", va="center", fontsize=10)
    edits = {wish: heard(wish) for wish in WISHES}
    least = torch.stack([lead(edits[wish][1], place) for wish, place in WISHES.items()]).amin(0)  # (blocks, H)
    head = divmod(least.argmax().item(), least.shape[1])  # where it shows best, of all
    for column, (wish, (result, listens)) in enumerate(edits.items(), start=1):
        axes[0, column].imshow(result)
        axes[0, column].set(title=f"“{wish}”")
        lit(axes[1, column], result, listens[head], f"full red is {listens[head].max():.0%}")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    plt.show()


def without_a_wire() -> None:
    """The same edit with all wires, and with one of two cut."""
    text, new, old = parts_of()
    pictures = [given(), edit()]
    for wire in ((new, text), (new, old)):
        with softmax_by(cut(wire)):
            pictures.append(edit())
    titles = ["the given picture", f"“{WISH}”", "the new picture does\nnot see the words"]
    show(pictures, [*titles, "the new picture does\nnot see the given one"], size=2.2)


def one_query(query: Tensor, names: tuple[str, ...], keys: Tensor, values: Tensor, features: tuple[str, ...]) -> None:
    """A query, keys with their scores and shares, and colours as values, mixed by the shares."""
    scores = keys @ query / len(query) ** 0.5
    weights = scores.softmax(-1)
    mixed = weights @ values
    figure, axis = plt.subplots(figsize=(9.4, 3.9))
    rows = len(keys)

    def cells(y: float, numbers: Tensor, colour: str) -> None:
        for x, number in enumerate(numbers.tolist()):
            box = plt.Rectangle((2.2 + 0.8 * x, y - 0.36), 0.76, 0.72, facecolor=colour, alpha=0.15 + 0.35 * number)
            axis.add_patch(box)
            axis.text(2.58 + 0.8 * x, y, f"{number:g}", ha="center", va="center", fontsize=10)

    axis.text(0, rows + 0.2, "query of a square\nof the new picture", va="center", fontsize=10, weight="bold")
    cells(rows + 0.2, query, ORANGE)
    for x, name in enumerate(features):
        axis.text(2.58 + 0.8 * x, rows + 0.75, name, ha="center", fontsize=9, color=GREY)
    heads = {2.2: "keys", 5.55: "q · k / 2", 6.75: "share", 9.55: "value"}
    for x, name in heads.items():
        axis.text(x, rows - 0.42, name, fontsize=9, color=GREY)
    for row, name in enumerate(names):
        y = rows - 1 - row
        axis.text(0, y, name, va="center", fontsize=10)
        cells(y, keys[row], BLUE)
        axis.text(5.95, y, f"{scores[row]:g}", va="center", fontsize=10)
        axis.barh(y, 2.2 * weights[row].item(), left=6.75, height=0.55, color=ORANGE)
        axis.text(6.83 + 2.2 * weights[row].item(), y, f"{weights[row]:.0%}", va="center", fontsize=10)
        axis.add_patch(plt.Rectangle((9.55, y - 0.36), 0.72, 0.72, facecolor=values[row].tolist(), edgecolor=GREY))
    axis.annotate("", xy=(11.2, 1.5), xytext=(10.4, 1.5), arrowprops={"arrowstyle": "->", "color": GREY})
    axis.add_patch(plt.Rectangle((11.3, 0.9), 1.2, 1.2, facecolor=mixed.tolist(), edgecolor=GREY))
    axis.text(11.9, 2.3, "the mix", ha="center", fontsize=10, weight="bold")
    axis.set(xlim=(-0.05, 12.7), ylim=(-0.6, rows + 1.15))
    axis.axis("off")
    plt.show()


def scores_by_width(widths: tuple[int, ...] = (4, 32, 128)) -> None:
    """Random queries and keys of several widths: their products and the winner's share, with and without √D."""
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 2.9))
    generator = torch.Generator().manual_seed(0)
    for colour, width in zip((GREEN, BLUE, ORANGE), widths, strict=True):
        q, k = (torch.randn(2000, width, generator=generator) for _ in range(2))
        axes[0].hist((q * k).sum(-1), bins=80, range=(-40, 40), histtype="step", lw=1.8, color=colour,
                     label=f"D = {width}")  # fmt: skip
        crowd = torch.randn(300, 50, width, generator=generator)
        raw = (crowd @ torch.randn(300, width, 1, generator=generator)).squeeze(-1)
        winners = [scores.softmax(-1).amax(-1).mean().item() for scores in (raw, raw / width**0.5)]
        places = [widths.index(width) - 0.2, widths.index(width) + 0.2]
        bars = axes[1].bar(places, winners, 0.36, color=[RED, GREY])
    axes[0].set(xlabel="q · k", ylabel="pairs", title="dot products of random queries and keys")
    axes[0].legend()
    axes[1].set(xticks=range(len(widths)), xticklabels=[f"D = {width}" for width in widths], ylim=(0, 1),
                ylabel="share of the winner", title="how much the winner of 50 keys takes")  # fmt: skip
    axes[1].legend(bars, ["without √D", "with √D"])
    plt.show()


def with_and_without_norms() -> None:
    """The scores of all attentions of an edit, and the share of each query's winner."""
    found = {"normed": [], "not normed": []}
    for attn, img, txt, _, tables in inputs_of(edit):
        for name, scores in found.items():
            plain = patch.multiple(attn, **dict.fromkeys(NORMS, torch.nn.Identity()))
            with nullcontext() if name == "normed" else plain:
                scores.append(scores_in(attn, img, txt, tables))
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 2.9))
    end = max(scores.abs().max().item() for scores in found["not normed"])
    for (name, scores), colour in zip(found.items(), (BLUE, RED), strict=True):
        scores = torch.cat(scores)
        queries = scores[..., 0].numel()
        axes[0].hist(scores.flatten(), bins=120, range=(-end, end), color=colour, alpha=0.7, label=name)
        axes[1].hist(scores.softmax(-1).amax(-1).flatten(), bins=40, range=(0, 1), color=colour, alpha=0.7, label=name)
    axes[0].set(xlabel="score", ylabel="pairs", yscale="log", title="all scores of one edit")
    axes[1].set(xlabel="share of the winner", ylabel="queries", title=f"what the winner takes, for {queries:,} queries")
    axes[0].legend()
    axes[1].legend()
    plt.show()


def scores_in(attn, img: Tensor, txt: Tensor, tables) -> Tensor:
    """The scores that an attention computes, (B, H, N, N)."""
    caught = []

    def keep(q, k, v, attn_mask=None):
        caught.append(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5)
        return F.scaled_dot_product_attention(q, k, v)

    with torch.no_grad(), softmax_by(keep):
        attn(img, txt, None, tables)
    return caught[0]


def each_head(block: int = 3) -> None:
    """Where one square of the new picture looks in the given picture, in each head of a block."""
    result, weights = watched()
    _, new, old = parts_of()
    heads = weights.mean(0)[block]  # (H, N, N)
    square = SIDE + 1  # in the middle of the fox
    figure, axes = plt.subplots(1, 1 + len(heads), figsize=(1.75 * (1 + len(heads)), 2.3))
    axes[0].imshow(result)
    y, x = divmod(square, SIDE)
    side = result.width / SIDE
    axes[0].add_patch(plt.Rectangle((x * side, y * side), side, side, fill=False, edgecolor=RED, lw=2.5))
    seen = heads[:, new.start + square, old]  # (H, tokens)
    axes[0].set(xticks=[], yticks=[], title="this square asks", xlabel=f"full red is {seen.max():.0%}")
    for head, axis in enumerate(axes[1:]):
        lit(axis, given(), seen[head], f"head {head}: {seen[head].sum():.0%}", top=seen.max().item())
    for axis in axes:
        axis.spines[:].set_visible(False)
    plt.show()


def three_designs() -> None:
    """Which query may see which key, and which keys share a softmax: three ways to let picture and words meet."""
    designs = {  # (asks, answers) -> the softmax
        "cross-attention": {(1, 0): "a", (1, 1): "b"},
        "two softmaxes": {(0, 0): "a", (0, 1): "b", (1, 0): "a", (1, 1): "b"},
        "one softmax (this model)": {(0, 0): "c", (0, 1): "c", (1, 0): "c", (1, 1): "c"},
    }
    colours = {"a": LIGHT["words"], "b": LIGHT["picture"], "c": LIGHT["both"]}
    figure, axes = plt.subplots(1, 3, figsize=(9.2, 2.9))
    for axis, (name, seen) in zip(axes, designs.items(), strict=True):
        for row in range(2):
            groups = [seen.get((row, column)) for column in range(2)]
            for column, group in enumerate(groups):
                axis.add_patch(plt.Rectangle((column, 1 - row), 1, 1, facecolor=colours.get(group, "white"), lw=0))
                if groups[0] != groups[1] or not group:
                    label = "100 %" if group else "reads\nnothing"
                    axis.text(column + 0.5, 1.5 - row, label, ha="center", va="center", fontsize=9)
            if groups[0] and groups[0] == groups[1]:
                axis.text(1, 1.5 - row, "100 % together", ha="center", va="center", fontsize=9)
        axis.axhline(1, color="white", lw=4)
        axis.set(xlim=(0, 2), ylim=(0, 2), title=name, xticks=(0.5, 1.5), yticks=(0.5, 1.5))
        axis.set_xticklabels(["words", "picture"])
        axis.set_yticklabels(["picture\nasks", "words\nask"] if axis is axes[0] else ["", ""])
        axis.set(xlabel="read", aspect="equal")
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    plt.show()


def share_of_words() -> Tensor:
    """For each head, how much of the new picture's attention goes to the text; drawn, and returned (blocks, H)."""
    _, weights = watched()
    text, new, _ = parts_of()
    share = weights.mean(0)[:, :, new, text].sum(-1).mean(-1)  # (blocks, H)
    figure, axis = plt.subplots(figsize=(9.2, 2.6))
    for block, heads in enumerate(share):
        width = 0.76 / len(heads)
        places = [block + width * (head - (len(heads) - 1) / 2) for head in range(len(heads))]
        axis.bar(places, heads, 0.9 * width, color=GREEN)
    axis.set(xlabel="block, its heads side by side", ylabel="share that goes\nto the text", ylim=(0, 1))
    axis.set_title("attention of the new picture, mean over the steps of an edit")
    plt.show()
    return share


def whole_attention() -> None:
    """The way of a token through joint attention, with shapes."""
    figure, axis = plt.subplots(figsize=(9.4, 3.6))
    columns = ["tokens", "matrices, heads", "norm", "turn", "join", "softmax · V", "glue, cut", "way out"]
    norm, turn = "q and k\nover D\n\nv as it is", "q and k\n(chapter 02)\n\nv as it is"
    added = "add_q_proj\nadd_k_proj\nadd_v_proj\n(B, Nt, H, D)"
    words = ["words\n(B, Nt, C)", added, norm, turn, None, None, "text\n(B, Nt, C)", "to_add_out"]
    picture = [
        "picture\n(B, Ni, C)",
        "to_q\nto_k\nto_v\n(B, Ni, H, D)",
        norm,
        turn,
        None,
        None,
        "picture\n(B, Ni, C)",
        "to_out.0",
    ]
    shared = {4: "(B, H,\nNt + Ni, D)", 5: "(B, H,\nNt + Ni, D)"}
    for x, name in enumerate(columns):
        axis.text(x, 2.05, name, ha="center", fontsize=9, weight="bold")
        for y, row, colour in ((1.2, words, LIGHT["words"]), (0.0, picture, LIGHT["picture"])):
            if row[x]:
                axis.add_patch(plt.Rectangle((x - 0.42, y - 0.4), 0.84, 0.8, facecolor=colour, edgecolor=GREY))
                axis.text(x, y, row[x], ha="center", va="center", fontsize=8)
        if x in shared:
            axis.add_patch(plt.Rectangle((x - 0.42, -0.4), 0.84, 2, facecolor=LIGHT["both"], edgecolor=GREY))
            axis.text(x, 0.6, shared[x], ha="center", va="center", fontsize=8)
        if x:
            for y in (1.2, 0.0) if x != 5 else (0.6,):
                ends = {"xy": (x - 0.42, y), "xytext": (x - 0.58, y)}
                axis.annotate("", **ends, arrowprops={"arrowstyle": "->", "color": GREY})
    axis.set(xlim=(-0.5, 7.5), ylim=(-0.5, 2.3))
    axis.axis("off")
    plt.show()


def mask_forgotten(pads: tuple[int, ...] = (0, 16, 64, 256)) -> list[float]:
    """The same edit with more and more tokens of padding that nobody masks; the share of attention that they get."""
    encode, pictures, shares = model().encode_prompt, [], []
    for extra in pads:

        def padded(words, images=None, extra=extra):
            embeds, _ = encode(words, images)
            return F.pad(embeds, (0, 0, 0, extra)), None

        with patch.object(model(), "encode_prompt", padded):
            picture, weights = watched()
        text = len(words_of())
        shares.append(weights[..., text + extra :, text : text + extra].sum(-1).mean().item())
        pictures.append(picture)
    titles = [f"{extra} tokens of padding\nget {share:.0%}" for extra, share in zip(pads, shares, strict=True)]
    show(pictures, titles, size=2.2)
    return shares


def change(a: Image.Image, b: Image.Image) -> float:
    """Mean difference of two pictures, in levels of 255."""
    return round(np.abs(np.asarray(a, float) - np.asarray(b, float)).mean().item(), 2)

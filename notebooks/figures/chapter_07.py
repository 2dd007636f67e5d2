"""Figures of chapter 07: from a sentence and a picture to vectors.

The released vocabulary comes from data/vocabulary. What is trained comes from data/tiny, a small model of the same
architecture; what depends on what that model can draw stands in the constants below.
"""

import gzip
import json
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from unittest.mock import patch

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn

from course import BLUE, GREEN, GREY, ORANGE, RED, ROOT, show
from figures.small_model import given as scene
from figures.small_model import model
from minqwen import prompt as library
from minqwen.prompt import EDIT, IMAGE_PAD, T2I, Template
from minqwen.tokenizer import load_tokenizer
from minqwen.world import judge, sample_edit

WISHES = ("replace the cat with a fox", "remove the cake", "move the tree to the top right")
ONE_WORD = {
    "replace the cat with a fox": None, "replace the cat with a dog": BLUE, "replace the tree with a fox": ORANGE,
}  # fmt: skip
SHOWN = "replace the cake with a fox"  # where vectors are miscounted
STEPS, TASKS = 4, 12  # of an edit; edits that are judged
ADDED = """endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end vision_start
vision_end vision_pad image_pad video_pad""".split()  # the marks of the released vocabulary, in the order of their ids
LIGHT = {"rest": "#ececec", "picture": "#dceaf7", "words": "#dcefdc", "layers": "#fff3d6", "padding": "#ffffff"}


# ------------------------------------------------------------------------------------------------------ instruments


@cache
def released_tokenizer() -> Tokenizer:
    """The released vocabulary: 256 bytes, a piece for each merge, the marks of the template."""
    text = gzip.decompress((ROOT / "data/vocabulary/merges.txt.gz").read_bytes()).decode("utf-8")
    merges = text.removesuffix("\n").split("\n")[1:]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that are written as themselves
    pieces = [*map(chr, printable), *(chr(256 + n) for n in range(256 - len(printable)))]
    pieces += [line.replace(" ", "") for line in merges]
    files = {
        "vocab.json": json.dumps({piece: n for n, piece in enumerate(pieces)}),
        "merges.txt": text,
        "added_tokens.json": json.dumps({f"<|{name}|>": len(pieces) + n for n, name in enumerate(ADDED)}),
    }
    with tempfile.TemporaryDirectory() as place:
        for name, content in files.items():
            (Path(place) / name).write_text(content, encoding="utf-8", newline="")
        return load_tokenizer(place)


@cache
def photo(width: int = 112, height: int = 84) -> Image.Image:
    return Image.open(ROOT / "data/pictures/coffee.png").convert("RGB").resize((width, height))


@torch.inference_mode()
def states(words: str, picture: Image.Image, template: Template = EDIT) -> tuple[Tensor, library.TokenizedPrompts]:
    """All vectors (L, C) of a prompt, the template's included, and its tokens."""
    tokens = library.tokenize_prompts(model().tokenizer, [words], [[picture]], template, 512, model().image_settings)
    return model().text_encoder(*tokens[:4])[0], tokens


def encoded(words: str, picture: Image.Image, template: Template = EDIT, drop: int | None = None):
    """What the image transformer is given, with so many vectors dropped."""
    vectors, tokens = states(words, picture, template)
    return vectors[None, tokens.drop if drop is None else drop :], None


def from_the_table(words: str, picture: Image.Image):
    """The same without the layers: rows of the table, and the picture's vectors, go straight to the last norm."""
    language = model().text_encoder.model
    with patch.object(language, "forward", lambda x, positions, mask: language.norm(x)):
        return encoded(words, picture)


def edit(picture: Image.Image, words: str, encoding: Callable = encoded) -> Image.Image:
    """An edit whose prompt was encoded by something else."""
    with patch.object(model(), "encode_prompt", lambda words, pictures: encoding(words, pictures[0])):
        settings = {"num_inference_steps": STEPS, "true_cfg_scale": 1, "progress": False}
        return model().edit(picture, words, generator=torch.Generator().manual_seed(0), **settings)


@cache
def tasks() -> list:
    rng = np.random.default_rng(7)
    return [sample_edit(rng) for _ in range(TASKS)]


@cache
def right(encoding: Callable = encoded) -> int:
    """How many of the tasks come out right."""
    return sum(judge(edit(task.source, task.instruction, encoding), task) for task in tasks())


def pieces_of(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """The text of each token, spaces and line ends visible."""
    texts = [tokenizer.decode([i], skip_special_tokens=False) for i in ids]
    return [text.replace(" ", "␣").replace("\n", "⏎") for text in texts]


# ---------------------------------------------------------------------------------------------------------- drawings


def box(axis, x: float, y: float, width: float, height: float, text: str, colour: str, size: float = 8.5, **more):
    axis.add_patch(plt.Rectangle((x, y), width, height, facecolor=colour, edgecolor=more.pop("edge", GREY), lw=0.8))
    axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, **more)


def arrow(axis, start: tuple[float, float], end: tuple[float, float], **more) -> None:
    axis.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "->", "color": GREY, "lw": 1.2} | more)


def vector(axis, x: float, y: float, width: float, height: float, numbers: Tensor) -> None:
    """A list of numbers as a column of coloured cells, blue below zero and red above."""
    step = height / len(numbers)
    for n, number in enumerate(numbers.tolist()):
        colour = plt.cm.RdBu_r(0.5 + number / 5)
        axis.add_patch(plt.Rectangle((x, y + n * step), width, step, facecolor=colour, edgecolor="white", lw=0.5))


def the_whole_way(words: str = "make the cup red") -> None:
    """Sentence and picture, template, ids, rows of the table, layers, kept vectors."""
    tokenizer, generator = released_tokenizer(), torch.Generator().manual_seed(1)
    text = tokenizer.encode(words)
    mark = {name: tokenizer.token_to_id(f"<|{name}|>") for name in ("vision_start", "image_pad", "vision_end")}
    columns = [("template", "64 ids", 1.5, "rest"), ("picture\nstarts", mark["vision_start"], 1.0, "picture")]
    columns += [("?", mark["image_pad"], 1.0, "picture")] * 4
    columns += [("picture\nends", mark["vision_end"], 1.0, "picture")]
    columns += [(tokenizer.decode([i]).strip(), i, 1.0, "words") for i in text.ids]
    columns += [("template", "5 ids", 1.5, "rest")]
    figure, axis = plt.subplots(figsize=(9.8, 5.9))
    x = 2.2
    places = []
    for title, number, width, kind in columns:
        box(axis, x, 5.0, width - 0.08, 0.75, title, LIGHT[kind], 8)
        axis.text(x + width / 2 - 0.04, 4.68, number, ha="center", va="center", fontsize=8)
        places.append((x, width - 0.08, kind))
        x += width
    end = x
    for place, width, kind in places:
        middle = place + width / 2
        for y, low in ((3.0, 4.5), (0.55, 2.05)):
            for k in range(3) if kind == "rest" else range(1):
                left = place + 0.15 + 0.45 * k if kind == "rest" else middle - 0.15
                vector(axis, left, y, 0.3, 1.1, 1.3 * torch.randn(6, generator=generator))
            arrow(axis, (middle, low), (middle, y + 1.18))
        arrow(axis, (middle, 2.95), (middle, 2.62))
    reads = "28 layers: each token reads those in front of it (to the left)"
    box(axis, 2.2, 2.1, end - 2.28, 0.48, reads, LIGHT["layers"], 9)
    first, last = places[0], places[-1]
    axis.plot([first[0] - 0.05, first[0] + first[1] + 0.05], [0.5, 1.75], color=RED, lw=2)
    axis.plot([first[0] - 0.05, first[0] + first[1] + 0.05], [1.75, 0.5], color=RED, lw=2)
    axis.text(first[0] + first[1] / 2, 0.25, "dropped", ha="center", va="center", fontsize=9, color=RED)
    axis.plot([places[1][0], last[0] + last[1]], [0.42, 0.42], color=GREEN, lw=2)
    axis.text((places[1][0] + last[0] + last[1]) / 2, 0.15, "kept: this is what the image transformer reads",
              ha="center", va="center", fontsize=9, color=GREEN)  # fmt: skip
    picture = places[1][0] + 3.0
    axis.imshow(photo(), extent=(picture - 0.75, picture + 0.75, 6.15, 7.25), aspect="auto", zorder=2)
    arrow(axis, (picture, 6.1), (picture, 5.8))
    sentence = places[7][0] + 2.0
    axis.text(sentence, 6.6, f"“{words}”", ha="center", fontsize=12, weight="bold")
    arrow(axis, (sentence, 6.45), (sentence, 5.8))
    for y, label in (
        (6.65, "what you give"),
        (5.38, "1 · pieces, in a\ntemplate"),
        (4.68, "2 · their numbers"),
        (3.55, "3 · a vector for each:\nrow of a table, or a\npiece of the picture"),
        (2.34, "4 · language model"),
        (1.1, "5 · a vector for each,\nthat knows what\nstood in front"),
    ):
        axis.text(-0.6, y, label, va="center", fontsize=9)
    axis.set(xlim=(-0.7, end + 0.05), ylim=(0, 7.3))
    axis.axis("off")
    plt.show()


def without_the_layers() -> tuple[int, int]:
    """The same edits with vectors from the language model, and with rows of its table; how many come out right."""
    figure, axes = plt.subplots(2, 1 + len(WISHES), figsize=(2.2 * (1 + len(WISHES)), 4.9))
    axes[0, 0].imshow(scene())
    axes[0, 0].set_title("the given picture")
    for axis, label in zip(axes[:, 1], ("with the layers", "rows of the table,\nno layers"), strict=True):
        axis.set_ylabel(label, fontsize=10)
    for column, wish in enumerate(WISHES, start=1):
        for row, encoding in enumerate((encoded, from_the_table)):
            axes[row, column].imshow(edit(scene(), wish, encoding))
        axes[0, column].set_title(f"“{wish}”")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    plt.show()
    return right(), right(from_the_table)


def merging(stages: list, labels: list[str]) -> None:
    """Words in pieces, one row for each merge."""
    figure, axis = plt.subplots(figsize=(9.2, 0.46 * len(stages) + 0.2))
    for row, words in enumerate(stages):
        x = 0.0
        for word in words:
            for piece in word:
                width = 0.3 * len(piece) + 0.12
                colour = ORANGE if len(piece) > 1 else GREY
                patch_ = plt.Rectangle((x, -row - 0.36), width, 0.72, facecolor=colour, alpha=0.3, lw=0)
                axis.add_patch(patch_)
                axis.text(x + width / 2, -row, piece, ha="center", va="center", fontsize=11)
                x += width + 0.06
            x += 0.35
        axis.text(-0.25, -row, labels[row], ha="right", va="center", fontsize=9)
    axis.set(xlim=(-1.9, 12.6), ylim=(-len(stages) + 0.4, 0.6))
    axis.axis("off")
    plt.show()


def rows_of_the_table(table: Tensor, ids: Tensor, words: list[str]) -> None:
    """A table with a row for each piece, and the rows that a sentence picks."""
    rows, width = table.shape
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 3.4), width_ratios=[1, 0.9])
    for axis, numbers, names in ((axes[0], table, words), (axes[1], table[ids], [words[i] for i in ids.tolist()])):
        axis.imshow(numbers.detach(), cmap="RdBu_r", vmin=-2.5, vmax=2.5, aspect="auto")
        axis.set_yticks(range(len(names)), [f"{name}  {i}" for name, i in zip(names, ids.tolist(), strict=True)]
                        if axis is axes[1] else [f"{name}  {n}" for n, name in enumerate(names)])  # fmt: skip
        axis.set(xlabel=f"the {width} numbers of a row")
        axis.tick_params(length=0, labelsize=9)
        axis.spines[:].set_visible(False)
    axes[0].set_title(f"the table: a row for each of {rows} pieces")
    axes[1].set_title("what a sentence becomes")
    for row in ids.tolist():
        axes[0].add_patch(plt.Rectangle((-0.4, row - 0.38), width - 0.2, 0.76, fill=False, edgecolor=GREEN, lw=2))
    plt.show()


def triangle(words: list[str], weights: Tensor) -> None:
    """Who reads whom: weights (N, N) of a causal attention."""
    figure, axis = plt.subplots(figsize=(5.2, 3.6))
    size = len(words)
    axis.imshow(weights, cmap="Greens", vmin=0, vmax=1.3)
    for (row, column), weight in np.ndenumerate(weights.numpy()):
        text = f"{weight:.2f}" if column <= row else "closed"
        axis.text(column, row, text, ha="center", va="center", fontsize=9, color="black" if column <= row else GREY)
    axis.set_xticks(range(size), words)
    axis.set_yticks(range(size), words)
    axis.set(xlabel="is read", ylabel="reads", title="how much each token reads of each")
    axis.tick_params(length=0, labelsize=10)
    axis.spines[:].set_visible(False)
    plt.show()


def one_word(
    sentences: list[str], before: list[Tensor], after: list[Tensor], guesses: Tensor, words: list[str]
) -> None:
    """The last word of some sentences: its row of the table, its vector behind the layers, the guess of the next."""
    figure, axes = plt.subplots(len(sentences), 3, figsize=(9.4, 3.8), width_ratios=[1, 1, 1.3])
    before, after = (torch.stack(vectors) / torch.stack(vectors).std() for vectors in (before, after))
    figure.get_layout_engine().set(wspace=0.06)
    for row, sentence in enumerate(sentences):
        for axis, numbers in ((axes[row, 0], before[row]), (axes[row, 1], after[row])):
            axis.imshow(numbers[None], cmap="RdBu_r", vmin=-2.5, vmax=2.5, aspect="auto")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        axes[row, 0].set_ylabel(f"“{sentence}”", rotation=0, ha="right", va="center", fontsize=10)
        axes[row, 2].bar(words, guesses[row], color=GREEN)
        axes[row, 2].set(ylim=(0, 1), yticks=(0, 1), xticks=range(len(words)))
        axes[row, 2].set_xticklabels(words if row == len(sentences) - 1 else [], rotation=60)
    axes[0, 0].set_title("“light”: its row of the table")
    axes[0, 1].set_title("“light”: behind the layers")
    axes[0, 2].set_title("probability of the next word")
    plt.show()


def which_differ() -> dict[str, list[str]]:
    """How far each vector moves when one word of the instruction is another; the tokens whose vectors differ."""
    (first, _), *others = ONE_WORD.items()
    vectors, tokens = states(first, scene())
    names = pieces_of(model().tokenizer, tokens.input_ids[0, tokens.drop :].tolist())
    names = ["picture" if name == IMAGE_PAD else name.removeprefix("␣").strip("<|>") for name in names]
    first_of_picture, count = names.index("picture"), names.count("picture")
    behind = first_of_picture + count
    labels = [f"template\n({tokens.drop})", *names[:first_of_picture], f"picture\n({count})", *names[behind:]]
    figure, axis = plt.subplots(figsize=(9.8, 2.9))
    found = {}
    for k, (wish, colour) in enumerate(others):
        other = states(wish, scene())[0]
        front, kept = ((other - vectors).norm(dim=-1) / vectors.norm(dim=-1)).tensor_split([tokens.drop])
        ((old, new),) = [pair for pair in zip(first.split(), wish.split(), strict=True) if len({*pair}) == 2]
        change = f"“{new}” in place of “{old}”"
        found[change] = [names[n] for n in (kept > 1e-5).nonzero()[:, 0].tolist()]
        assert front.max() < 1e-5
        picture = kept[first_of_picture:behind].max()  # of template and picture the largest change
        shown = [front.max(), *kept[:first_of_picture], picture, *kept[behind:]]
        places = torch.arange(len(labels)) + 0.4 * k - 0.2
        axis.bar(places, shown, 0.38, color=colour, label=change)
    axis.set_xticks(range(len(labels)), [label.replace("_", "_\n") for label in labels], fontsize=8)
    axis.set(yscale="log", ylim=(1e-4, 3), title=f"“{first}”: which vectors change?",
             ylabel="change of the vector,\nshare of its length")  # fmt: skip
    axis.legend(loc="upper left")
    plt.show()
    return found


def prompts(picture_tokens: int = 196) -> None:
    """Two prompts in their templates: what is dropped, what is kept, what is padding."""
    closing = ("5 closing", 1.1, "rest")
    edits = [("64 of the template", 2.2, "rest"), ("start", 0.7, "picture")]
    edits += [(f"{picture_tokens} of the picture", 2.6, "picture"), ("end", 0.7, "picture")]
    edits += [("the words", 1.4, "words"), closing]
    long = [("34 of the template", 2.2, "rest"), ("many words", 2.6, "words"), closing]
    short = [long[0], ("few words", 1.4, "words"), closing, ("padding", 1.2, "padding")]
    rows = [(2.2, "an edit", edits), (1.1, "a drawing", long), (0.3, "another in\nthe same batch", short)]
    figure, axis = plt.subplots(figsize=(9.4, 2.9))
    for y, label, boxes in rows:
        x = 0.0
        for k, (text, width, kind) in enumerate(boxes):
            box(axis, x, y, width - 0.05, 0.6, text, LIGHT[kind], 9)
            if k == 0:
                axis.plot([x, x + width - 0.05], [y, y + 0.6], color=RED, lw=1.2)
            if k == 1:
                kept = x
            if kind == "padding":
                break
            x += width
        axis.plot([kept, x - 0.05], [y - 0.08, y - 0.08], color=GREEN, lw=2.5)
        axis.text(-0.15, y + 0.3, label, ha="right", va="center", fontsize=9)
    axis.text(1.1, 2.95, "dropped", ha="center", color=RED, fontsize=9)
    axis.text(5.4, 2.95, "kept (underlined in green)", ha="center", color=GREEN, fontsize=9)
    axis.set(xlim=(-1.6, 8.8), ylim=(0.1, 3.15))
    axis.axis("off")
    plt.show()


def patches(picture: Image.Image | None = None, size: int = 14, merge: int = 2) -> None:
    """A picture cut into patches, four of which become one token."""
    picture = picture or photo()
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 3.6), width_ratios=[1.35, 1])
    axes[0].imshow(picture)
    for k in range(0, picture.width + 1, size):
        axes[0].axvline(k - 0.5, color="white", lw=2.5 if k % (size * merge) == 0 else 0.7)
    for k in range(0, picture.height + 1, size):
        axes[0].axhline(k - 0.5, color="white", lw=2.5 if k % (size * merge) == 0 else 0.7)
    side = size * merge
    axes[0].add_patch(
        plt.Rectangle((side - 0.5, side - 0.5), side, side, fill=False, edgecolor="#00e0ff", lw=3, zorder=3)
    )
    axes[0].set(xlabel="pixels", ylabel="pixels", xticks=range(0, picture.width + 1, side))
    axes[0].set(yticks=range(0, picture.height + 1, side))
    axes[0].set_title(f"patches of {size}×{size} pixels (thin), {merge}×{merge} of them a token (bold)")
    axes[1].imshow(picture.crop((side, side, 2 * side, 2 * side)), extent=(0, 2, 0, 2))
    axes[1].axvline(1, ymin=0.267, ymax=0.733, color="white", lw=1.5)
    axes[1].plot([0, 2], [1, 1], color="white", lw=1.5)
    arrow(axes[1], (2.1, 1), (2.85, 1))
    vector(axes[1], 3, -0.3, 0.35, 2.6, 1.3 * torch.randn(12, generator=torch.Generator().manual_seed(4)))
    axes[1].text(2.5, 1.25, "vision\ntower", ha="center", fontsize=9)
    axes[1].set(xlim=(-0.1, 3.5), ylim=(-0.7, 2.7), title="the framed square: one vector")
    axes[1].axis("off")
    plt.show()


def positions(table: Tensor, names: list[str]) -> None:
    """Time, row and column of each token of a prompt."""
    figure, axis = plt.subplots(figsize=(9.6, 2.3))
    axis.imshow(table, cmap="Blues", vmin=0, vmax=1.6 * table.max().item(), aspect="auto")
    for (row, column), value in np.ndenumerate(table.numpy()):
        axis.text(column, row, value, ha="center", va="center", fontsize=9)
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axis.set_yticks(range(3), ["time", "row", "column"])
    axis.set(title="positions of a prompt: words, a picture of 3×4 tokens, words")
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    plt.show()


def names_of(parts: list) -> list[str]:
    """What stands under each column of `positions`."""
    names = []
    for part in parts:
        names += ["word"] if part == "word" else [f"{y}, {x}" for y in range(part[0]) for x in range(part[1])]
    return names


def miscounted() -> dict[str, int]:
    """An edit with vectors miscounted, or in another template; how many of the tasks come out right."""
    text = EDIT.text[EDIT.text.index("<|im_start|>user") :]
    bare = Template(text, len(model().tokenizer.encode(text.split("{}")[0]).ids), EDIT.picture)
    ways = {
        "right": encoded,
        "one too few\ndropped": lambda words, picture: encoded(words, picture, drop=EDIT.drop - 1),
        "one too many\ndropped": lambda words, picture: encoded(words, picture, drop=EDIT.drop + 1),
        "nothing\ndropped": lambda words, picture: encoded(words, picture, drop=0),
        "no system\nmessage": lambda words, picture: encoded(words, picture, template=bare),
        "the template\nfor drawing": lambda w, picture: encoded(w, picture, T2I._replace(picture=EDIT.picture)),
    }
    counts = {name.replace("\n", " "): right(way) for name, way in ways.items()}
    pictures = [edit(scene(), SHOWN, way) for way in ways.values()]
    titles = [f"{name}\n{n} of {TASKS}" for name, n in zip(ways, counts.values(), strict=True)]
    show([scene(), *pictures], ["given, and\n“replace the cake\nwith a fox”", *titles], size=1.5)
    return counts


def another_picture() -> int:
    """How many of the tasks come out right if the text encoder is shown the picture of another task."""
    return right(lambda words, picture: encoded(words, scene()))


class Layer(nn.Module):
    """For the toy language model: attention by the function that is handed in, then an MLP, each added to its input."""

    def __init__(self, width: int, attention: Callable):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(self.attention(self.q(x), self.k(x), self.v(x)))
        return x + self.mlp(x)

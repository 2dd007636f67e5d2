"""Figures of chapter 09: a small model of pictures that leaves things open, and walks from noise through it.

What depends on the weights that ship stands in the constants at the top. In the tier full the released model takes the
place of data/tiny, with a photo and a sentence of its own.
"""

from collections.abc import Callable
from functools import cache
from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from course import BLUE, GREEN, GREY, ORANGE, RED, TINY, show
from figures.small_model import FULL, WHOLE_SCENE, WHOLE_WISH
from figures.small_model import whole_model as model
from minqwen.images import pack_latents, pixels_to_image, unpack_latents
from minqwen.pipeline import QwenImagePipeline, starting_noise
from minqwen.prompt import pad_prompts
from minqwen.sampling import denoise, get_sigmas, guide
from minqwen.world import SIZE, Edit, Scene, Wish, judge, read, sample_drawing, sample_edit
from minqwen.world.words import Slot

WISH = WHOLE_WISH  # of the lesson, too
DRAWN = "a coffee cup made of green glass" if FULL else "a cat at the top left"
STEPS, SCALE = (50, 4.0) if FULL else (8, 2.0)  # of that edit
ROUNDING = 32 if FULL else 1  # levels of 255 by which two ways to compute the same picture may differ: bf16, or float32
SEED = 5  # of the tasks of the checkpoint's world that are counted
SHOWN = slice(10, 20)  # of the 360 noises; two of these ten end in another shape without guidance
SORTS = {"edits": 12, "closed descriptions": 12, "open descriptions": 36}  # how many the lesson counts

LARGE = {
    "heart": ".#.#. ##### ##### .###. ..#..",
    "ring": ".###. #...# #...# #...# .###.",
    "cross": "#...# .#.#. ..#.. .#.#. #...#",
    "T": "##### ..#.. ..#.. ..#.. ..#..",
}
SMALL = {"heart": "#.# ### .#.", "ring": "### #.# ###", "cross": "#.# .#. #.#", "T": "### .#. .#."}
SHAPES, SIZES = list(LARGE), ["large", "small"]
PLACES = [f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "centre", "right")]
SIDE = 7  # pixels
MISNAMED = torch.tensor([0.1, 0.4])  # how often an open caption names another shape: of large ones, of small ones
OPEN, UNNAMED = 0.45, 0.1  # how many captions are open, and how many are dropped


# ---------------------------------------------------------------------------------------------------- the small world


@cache
def pictures() -> Tensor:
    """All pictures of the small world, (4 shapes, 2 sizes, 9 places, 7, 7): ink is 1, paper is -1."""
    found = -torch.ones(4, 2, 9, SIDE, SIDE)
    for shape, name in enumerate(SHAPES):
        for size, drawn in enumerate((LARGE, SMALL)):
            rows = torch.tensor([[1.0 if dot == "#" else -1.0 for dot in row] for row in drawn[name].split()])
            for place in range(9):
                y, x = place // 3 + size, place % 3 + size
                found[shape, size, place, y : y + len(rows), x : x + len(rows)] = rows
    return found


def words(shape: str | None = None, size: str | None = None, place: str | None = None, count: int = 1) -> Tensor:
    """A caption as numbers, (B, 3): which shape, which size, which place; the last number of each means "not said"."""
    said = [SHAPES.index(shape) if shape else 4, SIZES.index(size) if size else 2, PLACES.index(place) if place else 9]
    return torch.tensor([said]).expand(count, -1)


def open_words(count: int) -> Tensor:
    """The four open captions, "a heart", "a ring" and so on, in turn."""
    return torch.cat([words(SHAPES[k % 4]) for k in range(count)])


def closed_words(count: int) -> Tensor:
    """The 72 closed captions, as "a large heart, top left", in turn."""
    k = torch.arange(count)
    return torch.stack([k % 4, k // 4 % 2, k // 8 % 9], dim=1)


def batch(count: int) -> tuple[Tensor, Tensor]:
    """Pictures with captions: open ones, of which some name another shape; closed ones; one in ten is dropped."""
    shape, size, place = (torch.randint(most, (count,)) for most in (4, 2, 9))
    is_open = torch.rand(count) < OPEN
    wrong = is_open & (torch.rand(count) < MISNAMED[size])
    named = torch.where(wrong, (shape + torch.randint(1, 4, (count,))) % 4, shape)
    dropped = torch.rand(count) < UNNAMED
    said = torch.stack([named.where(~dropped, torch.tensor(4)), size.where(~(is_open | dropped), torch.tensor(2)),
                        place.where(~(is_open | dropped), torch.tensor(9))], dim=1)  # fmt: skip
    return pictures()[shape, size, place], said


class Network(nn.Module):
    """One attention: the mix asks, 256 learned pictures are keys and values, and words make some of them likelier."""

    def __init__(self, memories: int = 256):
        super().__init__()
        self.memory = nn.Parameter(0.3 * torch.randn(memories, SIDE**2))
        self.words = nn.ParameterList([nn.Parameter(torch.zeros(n, memories)) for n in (5, 3, 10)])

    def forward(self, x: Tensor, sigma: float | Tensor, words: Tensor) -> Tensor:  # (B, 7, 7), level, (B, 3)
        mix, sigma = x.flatten(1), torch.zeros(len(x), 1) + torch.as_tensor(sigma).view(-1, 1)
        length = (1 - sigma) / 2 * self.memory.square().sum(1)
        scores = (1 - sigma) / sigma**2 * (mix @ self.memory.T - length)
        scores = scores + sum(table[words[:, k]] for k, table in enumerate(self.words))
        guess = scores.softmax(-1) @ self.memory
        return ((mix - guess) / sigma).view_as(x)


class Ideal:
    """The answer that no network can beat: the mean of all pictures, weighed by how likely each of them is."""

    def __init__(self):
        likely = torch.zeros(5, 3, 10, 4, 2, 9)
        likely[4, 2, 9] = 1  # nothing is said
        for shape in range(4):
            named = MISNAMED / 3 * torch.ones(4, 1)
            named[shape] = 1 - MISNAMED
            likely[shape, 2, 9] = named[:, :, None]
            for size in range(2):
                for place in range(9):
                    likely[shape, size, place, shape, size, place] = 1
        self.likely = (likely.flatten(3) + 1e-30).log()

    def __call__(self, x: Tensor, sigma: float | Tensor, words: Tensor) -> Tensor:
        mix, sigma = x.flatten(1), torch.zeros(len(x), 1) + torch.as_tensor(sigma).view(-1, 1)
        known = pictures().view(72, -1)
        scores = (1 - sigma) / sigma**2 * (mix @ known.T - (1 - sigma) / 2 * SIDE**2)
        guess = (scores + self.likely[tuple(words.T)]).softmax(-1) @ known
        return ((mix - guess) / sigma).view_as(x)


def enlarged(network: Callable, n: int) -> Callable:
    """A network of pictures whose every pixel is n by n pixels: it averages them, asks, and enlarges the answer."""

    def velocity(x: Tensor, sigma: float, words: Tensor) -> Tensor:
        size = 1 - sigma + sigma / n  # averaging leaves (1 - sigma) of the picture and sigma / n of noise
        level = sigma / n / size
        small = F.avg_pool2d(x[:, None], n)[:, 0] / size
        guess = small - level * network(small, level, words)
        return (x - guess.repeat_interleave(n, 1).repeat_interleave(n, 2)) / sigma

    return velocity


def noises(count: int, n: int = 1, seed: int = 7) -> Tensor:
    return torch.randn(count, SIDE * n, SIDE * n, generator=torch.Generator().manual_seed(seed))


def shifted(steps: int, a: float = 1.0) -> list[float]:
    """Even levels from 1 to 0, shifted."""
    even = torch.linspace(1, 0, steps + 1)
    return (a * even / (1 + (a - 1) * even)).tolist()


def walk(network: Callable, x: Tensor, said: Tensor, levels: list[float], scale: float = 1.0) -> Tensor:
    """The loop of chapter 00; with guidance where scale is not 1."""
    for sigma, sigma_next in pairwise(levels):
        v = network(x, sigma, said)
        if scale != 1:
            without = network(x, sigma, words(count=len(x)))
            v = without + scale * (v - without)
        x = x + (sigma_next - sigma) * v
    return x


def recognised(x: Tensor) -> Tensor:
    """For each picture the number of the one of 72 that it is in every pixel, -1 for none."""
    n = x.shape[-1] // SIDE
    x = F.avg_pool2d(x[:, None], n).flatten(1)
    same = (x[:, None].sign() == pictures().view(72, -1).sign()).all(-1)
    return torch.where(same.any(1), same.int().argmax(1), -1)


def shares(x: Tensor, said: Tensor) -> dict[str, float]:
    """Of some pictures: how many are clear, how many are what was said, and how many of those are small."""
    found = recognised(x)
    clear = found >= 0
    right = clear.clone()
    for k, part in enumerate((found // 18, found // 9 % 2, found % 9)):
        right &= (part == said[:, k]) | (said[:, k] == (4, 2, 9)[k])
    small = (found[right] // 9 % 2).float().mean().item()
    return {"clear": clear.float().mean().item(), "right": right.float().mean().item(), "small": small}


# ------------------------------------------------------------------------------------------------- the shipped model


@cache
def given() -> Image.Image:
    return Image.open(WHOLE_SCENE)


def apart(a: Image.Image, b: Image.Image) -> int:
    """The largest difference of two pictures, in levels of 255."""
    return np.abs(np.asarray(a, int) - np.asarray(b, int)).max().item()


class Tasks:
    """Tasks of the small checkpoint's world, all edits or none, in one batch: what needs no step is computed once."""

    def __init__(self, tasks: list[Edit]):
        self.pipe = pipe = QwenImagePipeline.from_pretrained(TINY, device="cpu") if FULL else model()
        self.tasks, self.h, self.w = tasks, SIZE // 16, SIZE // 16
        texts = [(t.instruction, t.sources) for t in tasks] + [(" ", t.sources) for t in tasks]
        self.embeds, self.mask = pad_prompts([pipe.encode_prompt(*each) for each in texts])
        given = [pack_latents(pipe.encode_image(picture)) for t in tasks for picture in t.sources]
        self.given = torch.cat(given) if given else torch.zeros(len(tasks), 0, 64)  # (B, Ni or 0, 64)
        noise = [starting_noise(self.h, self.w, torch.Generator().manual_seed(k)) for k in range(len(tasks))]
        self.noise = torch.cat(noise)

    @torch.inference_mode()
    def draw(self, steps: int, scale: float, rule: Callable = guide, **changes) -> list[Image.Image]:
        """All tasks, with guidance by this rule, and changes of the schedule."""
        rows = len(self.noise) * (2 if scale > 1 else 1)
        shapes = [[(1, self.h, self.w)] * (1 + len(self.tasks[0].sources))] * rows
        mask = None if self.mask is None else self.mask[:rows]

        def velocity(x: Tensor, sigma: float) -> Tensor:
            tokens = torch.cat([x, self.given], dim=1).repeat(rows // len(x), 1, 1)
            answers = self.pipe.transformer(tokens, self.embeds[:rows], mask, torch.tensor([sigma]), shapes)
            answers = answers[:, : self.h * self.w].split(len(x))
            return rule(*answers, scale) if len(answers) == 2 else answers[0]

        latents = denoise(velocity, self.noise, get_sigmas(steps, self.h * self.w, **self.pipe.schedule | changes))
        pixels = self.pipe.vae.decode(self.pipe.vae.denormalize(unpack_latents(latents, 2 * self.h, 2 * self.w)))
        return [pixels_to_image(one) for one in pixels.split(1)]

    def right(self, pictures: list[Image.Image]) -> int:
        return sum(judge(picture, task) for picture, task in zip(pictures, self.tasks, strict=True))


@cache
def tasks(sort: str, count: int, seed: int = SEED) -> Tasks:
    """So many tasks of one of SORTS."""
    rng = np.random.default_rng(seed)
    is_open = sort == "open descriptions"
    return Tasks([sample_edit(rng) if sort == "edits" else sample_drawing(rng, is_open=is_open) for _ in range(count)])


THREE_ANIMALS = Wish((Slot(family="animal"),) * 3)


@cache
def repeated(text: str, wish: Wish | None = None, count: int = 40) -> Tasks:
    """One description with so many noises."""
    return Tasks([Edit("open", None, text, Scene("white"), wanted=wish)] * count)


def things_in(picture: Image.Image) -> list:
    """The clear things that the judge sees in a picture."""
    return [thing for thing in read(picture).things.values() if thing]


# ---------------------------------------------------------------------------------------------------------- drawings


def paint(axis, x: Tensor, title: str = "") -> None:
    axis.imshow(x.detach().numpy(), cmap="gray_r", vmin=-1, vmax=1)
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=10)
    axis.spines[:].set(visible=True, color=GREY, linewidth=0.8)


def rows_of(rows: dict[str, Tensor], title: str = "", columns: int = 8) -> None:
    """Pictures in rows, each with its name at the left."""
    figure, axes = plt.subplots(len(rows), columns, figsize=(9.4, 0.95 * len(rows) + 0.35))
    for (name, pictures_), line in zip(rows.items(), axes, strict=True):
        for axis, picture in zip(line, pictures_, strict=False):
            paint(axis, picture)
        line[0].set_ylabel(name, fontsize=10, rotation=0, ha="right", va="center", labelpad=8)
    figure.suptitle(title, fontsize=11)
    plt.show()


def one_wish() -> None:
    """A wish, several noises: one step, eight steps, eight steps with guidance."""
    said, x, ideal = words("ring", count=8), noises(8, seed=10), Ideal()
    rows = {"1 step": (1, 1.0), "8 steps": (8, 1.0), "8 steps and\nguidance": (8, 4.0)}
    rows = {name: walk(ideal, x, said, shifted(steps), scale) for name, (steps, scale) in rows.items()}
    rows_of(rows, "“a ring”: each column begins with another noise")


def eight_pictures() -> None:
    """The four shapes in both sizes, each in the middle."""
    figure, axes = plt.subplots(1, 8, figsize=(9.4, 1.5))
    for k, axis in enumerate(axes):
        paint(axis, pictures()[k % 4, k // 4, 4], f"{SIZES[k // 4]} {SHAPES[k % 4]}")
    plt.show()


def open_and_closed() -> None:
    """Two captions: some pictures for which they are right, what one step makes, what eight make."""
    captions = {"“a large ring,\ntop left”": ("ring", "large", "top left"), "“a ring”": ("ring", None, None)}
    examples = [pictures()[1, 0, :1], pictures()[1].flatten(0, 1)[[0, 4, 8, 11, 15]]]
    ideal, x = Ideal(), noises(2, seed=10)
    figure, axes = plt.subplots(2, 11, figsize=(9.4, 2.7), width_ratios=[1] * 5 + [0.4, 1, 0.4, 1, 1, 0.4])
    for line, (name, caption), right in zip(axes, captions.items(), examples, strict=True):
        for axis in line:
            axis.axis("off")
        for axis, picture in zip(line, right, strict=False):
            axis.axis("on")
            paint(axis, picture)
        said = words(*caption, count=2)
        one, many = (walk(ideal, x, said, shifted(steps)) for steps in (1, 8))
        for axis, picture in zip((line[6], line[8], line[9]), (one[0], *many), strict=True):
            axis.axis("on")
            paint(axis, picture)
        line[0].set_ylabel(name, fontsize=10, rotation=0, ha="right", va="center", labelpad=8)
    axes[0, 2].set_title("right pictures\n(the only one; 5 of 18)", fontsize=10)
    axes[0, 6].set_title("1 step", fontsize=10)
    axes[0, 8].set_title("8 steps", fontsize=10)
    axes[0, 9].set_title("other noise", fontsize=10)
    plt.show()


def on_a_line(paths: dict[int, list[tuple[float, float]]]) -> None:
    """Walks of several numbers of steps from one noise, where a picture is one number."""
    figure, axis = plt.subplots(figsize=(7.6, 3.4))
    for value in (-1, 1):
        axis.plot((1, 0), (value, value), color=GREY, lw=1, ls=":")
        axis.text(-0.03, value, f"picture {value:+d}", va="center", fontsize=10, color="#555555")
    for (steps, path), colour in zip(paths.items(), (RED, ORANGE, GREEN, BLUE), strict=False):
        sigmas, xs = zip(*path, strict=True)
        label = f"{steps} step{'s' if steps > 1 else ''}, ends at {xs[-1]:.2f}"
        axis.plot(sigmas, xs, "o-", ms=4, color=colour, label=label)
    axis.set(xlim=(1.05, -0.28), ylim=(-1.25, 1.35), xlabel="noise level σ", ylabel="x")
    axis.set_xticks([1, 0.75, 0.5, 0.25, 0])
    axis.set_title("one noise, 0.7, walked in several numbers of steps")
    axis.legend(loc="lower left", bbox_to_anchor=(0, 0.12), fontsize=9)
    plt.show()


def by_steps(network: Callable, counts: tuple[int, ...] = (1, 2, 4, 8, 20)) -> None:
    """The four open captions with several numbers of steps, and the share of right pictures among 400."""
    said, rows = open_words(400), {}
    for steps in counts:
        x = walk(network, noises(400), said, shifted(steps))
        rows[f"{steps} step{'s' if steps > 1 else ''}\n{shares(x, said)['right']:.0%} right"] = x[:8]
    rows_of(rows, "in turn “a heart”, “a ring”, “a cross”, “a T”")


def averaged(n: int = 4, sigma: float = 0.75) -> None:
    """A ring at one noise level: small, large, and the large one with its pixels averaged."""
    ring = pictures()[1, 0, 4]
    large = ring.repeat_interleave(n, 0).repeat_interleave(n, 1)
    mixes = [(1 - sigma) * z + sigma * noises(1, z.shape[-1] // SIDE, seed=4)[0] for z in (ring, large)]
    shown = {f"{SIDE} × {SIDE}": mixes[0], f"{SIDE * n} × {SIDE * n}": mixes[1]}
    shown[f"the same, {n} × {n}\npixels averaged"] = F.avg_pool2d(mixes[1][None, None], n)[0, 0]
    figure, axes = plt.subplots(1, 4, figsize=(9.2, 2.7))
    paint(axes[0], ring, "the picture, σ = 0")
    for axis, (name, picture) in zip(axes[1:], shown.items(), strict=True):
        limit = picture.std() * 2
        paint(axis, picture / limit, f"σ = {sigma}\n{name}" if axis is not axes[3] else name)
    plt.show()


def shift_tested(network: Callable, steps: int = 4, count: int = 200) -> dict[str, float]:
    """Left: walks that end where 100 steps end, by steps, with and without shift. Right: by the shift, three sizes."""
    said, sizes = open_words(count), {1: GREY, 2: ORANGE, 4: BLUE}
    every, a_of, counts = (1, 1.5, 2, 3, 4, 6, 8, 12), {1: 2, 2: 4, 4: 8}, (2, 4, 8, 16)
    figure, axes = plt.subplots(1, 2, figsize=(9.4, 3.3), sharey=True)
    found = {}
    for n, colour in sizes.items():
        large, x = enlarged(network, n), noises(count, n)
        target = recognised(walk(large, x, said, shifted(100, 2.0 * n)))

        def agree(levels: list[float], large=large, x=x, target=target) -> float:
            ends = recognised(walk(large, x, said, levels))
            return ((ends == target) & (ends >= 0)).float().mean().item()

        name, side = f"{SIDE * n} × {SIDE * n}", n
        curve = [agree(shifted(steps, a)) for a in every]
        axes[1].plot(every, [100 * y for y in curve], "o-", ms=4, color=colour, label=f"{name} pixels")
        found |= {f"{name}, a = {a}": y for a, y in zip(every, curve, strict=True)}
        if n != 2:
            for a, style in ((1, "o--"), (a_of[side], "o-")):
                line = [100 * agree(shifted(k, a)) for k in counts]
                label = f"{name}, " + ("even" if a == 1 else f"shifted, a = {a}")
                axes[0].plot(counts, line, style, ms=4, color=colour, label=label)
    axes[0].set(xscale="log", xticks=counts, xticklabels=counts, xlabel="steps", ylim=(0, 100))
    axes[0].set(ylabel="% that end at the picture\nof a walk of 100 steps", title="with and without the shift")
    axes[0].minorticks_off()
    axes[1].set(
        xticks=(1, 2, 3, 4, 6, 8, 12), xlabel="shift a", title=f"{steps} steps: larger pictures want a larger shift"
    )
    for axis in axes:
        axis.legend(loc="lower right" if axis is axes[0] else "lower left", fontsize=8.5)
    plt.show()
    return found


def two_arrows(plus: Tensor, minus: Tensor, further: Tensor, kept: Tensor) -> None:
    """Two answers, the arrow that goes further in their difference, and the same at the length of the first."""
    figure, axis = plt.subplots(figsize=(5.6, 4.6))
    arrows = (minus, "without the words", "#666666"), (plus, "with the words", BLUE), (further, "s = 2", ORANGE)
    for vector, name, colour in (*arrows, (kept, "s = 2, as long\nas “with”", RED)):
        (x, y), head = vector.tolist(), {"arrowstyle": "-|>", "color": colour, "lw": 2, "mutation_scale": 15}
        axis.annotate("", xy=(x, y), xytext=(0, 0), arrowprops={**head, "shrinkA": 0, "shrinkB": 0})
        where = {"xytext": (-8, 6), "ha": "right"} if colour == RED else {"xytext": (8, -2)}
        label = f"{name}\n({x:.3g}, {y:.3g})"
        axis.annotate(label, (x, y), textcoords="offset points", color=colour, fontsize=9.5, **where)
    dotted = {"color": GREY, "ls": ":", "lw": 1.5}
    axis.plot(*torch.stack([minus, further]).T.tolist(), **dotted)
    turn = torch.linspace(0.2, 1.2, 50)
    axis.text(5.0, 1.9, "length 5", color="#666666", fontsize=9)
    axis.plot(plus.norm() * turn.cos(), plus.norm() * turn.sin(), color=GREY, lw=0.7)
    axis.set(xlim=(-2.2, 7), ylim=(-0.6, 9), aspect="equal", xlabel="first number", ylabel="second number")
    axis.set_title("guidance goes further in the difference")
    plt.show()


def by_guidance(results: dict[float, Tensor], said: Tensor) -> None:
    """Pictures for several scales of guidance, with what is right and how many of the right ones are small."""
    named = {f"s = {scale:g}: ": x for scale, x in results.items()}
    same_noises(named, said, "{right:.0%} right,\n{small:.0%} of them small")


def without_guidance(results: dict[str, Tensor], said: Tensor) -> None:
    """What a bug makes of the same noises."""
    same_noises(results, said, "\n{right:.0%} right, {clear:.0%} clear")


def same_noises(results: dict[str, Tensor], said: Tensor, told: str) -> None:
    """A row of pictures for each result, with its name and what is told of its shares."""
    rows = {name + told.format(**shares(x, said)): x[SHOWN] for name, x in results.items()}
    rows_of(rows, "“a ring”, 8 steps, each column the same noise", columns=10)


def three_moves(moves: dict[str, Tensor], sizes: dict[str, Tensor]) -> None:
    """The three moves of the released schedule, and its levels for several sizes."""
    figure, axes = plt.subplots(1, 2, figsize=(9.4, 3.2), sharey=True)
    for (name, levels), colour in zip(moves.items(), (GREY, BLUE, RED), strict=True):
        axes[0].plot([*levels.tolist(), 0], "o-", ms=4, color=colour, label=name)
    axes[0].set(title="three moves: 8 steps, 1024 × 1024 pixels", xlabel="step", ylabel="noise level σ")
    for (name, levels), colour in zip(sizes.items(), (GREY, BLUE, GREEN), strict=True):
        axes[1].plot(levels, color=colour, label=name)
    axes[1].set(title="50 steps, three sizes", xlabel="step")
    for axis in axes:
        axis.legend(fontsize=8.5)
    plt.show()


def beside(results: dict[str, Image.Image]) -> None:
    """Pictures with their names."""
    show(list(results.values()), list(results), size=9.4 / max(4, len(results)))


def table_of_tasks(counts: tuple[int, ...] = (1, 8), scales: tuple[float, ...] = (1, 2, 4)) -> dict:
    """How many tasks of each sort the shipped model gets right, by steps and guidance; printed, and returned."""
    found = {}
    print("right of".ljust(34) + "".join(f"s = {scale:<9g}" for scale in scales))
    for sort, count in SORTS.items():
        for steps in counts:
            for scale in scales:
                found[sort, steps, scale] = tasks(sort, count).right(tasks(sort, count).draw(steps, scale))
            name = f"{count} {sort}, {steps} step{'s' * (steps > 1)}"
            print(name.ljust(34) + "".join(f"{found[sort, steps, scale]:<13}" for scale in scales))
    return found


def three_animals(cases: tuple[tuple[int, float], ...] = ((1, 1), (8, 1), (8, 2), (8, 4))) -> dict:
    """One open description, a row for each (steps, guidance): 8 of 40 pictures, with what all of them hold."""
    tasks_ = repeated("three animals", THREE_ANIMALS)
    figure, axes = plt.subplots(len(cases), 8, figsize=(9.4, 1.05 * len(cases) + 0.35))
    counts = {}
    for (steps, scale), line in zip(cases, axes, strict=True):
        drawn = tasks_.draw(steps, scale)
        for axis, picture in zip(line, drawn, strict=False):
            axis.imshow(picture)
            axis.set(xticks=[], yticks=[])
        held = [things_in(picture) for picture in drawn]
        other = sum(any(thing.family != "animal" for thing in things) for things in held)
        more = sum(len(things) > 3 for things in held)
        counts[steps, scale] = tasks_.right(drawn), other, more
        told = f"{counts[steps, scale][0]} of {len(drawn)} right"
        if steps > 1:
            told += f"\n{other} with other things\n{more} with too many"
        name = f"{steps} step{'s' * (steps > 1)}, s = {scale:g}\n{told}"
        line[0].set_ylabel(name, fontsize=10, rotation=0, ha="right", va="center", labelpad=8)
    figure.suptitle("“three animals”: 8 of 40 pictures, each column the same noise", fontsize=11)
    plt.show()
    return counts

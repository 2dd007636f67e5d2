"""Checks of the exercises of chapter 02, with the broken model and the trained block that they need."""

import random
from functools import cache

import torch
import torch.nn.functional as F

from checks import Wrong, ask, exercise, expect, expect_finding, expect_five
from course import TINY
from minqwen.checkpoint import Checkpoint
from minqwen.rope import QwenEmbedRope
from minqwen.transformer import QwenImageTransformer2DModel

THETA = 10000.0


def angles_of(positions: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
    """Positions (N, axes) -> angles (N, D/2), frequency by frequency."""
    columns = [positions[:, a] * THETA ** (-2 * k / dim) for a, dim in enumerate(axes) for k in range(dim // 2)]
    return torch.stack(columns, dim=-1)


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, halves: bool = False) -> torch.Tensor:
    """x (B, N, H, D) with its neighbours, or its halves, turned."""
    out, width = torch.empty_like(x), x.shape[-1]
    first = slice(0, width // 2) if halves else slice(0, None, 2)
    second = slice(width // 2, None) if halves else slice(1, None, 2)
    cos, sin = cos[:, None], sin[:, None]
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., first] * sin + x[..., second] * cos
    return out


# ---------------------------------------------------------------------------------------------------- 02.1


@exercise("02.1")
def places(answer):
    """Five positions of a sequence of (1, 7, 10), (1, 5, 4), (1, 12, 9) and 20 words."""
    wrong = [
        {"this counts from the corner, not from the middle": 0, "this is ComfyUI's middle, one off for odd grids": -3},
        {"this counts from the corner, not from the middle": 9, "with ten columns the last is 10//2 - 1": 5},
        {"the target counts too, as picture 0": 1, "numbers start at 0, not at 1": 3},
        {"this looks at the target only; all pictures count": 5, "this is the last row of a picture; text is behind": 5,
         "take half of the side: pictures count from their middle": 12},
        {"20 words starting there end one earlier": 26, "this looks at the target only; all pictures count": 24},
    ]  # fmt: skip
    names = ["first row of the target", "last column of the target", "frame of the second reference"]
    names += ["first word", "last word"]
    expect_five(answer, (-4, 4, 2, 6, 25), wrong, names)


# ---------------------------------------------------------------------------------------------------- 02.2


@exercise("02.2")
def rotate(answer):
    """rotate(x, cos, sin) over random shapes, and in bf16."""
    for B, N, H, D in ((1, 1, 1, 2), *((random.randint(1, 3), *random.sample(range(2, 8), 2), 8) for _ in range(4))):
        x, angles = torch.randn(B, N, H, D), 5 * torch.randn(N, D // 2)
        cos, sin = angles.cos(), angles.sin()
        want = turned(x, cos, sin)
        expect(
            ask(answer, x, cos, sin, library="rope.py"),
            want,
            {
                "this is the split-half pairing; these weights want neighbours": turned(x, cos, sin, halves=True),
                "this turns clockwise: look at the signs": turned(x, cos, -sin),
                "the pairs come back as halves; put each pair's two numbers side by side": torch.cat(
                    [want[..., 0::2], want[..., 1::2]], dim=-1
                ),
                "only the cosine part is there": x * cos.repeat_interleave(2, -1)[:, None],
            },
            where=f"x {tuple(x.shape)}",
        )
    x, angles = torch.randn(2, 5, 3, 8, dtype=torch.bfloat16), 5 * torch.randn(5, 4)
    cos, sin = angles.cos(), angles.sin()
    got = ask(answer, x, cos, sin, library="rope.py")
    if getattr(got, "dtype", None) != torch.bfloat16:
        raise Wrong(f"x was bfloat16, so the result should be; it is {getattr(got, 'dtype', type(got).__name__)}")
    rough = turned(x, cos.bfloat16(), sin.bfloat16())
    want = turned(x.float(), cos, sin).bfloat16()
    expect(got, want, {"compute in float32, then come back to bfloat16": rough}, where="x in bfloat16")


# ---------------------------------------------------------------------------------------------------- 02.3


def places_of(shapes, text_length, middle=lambda n: n - n // 2, frame=lambda i: i, start=None, columns_first=False):
    rows = []
    for i, (T, h, w) in enumerate(shapes):
        for t in range(T):
            grid = [(y, x) for y in range(h) for x in range(w)]
            if columns_first:
                grid = [(y, x) for x in range(w) for y in range(h)]
            rows += [[frame(i) + t, y - middle(h), x - middle(w)] for y, x in grid]
    if start is None:
        start = max(max(h // 2, w // 2) for _, h, w in shapes)
    text = [[start + j] * 3 for j in range(text_length)]
    return torch.tensor(rows, dtype=torch.float32), torch.tensor(text, dtype=torch.float32)


@exercise("02.3")
def positions(answer):
    """positions(shapes, text_length) -> (Ni, 3), (Nt, 3), for several pictures, clips, odd grids."""
    side = lambda: random.randint(2, 9)  # noqa: E731
    cases = [[(1, 4, 4)], [(1, 4, 6), (1, 9, 5)], [(3, 2, 4), (1, 5, 3)]]
    cases += [[(random.randint(1, 3), side(), side()) for _ in range(random.randint(1, 4))] for _ in range(4)]
    for shapes in cases:
        length, sides = random.randint(1, 9), [max(h, w) for _, h, w in shapes]
        want = places_of(shapes, length)
        got = ask(answer, list(shapes), length, library="rope.py")
        if not isinstance(got, tuple | list) or len(got) != 2 or not all(isinstance(t, torch.Tensor) for t in got):
            raise Wrong(f"expected two tensors, image positions (Ni, 3) and text positions (Nt, 3) ({shapes})")
        still = [
            places_of([(1, h, w)], 1, frame=lambda _, i=i: i)[0].repeat(T, 1) for i, (T, h, w) in enumerate(shapes)
        ]
        wrong_images = {
            "all pictures have frame 0: the n-th picture should begin at n": places_of(shapes, 1, frame=lambda i: 0)[0],
            "rows and columns count from the middle": places_of(shapes, 1, middle=lambda n: 0)[0],
            "odd grids are one off: n tokens start at -(n - n//2)": places_of(shapes, 1, middle=lambda n: n // 2)[0],
            "wrong order: row by row, the column runs fastest": places_of(shapes, 1, columns_first=True)[0],
            "frames of a clip count on: frame t of picture i is at i + t": torch.cat(still),
            "columns and rows are exchanged": want[0][:, [0, 2, 1]],
        }  # fmt: skip
        expect(got[0].float(), want[0], wrong_images, where=f"images of {shapes}")
        behind_target = places_of(shapes, length, start=sides[0] // 2)[1]
        wrong_text = {
            "text starts behind the largest picture, not behind the target": behind_target,
            "text starts at half of the largest side": places_of(shapes, length, start=max(sides))[1],
            "text starts at 0: it should start behind the pictures": places_of(shapes, length, start=0)[1],
            "text moves along all three axes, the frame axis too": want[1] * torch.tensor([0, 1, 1]),
        }  # fmt: skip
        expect(got[1].float(), want[1], wrong_text, where=f"text of {shapes}")


# ---------------------------------------------------------------------------------------------------- 02.4


@cache
def trained():
    """Block 0 of the tiny checkpoint: its attention's tensors, real image tokens that enter it, and its tables."""
    prefix = "transformer_blocks.0.attn."
    tensors = Checkpoint(TINY).tensors("transformer", prefix)
    tensors = {name.removeprefix(prefix): tensor.float() for name, tensor in tensors.items()}
    model, seen = _model(), {}
    attn = model.transformer_blocks[0].attn
    hook = attn.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(zip("xy", (*args, *kwargs.values()), strict=False)), with_kwargs=True
    )
    try:
        with torch.no_grad():
            model(*inputs([(1, 4, 4), (1, 4, 4)]))
    finally:
        hook.remove()
    (cos, sin), _ = model.pos_embed([(1, 4, 4), (1, 4, 4)], 1)
    return tensors, seen["x"], (cos, sin), attn.heads


def scores(x, tensors, tables, heads: int, halves: bool) -> torch.Tensor:
    """Query times key of all image tokens, (B, H, N, N), with one pairing or the other."""
    parts = []
    for name in "qk":
        y = F.linear(x, tensors[f"to_{name}.weight"], tensors[f"to_{name}.bias"]).unflatten(-1, (heads, -1))
        y = y * (y.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * tensors[f"norm_{name}.weight"]
        parts.append(turned(y, *tables, halves=halves))
    return torch.einsum("bqhd,bkhd->bhqk", *parts)


@exercise("02.4")
def to_halves(answer):
    """to_halves(weight, heads): random tensors, then the trained block on real tokens."""
    for _ in range(4):
        heads, D = random.randint(2, 4), 2 * random.randint(3, 8)
        weight = torch.randn(heads * D, *([random.randint(2, 5)] if random.random() < 0.7 else []))
        rows = weight.unflatten(0, (heads, D))
        evens_first = [*range(0, D, 2), *range(1, D, 2)]
        back = torch.tensor(evens_first).argsort()
        wrong = {
            "nothing moved": weight,
            "this is the way back, from halves to neighbours": rows[:, back].flatten(0, 1),
            "reorder within each head, not over all heads at once": torch.cat([weight[0::2], weight[1::2]]),
            "the odd rows come first: even ones are the first numbers of the pairs": rows[
                :, [*range(1, D, 2), *range(0, D, 2)]
            ].flatten(0, 1),
        }  # fmt: skip
        got = ask(answer, weight.clone(), heads, library="rope.py")
        expect(got, rows[:, evens_first].flatten(0, 1), wrong, where=f"weight {tuple(weight.shape)}, {heads} heads")
    tensors, x, tables, heads = trained()
    names = [
        f"{kind}_{n}.{part}" for n in "qk" for kind, part in (("to", "weight"), ("to", "bias"), ("norm", "weight"))
    ]
    moved = {n: ask(answer, tensors[n].clone(), 1 if n.startswith("norm") else heads, library="rope.py") for n in names}
    want = scores(x, tensors, tables, heads, halves=False)
    got = scores(x, moved, tables, heads, halves=True)
    expect(got, want, tolerance=1e-3, where="scores of the trained block 0")
    return f"Scores of the trained block agree to {(got - want).abs().max():.0e}; the largest is {want.max():.0f}."


# ---------------------------------------------------------------------------------------------------- 02.5


class _Rope(QwenEmbedRope):  # spoiler: the fault of exercise 02.5
    def forward(self, video_fhw, txt_seq_lens, device=None):
        images, _ = super().forward(video_fhw, txt_seq_lens, device)
        _, text = super().forward(video_fhw[:1], txt_seq_lens, device)
        return images, text


def _model() -> QwenImageTransformer2DModel:
    return Checkpoint(TINY).load(QwenImageTransformer2DModel, "transformer")


def broken() -> QwenImageTransformer2DModel:
    """The tiny transformer with one fault."""
    model = _model()
    model.pos_embed = _Rope(10000, model.pos_embed.axes_dim)
    return model


def right() -> QwenImageTransformer2DModel:
    """The tiny transformer."""
    return _model()


def inputs(shapes: list[tuple[int, int, int]], words: int = 9) -> tuple:
    """What a transformer takes, with random numbers: image tokens, text, no mask, noise level, shapes."""
    generator = torch.Generator().manual_seed(0)
    tokens = sum(t * h * w for t, h, w in shapes)
    config = Checkpoint(TINY).config("transformer/config.json")
    image = torch.randn(1, tokens, config["in_channels"], generator=generator)
    text = torch.randn(1, words, config["joint_attention_dim"], generator=generator)
    return image, text, None, torch.tensor([0.8]), [shapes]


CAUSES = {
    "B": "the frame number stands in the image tables, and those agree",
    "C": "centring changes the image tables, and those agree",
    "D": "the pairing is not in the tables, so pos_embed would agree",
    "E": "then two pictures of 4×4 would show it already",
    "F": "then [(1, 4, 4), (1, 4, 6)] would show nothing: its last picture is its largest",
    "G": "rows and columns stand in the image tables too, and those agree",
}


@exercise("02.5")
def cause(finding, shapes):
    """(name of the sub-module, "image" or "text", letter), and shapes that show the fault."""
    fits = isinstance(shapes, list) and shapes and all(isinstance(s, tuple) and len(s) == 3 for s in shapes)
    if not fits:
        raise Wrong("shapes should be a list such as [(1, 4, 4), (1, 4, 4)]")
    largest = [max(h, w) // 2 for _, h, w in shapes]
    if max(largest) == largest[0]:
        raise Wrong("on these shapes the two models agree: vary the sizes of target and reference")
    names = {
        "": "look at the first sub-module that differs, not at the whole",
        "transformer_blocks*": "the blocks differ because what they are given differs; "
        "which sub-module finishes before them?",
    }
    images, words = sum(t * h * w for t, h, w in shapes), 9
    rows = f"how many rows has the table that differs? There are {images} image tokens and {words} words"
    expect_finding(
        finding,
        "three: the sub-module's name, 'image' or 'text', a letter",
        name=("pos_embed", names),
        table=("text", {"image": rows}),
        cause=("A", CAUSES),
    )


# ---------------------------------------------------------------------------------------------------- 02.6


@exercise("02.6")
def freeze(answer):
    """freeze(tables, axis, axes_dim): the pairs of one axis unturned, in image and text tables."""
    for axes in ((4, 14, 14), (16, 56, 56), tuple(2 * random.randint(2, 6) for _ in range(3))):
        for axis in range(3):
            vid, txt = torch.randn(random.randint(4, 9), sum(axes) // 2), torch.randn(3, sum(axes) // 2)
            begin = sum(axes[:axis]) // 2
            own = slice(begin, begin + axes[axis] // 2)

            def tables(cos_of, sin_of, parts=(vid, txt), own=own, only=2):
                made = []
                for i, angles in enumerate(parts):
                    cos, sin = angles.cos(), angles.sin()
                    if i < only:
                        cos[:, own], sin[:, own] = cos_of(cos[:, own]), sin_of(sin[:, own])
                    made.append((cos, sin))
                return tuple(made)

            flat = lambda made: tuple(t for pair in made for t in pair)  # noqa: E731
            same, ones, zeros = (lambda t: t), torch.ones_like, torch.zeros_like
            channels = slice(sum(axes[:axis]), sum(axes[: axis + 1]))
            wrong = {
                "cosine 0 and sine 0 delete the pairs; unturned is cosine 1": flat(tables(zeros, zeros)),
                "the image tables are right, but words have positions too": flat(tables(ones, zeros, only=1)),
                "cosine 1 but the old sine: that is no turn": flat(tables(ones, same)),
                "sine 0 but the old cosine: that is no turn": flat(tables(same, zeros)),
                "a table has a column for each pair, and an axis half as many pairs as channels": flat(
                    tables(ones, zeros, own=channels)
                ),
                "nothing was frozen": flat(tables(same, same)),
            }  # fmt: skip
            given = tables(same, same)
            got = ask(answer, given, axis, axes, library="rope.py")
            whole = isinstance(got, tuple | list) and len(got) == 2 and all(
                isinstance(pair, tuple | list) and len(pair) == 2 for pair in got
            )  # fmt: skip
            if not whole:
                raise Wrong("expected ((cos, sin), (cos, sin)): image tables and text tables")
            expect(flat(given), flat(tables(same, same)), where="the tables you were given were changed in place")
            expect(flat(got), flat(tables(ones, zeros)), wrong, where=f"axis {axis} of {axes}")

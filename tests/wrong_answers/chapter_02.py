"""Plausible wrong answers to the exercises of chapter 02, and the words of the diagnosis that each must get."""

import torch

from checks import Answers


def halves(x, cos, sin):
    cos, sin = cos[:, None], sin[:, None]
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)


def clockwise(x, cos, sin):
    return neighbours(x, cos, -sin)


def neighbours(x, cos, sin):
    cos, sin = cos[:, None], sin[:, None]
    a, b = x.float()[..., 0::2], x.float()[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)


def left_as_halves(x, cos, sin):
    cos, sin = cos[:, None], sin[:, None]
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def by_heads(x, cos, sin):
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def promoted(x, cos, sin):
    return neighbours(x.float(), cos, sin)


def rough(x, cos, sin):
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def library_rotate(x, cos, sin):
    from minqwen.rope import apply_rotary_emb_qwen

    return apply_rotary_emb_qwen(x, (cos, sin))


def positions(middle=lambda n: n - n // 2, frame=True, clip=True, start=None, swap=False, diagonal=True):
    def answer(shapes, text_length):
        images = []
        for i, (T, h, w) in enumerate(shapes):
            t = torch.arange(T) * clip + i * frame
            y, x = torch.arange(h) - middle(h), torch.arange(w) - middle(w)
            images.append(torch.cartesian_prod(t, y, x))
            if swap:
                images[-1] = torch.cartesian_prod(t, x, y)[:, [0, 2, 1]]
        s = max(max(h // 2, w // 2) for _, h, w in shapes) if start is None else start(shapes)
        text = (s + torch.arange(text_length))[:, None].repeat(1, 3)
        if not diagonal:
            text[:, 0] = 0
        return torch.cat(images), text

    return answer


def moved(order):
    return lambda weight, heads: torch.cat([part[order(len(part))] for part in weight.chunk(heads)])


def evens(n):
    return [*range(0, n, 2), *range(1, n, 2)]


def frozen(cos=1.0, sin=0.0, text=True, channels=False, nothing=False):
    def answer(tables, axis, axes_dim):
        size = 1 if channels else 2
        begin, end = sum(axes_dim[:axis]) // size, sum(axes_dim[: axis + 1]) // size
        made = []
        for i, pair in enumerate(tables):
            pair = [t.clone() for t in pair]
            for table, value in zip(pair, (cos, sin), strict=True):
                if value is not None and not nothing and (i == 0 or text):
                    table[:, begin:end] = value
            made.append(tuple(pair))
        return tuple(made)

    return answer


def in_place(tables, axis, axes_dim):
    begin, end = sum(axes_dim[:axis]) // 2, sum(axes_dim[: axis + 1]) // 2
    for cos, sin in tables:
        cos[:, begin:end], sin[:, begin:end] = 1, 0
    return tables


SHOWS = [(1, 4, 4), (1, 4, 6)]

WRONG = {
    "places": [
        ("counts from the corner", (0, 9, 2, 12, 31)),
        ("ComfyUI's middle", (-3, 4, 2, 6, 25)),
        ("the last is 10//2 - 1", (-4, 5, 2, 6, 25)),
        ("the target counts too", (-4, 4, 1, 6, 25)),
        ("looks at the target only", (-4, 4, 2, 5, 24)),
        ("half of the side", (-4, 4, 2, 12, 31)),
        ("end one earlier", (-4, 4, 2, 6, 26)),
        ("expected five numbers", (-4, 4, 2)),
    ],
    "rotate": [
        ("split-half pairing", halves),
        ("clockwise", clockwise),
        ("come back as halves", left_as_halves),
        ("your code raised RuntimeError", by_heads),
        ("x was bfloat16", promoted),
        ("compute in float32", rough),
        ("write it yourself", library_rotate),
    ],
    "positions": [
        ("all pictures have frame 0", positions(frame=False)),
        ("count from the middle", positions(middle=lambda n: 0)),
        ("odd grids are one off", positions(middle=lambda n: n // 2)),
        ("frames of a clip count on", positions(clip=False)),
        ("the column runs fastest", positions(swap=True)),
        ("not behind the target", positions(start=lambda shapes: max(shapes[0][1:]) // 2)),
        ("half of the largest side", positions(start=lambda shapes: max(max(s[1:]) for s in shapes))),
        ("the frame axis too", positions(diagonal=False)),
        ("expected two tensors", lambda shapes, n: torch.cat(positions()(shapes, n))),
    ],
    "to_halves": [
        ("nothing moved", lambda weight, heads: weight),
        ("the way back", moved(lambda n: torch.tensor(evens(n)).argsort())),
        ("not over all heads at once", lambda weight, heads: weight[evens(len(weight))]),
        ("the odd rows come first", moved(lambda n: [*range(1, n, 2), *range(0, n, 2)])),
    ],
    "cause": [
        ("the two models agree", Answers((("pos_embed", "text", "A"), [(1, 4, 4), (1, 4, 4)]))),
        ("the blocks differ because", Answers((("transformer_blocks.0.attn", "text", "A"), SHOWS))),
        ("not at the whole", Answers((("", "text", "A"), SHOWS))),
        ("how many rows has the table", Answers((("pos_embed", "image", "C"), SHOWS))),
        ("the frame number stands in the image tables", Answers((("pos_embed", "text", "B"), SHOWS))),
        ("two pictures of 4×4 would show it", Answers((("pos_embed", "text", "E"), SHOWS))),
        ("its last picture is its largest", Answers((("pos_embed", "text", "F"), SHOWS))),
        ("rows and columns stand in the image tables", Answers((("pos_embed", "text", "G"), SHOWS))),
    ],
    "freeze": [
        ("delete the pairs", frozen(cos=0.0)),
        ("words have positions too", frozen(text=False)),
        ("that is no turn", frozen(sin=None)),
        ("half as many pairs as channels", frozen(channels=True)),
        ("changed in place", in_place),
        ("nothing was frozen", frozen(nothing=True)),
    ],
}

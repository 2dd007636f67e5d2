"""Plausible wrong answers to the exercises of chapter 04, and the words of the diagnosis that each must get."""

import torch
import torch.nn.functional as F


def normed(x, dim=-1, correction=0, eps=1e-6):
    var, mean = torch.var_mean(x, dim=dim, keepdim=True, correction=correction)
    return (x - mean) / (var + eps).sqrt()


def step(norm=normed, one=1, base=lambda x, read: x, gate=lambda g: g, swap=False, whole=False):
    def answer(x, f, shift, scale, g):
        shift, scale, g = shift[:, None], scale[:, None], gate(g[:, None])
        if swap:
            shift, scale = scale, shift
        read = norm(x) * (one + scale) + shift
        return g * (x + f(read)) if whole else base(x, read) + g * f(read)

    return answer


def without_axis(x, f, shift, scale, gate):
    return x + gate * f(normed(x) * (1 + scale) + shift)


def library_step(x, f, shift, scale, gate):
    from minqwen.block import Modulation, modulate

    mod = Modulation(shift[:, None], scale[:, None], gate[:, None])
    return x + mod.gate * f(modulate(normed(x), mod))


def rms(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def tanh(x):
    return F.gelu(x, approximate="tanh")


def block(order=(0, 1, 2, 3, 4, 5), bend=tanh, reread=True, act=F.silu, crossed=False, turned=False, only=False):
    def answer(img, txt, temb, w, attention):
        streams, kinds, mods = [img, txt], ("img", "txt"), []
        for s in kinds:
            six = (act(temb) @ w[f"{s}_mod.1.weight"].T + w[f"{s}_mod.1.bias"])[:, None].chunk(6, dim=-1)
            mods.append([six[i] for i in order])
        mods = mods[::-1] if crossed else mods
        read = [normed(x) * (1 + m[1]) + m[0] for x, m in zip(streams, mods, strict=True)]
        new = [x + m[2] * a for x, m, a in zip(streams, mods, attention(*read), strict=True)]
        out = []
        for s, x, old, m in zip(kinds, new, streams, mods, strict=True):
            y = normed(x if reread else old) * (1 + m[4]) + m[3]
            y = bend(y @ w[f"{s}_mlp.net.0.proj.weight"].T + w[f"{s}_mlp.net.0.proj.bias"])
            out.append(x + m[5] * (y @ w[f"{s}_mlp.net.2.weight"].T + w[f"{s}_mlp.net.2.bias"]))
        if only:
            return out[0]
        return out[::-1] if turned else out

    return answer


def library_block(img, txt, temb, w, attention):
    from minqwen.block import clip_fp16

    clip_fp16(img)
    return block()(img, txt, temb, w, attention)


def tokens(vectors, lengths, clean, turns=False, place=False, swap=False, plain=False, across=False):
    noisy, still = (vectors[0::2], vectors[1::2]) if turns else vectors.chunk(2)
    if swap:
        noisy, still = still, noisy
    if plain:
        still = noisy
    clean = [i > 0 for i in range(len(lengths))] if place else clean
    rows = [(still if c else noisy)[:, None].expand(-1, n, -1) for n, c in zip(lengths, clean, strict=True)]
    out = torch.cat(rows, dim=1)
    return out.transpose(0, 1) if across else out


def mistaken(**options):
    return lambda vectors, lengths, clean: tokens(vectors, lengths, clean, **options)


def turned(*places):
    def answer(six, factor, part):
        at = places[0](part) if places and callable(places[0]) else places
        return tuple(t * factor if i in at else t for i, t in enumerate(six))

    return answer


def in_place(six, factor, part):
    six[{"attention": 2, "MLP": 5}[part]].mul_(factor).add_(factor == 1)
    six[0].add_(1)
    return six


WRONG = {
    "numbers": [
        ("the residual is missing", (20, 640, 65504, 99072, 4)),
        ("the gate is missing", (8, 640, 65504, 99072, 4)),
        ("that is the row of shift2", (23, 384, 65504, 99072, 4)),
        ("counted in vectors", (23, 5, 65504, 99072, 4)),
        ("without the clip", (23, 640, float("inf"), 99072, 4)),
        ("the bias is missing", (23, 640, 65504, 98304, 4)),
        ("who reads the text's query", (23, 640, 65504, 99072, 3)),
        ("text keys and values are read", (23, 640, 65504, 99072, 6)),
        ("expected five numbers", (23, 640)),
    ],
    "gated_step": [
        ("scale multiplies as 1 + scale", step(one=0)),
        ("shift and scale are exchanged", step(swap=True)),
        ("the residual is missing", step(base=lambda x, read: 0)),
        ("not to its normed form", step(base=lambda x, read: normed(x))),
        ("not to what f was given", step(base=lambda x, read: read)),
        ("the gate is missing", step(gate=torch.ones_like)),
        ("not the sum", step(whole=True)),
        ("not as 1 + gate", step(gate=lambda g: 1 + g)),
        ("the norm is missing", step(norm=lambda x: x)),
        ("this is RMSNorm", step(norm=rms)),
        ("not by C - 1", step(norm=lambda x: normed(x, correction=1))),
        ("not over the tokens", step(norm=lambda x: normed(x, dim=1))),
        ("nearly constant", step(norm=lambda x: normed(x, eps=0))),
        ("your code raised RuntimeError", without_axis),
        ("write it yourself", library_step),
    ],
    "block": [
        ("this order is scale, shift, gate", block(order=(1, 0, 2, 4, 3, 5))),
        ("the last three to the MLP", block(order=(3, 4, 5, 0, 1, 2))),
        ("its own shift, scale and gate", block(order=(0, 1, 2, 0, 1, 2))),
        ("do not alternate", block(order=(0, 2, 4, 1, 3, 5))),
        ("the GELU with erf", block(bend=F.gelu)),
        ("sigmoid(1.702 x)", block(bend=lambda x: x * torch.sigmoid(1.702 * x))),
        ("not SiLU", block(bend=F.silu)),
        ("after attention was added", block(reread=False)),
        ("temb passes SiLU", block(act=lambda t: t)),
        ("exchanged their modulations", block(crossed=True)),
        ("this returns (text, image)", block(turned=True)),
        ("expected two streams", block(only=True)),
        ("write it yourself", library_block),
    ],
    "cause": [
        ("expected three", (3, "txt_mlp.net.0.proj")),
        ("block 4 differs because", (4, "img_norm1", "C")),
        ("that one agrees still", (3, "txt_norm2", "C")),
        ("name the innermost", (3, "txt_mlp", "C")),
        ("attn would already differ", (3, "txt_mlp.net.0.proj", "A")),
        ("the attention gate is used before", (3, "txt_mlp.net.0.proj", "B")),
        ("then txt_norm2 would differ", (3, "txt_mlp.net.0.proj", "D")),
        ("before any GELU", (3, "transformer_blocks.3.txt_mlp.net.0.proj", "E")),
    ],
    "per_token": [
        ("are exchanged: the first B rows", mistaken(swap=True)),
        ("every token has the noise level's row", mistaken(plain=True)),
        ("not in turns", mistaken(turns=True)),
        ("not its place in the list", mistaken(place=True)),
        ("batch and tokens are exchanged", mistaken(across=True)),
        ("expected the shape", lambda vectors, lengths, clean: vectors[:, None]),
    ],
    "turned_down": [
        ("both gates are turned down", turned(2, 5)),
        ("the other part's gate", turned(lambda part: [{"attention": 5, "MLP": 2}[part]])),
        ("the third of three", turned(lambda part: [{"attention": 0, "MLP": 3}[part]])),
        ("that is the scale", turned(lambda part: [{"attention": 1, "MLP": 4}[part]])),
        ("all six are turned down", turned(*range(6))),
        ("nothing was turned down", turned()),
        ("changed in place", in_place),
        ("expected six vectors", lambda six, factor, part: six[2] * factor),
    ],
}

"""Checks of the exercises of chapter 03, with the broken model and the trained blocks that they need."""

import random
from functools import cache

import torch
import torch.nn.functional as F

from checks import Wrong, ask, exercise, expect, expect_finding
from course import TINY
from minqwen import attention as library
from minqwen.checkpoint import Checkpoint
from minqwen.rope import QwenEmbedRope, apply_rotary_emb_qwen
from minqwen.transformer import QwenImageTransformer2DModel


def turn(x: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Chapter 02: x (B, N, H, D) turned by a table (cos, sin), each (N, D/2)."""
    return apply_rotary_emb_qwen(x, table)


# ---------------------------------------------------------------------------------------------------- 03.1


@exercise("03.1")
def sizes(answer):
    """Five answers about a batch of two: target 6×4, reference 5×5, texts of 9 and 12 tokens, 24 heads of 128."""
    if not isinstance(answer, tuple | list) or len(answer) != 5:
        raise Wrong(f"expected five answers, got {str(answer)[:60]}")
    wrong = [
        {"twelve tokens long, but three of them are padding that nobody sees": 61,
         "the reference is seen too": 33, "the pictures are seen too": 9, "words are seen too": 49},
        {"padded to the longest text": 58, "the reference's tokens are in it too": 36},
        {"every head has its own": 2 * 61 * 61, "there are two samples": 24 * 61 * 61,
         "masked scores are computed as well, and then thrown away": 24 * (58 * 58 + 61 * 61),
         "queries of all tokens: the text's as well": 2 * 24 * 49 * 61, "D does not count scores": 2 * 24 * 61 * 128},
        {"the text is padded to the longest": 9, "that is the image first; the text comes first": 0,
         "that is where the reference begins": 36, "that is where the text would begin if the image came first": 49},
        {"this puts the mask of one prompt to the pictures of the other": (9, 12, 9, 12)},
    ]  # fmt: skip
    names = ["tokens seen in the first sample", "length of a row", "scores", "first image row", "tokens of each row"]
    wants = (9 + 24 + 25, 12 + 24 + 25, 2 * 24 * 61 * 61, 12, (9, 9, 12, 12))
    for got, want, mistakes, name in zip(answer, wants, wrong, names, strict=True):
        expect(tuple(got) if isinstance(got, list) else got, want, mistakes, where=name)


# ---------------------------------------------------------------------------------------------------- 03.2


def mixed(txt, img, scale=None, dim=-1, heads_last=False, own_only=False, cut=None, text_first=True):
    """(q, k, v) of text and of image, each (B, N, H, D) -> image, text (B, N, H * D), and the usual mistakes."""
    if own_only:
        return mixed([x[:, :0] for x in txt], img)[0], mixed([x[:, :0] for x in txt], txt)[0]
    q, k, v = (torch.cat([t, i], dim=1).double() for t, i in zip(txt, img, strict=True))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim), v)
    out = (out.transpose(2, 3) if heads_last else out).flatten(2).float()
    cut = txt[0].shape[1] if cut is None else cut
    return (out[:, cut:], out[:, :cut]) if text_first else (out[:, :cut], out[:, cut:])


def stacked_heads(txt, img):
    """Heads taken for tokens: what a softmax over (B, N, H, D) gives."""
    q, k, v = (torch.cat([t, i], dim=1) for t, i in zip(txt, img, strict=True))
    out = ((q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v).flatten(2)
    return out[:, txt[0].shape[1] :], out[:, : txt[0].shape[1]]


@exercise("03.2")
def joint(answer):
    """joint(txt, img): random sizes; both are (q, k, v)."""
    for _ in range(5):
        B, Nt, Ni = random.randint(1, 3), *random.sample(range(2, 7), 2)
        H, D = random.choice([2, 3, 5]), random.choice([4, 6, 8])
        txt, img = (tuple(2 * torch.randn(B, n, H, D) for _ in range(3)) for n in (Nt, Ni))
        want = mixed(txt, img)
        wrong = {
            "a softmax for each stream: join them first, so that all tokens compete": mixed(txt, img, own_only=True),
            "scores are not divided by the root of D": mixed(txt, img, scale=1.0),
            "divide by the root of D, not by D": mixed(txt, img, scale=1 / D),
            "divide by the root of a head's D numbers, not of all H * D": mixed(txt, img, scale=(H * D) ** -0.5),
            "softmax runs over the keys: the weights of one query sum to 1": mixed(txt, img, dim=-2),
            "a token's heads come out interleaved: one head after the other": mixed(txt, img, heads_last=True),
            "the image comes first in what you return": want[::-1],
            "cut behind the last text token, not behind as many rows as there are image tokens": mixed(
                txt, img, cut=Ni
            ),
            "the text stands first in the joined sequence; you cut as if the image did": mixed(
                txt, img, cut=Ni, text_first=False
            ),
            "heads were taken for tokens: put the axis of tokens next to the last": stacked_heads(txt, img),
        }
        got = ask(answer, txt, img, library="attention.py")
        expect(got, want, wrong, where=f"text {(B, Nt, H, D)}, image {(B, Ni, H, D)}")


# ---------------------------------------------------------------------------------------------------- 03.3


@exercise("03.3")
def weights(answer):
    """weights(scores, text_mask): (B, H, N, N), (B, Nt) -> (B, H, N, N); masks with holes, bool or 0 and 1."""
    for kind in (torch.bool, torch.long, torch.bool, torch.float32):
        B, H, Nt, Ni = random.randint(2, 3), random.randint(1, 3), random.randint(3, 6), random.randint(4, 7)
        scores = 2 * torch.randn(B, H, Nt + Ni, Nt + Ni)
        hidden = torch.stack([torch.randperm(Nt) < random.randint(1, Nt - 1) for _ in range(B)])
        seen = F.pad(~hidden, (0, Ni), value=True)
        columns, rows = seen[:, None, None, :], seen[:, None, :, None]
        at_the_end = F.pad(~hidden, (Ni, 0), value=True)[:, None, None, :]
        valid_hidden = F.pad(hidden, (0, Ni), value=True)[:, None, None, :]

        def shown(where, scores=scores):
            return torch.where(where, scores, -torch.inf).softmax(-1)

        wrong = {
            "the mask is ignored": scores.softmax(-1),
            "you hide after the softmax: then a row no longer sums to 1": scores.softmax(-1) * columns,
            "a score of 0 is not hidden: exp(0) is 1": (scores * columns).softmax(-1),
            "the text comes first in a row; you hide as if it came last": shown(at_the_end),
            "this hides what is valid": shown(valid_hidden),
            "1 and 0 were added to the scores": (scores + columns.float()).softmax(-1),
        }
        given = scores.clone()
        got = ask(answer, given, (~hidden).to(kind), library="attention.py")
        expect(given, scores, where="the scores you were given were changed in place")
        if isinstance(got, torch.Tensor) and got.shape == scores.shape:
            padded = torch.where(rows, got, 0.0)  # what a padded query sees means nothing
            want = torch.where(rows, shown(columns), 0.0)
            wrong = {why: torch.where(rows, value, 0.0) for why, value in wrong.items()}
            if torch.allclose(got, scores.softmax(-1) * rows, atol=1e-5) or _rows_hidden(got, scores, rows):
                raise Wrong("rows are hidden, not columns: nobody may see a padded *key*")
            where = f"scores {tuple(scores.shape)}, mask {tuple(hidden.shape)} {str(kind).removeprefix('torch.')}"
            expect(padded, want, wrong, where=where)
        else:
            expect(got, scores)


def _rows_hidden(got: torch.Tensor, scores: torch.Tensor, rows: torch.Tensor) -> bool:
    """Whether valid rows are those without a mask, and padded ones are something else."""
    rows, plain = rows.expand_as(scores), scores.softmax(-1)
    return bool(torch.allclose(got[rows], plain[rows], atol=1e-5) and not torch.allclose(got, plain, atol=1e-5))


# ---------------------------------------------------------------------------------------------------- 03.4


LAYERS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out")
NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")


def attention_of(tensors, img, txt, tables, heads, norm="head", late=False, values=False, bias=True, mute=None):
    """The joint attention of a dictionary of tensors, in float64, and the usual mistakes. -> image, text"""
    tensors = {name: t.double() for name, t in tensors.items()}

    def linear(name, x):
        return F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"] if bias else None)

    def normed(x, name):
        weight = tensors[f"{name}.weight"]
        if norm == "none":
            return x
        if norm == "width":
            return F.rms_norm(x.flatten(2), (weight.numel() * heads,), weight.repeat(heads), 1e-6).view_as(x)
        x = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        return x if norm == "plain" else x * weight

    def turned(x, table):
        cos, sin = (t.double()[:, None] for t in table)
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)

    parts = []
    names = (("add_q_proj", "add_k_proj", "add_v_proj"), ("to_q", "to_k", "to_v"))
    for x, layers, table, added in zip((txt, img), names, tables[::-1], ("added_", ""), strict=True):
        q, k, v = (linear(name, x.double()).unflatten(-1, (heads, -1)) for name in layers)
        steps = [lambda x, n: normed(x, n), lambda x, n, table=table: turned(x, table)]
        for step in reversed(steps) if late else steps:
            q, k = step(q, f"norm_{added}q"), step(k, f"norm_{added}k")
        parts.append((q, k, turned(v, table) if values else v))
    out_img, out_txt = mixed(*parts)
    if mute is not None:
        own = slice(mute * (out_img.shape[-1] // heads), (mute + 1) * (out_img.shape[-1] // heads))
        out_img[..., own], out_txt[..., own] = 0, 0
    return linear("to_out.0", out_img.double()).float(), linear("to_add_out", out_txt.double()).float()


def swapped(tensors, *pairs):
    there = {a: b for pair in pairs for a, b in (pair, pair[::-1])}
    return {n: tensors[f"{there.get(n.rsplit('.', 1)[0], n.rsplit('.', 1)[0])}.{n.rsplit('.', 1)[1]}"] for n in tensors}


def random_case(heads: int, axes: tuple[int, ...]):
    """Tensors of one attention under their released names, and tokens and tables to go with them."""
    D, C = sum(axes), heads * sum(axes)
    tensors = {f"{n}.weight": torch.randn(C, C) / C**0.5 for n in LAYERS} | {
        f"{n}.bias": torch.randn(C) for n in LAYERS
    }
    tensors |= {f"{n}.weight": 1 + 0.3 * torch.randn(D) for n in NORMS}
    grids, length = [(1, 2, 3), (1, 3, 1)], random.randint(3, 7)
    img, txt = torch.randn(2, 9, C) * torch.rand(2, 9, 1).exp(), torch.randn(2, length, C)
    return tensors, img, txt, QwenEmbedRope(10000, axes)(grids, length), heads


@cache
def trained(number: int = 0):
    """A block of the tiny checkpoint: its attention's tensors, the real tokens that enter it, tables, heads."""
    model, seen = right(), {}
    attn = model.transformer_blocks[number].attn
    hook = attn.register_forward_pre_hook(lambda _, args: seen.update(zip(("img", "txt", "mask", "tables"), args)))  # noqa: B905
    try:
        with torch.no_grad():
            model(*inputs([9]))
    finally:
        hook.remove()
    tensors = {name: t.detach() for name, t in attn.state_dict().items()}
    return tensors, seen["img"], seen["txt"], seen["tables"], attn.heads


@exercise("03.4")
def attention(answer):
    """attention(tensors, img, txt, tables, heads): random weights, then all trained blocks on real activations."""
    cases = [random_case(3, (2, 4, 6)), random_case(2, (4, 2, 2))] + [trained(n) for n in range(6)]
    for number, case in enumerate(cases):
        tensors, img, txt, tables, heads = case
        want = attention_of(*case)
        rest = case[1:]
        norms = (("norm_q", "norm_added_q"), ("norm_k", "norm_added_k"))
        streams = tuple(zip(LAYERS[:3], LAYERS[3:6], strict=True))
        wrong = {
            "to_out.0 is the image's way out, to_add_out the text's": attention_of(
                swapped(tensors, ("to_out.0", "to_add_out")), *rest
            ),
            "queries and keys are not normed": attention_of(*case, norm="none"),
            "the norms lack their learned weights": attention_of(*case, norm="plain"),
            "the norm runs over the D numbers of each head, not over all C": attention_of(*case, norm="width"),
            "norm first, then turn": attention_of(*case, late=True),
            "norm_added_q and norm_added_k are the text's": attention_of(swapped(tensors, *norms), *rest),
            "query and key have a norm each": attention_of(
                tensors | {f"norm_{a}k.weight": tensors[f"norm_{a}q.weight"] for a in ("", "added_")}, *rest
            ),
            "values are not turned": attention_of(*case, values=True),
            "the biases are missing": attention_of(*case, bias=False),
            "the layers with add are the text's": attention_of(swapped(tensors, *streams), *rest),
            "the image comes first in what you return": want[::-1],
        }
        name = "random weights" if number < 2 else f"trained block {number - 2}"
        given = {key: t.clone() for key, t in tensors.items()}
        with torch.no_grad():
            got = ask(answer, given, img.clone(), txt.clone(), tables, heads, library="attention.py")
        expect(got, want, wrong, tolerance=1e-4, where=name)
    apart = max((a - b).abs().max() for a, b in zip(got, want, strict=True))
    return f"The last block's {want[0].numel() + want[1].numel():,} numbers agree to {apart:.0e}."


# ---------------------------------------------------------------------------------------------------- 03.5


def _mask(text_mask, image_tokens):  # spoiler: the fault of exercise 03.5
    return None if text_mask is None else F.pad(text_mask.bool(), (image_tokens, 0), value=True)[:, None, None]


class _Faulty(library.QwenDoubleStreamAttention):
    def forward(self, *args):
        before, library.joint_key_mask = library.joint_key_mask, _mask
        try:
            return super().forward(*args)
        finally:
            library.joint_key_mask = before


def right() -> QwenImageTransformer2DModel:
    """The tiny transformer."""
    return Checkpoint(TINY).load(QwenImageTransformer2DModel, "transformer")


def broken() -> QwenImageTransformer2DModel:
    """The tiny transformer with one fault."""
    model = right()
    for block in model.transformer_blocks:
        block.attn.__class__ = _Faulty
    return model


def inputs(lengths: list[int], mask: bool = True) -> tuple:
    """What a transformer takes, with random numbers, for a batch of texts of these lengths; mask=False: None for it."""
    generator = torch.Generator().manual_seed(0)
    config = Checkpoint(TINY).config("transformer/config.json")
    image = torch.randn(len(lengths), 32, config["in_channels"], generator=generator)
    text = torch.randn(len(lengths), max(lengths), config["joint_attention_dim"], generator=generator)
    valid = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    seen = valid if mask and not valid.all() else None
    return image, text * valid[..., None], seen, torch.tensor([0.8]), [[(1, 4, 4), (1, 4, 4)]]


CAUSES = {
    "B": "then mine would give the same with the mask and without it: hand it inputs(lengths, mask=False) as well",
    "C": "a wrong cut shows with equal lengths too",
    "D": "a wrong scale shows with equal lengths too",
    "E": "the sub-module norm_added_k finishes before the first difference, and agrees",
}


@exercise("03.5")
def cause(finding, lengths):
    """(name of the sub-module, letter), and lengths that show the fault."""
    fits = isinstance(lengths, list | tuple) and lengths and all(isinstance(n, int) and n > 0 for n in lengths)
    if not fits:
        raise Wrong("lengths should be a list such as [9, 9]")
    if len(set(lengths)) == 1:
        raise Wrong("on texts of one length the two models agree: nothing is padded")
    attn = "transformer_blocks.0.attn"
    outside = "what comes out of it differs, but a sub-module inside it is the first to differ"
    names = {
        "transformer_blocks.0": "look at the first sub-module that differs, the innermost",
        attn: outside,
        f"{attn}.to_add_out": outside,
        f"{attn}.norm_added_k": "this agrees still; the next one is the first to differ",
    }
    expect_finding(
        finding,
        "two: the sub-module's name, and a letter",
        name=(f"{attn}.to_out.0", names),
        cause=("A", CAUSES),
    )


# ---------------------------------------------------------------------------------------------------- 03.6


def zeroed(tensors, names, index):
    made = {name: t.clone() for name, t in tensors.items()}
    for name in names:
        made[name][index] = 0
    return made


@exercise("03.6")
def silence(answer):
    """silence(tensors, head, heads): judged by what the attention then does, so there is more than one right way."""
    for case in (random_case(3, (2, 4, 6)), random_case(4, (2, 2, 2)), trained(3)):
        tensors, img, txt, tables, heads = case
        for head in random.sample(range(heads), 2):
            rest = (img, txt, tables, heads)
            D = len(tensors["norm_q.weight"])
            own, outs = slice(head * D, (head + 1) * D), ("to_out.0.weight", "to_add_out.weight")
            values = ("to_v.weight", "add_v_proj.weight")
            queries = [f"{n}.{part}" for n in ("to_q", "add_q_proj") for part in ("weight", "bias")]
            mistakes = {
                "rows of a way out are its results; a head's numbers are its columns": zeroed(tensors, outs, own),
                "heads lie one after the other, D numbers each": zeroed(
                    tensors, outs, (slice(None), slice(head, None, heads))
                ),
                "the image is done; the text has a way out too": zeroed(tensors, outs[:1], (slice(None), own)),
                "a value without a weight still has a bias": zeroed(tensors, values, own),
                "a head without queries looks at everything alike, but it is not silent": zeroed(tensors, queries, own),
                "nothing is silenced": tensors,
                "everything is silenced": zeroed(tensors, outs, slice(None)),
                "a head too early": zeroed(tensors, outs, (slice(None), slice(max(own.start - D, 0), own.start))),
            }
            given = {name: t.clone() for name, t in tensors.items()}
            got = ask(answer, given, head, heads)
            if not isinstance(got, dict) or set(got) != set(tensors):
                raise Wrong("expected a dictionary of the same names")
            shapes = [name for name in tensors if getattr(got[name], "shape", None) != tensors[name].shape]
            if shapes:
                raise Wrong(f"the shape of {shapes[0]} has changed")
            if any(not torch.equal(given[name], tensors[name]) for name in tensors):
                raise Wrong("the tensors you were given were changed in place: clone them first")
            wrong = {why: attention_of(t, *rest) for why, t in mistakes.items()}
            want = attention_of(*case, mute=head)
            expect(attention_of(got, *rest), want, wrong, tolerance=1e-4, where=f"head {head} of {heads}")

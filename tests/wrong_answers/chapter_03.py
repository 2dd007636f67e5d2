"""Plausible wrong answers to the exercises of chapter 03, and the words of the diagnosis that each must get."""

import torch
import torch.nn.functional as F

from checks import Answers, chapter_03

RIGHT = (58, 61, 178608, 12, (9, 9, 12, 12))


def sizes(**changed):
    return tuple(changed.get(f"n{i}", value) for i, value in enumerate(RIGHT, 1))


def joint(scale=None, dim=-1, interleaved=False, exchanged=False, cut=None, one_stream=False):
    def answer(txt, img):
        if one_stream:
            return answer_of(img), answer_of(txt)
        q, k, v = (torch.cat(pair, dim=1).transpose(1, 2) for pair in zip(txt, img, strict=True))
        H, D = q.shape[1], q.shape[-1]
        out = ((q @ k.transpose(-1, -2) * (scale(H, D) if scale else D**-0.5)).softmax(dim) @ v).transpose(1, 2)
        out = (out.transpose(2, 3) if interleaved else out).flatten(2)
        Nt, Ni = txt[0].shape[1], img[0].shape[1]
        if cut == "image first":
            return out[:, :Ni], out[:, Ni:]
        parts = out[:, Ni if cut else Nt :], out[:, : Ni if cut else Nt]
        return parts[::-1] if exchanged else parts

    def answer_of(stream):
        q, k, v = (x.transpose(1, 2) for x in stream)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    return answer


def heads_as_tokens(txt, img):
    q, k, v = (torch.cat(pair, dim=1) for pair in zip(txt, img, strict=True))
    out = F.scaled_dot_product_attention(q, k, v).flatten(2)
    return out[:, txt[0].shape[1] :], out[:, : txt[0].shape[1]]


def by_the_library(txt, img):
    from minqwen.attention import joint_key_mask

    joint_key_mask(None, 1)
    return joint()(txt, img)


def seen_by(scores, text_mask, front=False):
    rest = scores.shape[-1] - text_mask.shape[1]
    return F.pad(text_mask.bool(), (rest, 0) if front else (0, rest), value=True)


def rows_hidden(scores, text_mask):
    return scores.masked_fill(~seen_by(scores, text_mask)[:, None, :, None], -torch.inf).softmax(-1)


def rows_zeroed(scores, text_mask):
    return scores.softmax(-1) * seen_by(scores, text_mask)[:, None, :, None]


def at_the_end(scores, text_mask):
    return scores.masked_fill(~seen_by(scores, text_mask, front=True)[:, None, None], -torch.inf).softmax(-1)


def valid_hidden(scores, text_mask):
    seen = F.pad(~text_mask.bool(), (0, scores.shape[-1] - text_mask.shape[1]), value=True)
    return scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)


def in_place(scores, text_mask):
    return scores.masked_fill_(~seen_by(scores, text_mask)[:, None, None], -torch.inf).softmax(-1)


def attention(norm="head", late=False, turn_values=False, bias=True, names=None, exchanged=False, shared=False):
    """Written with other operations than the check's own, so that it is a second opinion."""

    def answer(tensors, img, txt, tables, heads):
        t = dict(tensors)
        for a, b in names or ():
            for part in ("weight", "bias"):
                if f"{a}.{part}" in tensors:
                    t[f"{a}.{part}"], t[f"{b}.{part}"] = tensors[f"{b}.{part}"], tensors[f"{a}.{part}"]

        def linear(name, x):
            return F.linear(x, t[f"{name}.weight"], t[f"{name}.bias"] if bias else None)

        def normed(name, x):
            w = t[f"{name}.weight"]
            if norm == "width":
                return F.rms_norm(x.flatten(2), (len(w) * heads,), w.repeat(heads), 1e-6).view_as(x)
            return x if norm == "none" else F.rms_norm(x, w.shape, None if norm == "plain" else w, 1e-6)

        def stream(x, layers, added, table):
            q, k, v = (linear(name, x).unflatten(-1, (heads, -1)) for name in layers)
            n = (f"norm_{added}q", f"norm_{added}{'q' if shared else 'k'}")
            if late:
                q, k = (normed(name, chapter_03.turn(y, table)) for name, y in zip(n, (q, k), strict=True))
            else:
                q, k = (chapter_03.turn(normed(name, y), table) for name, y in zip(n, (q, k), strict=True))
            return q, k, chapter_03.turn(v, table) if turn_values else v

        image = stream(img, ("to_q", "to_k", "to_v"), "", tables[0])
        text = stream(txt, ("add_q_proj", "add_k_proj", "add_v_proj"), "added_", tables[1])
        a, b = joint()(text, image)
        out = linear("to_out.0", a), linear("to_add_out", b)
        return out[::-1] if exchanged else out

    return answer


def library_attention(tensors, img, txt, tables, heads):
    from minqwen.attention import QwenDoubleStreamAttention

    module = QwenDoubleStreamAttention(img.shape[-1], heads, img.shape[-1] // heads)
    module.load_state_dict(tensors)
    return module(img, txt, None, tables)


def zeroed(names, index, clone=True):
    def answer(tensors, head, heads):
        D = len(tensors["norm_q.weight"])
        made = {name: tensor.clone() if clone else tensor for name, tensor in tensors.items()}
        for name in names:
            made[name][index(head, D, heads)] = 0
        return made

    return answer


OUTS = ("to_out.0.weight", "to_add_out.weight")
QUERIES = ("to_q.weight", "to_q.bias", "add_q_proj.weight", "add_q_proj.bias")


def rows(head, D, heads):
    return slice(head * D, (head + 1) * D)


def columns(head, D, heads):
    return slice(None), slice(head * D, (head + 1) * D)


def strided(head, D, heads):
    return slice(None), slice(head, None, heads)


SHOWS, NAME = [9, 5], "transformer_blocks.0.attn.to_out.0"

WRONG = {
    "sizes": [
        ("padding that nobody sees", sizes(n1=61)),
        ("the reference is seen too", sizes(n1=33)),
        ("padded to the longest text", sizes(n2=58)),
        ("every head has its own", sizes(n3=2 * 61 * 61)),
        ("computed as well, and then thrown away", sizes(n3=24 * (58 * 58 + 61 * 61))),
        ("the text comes first", sizes(n4=0)),
        ("the mask of one prompt to the pictures of the other", sizes(n5=[9, 12, 9, 12])),
        ("expected five answers", (58, 61)),
    ],
    "joint": [
        ("a softmax for each stream", joint(one_stream=True)),
        ("not divided by the root of D", joint(scale=lambda H, D: 1)),
        ("by the root of D, not by D", joint(scale=lambda H, D: 1 / D)),
        ("not of all H * D", joint(scale=lambda H, D: (H * D) ** -0.5)),
        ("the weights of one query sum to 1", joint(dim=-2)),
        ("heads come out interleaved", joint(interleaved=True)),
        ("the image comes first in what you return", joint(exchanged=True)),
        ("cut behind the last text token", joint(cut="length")),
        ("you cut as if the image did", joint(cut="image first")),
        ("heads were taken for tokens", heads_as_tokens),
        ("write it yourself", by_the_library),
    ],
    "weights": [
        ("the mask is ignored", lambda scores, text_mask: scores.softmax(-1)),
        ("a row no longer sums to 1", lambda s, m: s.softmax(-1) * seen_by(s, m)[:, None, None]),
        ("a score of 0 is not hidden", lambda s, m: (s * seen_by(s, m)[:, None, None]).softmax(-1)),
        ("rows are hidden, not columns", rows_hidden),
        ("rows are hidden, not columns", rows_zeroed),
        ("you hide as if it came last", at_the_end),
        ("this hides what is valid", valid_hidden),
        ("1 and 0 were added", lambda s, m: (s + seen_by(s, m)[:, None, None].float()).softmax(-1)),
        ("changed in place", in_place),
    ],
    "attention": [
        ("to_out.0 is the image's way out", attention(names=[("to_out.0", "to_add_out")])),
        ("are not normed", attention(norm="none")),
        ("lack their learned weights", attention(norm="plain")),
        ("each head, not over all C", attention(norm="width")),
        ("norm first, then turn", attention(late=True)),
        ("are the text's", attention(names=[("norm_q", "norm_added_q"), ("norm_k", "norm_added_k")])),
        ("a norm each", attention(shared=True)),
        ("values are not turned", attention(turn_values=True)),
        ("the biases are missing", attention(bias=False)),
        ("the layers with add", attention(names=[(f"to_{x}", f"add_{x}_proj") for x in "qkv"])),
        ("the image comes first in what you return", attention(exchanged=True)),
        ("write it yourself", library_attention),
    ],
    "cause": [
        ("the two models agree", Answers(((NAME, "A"), [7, 7]))),
        ("a sub-module inside it", Answers((("transformer_blocks.0.attn", "A"), SHOWS))),
        ("the innermost", Answers((("transformer_blocks.0", "A"), SHOWS))),
        ("this agrees still", Answers((("transformer_blocks.0.attn.norm_added_k", "E"), SHOWS))),
        ("with the mask and without it", Answers(((NAME, "B"), SHOWS))),
        ("a wrong cut shows with equal lengths", Answers(((NAME, "C"), SHOWS))),
        ("finishes before the first difference", Answers(((NAME, "e"), SHOWS))),
    ],
    "silence": [
        ("a head's numbers are its columns", zeroed(OUTS, rows)),
        ("one after the other, D numbers each", zeroed(OUTS, strided)),
        ("the text has a way out too", zeroed(OUTS[:1], columns)),
        ("still has a bias", zeroed(("to_v.weight", "add_v_proj.weight"), rows)),
        ("it is not silent", zeroed(QUERIES, rows)),
        ("nothing is silenced", lambda tensors, head, heads: dict(tensors)),
        ("everything is silenced", zeroed(OUTS, lambda head, D, heads: slice(None))),
        ("changed in place", zeroed(OUTS, columns, clone=False)),
        ("a dictionary of the same names", lambda tensors, head, heads: {}),
    ],
}

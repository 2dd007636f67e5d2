"""Plausible wrong answers to the exercises of chapter 07, and the words of the diagnosis that each must get."""

import torch

from checks import Answers
from checks import chapter_07 as check


def heads(owner="share", scale=True, causal=True, diagonal=1, repeat=False):
    def answer(q, k, v):
        H, G, L = q.shape[1], k.shape[1], q.shape[2]
        if owner == "turn":
            k, v = k.repeat(1, H // G, 1, 1), v.repeat(1, H // G, 1, 1)
        else:
            k, v = k.repeat_interleave(H // G, 1), v.repeat_interleave(H // G, 1)
        logits = q @ k.transpose(-1, -2) / (q.shape[-1] ** 0.5 if scale else 1)
        if causal:
            hidden = torch.ones(L, L, dtype=torch.bool).triu(diagonal)
            logits = logits.masked_fill(hidden, float("-inf"))
        return logits.softmax(-1) @ v

    return answer


def no_groups(q, k, v):
    return (q @ k.transpose(-1, -2)).softmax(-1) @ v


def faulty(**fault):
    return lambda *given: check.decoder_layer(*given, **fault)


def library_layer(x, cos, sin, w, heads, kv_heads):
    from minqwen.text_encoder import TextLayer

    layer = TextLayer(x.shape[-1], heads, kv_heads, len(w["mlp.up_proj.weight"]), 1e-6)
    layer.load_state_dict(w)
    return layer(x, torch.atan2(sin, cos)[None, None], None)


def library_norm(x, cos, sin, w, heads, kv_heads):
    from minqwen.vision import RMSNorm

    norm = RMSNorm(x.shape[-1])
    norm(x)
    return check.decoder_layer(x, cos, sin, w, heads, kv_heads)


def across_words(words, steps):
    text = "".join(word * n for word, n in words.items())
    return check.learned({text: 1}, steps)


def never_stops(words, steps):
    return (check.learned(words, steps) + [("a", "b")] * steps)[:steps]


def in_place(a, b, places):
    a[:, places] = b[:, places]
    return a


def the_other_way(a, b, places):
    return answer_of(b, a, places)


def answer_of(a, b, places):
    a = a.clone()
    a[:, places] = b[:, places]
    return a


def emptied(a, b, places):
    return answer_of(a, torch.zeros_like(b), places)


SHOWS = (224, 224)

WRONG = {
    "numbers": [
        ("multiples of 28, two patches", (294, 196, 77, 87, 76, 84)),
        ("four patches become one token", (308, 196, 308, 318, 76, 84)),
        ("five closing tokens are kept too", (308, 196, 77, 82, 76, 84)),
        ("the vision marks", (308, 196, 77, 85, 76, 84)),
        ("the prefix of 64 is dropped", (308, 196, 77, 151, 76, 84)),
        ("as many steps as its longer side", (308, 196, 77, 87, 142, 150)),
        ("not the shorter", (308, 196, 77, 87, 72, 80)),
        ("so it has positions", (308, 196, 77, 87, 12, 20)),
        ("positions start at 0", (308, 196, 77, 87, 76, 85)),
        ("expected six numbers", (308, 196)),
    ],
    "grouped": [
        ("heads are dealt out in turn", heads(owner="turn")),
        ("what comes behind it", heads(causal=False)),
        ("divided by the root of D", heads(scale=False)),
        ("a token sees itself too", heads(diagonal=0)),
        ("your code raised RuntimeError", no_groups),
    ],
    "layer": [
        ("these weights want halves", faulty(pairs="neighbours")),
        ("takes no mean off", faulty(mean=True)),
        ("SiLU belongs to the gate", faulty(silu_up=True)),
        ("the biases of q, k and v", faulty(no_bias=True)),
        ("values are never turned", faulty(turn_v=True)),
        ("neighbouring heads share", faulty(in_turn=True)),
        ("what comes behind it", faulty(sees_all=True)),
        ("the MLP reads what attention", faulty(parallel=True)),
        ("is added again behind attention", faulty(no_residual=True)),
        ("calls minqwen/text_encoder.py", library_layer),
        ("calls minqwen/vision.py", library_norm),
    ],
    "cause": [
        ("how many windows", Answers((("blocks.1.attn.proj", "A"), (112, 112)))),
        ("not at the whole", Answers((("", "A"), SHOWS))),
        ("qkv agrees", Answers((("blocks.1.attn", "A"), SHOWS))),
        ("take the name that first_difference prints", Answers((("merger", "A"), SHOWS))),
        ("block 0 would be the first", Answers((("blocks.1.attn.proj", "B"), SHOWS))),
        ("only the tower's own result", Answers((("blocks.1.attn.proj", "C"), SHOWS))),
        ("a small picture would show it", Answers((("blocks.1.attn.proj", "E"), SHOWS))),
    ],
    "learn": [
        ("counts five times", lambda words, steps: check.learned(words, steps, count=lambda n: 1)),
        ("take the smallest", lambda words, steps: check.learned(words, steps, tie=max)),
        ("count as one from then on", lambda words, steps: check.learned(words, steps, merge=False)),
        ("merge number", across_words),
        ("stop when no pair is left", never_stops),
        ("expected a list of pairs", lambda words, steps: ["ab"]),
    ],
    "transplant": [
        ("changed in place", in_place),
        ("it should be a with some of b", the_other_way),
        ("that is all of b", lambda a, b, places: b.clone()),
        ("nothing was transplanted", lambda a, b, places: a.clone()),
        ("the places are empty", emptied),
    ],
}

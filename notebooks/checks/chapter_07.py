"""Checks of the exercises of chapter 07, with the trained layer and the broken vision tower that they need."""

import random
from collections import Counter
from functools import cache

import torch
import torch.nn.functional as F
from PIL import Image

from checks import Wrong, ask, exercise, expect, expect_finding
from course import ROOT, TINY
from minqwen.checkpoint import Checkpoint
from minqwen.prompt import EDIT, tokenize_prompts
from minqwen.text_encoder import Qwen2_5_VLTextEncoder, read_config
from minqwen.tokenizer import load_tokenizer
from minqwen.vision import Qwen2_5_VLVisionTower, image_patches

# ---------------------------------------------------------------------------------------------------- 07.1


@exercise("07.1")
def numbers(answer):
    """Six numbers of a picture of 300x200 pixels with three words."""
    if not isinstance(answer, tuple | list) or len(answer) != 6:
        raise Wrong(f"expected six numbers, got {str(answer)[:60]}")
    prefix, a_step = "the prefix is dropped after the encoder, so it has positions", "a picture takes as many steps as"
    wrong = [
        {"sides are multiples of 28, two patches, not of 14": 294, "10.7 rounds up": 280, "multiples of 28": 300},
        {"7.1 rounds down": 224, "multiples of 28": 200},
        {"four patches become one token": 308, "that is patches along the sides, added": 36},
        {"five closing tokens are kept too": 82, "the vision marks around the picture are kept too": 85,
         "the prefix of 64 is dropped": 151, "the picture's tokens are kept too": 10},
        {f"{a_step} its longer side has tokens": 142, f"{a_step} its longer side has tokens, not the shorter": 72,
         prefix: 12, "positions start at 0": 77, "that is the picture's own time": 65},
        {f"{a_step} its longer side has tokens": 150, prefix: 20, "positions start at 0": 85,
         "count the five closing tokens": 79},
    ]  # fmt: skip
    names = ["width", "height", "tokens of the picture", "vectors kept", "time of <|vision_end|>", "time of the last"]
    for got, want, mistakes, name in zip(answer, (308, 196, 77, 87, 76, 84), wrong, names, strict=True):
        expect(got, want, mistakes, where=name)


# ---------------------------------------------------------------------------------------------------- 07.2


def attention(q, k, v, owner=lambda h, H, G: h * G // H, scale=None, causal=True, strictly=False):
    """q (B, H, L, D), k and v (B, G, L, D), head by head."""
    H, G, L, D = q.shape[1], k.shape[1], q.shape[2], q.shape[3]
    hidden = torch.ones(L, L, dtype=torch.bool).triu(0 if strictly else 1)
    out = []
    for h in range(H):
        g = owner(h, H, G)
        logits = torch.einsum("bqd,bkd->bqk", q[:, h], k[:, g]) * (D**-0.5 if scale is None else scale)
        if causal:
            logits = logits.masked_fill(hidden, float("-inf"))
        out.append(torch.einsum("bqk,bkd->bqd", logits.softmax(-1), v[:, g]))
    return torch.stack(out, dim=1)


@exercise("07.2")
def grouped(answer):
    """grouped(q, k, v) over random shapes."""
    for H, G in ((6, 2), (4, 4), (6, 3), (3, 1), (28, 4)):
        B, L, D = random.randint(1, 3), random.randint(4, 7), 2 * random.randint(2, 5)
        q, k, v = torch.randn(B, H, L, D), torch.randn(B, G, L, D), torch.randn(B, G, L, D)
        in_turn = lambda h, H, G: h % G  # noqa: E731
        wrong = {
            "heads are dealt out in turn; here neighbours share: heads 0 to H/G - 1 use the first": attention(
                q, k, v, in_turn
            ),
            "a token must not see what comes behind it": attention(q, k, v, causal=False),
            "scores are divided by the root of D": attention(q, k, v, scale=1.0),
            "scores are divided by the root of D, the width of a head, not by D": attention(q, k, v, scale=1 / D),
            "a token sees itself too": attention(q, k, v, strictly=True).nan_to_num(),
        }
        got = ask(answer, q.clone(), k.clone(), v.clone(), library="text_encoder.py")
        if isinstance(got, torch.Tensor) and got.shape == q.shape and got[:, :, 0].isnan().all():
            raise Wrong("the first token's row is empty (NaN): a token sees itself too")
        expect(got, attention(q, k, v), wrong, where=f"q {tuple(q.shape)}, k {tuple(k.shape)}")


# ---------------------------------------------------------------------------------------------------- 07.3


def rms(x, weight, mean=False, eps=1e-6):
    x = x - x.mean(-1, keepdim=True) if mean else x
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def turned(x, cos, sin, pairs="halves"):
    """x (B, H, L, D), tables (L, D/2)."""
    out, D = torch.empty_like(x), x.shape[-1]
    first = slice(0, D // 2) if pairs == "halves" else slice(0, None, 2)
    second = slice(D // 2, None) if pairs == "halves" else slice(1, None, 2)
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., first] * sin + x[..., second] * cos
    return out


def decoder_layer(x, cos, sin, w, heads, kv_heads, **fault):
    """One layer of the language model; faults by name."""
    parallel, none = x, torch.zeros(1)
    y = rms(x, w["input_layernorm.weight"], fault.get("mean", False))
    q, k, v = (
        F.linear(y, w[f"self_attn.{n}_proj.weight"], none if fault.get("no_bias") else w[f"self_attn.{n}_proj.bias"])
        .unflatten(-1, (count, -1))
        .transpose(1, 2)
        for n, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
    )
    pairs = fault.get("pairs", "halves")
    q, k = turned(q, cos, sin, pairs), turned(k, cos, sin, pairs)
    v = turned(v, cos, sin) if fault.get("turn_v") else v
    owner = (lambda h, H, G: h % G) if fault.get("in_turn") else (lambda h, H, G: h * G // H)
    y = attention(q, k, v, owner, causal=not fault.get("sees_all"))
    y = F.linear(y.transpose(1, 2).flatten(2), w["self_attn.o_proj.weight"])
    x = y if fault.get("no_residual") else x + y
    y = rms(parallel if fault.get("parallel") else x, w["post_attention_layernorm.weight"], fault.get("mean", False))
    gate, up = (F.linear(y, w[f"mlp.{n}_proj.weight"]) for n in ("gate", "up"))
    y = gate * F.silu(up) if fault.get("silu_up") else F.silu(gate) * up
    return x + F.linear(y, w["mlp.down_proj.weight"])


FAULTS = {
    "these weights want halves: number i of a head turns with number i + D/2": {"pairs": "neighbours"},
    "RMSNorm takes no mean off": {"mean": True},
    "SiLU belongs to the gate, not to up": {"silu_up": True},
    "the biases of q, k and v are missing": {"no_bias": True},
    "values are never turned": {"turn_v": True},
    "neighbouring heads share keys and values": {"in_turn": True},
    "a token must not see what comes behind it": {"sees_all": True},
    "the MLP reads what attention has been added to": {"parallel": True},
    "what the layer was given is added again behind attention": {"no_residual": True},
}


def random_layer(heads, kv_heads, D, hidden):
    C = heads * D
    shapes = {f"self_attn.{n}_proj": (count * D, C) for n, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))}
    w = {f"{name}.bias": 0.5 * torch.randn(shape[0]) for name, shape in shapes.items()}
    shapes |= {"self_attn.o_proj": (C, C), "mlp.gate_proj": (hidden, C), "mlp.up_proj": (hidden, C)}
    shapes |= {"mlp.down_proj": (C, hidden)}
    w |= {f"{name}.weight": torch.randn(shape) * shape[1] ** -0.5 for name, shape in shapes.items()}
    norms = ("input_layernorm.weight", "post_attention_layernorm.weight")
    return w | {name: 1 + 0.3 * torch.randn(C) for name in norms}


@cache
def trained():
    """Layer 0 of the tiny checkpoint: weights, what enters it for a real prompt, tables, heads, heads of keys."""
    encoder = Checkpoint(TINY).load(Qwen2_5_VLTextEncoder, "text_encoder")
    tokens = tokenize_prompts(load_tokenizer(TINY / "tokenizer"), ["replace the cat with a fox"], [[scene()]], EDIT)
    seen = {}
    hook = encoder.model.layers[0].register_forward_pre_hook(lambda _, args: seen.update(x=args[0], angles=args[1]))
    try:
        with torch.no_grad():
            encoder(*tokens[:4])
    finally:
        hook.remove()
    w = {name: t.detach() for name, t in encoder.model.layers[0].state_dict().items()}
    config = read_config(Checkpoint(TINY).config("text_encoder/config.json"))[0]
    angles = seen["angles"][0, 0]
    return w, seen["x"], angles.cos(), angles.sin(), config["num_attention_heads"], config["num_key_value_heads"]


@exercise("07.3")
def layer(answer):
    """layer(x, cos, sin, w, heads, kv_heads): random layers, then the trained one on a real prompt."""
    for library in ("text_encoder.py", "vision.py", "text_encoder.py"):
        kv_heads, D = random.randint(2, 3), 2 * random.randint(2, 4)
        heads, L = 2 * kv_heads, random.randint(4, 7)
        w = random_layer(heads, kv_heads, D, random.randint(10, 20))
        x, angles = torch.randn(random.randint(1, 2), L, heads * D), 3 * torch.randn(L, D // 2)
        given = (x, angles.cos(), angles.sin(), w, heads, kv_heads)
        wrong = {diagnosis: decoder_layer(*given, **fault) for diagnosis, fault in FAULTS.items()}
        got = ask(answer, *given, library=library)
        expect(got, decoder_layer(*given), wrong, tolerance=1e-4, where=f"x {tuple(x.shape)}, {heads} heads")
    w, *rest = trained()
    x, cos, sin, heads, kv_heads = rest
    want = decoder_layer(x, cos, sin, w, heads, kv_heads)
    got = ask(answer, x, cos, sin, w, heads, kv_heads, library="text_encoder.py")
    size = want.abs().max().item()
    expect(got, want, tolerance=1e-5 * size, where="the trained layer 0 on a real prompt")
    return f"On a real prompt the trained layer agrees to {(got - want).abs().max() / size:.0e} of its largest number."


# ---------------------------------------------------------------------------------------------------- 07.4


def scene() -> Image.Image:
    return Image.open(ROOT / "data" / "pictures" / "scene.png").convert("RGB")


def right() -> Qwen2_5_VLVisionTower:
    """The tiny vision tower."""
    config = Checkpoint(TINY).config("text_encoder/config.json")["vision_config"]
    tower = Qwen2_5_VLVisionTower(**config).eval()
    stored = Checkpoint(TINY).tensors("text_encoder", "visual.")
    tower.load_state_dict({name.removeprefix("visual."): t.float() for name, t in stored.items()})
    return tower


def broken() -> Qwen2_5_VLVisionTower:
    """The tiny vision tower with one fault."""
    tower = right()
    tower.fullatt_block_indexes = ()  # spoiler: the fault of exercise 07.4
    return tower


def inputs(width: int, height: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a tower takes: the patches of a photograph at this size in pixels, and their grid."""
    photo = Image.open(ROOT / "data" / "pictures" / "coffee.png").convert("RGB").resize((width, height))
    patches, grid = image_patches(photo)
    return patches, torch.tensor([grid])


CAUSES = {
    "B": "then block 0 would be the first to differ",
    "C": "then every block and the merger would agree, and only the tower's own result differ",
    "D": "then patch_embed would differ already, on small pictures too",
    "E": "then a small picture would show it, in block 0",
}


@exercise("07.4")
def cause(finding, size):
    """(name of the sub-module, letter), and a (width, height) in pixels that shows the fault."""
    if not isinstance(size, tuple | list) or len(size) != 2 or not all(isinstance(side, int) for side in size):
        raise Wrong("size should be (width, height) in pixels, such as (112, 112)")
    _, grid = inputs(*size)
    if grid.max() <= 8:
        raise Wrong("at this size the two towers agree: how many windows does the picture have?")
    if isinstance(finding, tuple | list):  # "visual.blocks..." is the same sub-module, seen from the whole encoder
        finding = [part.strip().removeprefix("visual.") if isinstance(part, str) else part for part in finding]
    names = {
        "": "look at the first sub-module that differs, not at the whole",
        "blocks.1.attn*": "qkv agrees; which sub-module of blocks.1.attn is the first to differ?",
        "*": "this is not the first: take the name that first_difference prints",
    }
    expect_finding(
        finding,
        "two: the sub-module's name and a letter",
        name=("blocks.1.attn.proj", names),
        cause=("A", CAUSES),
    )


# ---------------------------------------------------------------------------------------------------- 07.5


def learned(words, steps, count=lambda n: n, tie=min, merge=True):
    corpus, merges = {word: list(word) for word in words}, []
    while len(merges) < steps:
        pairs = Counter()
        for word, n in words.items():
            for pair in zip(corpus[word], corpus[word][1:], strict=False):
                pairs[pair] += count(n)
        if not pairs:
            break
        best = tie(pair for pair, n in pairs.items() if n == max(pairs.values()))
        merges.append(best)
        for word, pieces in corpus.items() if merge else ():
            i, new = 0, []
            while i < len(pieces):
                whole = tuple(pieces[i : i + 2]) == best
                new.append("".join(best) if whole else pieces[i])
                i += 2 if whole else 1
            corpus[word] = new
    return merges


@exercise("07.5")
def learn(answer):
    """learn(words, steps) on a worked example and on random words."""
    cases = [({"star": 5, "tar": 2, "art": 4}, 4), ({"aaa": 2, "aab": 1}, 5), ({"ab": 1, "cd": 1}, 9)]
    for _ in range(4):
        made = ["".join(random.choices("abc", k=random.randint(2, 6))) for _ in range(6)]
        cases.append(({word: random.randint(1, 5) for word in made}, random.randint(3, 6)))
    for words, steps in cases:
        want = learned(words, steps)
        got = ask(answer, dict(words), steps)
        if not isinstance(got, list) or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in got):
            raise Wrong(f"expected a list of pairs such as [('s', 't')], got {str(got)[:60]}")
        wrong = {
            "a word that occurs five times counts five times": learned(words, steps, count=lambda n: 1),
            "of equally frequent pairs take the smallest": learned(words, steps, tie=max),
            "merged pieces count as one from then on": learned(words, steps, merge=False),
        }
        if len(got) > len(want):
            raise Wrong(f"stop when no pair is left: {words} allows {len(want)} merges ({steps} asked for)")
        for diagnosis, mistake in wrong.items():
            if got == mistake != want:
                raise Wrong(f"{diagnosis} ({words})")
        if got != want:
            place = next((i for i, (g, w) in enumerate(zip(got, want, strict=False)) if g != w), len(got))
            there = f"{got[place]} instead of {want[place]}" if place < len(got) else f"{want[place]} is missing"
            raise Wrong(f"merge number {place + 1}: {there} ({words})")


# ---------------------------------------------------------------------------------------------------- 07.6


@exercise("07.6")
def transplant(answer):
    """transplant(a, b, places): some vectors of a prompt from another one."""
    for _ in range(5):
        N = random.randint(5, 9)
        a, b = torch.randn(1, N, 6), torch.randn(1, N, 6)
        places = sorted(random.sample(range(N), random.randint(1, 3)))
        want = a.clone()
        want[:, places] = b[:, places]
        other = b.clone()
        other[:, places] = a[:, places]
        zeros = a.clone()
        zeros[:, places] = 0
        before = a.clone()
        got = ask(answer, a, b, list(places))
        expect(a, before, where="the embeddings you were given were changed in place")
        wrong = {
            "that is b with some of a: it should be a with some of b": other,
            "that is all of b": b,
            "nothing was transplanted": a,
            "the places are empty: put b's vectors there": zeros,
        }
        expect(got, want, wrong, where=f"places {places} of {N}")

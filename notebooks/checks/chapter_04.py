"""Checks of the exercises of chapter 04, with the broken block and the real activations that they need."""

import math
import random
from functools import cache
from unittest.mock import patch

import torch
import torch.nn.functional as F
from numpy.random import default_rng

from checks import Wrong, ask, exercise, expect, expect_finding
from course import TINY
from minqwen.block import QwenImageTransformerBlock, clip_fp16, modulate, split
from minqwen.checkpoint import Checkpoint
from minqwen.pipeline import QwenImagePipeline
from minqwen.transformer import QwenImageTransformer2DModel
from minqwen.world import judge, sample_edit

# ---------------------------------------------------------------------------------------------------- 04.1


@exercise("04.1")
def numbers(answer):
    """Five numbers about a block."""
    if not isinstance(answer, tuple | list) or len(answer) != 5:
        raise Wrong(f"expected five numbers, got {str(answer)[:60]}")
    questions = [
        ("new token", 23, {
            "scale is added to 1 before it multiplies": 63, "the residual is missing: x + gate · answer": 20,
            "the gate is missing": 8, "the answer is added to x, not to its normed form": 19,
        }),
        ("where gate2 begins", 640, {
            "that is the row of shift2": 384, "that is the row of scale2": 512, "that is gate1": 256,
            "counted in vectors; multiply by C": 5, "six vectors, the first begins at row 0": 768,
        }),
        ("float16", 65504, {
            "that is the sum; float16 ends earlier, and the block clips": 68000,
            "float16 ends at 65504, not at 65536": 65536,
        }),
        ("parameters of img_mod", 98304 + 768, {
            "the bias is missing": 98304, "img_mod goes from C to 6C": 128 * 128 + 128, "that is both streams": 198144,
        }),
        ("linear layers nobody reads", 4, {
            "who reads the text's query? only text rows of the softmax": 3,
            "text keys and values are read: image tokens attend to them": 6,
            "the MLP of the text has two layers": 2, "txt_mod is read in part: its shift1 and scale1": 5,
        }),
    ]  # fmt: skip
    if answer[2] == math.inf:
        raise Wrong("infinity is what comes out without the clip; the block clips (float16)")
    for got, (name, want, wrong) in zip(answer, questions, strict=True):
        expect(got, want, wrong, where=name)


# ---------------------------------------------------------------------------------------------------- 04.2


def _normed(x: torch.Tensor, dim: int = -1, correction: int = 0) -> torch.Tensor:
    var, mean = torch.var_mean(x, dim=dim, keepdim=True, correction=correction)
    return (x - mean) / (var + 1e-6).sqrt()


@exercise("04.2")
def gated_step(answer):
    """gated_step(x, f, shift, scale, gate), random sizes, some tokens nearly constant."""
    for _ in range(5):
        B, N, C = random.sample(range(2, 9), 3)
        x, matrix = 3 * torch.randn(B, N, C) + 1, torch.randn(C, C)
        x[0, 0] *= 1e-3  # here the 1e-6 shows
        shift, scale, gate = torch.randn(3, B, C).unbind()
        f = lambda y, matrix=matrix: torch.tanh(y) @ matrix  # noqa: E731
        s, k, g = shift[:, None], scale[:, None], gate[:, None]
        read = _normed(x) * (1 + k) + s
        rms = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        no_eps = (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True, correction=0)
        wrong = {
            "scale multiplies as 1 + scale": x + g * f(_normed(x) * k + s),
            "shift and scale are exchanged": x + g * f(_normed(x) * (1 + s) + k),
            "the residual is missing: the answer is added to x": g * f(read),
            "the answer is added to x itself, not to its normed form": _normed(x) + g * f(read),
            "the answer is added to x itself, not to what f was given": read + g * f(read),
            "the gate is missing": x + f(read),
            "the gate multiplies the answer only, not the sum": g * (x + f(read)),
            "the gate multiplies the answer as it is, not as 1 + gate": x + (1 + g) * f(read),
            "the norm is missing": x + g * f(x * (1 + k) + s),
            "this is RMSNorm: LayerNorm takes the mean off first": x + g * f(rms * (1 + k) + s),
            "the variance divides by C, not by C - 1": x + g * f(_normed(x, correction=1) * (1 + k) + s),
            "the norm runs over the channels, not over the tokens": x + g * f(_normed(x, dim=1) * (1 + k) + s),
            "the 1e-6 under the root is missing; a token that is nearly constant shows it": x
            + g * f(no_eps * (1 + k) + s),
        }
        got = ask(answer, x.clone(), f, shift, scale, gate, library="block.py")
        expect(got, x + g * f(read), wrong, tolerance=1e-4, where=f"x {(B, N, C)}")


# ---------------------------------------------------------------------------------------------------- 04.3


@cache
def trained() -> dict:
    """Block 2 of the tiny checkpoint and what enters it in a real edit: weights, img, txt, temb, rotary, module."""
    pipe, seen = QwenImagePipeline.from_pretrained(TINY, device="cpu"), {}
    block = pipe.transformer.transformer_blocks[2]
    hook = block.register_forward_pre_hook(lambda _, args: seen.update(args=args))
    task = sample_edit(default_rng(0))
    pipe.edit(task.source, task.instruction, num_inference_steps=2, true_cfg_scale=1, progress=False)
    hook.remove()
    img, txt, temb, _, rotary, _ = seen["args"]
    rotary = tuple(tuple(t.clone() for t in table) for table in rotary)  # copies, which autograd may touch
    known = {"img": img.clone(), "txt": txt.clone(), "temb": temb.clone(), "rotary": rotary}
    return known | {"weights": dict(block.state_dict()), "block": block}


def attention(img: torch.Tensor, txt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The joint attention of the trained block 2, with its rotary tables: (image, text) -> (image, text)."""
    known = trained()
    with torch.no_grad():
        return known["block"].attn(img, txt, None, known["rotary"])


def _block(img, txt, temb, w, attend, order=(0, 1, 2, 3, 4, 5), form="tanh", reread=True, act=F.silu, crossed=False):
    """An answer of our own, and with the options the mistakes."""
    mods, streams = [], [img, txt]
    for s in ("img", "txt"):
        six = F.linear(act(temb), w[f"{s}_mod.1.weight"], w[f"{s}_mod.1.bias"])[:, None].chunk(6, dim=-1)
        mods.append([six[i] for i in order])
    if crossed:
        mods = mods[::-1]
    answers = attend(*(_normed(x) * (1 + m[1]) + m[0] for x, m in zip(streams, mods, strict=True)))
    new = [x + m[2] * a for x, m, a in zip(streams, mods, answers, strict=True)]
    out = []
    bend = {"erf": F.gelu, "tanh": lambda y: F.gelu(y, approximate="tanh"), "silu": F.silu, "relu": F.relu,
            "sigmoid": lambda y: y * torch.sigmoid(1.702 * y)}[form]  # fmt: skip
    for s, x, old, m in zip(("img", "txt"), new, streams, mods, strict=True):
        y = _normed(x if reread else old) * (1 + m[4]) + m[3]
        y = bend(F.linear(y, w[f"{s}_mlp.net.0.proj.weight"], w[f"{s}_mlp.net.0.proj.bias"]))
        out.append(x + m[5] * F.linear(y, w[f"{s}_mlp.net.2.weight"], w[f"{s}_mlp.net.2.bias"]))
    return tuple(out)


@exercise("04.3")
def block(answer):
    """block(img, txt, temb, w, attention) -> (img, txt): random weights, then the trained block on real tokens."""
    for _ in range(3):
        B, C = random.randint(1, 3), 4 * random.randint(2, 4)
        Ni, Nt = random.sample(range(2, 9), 2)
        w = {}
        for s in ("img", "txt"):
            for name, out, into in (("mod.1", 6 * C, C), ("mlp.net.0.proj", 4 * C, C), ("mlp.net.2", C, 4 * C)):
                w[f"{s}_{name}.weight"] = torch.randn(out, into) / into**0.5
                w[f"{s}_{name}.bias"] = torch.randn(out)
        img, txt, temb = 2 * torch.randn(B, Ni, C), 2 * torch.randn(B, Nt, C), torch.randn(B, C)
        mix = torch.randn(C, C) / C**0.5
        attend = lambda i, t, mix=mix: (i @ mix + t.mean(1, keepdim=True), t @ mix.T - i.mean(1, keepdim=True))  # noqa: E731
        _compare(answer, (img, txt, temb, w, attend), f"image {(B, Ni, C)}, text {(B, Nt, C)}", 1e-4)
    known = trained()
    given = known["img"], known["txt"], known["temb"], known["weights"], attention
    off = _compare(answer, given, "the trained block 2 on real tokens", 2e-3)
    return f"The trained block's streams agree to {off:.0e}."


def _compare(answer, given, where: str, tolerance: float) -> float:
    want = _block(*given)
    got = ask(answer, *given, library="block.py")
    if not isinstance(got, tuple | list) or len(got) != 2:
        raise Wrong(f"expected two streams, image and text ({where})")
    variants = {
        "this order is scale, shift, gate; these weights want shift, scale, gate": {"order": (1, 0, 2, 4, 3, 5)},
        "the first three vectors belong to attention, the last three to the MLP": {"order": (3, 4, 5, 0, 1, 2)},
        "the second half has its own shift, scale and gate": {"order": (0, 1, 2, 0, 1, 2)},
        "the six vectors do not alternate between attention and MLP": {"order": (0, 2, 4, 1, 3, 5)},
        "this is the GELU with erf; the block wants tanh": {"form": "erf"},
        "this is x · sigmoid(1.702 x); the block wants the tanh GELU": {"form": "sigmoid"},
        "the bend of the MLP is GELU, not SiLU": {"form": "silu"},
        "the bend of the MLP is GELU, not ReLU": {"form": "relu"},
        "the MLP must read the stream after attention was added": {"reread": False},
        "temb passes SiLU before the linear layer": {"act": lambda t: t},
        "image and text have exchanged their modulations": {"crossed": True},
    }
    wrong = {"this returns (text, image); here (image, text) is asked for": want[::-1]}
    wrong |= {name: _block(*given, **options) for name, options in variants.items()}
    if "real" in where:  # mistakes that are small here are told apart on random weights
        wrong = {}
    expect(tuple(got), want, wrong, tolerance=tolerance, where=where)
    return max((a - b).abs().max().item() for a, b in zip(got, want, strict=True))


# ---------------------------------------------------------------------------------------------------- 04.4


class _Block(QwenImageTransformerBlock):  # spoiler: the fault of exercise 04.4
    def forward(self, img, txt, temb, mask=None, rotary=None, target_tokens=None, modulations=None):
        img_vectors, txt_vectors = self.modulations(temb)
        img_mod1, img_mod2 = split(self.spread(img_vectors, img.shape[1], target_tokens))
        txt_mod1, txt_mod2 = split(txt_vectors[:, None])
        read = modulate(self.img_norm1(img), img_mod1), modulate(self.txt_norm1(txt), txt_mod1)
        img_attn, txt_attn = self.attn(*read, mask, rotary)
        img, txt = img + img_mod1.gate * img_attn, txt + txt_mod1.gate * txt_attn
        img = img + img_mod2.gate * self.img_mlp(modulate(self.img_norm2(img), img_mod2))
        txt = txt + txt_mod2.gate * self.txt_mlp(modulate(self.txt_norm2(txt), txt_mod1))
        return clip_fp16(txt), clip_fp16(img)


def _model() -> QwenImageTransformer2DModel:
    return Checkpoint(TINY).load(QwenImageTransformer2DModel, "transformer")


def broken() -> QwenImageTransformer2DModel:
    """The tiny transformer with one fault in its block 3."""
    model = _model()
    model.transformer_blocks[3].__class__ = _Block  # the same weights
    return model


def right() -> QwenImageTransformer2DModel:
    """The tiny transformer."""
    return _model()


def inputs() -> tuple:
    """What a transformer takes: image tokens of a target and a reference, nine words, no mask, level, shapes."""
    generator = torch.Generator().manual_seed(0)
    width = Checkpoint(TINY).config("transformer/config.json")["joint_attention_dim"]
    image, text = torch.randn(1, 32, 64, generator=generator), torch.randn(1, 9, width, generator=generator)
    return image, text, None, torch.tensor([0.8]), [[(1, 4, 4), (1, 4, 4)]]


CAUSES = {
    "A": "then the order would be wrong for attention too, and attn would already differ",
    "B": "the attention gate is used before txt_norm2, and that agrees",
    "D": "then txt_norm2 would differ: what it is given is the stream after attention",
    "E": "the result of net.0.proj, before any GELU, differs already",
}


@exercise("04.4")
def cause(finding):
    """(block, sub-module, letter)."""
    if isinstance(finding, tuple | list):  # the finder prints the block's number within the name
        finding = [str(part).strip().removeprefix("transformer_blocks.3.") for part in finding]
    names = {
        "txt_norm2": "that one agrees still; it is the last that does, not the first that differs",
        "txt_mlp": "that is the whole; name the innermost sub-module that the finder prints",
        "img_mlp.net.0.proj": "the image stream of this block agrees",
    }
    expect_finding(
        finding,
        "three: the number of the block, the sub-module's name inside it, a letter",
        block=("3", {"4": "block 4 differs because what it is given differs; which sub-module is the first?"}),
        name=("txt_mlp.net.0.proj", names),
        cause=("C", CAUSES),
    )


# ---------------------------------------------------------------------------------------------------- 04.5


@exercise("04.5")
def per_token(answer):
    """per_token(vectors, lengths, clean): one row of a modulation for each image token."""
    cases = [([4, 3], [False, True]), ([5, 2, 6], [False, True, True]), ([3, 4, 2], [False, False, True])]
    cases.append(([random.randint(1, 6) for _ in range(4)], [False, True, False, True]))
    for lengths, clean in cases:
        B, C = random.randint(2, 3), random.randint(2, 5)
        vectors = torch.randn(2 * B, C)
        noisy, still = vectors[:B], vectors[B:]

        def rows(a, b, lengths=lengths, clean=clean):
            own = [(b if c else a)[:, None] for c in clean]
            return torch.cat([row.expand(-1, n, -1) for row, n in zip(own, lengths, strict=True)], dim=1)

        first = [i > 0 for i in range(len(lengths))]
        wrong = {
            "noisy and clean are exchanged: the first B rows are those of the noise level": rows(still, noisy),
            "every token has the noise level's row": rows(noisy, noisy),
            "rows come as B of the noise level, then B of noise 0, not in turns": rows(vectors[0::2], vectors[1::2]),
            "which picture is clean says `clean`, not its place in the list": rows(noisy, still, clean=first),
            "batch and tokens are exchanged": rows(noisy, still).transpose(0, 1),
        }
        got = ask(answer, vectors.clone(), list(lengths), list(clean), library="block.py")
        expect(got, rows(noisy, still), wrong, where=f"lengths {lengths}, clean {clean}")


# ---------------------------------------------------------------------------------------------------- 04.6


@exercise("04.6")
def turned_down(answer):
    """turned_down(six, factor, part): one gate of six vectors times a factor, the rest as given."""
    for part, place in (("attention", 2), ("MLP", 5), ("attention", 2)):
        shape, factor = (random.randint(1, 3), 1, random.randint(2, 6)), random.choice([0.0, 0.5, 2.0])
        six = tuple(torch.randn(6, *shape))
        kept = tuple(t.clone() for t in six)

        def at(*places, kept=kept, factor=factor):
            return tuple(t * factor if i in places else t for i, t in enumerate(kept))

        wrong = {
            "both gates are turned down; only one is asked for": at(2, 5),
            "that is the other part's gate": at(7 - place),
            "the gate is the third of three": at(place - 2),
            "that is the scale": at(place - 1),
            "all six are turned down": at(*range(6)),
            "nothing was turned down": kept,
        }
        got = ask(answer, six, factor, part, library="block.py")
        expect(six, kept, where="the vectors you were given were changed in place")
        if not isinstance(got, tuple | list):
            raise Wrong(f"expected six vectors, got {type(got).__name__}")
        expect(tuple(got), at(place), wrong, where=f"{part}, factor {factor}")


def edits_right(change, edits: int = 6) -> int:
    """How many of six edits the tiny model gets right with `change(six)` for the image's vectors in every block."""
    pipe, rng = QwenImagePipeline.from_pretrained(TINY, device="cpu"), default_rng(3)
    given = QwenImageTransformerBlock.modulations

    def modulations(self, temb):
        img, txt = given(self, temb)
        return torch.cat(change(img.chunk(6, dim=-1)), dim=-1), txt

    right = 0
    with patch.object(QwenImageTransformerBlock, "modulations", modulations):
        for seed in range(edits):
            task, noise = sample_edit(rng), torch.Generator().manual_seed(seed)
            settings = {"num_inference_steps": 8, "progress": False, "true_cfg_scale": 1, "generator": noise}
            right += judge(pipe.edit(task.source, task.instruction, **settings), task)
    return right

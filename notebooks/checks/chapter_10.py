"""Checks of the exercises to chapter 10."""

import random
from functools import cache

import numpy
import torch

from checks import WHOLE, Wrong, ask, exercise, expect, expect_finding
from course import ROOT, TINY
from minqwen.checkpoint import Checkpoint
from minqwen.lora import adapters, load_lora
from minqwen.transformer import QwenImageTransformer2DModel
from minqwen.world import HELD_BACK, sample_edit

FILE = ROOT / "data" / "finetune" / f"{HELD_BACK}_lora.safetensors"
_rng = numpy.random.default_rng(9 * 10**8)
tasks = [sample_edit(_rng, HELD_BACK) for _ in range(10)]


# ---------------------------------------------------------------------------------------------------- 10.1


@exercise("10.1")
def numbers(answer):
    """Five numbers, without running anything."""
    if not isinstance(answer, tuple | list) or len(answer) != 5:
        raise Wrong("expected five numbers, such as (1, 2, 3, 4, 5)")
    count, small, silent, change, gradient = answer
    expect(count, 5120, {"that is the full layer, or the product of A and B": 128 * 512,
                         "that is A alone": 1024, "that is B alone": 4096}, where="1")  # fmt: skip
    wrong = {"rank over alpha; it is the other way round": 8, "alpha alone is not the scale": 4}
    expect(small, 0.125, wrong, where="2")
    expect(silent, 1, {"then the file would do nothing": 0}, where="3")
    expect(change, 0, {"B is zero before the first step": 1}, where="4")
    expect(gradient, 0, {"the gradient of A passes through B, which is zero": 1}, where="5")


# ---------------------------------------------------------------------------------------------------- 10.2


@exercise("10.2")
def training_pair(answer):
    """training_pair(picture, noise, sigma) on random shapes."""
    for _ in range(4):
        B, N = random.randint(2, 4), random.randint(2, 7)
        picture, noise, sigma = torch.randn(B, N, 64), torch.randn(B, N, 64), torch.rand(B)
        level = sigma[:, None, None]
        noisy, velocity = (1 - level) * picture + level * noise, noise - picture
        wrong = {
            "picture and noise have changed places: σ = 1 is pure noise": (
                level * picture + (1 - level) * noise, velocity),
            "one level for the whole batch: each sample has its own": (
                (1 - sigma[0]) * picture + sigma[0] * noise, velocity),
            "the velocity has the other sign: it points from picture to noise": (noisy, -velocity),
            "the model should answer the velocity, not the noise": (noisy, noise),
            "the model should answer the velocity, not the picture": (noisy, picture),
            "nothing is scaled here: the two shares add up to one": (picture + level * noise, velocity),
        }  # fmt: skip
        given = picture.clone(), noise.clone(), sigma.clone()
        got = ask(answer, *given, library="flow.py")
        expect(got, (noisy, velocity), wrong, where=f"B = {B}, N = {N}")


# ---------------------------------------------------------------------------------------------------- 10.3


@exercise("10.3")
def merged(answer):
    """merged(weight, A, B, alpha): random layers, then a trained one."""
    for dtype in (torch.float32, torch.bfloat16, torch.float32, torch.bfloat16):
        rank, n, m = random.randint(2, 5), random.randint(6, 9), random.randint(10, 14)
        weight, A, B = torch.randn(m, n).to(dtype), torch.randn(rank, n), torch.randn(m, rank)
        alpha = random.choice([0.5, 3.0, 7.0])
        if alpha == rank:
            alpha += 1
        update = alpha / rank * (B @ A)
        right = (weight.float() + update).to(dtype)
        wrong = {
            "the scale is missing: alpha over rank": (weight.float() + B @ A).to(dtype),
            "alpha alone is not the scale: divide by the rank": (weight.float() + alpha * (B @ A)).to(dtype),
            "divided by the outputs: the rank is A's first size": (weight.float() + alpha / m * (B @ A)).to(dtype),
            "rank over alpha; it is the other way round": (weight.float() + rank / alpha * (B @ A)).to(dtype),
            "this is the update without the weight": update.to(dtype),
        }  # fmt: skip
        got = ask(answer, weight.clone(), A.clone(), B.clone(), alpha, library="lora.py")
        if not isinstance(got, torch.Tensor):
            raise Wrong(f"expected a tensor, got {type(got).__name__}")
        if got.dtype != dtype:
            raise Wrong(f"the weight was {str(dtype)[6:]}, the result is {str(got.dtype)[6:]}: give its dtype back")
        early = (weight + update.to(dtype)).to(dtype)
        if dtype == torch.bfloat16 and got.shape == early.shape and torch.equal(got, early) and not early.equal(right):
            raise Wrong("rounded before adding: turn the weight to float32, add, and round once")
        expect(got.float(), right.float(), {k: v.float() for k, v in wrong.items()}, 1e-5 if dtype != torch.bfloat16
               else 1e-9, where=f"weight {tuple(weight.shape)}, rank {rank}, alpha {alpha}")  # fmt: skip
    layer = adapters(_taught())["transformer_blocks.0.attn.to_q"]
    A, B = layer.lora_A.weight, layer.lora_B.weight
    x = torch.randn(5, layer.in_features)
    whole = ask(answer, layer.weight.detach(), A, B, layer.scale * len(A), library="lora.py")
    expect(x @ whole.T + layer.bias, layer(x), tolerance=1e-3, where="a trained adapter of the tiny checkpoint")
    return "The merged layer computes what the trained layer and its adapter do."


# ---------------------------------------------------------------------------------------------------- 10.4


@exercise("10.4")
def layer_of(answer):
    """layer_of(key, layers): every form of key, and keys that belong to nothing."""
    blocks = range(random.randint(11, 14))
    ends = ("attn.to_q", "attn.to_out.0", "attn.to_add_out", "attn.add_k_proj", "img_mlp.net.0.proj", "txt_mod.1")
    layers = [f"transformer_blocks.{i}.{end}" for i in blocks for end in ends] + ["proj_out", "norm_out.linear"]
    pairs = []
    for _ in range(12):
        name = random.choice(layers)
        flat = name.replace(".", "_")
        pairs += [(f"{prefix}{name}.{ab}.weight", name) for prefix in ("", "transformer.", "diffusion_model.",
                  "base_model.model.") for ab in ("lora_A", "lora_B")]  # fmt: skip
        pairs += [(f"{name}.lora_A.default.weight", name), (f"{name}.lora_up.weight", name), (f"{name}.alpha", name)]
        pairs += [(f"lora_unet_{flat}.{end}", name) for end in ("lora_down.weight", "lora_up.weight", "alpha")]
    nothing = ["transformer.single_blocks.0.attn.to_q.lora_A.weight", "transformer_blocks.99.attn.to_q.lora_A.weight",
               "lora_unet_transformer_blocks_99_attn_to_q.lora_up.weight", "transformer_blocks.0.attn.to_q.weight",
               "transformer_blocks.0.attn.to_q.lokr_w1"]  # fmt: skip
    random.shuffle(pairs)
    for key, name in pairs + [(key, None) for key in nothing]:
        got = ask(answer, key, list(layers), library="lora_files.py")
        if got == name:
            continue
        if name is None:
            raise Wrong(f"{key} belongs to no layer of this model, and you say {got!r}: give None")
        if "lora_unet_" in key and got is not None and got not in layers:
            raise Wrong(f"{key}: underscores cannot be split by rule, {got!r} is no layer; look names up")
        form = next((f for f in ("alpha", "lora_unet_", "default", "base_model.model.", "diffusion_model.", "lora_up",
                                 "lora_down", "lora_B", "transformer.transformer_blocks") if f in key), "a plain key")
        raise Wrong(f"{key} belongs to {name}, and you say {got!r}: look at the form with {form}")  # fmt: skip


# ---------------------------------------------------------------------------------------------------- 10.5


@cache
def _taught() -> QwenImageTransformer2DModel:
    return right()


def right() -> QwenImageTransformer2DModel:
    """The tiny transformer with the chapter's adapters."""
    model = Checkpoint(TINY).load(QwenImageTransformer2DModel, "transformer")
    load_lora(model, FILE)
    return model


def broken() -> QwenImageTransformer2DModel:
    """The same with one fault."""
    model = right()
    for name in [n for n in adapters(model) if n.split(".", 2)[2].startswith(_LEFT_OUT)]:
        plain = adapters(model)[name]
        layer = torch.nn.Linear(plain.in_features, plain.out_features, device="meta")
        layer.weight, layer.bias = plain.weight, plain.bias
        model.set_submodule(name, layer)
    return model


_LEFT_OUT = ("attn.add_", "attn.to_add_", "txt_mlp.")  # spoiler: the fault of exercise 10.5


def inputs() -> tuple:
    """What a transformer takes, with random numbers: image tokens, text, no mask, noise level, shapes."""
    generator = torch.Generator().manual_seed(0)
    config = Checkpoint(TINY).config("transformer/config.json")
    image = torch.randn(1, 72, config["in_channels"], generator=generator)
    text = torch.randn(1, 9, config["joint_attention_dim"], generator=generator)
    return image, text, None, torch.tensor([0.8]), [[(1, 6, 6), (1, 6, 6)]]


CAUSES = {
    "B": "then the image's queries, which finish first, would differ already",
    "C": "then the image's queries of block 0, which finish first, would differ already",
    "D": "then the image's queries, which are adapted too and finish first, would differ already",
    "E": "block 0 itself is not whole, and the image's layers of every block are: look at both models' layers",
}


@exercise("10.5")
def cause(finding):
    """(name of the first sub-module that differs, letter)."""
    names = dict.fromkeys(("", "transformer_blocks.0", "transformer_blocks.0.attn"), WHOLE)
    names |= dict.fromkeys(
        ("*lora_A", "*lora_B"), "a part that only one of the two models has cannot differ: which layer holds it?"
    )
    expect_finding(
        finding,
        "two: the sub-module's name and a letter, such as ('img_in', 'B')",
        name=("transformer_blocks.0.attn.add_q_proj", names),
        cause=("A", CAUSES),
    )


# ---------------------------------------------------------------------------------------------------- 10.6


@exercise("10.6")
def strength(answer):
    """at_strength(strength): the count at 0 and at 1."""
    off, on = ask(answer, 0.0), ask(answer, 1.0)
    for count in (off, on):
        if isinstance(count, bool) or not isinstance(count, int):
            raise Wrong(f"expected a whole number of right edits, got {count!r}")
    if off and off == on:
        raise Wrong(f"{off} right at strength 0 and at 1: the strength is not used")
    if off > 1:
        raise Wrong(f"{off} right at strength 0: the adapters are not off")
    if on < 8:
        raise Wrong(f"{on} right at strength 1, expected at least 8: is the file on the pipeline that edits?")
    return f"{off} of ten at strength 0, {on} at 1."

"""Plausible wrong answers to the exercises of chapter 10, and the words of the diagnosis that each must get."""

import torch


def pair(picture=1, noise=1, swap=False, first=False, velocity=lambda p, n: n - p):
    def answer(x, e, sigma):
        level = sigma[0] if first else sigma[:, None, None]
        level = 1 - level if swap else level
        return (1 - level) * x + level * e, velocity(x, e)

    return answer


def library_pair(picture, noise, sigma):
    from minqwen.flow import sample_sigmas

    sample_sigmas(1, "uniform")
    return noise, picture


def added(picture, noise, sigma):
    return picture + sigma[:, None, None] * noise, noise - picture


def merge(scale=lambda alpha, rank: alpha / rank, early=False, keep=True, alone=False):
    def answer(weight, A, B, alpha):
        update = scale(alpha, len(A)) * (B @ A)
        if alone:
            return update.to(weight.dtype)
        if early:
            return weight + update.to(weight.dtype)
        out = weight.float() + update
        return out.to(weight.dtype) if keep else out

    return answer


ENDINGS = (".lora_A.weight", ".lora_B.weight", ".lora_A.default.weight", ".lora_B.default.weight",
           ".lora_down.weight", ".lora_up.weight", ".alpha")  # fmt: skip
PREFIXES = ("transformer.", "diffusion_model.", "base_model.model.")


def name_of(endings=ENDINGS, prefixes=PREFIXES, split=False, checked=True):
    def answer(key, layers):
        ending = next((e for e in endings if key.endswith(e)), None)
        if ending is None:
            return None
        stem = key.removesuffix(ending)
        if stem.startswith("lora_unet_"):
            stem = stem.removeprefix("lora_unet_")
            if split:
                return stem.replace("_", ".")
            return {n.replace(".", "_"): n for n in layers}.get(stem)
        for prefix in prefixes:
            stem = stem.removeprefix(prefix)
        return stem if stem in layers or not checked else None

    return answer


FIRST = "transformer_blocks.0.attn.add_q_proj"

WRONG = {
    "numbers": [
        ("expected five numbers", (5120, 0.125, 1)),
        ("the full layer", (128 * 512, 0.125, 1, 0, 0)),
        ("that is A alone", (1024, 0.125, 1, 0, 0)),
        ("rank over alpha", (5120, 8, 1, 0, 0)),
        ("would do nothing", (5120, 0.125, 0, 0, 0)),
        ("B is zero before", (5120, 0.125, 1, 1, 0)),
        ("passes through B", (5120, 0.125, 1, 0, 1)),
    ],
    "training_pair": [
        ("have changed places", pair(swap=True)),
        ("one level for the whole batch", pair(first=True)),
        ("the other sign", pair(velocity=lambda p, n: p - n)),
        ("not the noise", pair(velocity=lambda p, n: n)),
        ("not the picture", pair(velocity=lambda p, n: p)),
        ("the two shares add up to one", added),
        ("write it yourself", library_pair),
    ],
    "merged": [
        ("the scale is missing", merge(scale=lambda alpha, rank: 1)),
        ("alpha alone is not the scale", merge(scale=lambda alpha, rank: alpha)),
        ("rank over alpha", merge(scale=lambda alpha, rank: rank / alpha)),
        ("rounded before adding", merge(early=True)),
        ("give its dtype back", merge(keep=False)),
        ("without the weight", merge(alone=True)),
    ],
    "layer_of": [
        ("underscores cannot be split by rule", name_of(split=True)),
        ("the form with default", name_of(endings=ENDINGS[:2] + ENDINGS[4:])),
        ("the form with alpha", name_of(endings=ENDINGS[:-1])),
        ("the form with base_model.model.", name_of(prefixes=PREFIXES[:2])),
        ("belongs to no layer", name_of(checked=False)),
    ],
    "cause": [
        ("expected two", ("A",)),
        ("a whole of several parts", ("transformer_blocks.0.attn", "A")),
        ("which layer holds it", (FIRST + ".lora_A", "A")),
        ("which finish first", (FIRST, "B")),
        ("look at both models' layers", (FIRST, "E")),
    ],
    "strength": [
        ("the strength is not used", lambda strength: 9),
        ("expected at least 8", lambda strength: 0),
        ("are not off", lambda strength: 4 + round(5 * strength)),
        ("a whole number", lambda strength: torch.tensor(9)),
    ],
}

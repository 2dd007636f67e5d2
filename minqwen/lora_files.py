"""LoRA files of any program: what their keys are called, and at which scale they are meant.

    file, model  ->  layer name -> (down (rank, in), up (out, rank), scale), and the keys that fit no layer

Every key is looked up among the model's own layers: layouts write a name with other prefixes and endings, or with _
for every dot, and names such as to_add_out have underscores of their own, so no rule splits them.
The surprise: files do not agree on the scale. lightx2v's Lightning stores alpha 8 at rank 64, and its adapters turn
pictures black at scale 1; musubi's default is alpha 1; ai-toolkit and DiffSynth store none and mean 1.
Matches peft and diffusers' QwenImageLoraLoaderMixin (tests/test_lora.py). Chapter 10.
"""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from minqwen.files import content_of, expect_numbers, open_weights, read_json
from minqwen.quantize import LINEAR

PREFIXES = ("transformer.", "diffusion_model.", "model.diffusion_model.", "base_model.model.", "lora_unet_", "lycoris_")
DOWN = (".lora_A.weight", ".lora_A.default.weight", ".lora_down.weight", ".lora.down.weight")
UP = (".lora_B.weight", ".lora_B.default.weight", ".lora_up.weight", ".lora.up.weight")
ENDINGS = dict.fromkeys(DOWN, "down") | dict.fromkeys(UP, "up") | {".alpha": "alpha"}
REFUSED = {"lokr_": "LoKr", "hada_": "LoHa", "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA"}
REBASED = ("pissa", "olora", "corda", "loftq", "lora_ga")  # beginnings that take something out of the base weights
PATTERNS = ("rank_pattern", "alpha_pattern")  # of settings: what single layers have of their own
METADATA = "lora_adapter_metadata"  # where diffusers keeps rank and alpha, as JSON


def read_lora(file: str | os.PathLike | dict[str, torch.Tensor], model: nn.Module) -> tuple[dict, list[str]]:
    """The adapters that a file has for the layers of a model, and the keys that fit nothing.

    Raises ValueError when no key fits, when a half is missing, comes twice, is not finite or does not fit, for damaged
    settings, and for LoKr, LoHa and DoRA.
    """
    where = "this LoRA" if isinstance(file, dict) else Path(file)
    tensors, config = (file, {}) if isinstance(file, dict) else read_tensors(where)
    with content_of(where):
        for mark, kind in REFUSED.items():
            if any(mark in key for key in tensors) or (kind == "DoRA" and config.get("use_dora")):
                raise ValueError(f"this is a {kind} file, another kind of adapter: minqwen reads plain LoRA only")
        layers = {name: module for name, module in model.named_modules() if isinstance(module, LINEAR)}
        found, unmatched = sort_keys(tensors, layers)
        if not found:
            theirs, ours = some(tensors), f"none of {type(model).__name__} ({some(layers)})"
            raise ValueError(f"is it for another model? Its keys ({theirs}) fit {ours}")
        return {name: adapter_of(name, parts, layers[name], config) for name, parts in found.items()}, unmatched


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """A file's tensors and what it says of rank and alpha, in its metadata or in the adapter_config.json beside it."""
    with open_weights(path) as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    beside = path.with_name("adapter_config.json")
    where = beside if beside.is_file() and METADATA not in metadata else path
    with content_of(where):
        config = read_json(beside) if where == beside else json.loads(metadata.get(METADATA, "{}"))
        config = {key.removeprefix("transformer."): value for key, value in config.items()}
        check_config(config)
    return tensors, config


def check_config(config: dict) -> None:
    """Raise ValueError for settings that do not say at which scale adapters are meant."""
    expect_numbers(**{key: config[key] for key in ("r", "lora_alpha") if key in config})
    for key in PATTERNS:
        expect_numbers(**(config.get(key) or {}))
        re.compile("|".join(config.get(key) or ()))
    for key, known in (("peft_type", (None, "LORA")), ("use_rslora", (None, False, True))):
        if config.get(key) not in known:
            raise ValueError(f"{key} is {config[key]!r}: minqwen reads plain LoRA only")
    if str(start := config.get("init_lora_weights")).split("_niter")[0] in REBASED:
        raise ValueError(f"init_lora_weights {start!r} changes the base too: have peft convert it to plain LoRA")
    if config.keys() & {"r", "use_rslora", *PATTERNS} and "lora_alpha" not in config:
        raise ValueError("lora_alpha is missing, so the scale is not known")


def sort_keys(tensors: dict, layers: dict) -> tuple[dict[str, dict[str, torch.Tensor]], list[str]]:
    """Layer -> {"down": ..., "up": ..., "alpha": ...}, and the keys that belong to no layer of the model."""
    names = {name.replace(".", "_"): name for name in layers} | {name: name for name in layers}
    found, unmatched = {}, []
    for key, tensor in tensors.items():
        ending = next((e for e in ENDINGS if key.endswith(e)), "")
        name = key.removesuffix(ending)
        while prefix := next((p for p in PREFIXES if name.startswith(p)), ""):
            name = name.removeprefix(prefix)
        if ending and name in names:
            parts = found.setdefault(names[name], {})
            if ENDINGS[ending] in parts:
                raise ValueError(f"{names[name]} comes twice in this file, the second time as {key}: take one away")
            parts[ENDINGS[ending]] = tensor
        else:
            unmatched.append(key)
    return found, unmatched


def adapter_of(name: str, parts: dict[str, torch.Tensor], layer: nn.Linear, config: dict) -> tuple:
    """(down, up, scale) of one layer. Raises ValueError unless both matrices are there, are finite and fit it."""
    if "down" not in parts or "up" not in parts:
        raise ValueError(f"{name} has only {' and '.join(sorted(parts))} in this file: it is cut off, fetch it again")
    down, up = parts["down"], parts["up"]
    for part, tensor in parts.items():
        right = tensor.numel() == 1 if part == "alpha" else tensor.is_floating_point()
        if not (right and tensor.float().isfinite().all()):
            raise ValueError(f"{name}: {part} holds numbers that are not finite, whole ones, or more than one alpha")
    rank = down.numel() // layer.in_features
    if rank < 1 or down.shape != (rank, layer.in_features) or up.shape != (layer.out_features, rank):
        shapes = f"{tuple(down.shape)} and {tuple(up.shape)}"
        raise ValueError(f"{name}: {shapes} do not fit {layer}: is it a LoRA for a model of another size?")
    return down, up, scale_of(name, parts.get("alpha"), rank, config)


def scale_of(name: str, alpha: torch.Tensor | None, rank: int, config: dict) -> float:
    """alpha / rank: from the alpha tensor, else from the settings (rank-stabilised: alpha / sqrt(rank)), else 1."""
    if alpha is not None:
        return float(alpha) / rank
    own = []  # of the layer; patterns are regular expressions of a name's end, and the first that fits counts
    for pattern, key in zip(PATTERNS, ("r", "lora_alpha"), strict=True):
        fitting = (v for end, v in (config.get(pattern) or {}).items() if re.match(rf"(.*\.)?({end})$", name))
        own.append(next(fitting, config.get(key, rank)))
    if own[0] != rank:
        raise ValueError(f"{name} has rank {rank}, and {own[0]} in its settings (adapter_config.json, or metadata)")
    return own[1] / (rank**0.5 if config.get("use_rslora") else rank)


def some(names: Iterable[str]) -> str:
    """Three of many names, for a message."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

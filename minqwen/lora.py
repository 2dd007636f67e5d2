"""LoRA: teach a large model something by training two thin matrices beside a few of its linear layers.

    y = W x + b   becomes   y = W x + b + scale * B A x        A (rank, in), B (out, rank), scale = alpha / rank

W stays frozen. B starts at zero, so that nothing changes before the first step; A and B stay in float32 beside a
bfloat16 W, because updates are smaller than bfloat16 can hold. At the end they can be added into W.
The surprise: in the first step only B has a gradient, since A's passes through B.
Matches peft and diffusers' load_lora_weights (tests/test_lora.py). Chapter 10.
"""

import json
import math
import os
import warnings
from dataclasses import dataclass
from statistics import mode

import torch
from torch import nn

from minqwen.files import save_weights, whole_file
from minqwen.lora_files import METADATA, read_lora, some
from minqwen.quantize import LINEAR, QuantizedLinear, refuse_fleeting

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # of the image stream: what diffusers' and FlyMyAI's trainers adapt


class LoRALinear(nn.Module):
    """A linear layer, frozen, and its adapter: (..., in) -> (..., out). The layer's tensors keep their names."""

    def __init__(self, base: nn.Linear | QuantizedLinear, rank: int, scale: float, device: torch.device):
        super().__init__()
        self.in_features, self.out_features, self.scale = base.in_features, base.out_features, scale
        self.base = (base,)  # in a tuple, and so no sub-module: its tensors stand here, as if they were ours
        self._parameters, self._buffers = base._parameters, base._buffers
        options = {"bias": False, "device": device, "dtype": torch.float32}
        self.lora_A = nn.Linear(base.in_features, rank, **options)
        self.lora_B = nn.Linear(rank, base.out_features, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.base[0](x)
        return out + (self.scale * self.lora_B(self.lora_A(x.float()))).to(out.dtype)

    def _apply(self, fn, recurse=True):
        for part in (self.base[0], self.lora_A, self.lora_B):  # the base knows which of its tensors keep their dtype
            part._apply(fn)
        return self

    def merged(self) -> nn.Linear:
        """The plain layer that computes the same, summed in float32."""
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        update = self.scale * self.lora_B.weight.detach() @ self.lora_A.weight.detach()
        plain.weight = nn.Parameter((self.weight.float() + update).to(self.weight.dtype), requires_grad=False)
        plain.bias = self.bias
        return plain


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers of a model: name -> layer."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def add_lora(
    model: nn.Module,
    rank: int = 16,
    alpha: float | None = None,
    targets: tuple[str, ...] = ATTENTION,
    generator: torch.Generator | None = None,
) -> list[nn.Parameter]:
    """Freeze a model and put fresh adapters on its linear layers; returns the parameters that are left to train.

    targets: ends of layer names ("to_q" takes every block's attn.to_q). alpha: by default the rank, scale 1.
    A is drawn from a normal distribution of deviation 1 / rank, B is zero. generator: a CPU one, for A.
    Raises ValueError for a target that fits no linear layer and for a model that has adapters already.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    _refuse_a_second(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LINEAR)}
    chosen = {t: [name for name in layers if f".{name}".endswith(f".{t}")] for t in targets}
    if empty := [target for target, names in chosen.items() if not names]:
        raise ValueError(f"no linear layer of {type(model).__name__} ends with {empty}; it has {some(layers)}")
    model.requires_grad_(False)
    for name in dict.fromkeys(sum(chosen.values(), [])):
        layer = _attach(model, name, rank, (rank if alpha is None else alpha) / rank)
        drawn = torch.randn(layer.lora_A.weight.shape, generator=generator) / rank
        layer.lora_A.weight = nn.Parameter(drawn.to(layer.lora_A.weight.device))
        nn.init.zeros_(layer.lora_B.weight)
    return [p for layer in adapters(model).values() for p in (layer.lora_A.weight, layer.lora_B.weight)]


def lora_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapters' tensors alone: "transformer_blocks.0.attn.to_q.lora_A.weight" -> (rank, in), and so on."""
    return {
        f"{name}.{part}.weight": getattr(layer, part).weight.detach()
        for name, layer in adapters(model).items()
        for part in ("lora_A", "lora_B")
    }


def merge_lora(model: nn.Module) -> None:
    """Add every adapter into its layer's weight and take it off. In bfloat16 this cannot be undone exactly.

    Raises ValueError for weights of 8 or 4 bits, and for weights that come and go (memory.py).
    """
    refuse_fleeting(model)
    layers = adapters(model)
    if any(isinstance(layer.base[0], QuantizedLinear) for layer in layers.values()):
        raise ValueError("adapters cannot be merged into weights of 8 or 4 bits: merge first, then quantize")
    for name, layer in layers.items():
        model.set_submodule(name, layer.merged())


def save_lora(model: nn.Module, path: str | os.PathLike, **metadata: str) -> None:
    """Write the adapters as diffusers' save_lora_weights does: float32 safetensors, rank and alpha in the metadata.

    metadata: more strings to keep in the file, such as base_model="Qwen/Qwen-Image-Edit". ValueError without adapters.
    """
    layers = adapters(model)
    if not layers:
        raise ValueError("this model has no adapters to save: add_lora or load_lora puts them on")
    ranks = {name: layer.lora_A.out_features for name, layer in layers.items()}
    alphas = {name: layer.scale * ranks[name] for name, layer in layers.items()}
    rank, alpha = mode(ranks.values()), mode(alphas.values())
    config = {"r": rank, "lora_alpha": alpha, "target_modules": sorted(layers)}
    config["rank_pattern"] = {name: value for name, value in ranks.items() if value != rank}
    config["alpha_pattern"] = {name: value for name, value in alphas.items() if value != alpha}
    text = json.dumps({f"transformer.{key}": value for key, value in config.items() if value != {}}, sort_keys=True)
    tensors = {f"transformer.{name}": tensor.cpu().contiguous() for name, tensor in lora_state(model).items()}
    with whole_file(path) as beside:
        save_weights(tensors, beside, {"format": "pt", METADATA: text} | metadata)


@dataclass(frozen=True)
class LoraReport:
    """What a LoRA file did: the layers that took an adapter, with its scale, and the file's keys that fit nothing."""

    matched: dict[str, float]
    unmatched: list[str]

    def __str__(self) -> str:
        scales = ", ".join(f"{scale:g}" for scale in sorted(set(self.matched.values())))
        text = f"{len(self.matched)} layers adapted, at scale {scales}"
        return text + (f"; {len(self.unmatched)} keys fit nothing: {some(self.unmatched)}" if self.unmatched else "")


def load_lora(model: nn.Module, file: str | os.PathLike | dict[str, torch.Tensor], scale: float = 1.0) -> LoraReport:
    """Put a file's adapters on a model, frozen; `scale` multiplies the scale that the file asks for.

    file: a .safetensors of diffusers, PEFT (adapter_config.json beside it is read), ai-toolkit, lightx2v, kohya and
    musubi or DiffSynth; or its tensors. The file's scale is alpha / rank of its alpha tensors, else of its metadata,
    else 1. Warns of keys that fit nothing. Raises ValueError when no key fits, when a half is missing or does not fit,
    for LoKr, LoHa and DoRA, and for a model that has adapters already. Source: QwenImageLoraLoaderMixin; peft.
    """
    _refuse_a_second(model)
    found, unmatched = read_lora(file, model)
    matched = {}
    for name, (down, up, own) in found.items():
        layer = _attach(model, name, len(down), scale * own)
        for part, tensor in ((layer.lora_A, down), (layer.lora_B, up)):
            part.weight = nn.Parameter(tensor.to(part.weight.device, torch.float32), requires_grad=False)
        matched[name] = layer.scale
    report = LoraReport(matched, unmatched)
    if unmatched:
        warnings.warn(f"LoRA: {report}", stacklevel=2)
    return report


def _attach(model: nn.Module, name: str, rank: int, scale: float) -> LoRALinear:
    if not math.isfinite(scale):
        raise ValueError(f"{name}: its scale would be {scale}, expected a finite number")
    base = model.get_submodule(name)
    device = base.weight.device
    if device.type == "meta":  # its weights stream: they come to where the others are
        device = next((p.device for p in model.parameters() if not p.is_meta), device)
    if device.type == "meta":
        raise ValueError("this model's weights are away: take it from the pipeline again, then put adapters on it")
    layer = LoRALinear(base, rank, scale, device)
    model.set_submodule(name, layer)
    return layer


def _refuse_a_second(model: nn.Module) -> None:
    if adapters(model):
        raise ValueError("this model has adapters already: merge_lora adds them into the weights, then take the next")

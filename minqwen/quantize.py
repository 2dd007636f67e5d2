"""Linear layers whose weights take 8 or 4 bits; they are unpacked where they are used, and not kept so.

    8 bits: w = scale * q, a scale for each output, q from -127 to 127
    4 bits: w = offset + scale * q, both for each 64 inputs of an output, q from 0 to 15: 4.5 bits a weight in all

Inputs, outputs and sums stay in the compute dtype: this saves memory, not operations.
The surprise: the scale that just covers a group's weights is not the best one. A smaller one cuts the largest off and
brings all the others nearer: `fit` looks for the scale and offset of the least squared error.
Source: Dettmers et al. 2022, LLM.int8(); Frantar et al. 2023, GPTQ (groups). Tests: tests/test_quantize.py. Chapter 11.
"""

import threading

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUP = 64  # weights of an output that share a scale and an offset at 4 bits
TOP = {8: 127, 4: 15, 3: 7}  # the largest code. 3 bits are for comparison only: they are stored as 4
STARTS = {4: (1.0, 0.85), 3: (1.0, 0.8, 0.6)}  # shares of a group's range from which `fit` begins
CHUNK = 2**18  # weights that are fitted, or unpacked, at a time on a CPU: about what stays in its cache
FORMAT = 2  # to be raised when the layout of codes, scales or offsets in files changes
SCRATCH = threading.local()  # .room: memory for one layer's numbers, a thread
INSIDE = ("transformer_blocks.", "model.layers.", "visual.blocks.")  # where linear layers are given fewer bits
AS_STORED = (".weight_scale", ".weight_offset")  # ends of names of tensors that keep their dtype when others change it


class QuantizedLinear(nn.Module):
    """A frozen linear layer of few bits: (..., in_features) -> (..., out_features).

    weight: codes, the inputs one below the other: int8 (in, out) for 8 bits; for 4 bits uint8 (groups * 32, out), two a
    byte: the first half of the inputs in the low four bits, the second in the high ones. weight_scale: float32 (1, out)
    or bfloat16 (groups, out). weight_offset: bfloat16 (groups, out), None for 8 bits. bias or None.
    """

    def __init__(self, in_features: int, out_features: int, bits: int, bias: bool = True, device=None, dtype=None):
        super().__init__()
        check_bits(bits)
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        groups = -(-in_features // (2 * GROUP)) * 2  # even: there are two halves
        shapes = {"weight": (in_features, torch.int8), "weight_scale": (1, torch.float32), "weight_offset": None}
        if bits < 8:
            shapes = {
                "weight": (groups * GROUP // 2, torch.uint8),
                "weight_scale": (groups, torch.bfloat16),
                "weight_offset": (groups, torch.bfloat16),
            }
        for name, shape in shapes.items():
            empty = None if shape is None else torch.empty(shape[0], out_features, dtype=shape[1], device=device)
            self.register_buffer(name, empty)
        self.register_buffer("bias", torch.empty(out_features, device=device, dtype=dtype) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        return QuantizedMatmul.apply(x, self)

    def unpacked(self, dtype: torch.dtype = torch.float32, room: Tensor | None = None) -> Tensor:
        """The weights as numbers, (out, in): the same on every device, since each step is rounded to float32.

        room: memory to write them to, (inputs, out) in this dtype; by default it is new.
        """
        if room is None:
            room = torch.empty(self.inputs, self.out_features, dtype=dtype, device=self.weight.device)
        if self.bits == 8:
            torch.mul(self.weight, self.weight_scale, out=room)
        else:
            unpack_groups(room, self.weight, self.weight_scale, self.weight_offset)
        return room[: self.in_features].t()

    @property
    def inputs(self) -> int:
        """Their number, filled up to whole groups."""
        return len(self.weight) * (1 if self.bits == 8 else 2)

    def into_scratch(self, dtype: torch.dtype) -> Tensor:
        """`unpacked` into memory that the next call writes over: on a CPU, new memory costs more than unpacking."""
        if self.weight.device.type != "cpu":
            return self.unpacked(dtype)
        kept, needed = getattr(SCRATCH, "room", torch.empty(0)), self.inputs * self.out_features
        if kept.dtype != dtype or len(kept) < needed:
            with torch.inference_mode(False):  # else training could not write to it later
                kept = SCRATCH.room = torch.empty(needed, dtype=dtype)
        return self.unpacked(dtype, kept[:needed].view(self.inputs, -1))

    def _apply(self, fn, recurse=True):
        """`.to()` and its like move codes and scales, but never change their dtype."""
        before = {name: self._buffers[name] for name in ("weight_scale", "weight_offset")}
        super()._apply(fn, recurse)
        for name, old in before.items():
            if old is not None and self._buffers[name].dtype != old.dtype:
                self._buffers[name] = old.to(self._buffers[name].device)
        return self


class QuantizedMatmul(torch.autograd.Function):
    """x W^T + b of a QuantizedLinear; what is unpacked is dropped at once, and unpacked again for the gradient of x."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(x, layer.into_scratch(x.dtype), bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.into_scratch(grad.dtype), None


LINEAR = (nn.Linear, QuantizedLinear)


def unpack_groups(out: Tensor, codes: Tensor, scale: Tensor, offset: Tensor) -> None:
    """4 bits: bytes (inputs / 2, out) -> numbers in `out`. A bfloat16 scale times a code is exact in float32."""
    codes, halves = codes.unflatten(0, (-1, GROUP)), out.unflatten(0, (2, -1, GROUP))
    scale, offset = (each.float().unflatten(0, (2, -1, 1)) for each in (scale, offset))
    for groups in slices(codes):
        for half, q in enumerate((codes[groups] & 15, codes[groups] >> 4)):
            numbers = halves[half, groups]
            room = numbers if out.dtype == torch.float32 else torch.empty(q.shape, device=q.device)
            torch.addcmul(offset[half, groups], scale[half, groups], room.copy_(q), out=room)
            if room is not numbers:
                numbers.copy_(room)


def slices(tensor: Tensor) -> list[slice]:
    """All rows, so many at a time: on a CPU about as fit into its cache, elsewhere all at once."""
    rows = max(1, CHUNK // tensor[0].numel()) if tensor.device.type == "cpu" else len(tensor)
    return [slice(first, first + rows) for first in range(0, len(tensor), rows)]


@torch.no_grad()
def quantize(linear: nn.Linear, bits: int) -> QuantizedLinear:
    """The layer with weights of 8, 4 or 3 bits (the last takes the room of 4), on its device; bias as it was.

    Raises ValueError for other bits and for weights that are not finite.
    """
    check_bits(bits)
    if not torch.stack(linear.weight.aminmax()).isfinite().all():  # fifty times as fast as asking every weight
        raise ValueError("weights that are not finite cannot be quantized")
    layer = QuantizedLinear(linear.in_features, linear.out_features, bits, linear.bias is not None, device="meta")
    weight, fit_part = linear.weight.detach(), fit_rows if bits == 8 else fit
    parts = [fit_part(weight[rows].float(), bits) for rows in slices(weight)]
    layer.weight, layer.weight_scale, *offset = (torch.cat(each).t().contiguous() for each in zip(*parts, strict=True))
    layer.weight_offset = offset[0] if offset else None
    layer.bias = None if linear.bias is None else linear.bias.detach()
    return layer


def fit_rows(w: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """8 bits: codes int8 (out, in) and a scale for each output, which covers its largest weight."""
    scale = w.abs().amax(-1, keepdim=True) / TOP[bits]
    return codes_of(w, scale, 0, TOP[bits], -TOP[bits]).to(torch.int8), scale


def fit(w: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, two a byte (out, inputs / 2), scale and offset, bfloat16 (out, groups), of the least squared error found.

    From each start: round to codes, fit scale and offset to them by least squares, once more; then every group keeps
    the better of the results.
    """
    filled = F.pad(w[:, None], (0, -w.shape[1] % (2 * GROUP)), "replicate")[:, 0]  # with the last weight
    w, top, best = filled.unflatten(1, (-1, GROUP)), TOP[bits], None
    (low, high), mean = w.aminmax(dim=-1, keepdim=True), w.mean(-1, keepdim=True)
    for share in STARTS[bits]:
        scale = share * (high - low) / top
        offset = (high + low) / 2 - scale * top / 2
        for _ in range(2):
            scale, offset = least_squares(codes_of(w, scale, offset, top), w, mean)
        scale, offset = scale.bfloat16().float(), offset.bfloat16().float()  # as they will be stored
        q = codes_of(w, scale, offset, top)
        error = (scale * q).add_(offset).sub_(w).square_().sum(-1, keepdim=True)
        new = (error, q, scale, offset)
        best = new if best is None else [torch.where(error < best[0], n, b) for n, b in zip(new, best, strict=True)]
    _, q, scale, offset = best
    first, second = q.flatten(1).to(torch.uint8).chunk(2, dim=1)
    return first | second << 4, scale[..., 0].bfloat16(), offset[..., 0].bfloat16()


def least_squares(q: Tensor, w: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and offset, (..., 1), with which codes come nearest to weights; scale 0 where all codes are alike.

    mean: that of the weights, (..., 1).
    """
    mean_q = q.mean(-1, keepdim=True)
    away = q - mean_q
    scale = (away * w).sum(-1, keepdim=True) / away.square_().sum(-1, keepdim=True).clamp(min=1e-6)
    return scale, mean - scale * mean_q


def codes_of(w: Tensor, scale: Tensor, offset: Tensor | float, top: int, least: int = 0) -> Tensor:
    """The nearest codes, as float32; where the scale is 0, all weights being alike, any code will do."""
    return (w - offset).div_(scale.clamp(min=1e-30)).round_().clamp_(least, top)


def check_bits(bits: int) -> None:
    if bits not in TOP:
        raise ValueError(f"{bits} bits: linear layers come in {', '.join(map(str, TOP))}")


def bits_of(name: str, bits: int) -> int | None:
    """How many bits a linear layer of a released model gets: those asked for in the blocks' attention and MLPs, 8 in
    their modulation, and None for what stays as it is (embeddings, both ends, the timestep)."""
    if not name.startswith(INSIDE):
        return None
    return 8 if "_mod." in name else bits


def quantize_blocks(model: nn.Module, bits: int) -> None:
    """Replace a model's linear layers, in place, by those of fewer bits; `bits_of` says which.

    Raises ValueError for a model with adapters, and for a part of a pipeline whose weights come and go.
    """
    refuse_fleeting(model)
    if any(name.endswith(".lora_A") for name, _ in model.named_modules()):
        raise ValueError("this model has adapters: merge_lora adds them into the weights, then quantize")
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and bits_of(name, bits):
            model.set_submodule(name, quantize(layer, bits_of(name, bits)))


def insert_quantized_layers(model: nn.Module, stored: dict[str, Tensor]) -> None:
    """Replace the linear layers of a model on the meta device for which `stored` holds codes."""
    layers = dict(model.named_modules())
    for name in [key.removesuffix(".weight_scale") for key in stored if key.endswith(".weight_scale")]:
        layer = layers.get(name)
        if type(layer) is nn.Linear and f"{name}.weight" in stored:  # else strict loading says what does not fit
            bits = 8 if stored[f"{name}.weight"].dtype == torch.int8 else 4
            sizes = layer.in_features, layer.out_features
            model.set_submodule(name, QuantizedLinear(*sizes, bits, layer.bias is not None, device="meta"))


def refuse_fleeting(model: nn.Module) -> None:
    """Raise ValueError for a model whose weights are read again from their files: a change would be forgotten."""
    if getattr(model, "comes_and_goes", False):
        raise ValueError('its weights come and go (memory.py): open the pipeline with memory="resident" to change them')


def keeps_dtype(name: str, tensor: Tensor) -> bool:
    """Whether a stored tensor is left as it is when a model is opened in another dtype: codes and their scales."""
    return name.endswith(AS_STORED) or not tensor.is_floating_point()

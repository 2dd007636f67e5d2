"""Checks of the exercises to chapter 11."""

import copy
import random
import threading
import time
from functools import cache

import torch
from torch import nn

from checks import WHOLE, Wrong, ask, exercise, expect, expect_finding, expect_five
from course import TINY
from minqwen.checkpoint import Checkpoint
from minqwen.quantize import GROUP, QuantizedLinear, quantize, quantize_blocks
from minqwen.transformer import QwenImageTransformer2DModel

WAIT = 2.0  # seconds that a check waits for a block which should be on its way
MOMENT = 0.03  # and for one which should not


@cache
def model() -> QwenImageTransformer2DModel:
    """The tiny transformer."""
    return Checkpoint(TINY).load(QwenImageTransformer2DModel, "transformer")


def inputs() -> tuple:
    """What a transformer takes, with random numbers: image tokens, text, no mask, noise level, shapes."""
    generator = torch.Generator().manual_seed(0)
    config = Checkpoint(TINY).config("transformer/config.json")
    image = torch.randn(1, 32, config["in_channels"], generator=generator)
    text = torch.randn(1, 9, config["joint_attention_dim"], generator=generator)
    return image, text, None, torch.tensor([0.8]), [[(1, 4, 4), (1, 4, 4)]]


# ---------------------------------------------------------------------------------------------------- 11.1


@exercise("11.1")
def numbers(answer):
    """Five numbers, without running anything."""
    weights = 3072 * 12288
    expect_five(
        answer,
        (2 * weights, weights * 9 // 16, 8 * 60 * 2 * 6 * 3072, 18.1, 9),
        [
            {"those are the weights, not their bytes": weights, "float32 takes 4 bytes, bf16 takes 2": 4 * weights},
            {"that is the codes alone: scale and offset are stored too": weights // 2,
             "a group has two more numbers, a scale and an offset": weights // 2 + weights // 32,
             "that is in bits": weights * 9 // 2, "scale and offset take 2 bytes each, not 4": weights * 5 // 8},
            {"that is one level": 60 * 2 * 6 * 3072, "that is one stream": 8 * 60 * 6 * 3072,
             "the layer gives six vectors, not one": 8 * 60 * 2 * 3072, "that is bytes": 16 * 60 * 2 * 6 * 3072},
            {"that is one after the other": 24, "the first block has to be waited for": 18,
             "the slower of the two decides, and that is the arithmetic": 6.3},
            {"that is all parts at once": 14.5, "they are never there together: not the sum": 14,
             "the transformer is there alone, but what else is in memory during its steps?": 8.5},
        ],
        "12345",
        0.05,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------- 11.2


def _group(weights, size, bits, levels=None, cut=False):
    groups = weights.reshape(len(weights), -1, size)
    low, high = groups.aminmax(dim=-1, keepdim=True)
    scale = (high - low) / (2**bits - 1 if levels is None else levels)
    codes = (groups - low) / torch.where(scale > 0, scale, torch.ones_like(scale))
    codes = (codes.floor() if cut else codes.round()).clamp(0, 2**bits - 1)
    return codes.reshape(weights.shape), scale[..., 0], low[..., 0]


@exercise("11.2")
def quantized(answer):
    """quantized(weights, bits, size) on random shapes; one group holds equal weights."""
    for trial in range(6):
        bits, size = random.choice([2, 3, 4, 8]), random.choice([4, 8, 16])
        rows, groups = random.randint(2, 5), random.randint(2, 5)
        weights = torch.randn(rows, groups * size) * torch.rand(rows, 1)
        alike = trial % 2 == 1
        if alike:
            weights[-1, :size] = 0.25
        want = _group(weights, size, bits)
        back = weights.t().reshape(rows, -1) if rows != groups * size else weights
        wrong = {
            "the codes are cut down to whole numbers: take the nearest one": _group(weights, size, bits, cut=True),
            f"{bits} bits have {2**bits} codes, so {2**bits - 1} steps from the least to the largest":
                _group(weights, size, bits, levels=2**bits),
        }  # fmt: skip
        got = ask(answer, weights.clone(), bits, size, library="quantize.py")
        where = f"{bits} bits, weights {tuple(weights.shape)}, groups of {size}"
        if not isinstance(got, tuple | list) or len(got) != 3:
            raise Wrong("expected three tensors: codes, scale, offset")
        if any(not isinstance(each, torch.Tensor) for each in got):
            raise Wrong("expected three tensors: codes, scale, offset")
        codes, scale, offset = (each.float() for each in got)
        for each, name, shape in ((codes, "codes", want[0].shape), (scale, "scale", want[1].shape),
                                  (offset, "offset", want[2].shape)):  # fmt: skip
            if each.shape != shape:
                one = {(): "for all weights", (rows,): "for each output", (rows, 1): "for each output"}
                told = one.get(tuple(each.shape))
                told = f": that is one {told}, each group has its own" if told else ""
                raise Wrong(f"{name}: expected the shape {tuple(shape)}, got {tuple(each.shape)}{told} ({where})")
        if not all(each.isfinite().all() for each in (codes, scale, offset)):
            raise Wrong(f"not all numbers are finite: what if the weights of a group are all alike? ({where})")
        if alike:  # any code will do where the scale is 0
            codes, want = codes.clone(), (want[0].clone(), *want[1:])
            codes[-1, :size] = want[0][-1, :size] = 0
        if (codes > 2**bits - 1).any() or (codes < 0).any():
            raise Wrong(f"a code is outside of 0 to {2**bits - 1} ({where})")
        across = _group(back, size, bits)
        if back is not weights and scale.shape == across[1].shape and torch.allclose(scale, across[1]):
            raise Wrong(f"the groups go along the inputs of one output, so along a row ({where})")
        place = (weights - want[2].repeat_interleave(size, 1)) / want[1].repeat_interleave(size, 1).clamp(min=1e-30)
        either = (place.frac() - 0.5).abs() < 1e-3  # in the middle of two values either is nearest

        def settled(codes, want=want, either=either):
            return torch.where(either & ((codes - want[0]).abs() == 1), want[0], codes)

        wrong = {told: (settled(theirs[0]), *theirs[1:]) for told, theirs in wrong.items()}
        expect((settled(codes), scale, offset), want, wrong, 1e-5, where)


# ---------------------------------------------------------------------------------------------------- 11.3


@exercise("11.3")
def unpacked(answer):
    """numbers(weight, scale, offset): random layers, then one of the tiny checkpoint."""
    for k in range(5):
        linear = nn.Linear(random.choice([128, 256, 384]), random.randint(3, 9), bias=False)
        if k == 4:
            linear = model().transformer_blocks[1].img_mlp.net[2]
        layer = quantize(linear, 4)
        w, scale, offset = layer.weight, layer.weight_scale, layer.weight_offset
        low, high = (w & 15).float(), (w >> 4).float()

        def numbers(codes, scale=scale, offset=offset):
            per = (each.float().repeat_interleave(GROUP, 0) for each in (scale, offset))
            s, o = per
            return (o + s * codes).t()

        want = numbers(torch.cat([low, high]))
        zeros, half = torch.zeros_like(offset), len(scale) // 2
        wrong = {
            "the offset is missing": numbers(torch.cat([low, high]), offset=zeros),
            "the halves are exchanged: the first half of the inputs lies in the low four bits":
                numbers(torch.cat([high, low])),
            "the two codes of a byte are no neighbours: the second belongs to the other half of the inputs":
                numbers(torch.stack([low, high], 1).flatten(0, 1)),
            "the second half of the inputs has its own scales and offsets":
                numbers(torch.cat([low, high]), torch.cat([scale[:half]] * 2), torch.cat([offset[:half]] * 2)),
            "expected one row for each output, (out, in): turn it over": want.t(),
            "weight = offset + scale * code: the offset is not scaled":
                (scale.float().repeat_interleave(GROUP, 0) * (torch.cat([low, high])
                 + offset.float().repeat_interleave(GROUP, 0))).t(),
        }  # fmt: skip
        got = ask(answer, w.clone(), scale.clone(), offset.clone(), library="quantize.py")
        if isinstance(got, torch.Tensor):
            got = got.float()
        expect(got, want, wrong, 1e-5, f"weight {tuple(w.shape)}, scale {tuple(scale.shape)}")
    return "The last one was a layer of the tiny checkpoint."


# ---------------------------------------------------------------------------------------------------- 11.4


@exercise("11.4")
def walk(answer):
    """walk(fetch, count, places): in order, one fetched at a time, as many ahead as there are places, and no more."""
    for count, places in ((random.randint(5, 7), 3), (4, 2), (3, 1), (2, 4), (1, 2), (5, random.randint(2, 4))):
        begun, used, faults = [threading.Event() for _ in range(count)], 0, []
        bus = threading.Lock()

        def fetch(k, begun=begun, faults=faults, bus=bus, count=count):
            if not 0 <= k < count:
                faults.append(_beyond(k, count))
                raise Wrong(faults[-1])
            if not bus.acquire(blocking=False):
                faults.append("two blocks are fetched at once, and there is one bus: one worker is enough")
                raise Wrong(faults[-1])
            begun[k].set()
            time.sleep(MOMENT / 3)
            bus.release()
            return f"block {k}"

        where = f"{count} blocks, {places} place{'s' * (places > 1)}"
        steps = ask(answer, fetch, count, places)
        if not hasattr(steps, "__next__") and not hasattr(steps, "__iter__"):
            raise Wrong(f"expected something to walk through, got {type(steps).__name__}: use yield")
        for k, block in enumerate(_each(steps)):
            if faults:
                raise Wrong(faults[0])
            if block != f"block {k}":
                held = "it is still on its way: ask for its .result()" if hasattr(block, "result") else ""
                raise Wrong(f"step {k} of {count} gives {block!r}; expected what fetch({k}) returned. {held}".strip())
            last, beyond = min(k + places, count) - 1, k + places
            for ahead in range(k + 1, last + 1):
                if not begun[ahead].wait(WAIT):
                    if faults:
                        raise Wrong(faults[0])
                    told = "ask for it before the yield" if ahead == k + 1 else f"there are {places} places"
                    raise Wrong(f"while block {k} is used, block {ahead} is not on its way: {told} ({where})")
            if beyond < count and begun[beyond].wait(MOMENT):
                most = sum(each.is_set() for each in begun) - k
                raise Wrong(f"{most} blocks are there or on their way while block {k} is used, too many ({where})")
            used += 1
        if faults:
            raise Wrong(faults[0])
        if used != count:
            raise Wrong(f"{used} of {count} blocks came")


def _beyond(k: int, count: int) -> str:
    return f"block {k} was asked for, and there are {count}: 0 to {count - 1}"


def _each(steps):
    """The steps of a walk; an error inside is said to be the reader's."""
    walked = iter(steps)
    while True:
        try:
            block = ask(next, walked)
        except Wrong as wrong:
            if "StopIteration" in str(wrong):
                return
            raise
        yield block


# ---------------------------------------------------------------------------------------------------- 11.5


def right() -> nn.Module:
    """The tiny transformer at 4 bits."""
    whole = copy.deepcopy(model())
    quantize_blocks(whole, 4)
    return whole


def broken() -> nn.Module:
    """The same from another program, with one fault."""
    whole = right()
    for name, layer in whole.named_modules():
        if isinstance(layer, QuantizedLinear) and layer.bits == 4 and name.endswith(_FAULTY):
            layer.weight = (layer.weight >> 4) | (layer.weight << 4)
    return whole


_FAULTY = "txt_mlp.net.2"  # spoiler: the layers of exercise 11.5

CAUSES = {
    "B": "the offsets of both models agree: compare layer.weight_offset",
    "C": "the scales of both models agree: compare layer.weight_scale",
    "D": "the biases of both models agree: compare layer.bias",
    "E": "then the codes would be those of another layer: look at the two codes of a byte, weight & 15 and weight >> 4",
}


@exercise("11.5")
def cause(finding):
    """(name of the first sub-module that differs, letter)."""
    names = dict.fromkeys(("", "transformer_blocks.0", "transformer_blocks.0.txt_mlp"), WHOLE)
    names["transformer_blocks.1*"] = "an earlier block differs already"
    expect_finding(
        finding,
        "two: the sub-module's name and a letter, such as ('img_in', 'B')",
        name=("transformer_blocks.0.txt_mlp.net.2", names),
        cause=("A", CAUSES),
    )


# ---------------------------------------------------------------------------------------------------- 11.6


def _chosen(kind: str, bits: int) -> float:
    """How far the velocity is off when the layers of one kind have so few bits."""
    fewer = copy.deepcopy(model())
    for name, layer in list(fewer.named_modules()):
        if type(layer) is nn.Linear and kind in name and name.startswith("transformer_blocks."):
            fewer.set_submodule(name, quantize(layer, bits))
    return _error(fewer)


@torch.no_grad()
def _error(fewer: nn.Module) -> float:
    want = model()(*inputs())
    return ((fewer(*inputs()) - want).norm() / want.norm()).item()


@exercise("11.6")
def sensitivity(answer):
    """error_of(kind, bits): two kinds at 3 bits, one at 8, and the model is left alone."""
    before = {name: tensor.clone() for name, tensor in model().state_dict().items()}
    everything = _chosen("", 3)
    for kind, bits in (("img_mlp", 3), ("attn.", 3), ("txt_mlp", 4)):
        got = ask(answer, kind, bits)
        after = model().state_dict()
        if after.keys() != before.keys() or any(not torch.equal(after[name], before[name]) for name in before):
            model.cache_clear()
            raise Wrong("check.model() itself was changed: work on a copy, copy.deepcopy(check.model())")
        if isinstance(got, torch.Tensor) and got.numel() == 1:
            got = got.item()
        if isinstance(got, bool) or not isinstance(got, float | int):
            raise Wrong(f"expected a number, got {type(got).__name__}")
        want = _chosen(kind, bits)
        if abs(got - want) > 0.01 * want:
            if got == 0:
                raise Wrong(f"0 for {kind!r}: no layer was changed. quantize returns a new layer: put it in place")
            if abs(got - _chosen(kind, 8)) < 0.01 * _chosen(kind, 8):
                raise Wrong("that is the error of 8 bits: are `bits` handed on?")
            if abs(got - everything) < 0.01 * everything:
                raise Wrong(f"that is the error of all layers: change only those with {kind!r} in their names")
            if abs(got - 100 * want) < want:
                raise Wrong("a share, please, not per cent")
            raise Wrong(f"{got:.4f} for {kind!r} at {bits} bits, expected {want:.4f}: |mine - reference| / |reference|")
    return "Now compare kinds."

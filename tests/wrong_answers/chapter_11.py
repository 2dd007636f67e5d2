"""Plausible wrong answers to the exercises of chapter 11, and the words of the diagnosis that each must get."""

import copy

import torch
from torch import nn

RIGHT = (75497472, 21233664, 17694720, 18.1, 9)


def but(place, value):
    return (*RIGHT[: place - 1], value, *RIGHT[place:])


def quantizer(size_of=lambda weights, size: size, levels=lambda bits: 2**bits - 1, cut=False, safe=True, across=False):
    def answer(weights, bits, size):
        given = weights.t().reshape(len(weights), -1) if across else weights
        groups = given.reshape(len(weights), -1, size_of(weights, size))
        low, high = groups.aminmax(dim=-1, keepdim=True)
        scale = (high - low) / levels(bits)
        divisor = scale.clamp(min=1e-30) if safe else scale
        codes = (groups - low) / divisor
        codes = codes.floor() if cut else codes.round()
        return codes.clamp(0, 2**bits - 1).reshape(weights.shape), scale[..., 0], low[..., 0]

    return answer


def one_scale(weights, bits, size):
    low, high = weights.aminmax()
    scale = (high - low) / (2**bits - 1)
    return ((weights - low) / scale).round(), scale, low


def too_large(weights, bits, size):
    codes, scale, offset = quantizer()(weights, bits, size)
    return codes + 2**bits, scale, offset


def library_quantizer(weights, bits, size):
    from minqwen.quantize import quantize

    layer = nn.Linear(weights.shape[1], len(weights))
    return quantize(layer, 4), None, None


def numbers(order=lambda low, high: torch.cat([low, high]), offsets=True, own=True, turned=True, inside=False):
    def answer(weight, scale, offset):
        codes = order((weight & 15).float(), (weight >> 4).float())
        if not own:
            half = len(scale) // 2
            scale, offset = (torch.cat([each[:half]] * 2) for each in (scale, offset))
        scale, offset = (each.float().repeat_interleave(64, dim=0) for each in (scale, offset * offsets))
        found = scale * (codes + offset) if inside else offset + scale * codes
        return found.t() if turned else found

    return answer


def one_after_the_other(fetch, count, places):
    for k in range(count):
        yield fetch(k)


def all_at_once(fetch, count, places):
    yield from [fetch(k) for k in range(count)]


def one_too_few(fetch, count, places):
    steps = sent_for()(fetch, count, places)
    for _ in range(count - 1):
        yield next(steps)


def next_one(fetch, count, places):
    for k in range(count):
        yield fetch((k + 1) % count)


def sent_for(ahead_of=lambda places: places, workers=1, wait=True, beyond=0):
    def walk(fetch, count, places):
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(workers) as beside:
            ahead, sent = [], 0
            for k in range(count):
                while sent < min(k + ahead_of(places), count + beyond):
                    ahead.append(beside.submit(fetch, sent))
                    sent += 1
                block = ahead.pop(0)
                yield block.result() if wait else block

    return walk


def error_of(change=True, all_of_them=False, keep=False, times=1, few=None, largest=False):
    def answer(kind, bits):
        from checks import chapter_11 as check
        from minqwen.quantize import quantize

        with torch.no_grad():
            want = check.model()(*check.inputs())
            model = check.model() if keep else copy.deepcopy(check.model())
            for name, layer in list(model.named_modules()):
                asked = all_of_them or kind in name
                if type(layer) is nn.Linear and name.startswith("transformer_blocks.") and asked:
                    new = quantize(layer, few or bits)
                    if change:
                        model.set_submodule(name, new)
            got = model(*check.inputs())
        if largest:
            return ((got - want).abs().max() / want.abs().max()).item()
        return times * ((got - want).norm() / want.norm()).item()

    return answer


FIRST = "transformer_blocks.0.txt_mlp.net.2"

WRONG = {
    "numbers": [
        ("expected five numbers", RIGHT[:3]),
        ("float32 takes 4 bytes", but(1, 4 * 3072 * 12288)),
        ("scale and offset are stored too", but(2, 3072 * 12288 // 2)),
        ("that is one stream", but(3, RIGHT[2] // 2)),
        ("one after the other", but(4, 24)),
        ("has to be waited for", but(4, 18)),
        ("all parts at once", but(5, 14.5)),
        ("what else is in memory", but(5, 8.5)),
    ],
    "quantized": [
        ("take the nearest one", quantizer(cut=True)),
        ("codes, so", quantizer(levels=lambda bits: 2**bits)),
        ("one for all weights", one_scale),
        ("one for each output", quantizer(size_of=lambda weights, size: weights.shape[1])),
        ("all alike", quantizer(safe=False)),
        ("is outside of 0", too_large),
        ("along a row", quantizer(across=True)),
        ("expected three tensors", lambda weights, bits, size: weights),
        ("write it yourself", library_quantizer),
    ],
    "unpacked": [
        ("the offset is missing", numbers(offsets=False)),
        ("the halves are exchanged", numbers(order=lambda low, high: torch.cat([high, low]))),
        ("no neighbours", numbers(order=lambda low, high: torch.stack([low, high], 1).flatten(0, 1))),
        ("its own scales and offsets", numbers(own=False)),
        ("turn it over", numbers(turned=False)),
        ("the offset is not scaled", numbers(inside=True)),
    ],
    "walk": [
        ("is not on its way: ask", one_after_the_other),
        ("there are 3 places", sent_for(lambda places: 2)),
        ("too many", sent_for(lambda places: places + 1)),
        ("too many", all_at_once),
        ("fetched at once", sent_for(workers=2)),
        ("was asked for, and there are", sent_for(beyond=1)),
        ("blocks came", one_too_few),
        ("expected what fetch(0) returned", next_one),
        ("ask for its .result()", sent_for(wait=False)),
    ],
    "cause": [
        ("expected two", ("A",)),
        ("a whole of several parts", ("transformer_blocks.0.txt_mlp", "A")),
        ("an earlier block", ("transformer_blocks.1.txt_mlp.net.2", "A")),
        ("weight_offset", (FIRST, "B")),
        ("another layer", (FIRST, "E")),
    ],
    "sensitivity": [
        ("no layer was changed", error_of(change=False)),
        ("the error of all layers", error_of(all_of_them=True)),
        ("work on a copy", error_of(keep=True)),
        ("not per cent", error_of(times=100)),
        ("the error of 8 bits", error_of(few=8)),
        ("|mine - reference| / |reference|", error_of(largest=True)),
        ("expected a number", lambda kind, bits: None or "small"),
    ],
}

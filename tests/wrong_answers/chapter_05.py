"""Plausible wrong answers to the exercises of chapter 05, and the words of the diagnosis that each must get."""

import json

import torch
import torch.nn.functional as F

from checks import Answers

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def leave(silu=True, one=1, first=0, unbiased=False, on=1, dim=-1):
    def answer(x, temb, linear, proj):
        halves = linear(F.silu(temb) if silu else temb)[:, None].chunk(2, dim=-1)
        scale, shift = halves[first], halves[1 - first]
        x = (x - x.mean(dim, keepdim=True)) / (x.var(dim, keepdim=True, unbiased=unbiased) + 1e-6).sqrt()
        return proj(x * (one + scale) + on * shift)

    return answer


def looping(x, temb, linear, proj):
    return torch.stack([leave()(x[b : b + 1], temb[b : b + 1], linear, proj)[0] for b in range(len(x))])


def unbroadcast(x, temb, linear, proj):
    scale, shift = linear(F.silu(temb)).chunk(2, dim=-1)
    return proj(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)


def library_exit(x, temb, linear, proj):
    from minqwen.transformer import AdaLayerNormContinuous

    norm = AdaLayerNormContinuous(x.shape[-1])
    norm.linear = linear
    return proj(norm(x, temb))


def read_tensor(order="little", before=8, header=True, all_of_it=False):
    def answer(read, name):
        length = int.from_bytes(read(0, 8), order)
        entry = json.loads(read(8, 8 + length))[name]
        place = before + length * header
        first, last = (place + offset for offset in entry["data_offsets"])
        if all_of_it:
            read(8 + length, last)
        numbers = torch.frombuffer(bytearray(read(first, last)), dtype=DTYPES[entry["dtype"]])
        return numbers.view(entry["shape"])

    return answer


def as_float(read, name):
    return read_tensor()(read, name).float()


def velocity(raw=False, times=1, masked=True, reverse=False, short=0, turned=True, exit_=None, sign=1, cut=False):
    def answer(model, latents, embeds, mask, sigma, shapes):
        img, txt = model.img_in(latents), model.txt_in(embeds if raw else model.txt_norm(embeds))
        temb, rotary = model.time_text_embed(sigma * times, img), model.pos_embed(shapes[0], txt.shape[1])
        blocks = list(model.transformer_blocks)
        blocks = blocks[::-1] if reverse else blocks[: len(blocks) - short]
        for block in blocks:
            txt, img = block(img, txt, temb, mask if masked else None, rotary if turned else None)
        out = sign * leave(**(exit_ or {}))(img, temb, model.norm_out.linear, model.proj_out)
        return out[:, : out.shape[1] // 2] if cut else out

    return answer


def library_forward(model, latents, embeds, mask, sigma, shapes):
    return model(latents, embeds, mask, sigma, shapes)


def swapped_streams(model, latents, embeds, mask, sigma, shapes):
    img, txt = model.img_in(latents), model.txt_in(model.txt_norm(embeds))
    temb, rotary = model.time_text_embed(sigma, img), model.pos_embed(shapes[0], txt.shape[1])
    for block in model.transformer_blocks:
        img, txt = block(img, txt, temb, mask, rotary)
    return leave()(img, temb, model.norm_out.linear, model.proj_out)


def named(*parts, last=None, more=()):
    def answer(model, inputs):
        block = len(model.transformer_blocks) - 1 if last is None else last
        names = [name for name, _ in model.named_parameters()]
        head = f"transformer_blocks.{block}."
        return {n for n in names if n.startswith(head) and any(part in n for part in parts)} | set(more)

    return answer


def spoiled(model, inputs):
    with torch.no_grad():
        model.proj_out.bias.fill_(0)
    return named("txt_mlp", "to_add_out", "add_q_proj", "norm_added_q")(model, inputs)


A, B = (f"transformer_blocks.{k}.img_mlp.net.2.weight" for k in (1, 4))
ALL = ("txt_mlp", "to_add_out", "add_q_proj", "norm_added_q")

WRONG = {
    "sizes": [
        ("a token is 16 pixels wide", (13824, 12248, 4056, 22020096, 3048)),
        ("the given pictures are read too", (3456, 4056, 4056, 22020096, 3048)),
        ("both given pictures are read", (3456, 8152, 4056, 22020096, 3048)),
        ("only the target's rows are kept", (3456, 12248, 12248, 22020096, 3048)),
        ("2 bytes a number", (3456, 12248, 4056, 44040192, 3048)),
        ("how many bytes are they", (3456, 12248, 4056, 11010048, 3048)),
        ("from the end of the header", (3456, 12248, 4056, 22020096, 1000)),
        ("8 bytes of the length", (3456, 12248, 4056, 22020096, 3040)),
        ("expected five numbers", 3456),
    ],
    "leave": [
        ("the scale comes first here", leave(first=1)),
        ("passes a SiLU", leave(silu=False)),
        ("multiplied by 1 + scale", leave(one=0)),
        ("the shift is missing", leave(on=0)),
        ("not by C - 1", leave(unbiased=True)),
        ("over its channels", leave(dim=1)),
        ("it loops", looping),
        ("your code raised RuntimeError", unbroadcast),
        ("write it yourself", library_exit),
    ],
    "read_tensor": [
        ("little-endian", read_tensor(order="big")),
        ("not from the start of the file", read_tensor(before=0, header=False)),
        ("the 8 bytes of the length lie in front", read_tensor(before=0)),
        ("the header lies in front of the numbers", read_tensor(header=False)),
        ("are enough", read_tensor(all_of_it=True)),
        ("is stored as", as_float),
    ],
    "velocity": [
        ("pass txt_norm", velocity(raw=True)),
        ("multiplies by 1000 itself", velocity(times=1000)),
        ("the mask is missing", velocity(masked=False)),
        ("from the first to the last", velocity(reverse=True)),
        ("one block is missing", velocity(short=1)),
        ("need the tables", velocity(turned=False)),
        ("the scale comes first", velocity(exit_={"first": 1})),
        ("temb passes a SiLU", velocity(exit_={"silu": False})),
        ("noise minus picture", velocity(sign=-1)),
        ("the pipeline cuts", velocity(cut=True)),
        ("your code raised RuntimeError", swapped_streams),
        ("write it yourself", library_forward),
    ],
    "exchanged": [
        ("a tensor's name, such as", Answers(((A.removesuffix(".weight"), B),))),
        ("expected the names of two tensors", Answers((A,))),
        ("two different tensors", Answers(((A, A),))),
        ("the biases are where they belong", Answers(((A, B.replace("weight", "bias")),))),
        ("one is right", Answers(((A, A.replace("img", "txt")),))),
        ("the finder names the first", Answers(((B, B.replace("img", "txt")),))),
        ("where they belong", Answers((("img_in.weight", "proj_out.weight"),))),
    ],
    "unused": [
        ("who reads that in the last block", named("txt_mlp", "to_add_out")),
        ("neither is their norm", named("txt_mlp", "to_add_out", "add_q_proj")),
        ("the words' MLP", named("to_add_out", "add_q_proj", "norm_added_q")),
        ("the first shift and scale of txt_mod", named(*ALL, "txt_mod")),
        ("keys and values", named(*ALL, "add_v_proj")),
        ("norm_added_k", named(*ALL, "norm_added_k")),
        ("only the last block's words", named(*ALL, last=0, more=["img_in.weight"])),
        ("has no tensor", named(*ALL, more=["transformer_blocks.59.to_add_out.weight"])),
        ("a list of names does not know", named(*ALL)),
        ("put back what you change", spoiled),
        ("expected a set of names", lambda model, inputs: 9),
    ],
}

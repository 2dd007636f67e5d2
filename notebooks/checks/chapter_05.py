"""Checks of the exercises of chapter 05, with the files, the trained model and the broken one that they need."""

import json
import random
from functools import cache

import torch
import torch.nn.functional as F
from numpy.random import default_rng
from safetensors.torch import save
from torch import nn

from checks import Wrong, ask, exercise, expect, expect_five
from course import TINY
from minqwen.checkpoint import Checkpoint
from minqwen.images import pack_latents
from minqwen.pipeline import QwenImagePipeline
from minqwen.prompt import pad_prompts
from minqwen.transformer import QwenImageTransformer2DModel
from minqwen.world import sample_edit

# ---------------------------------------------------------------------------------------------------- 05.1


@exercise("05.1")
def sizes(answer):
    """Five numbers about tokens and bytes."""
    wrong = [
        {"a token is 16 pixels wide, not 8: the packing takes 2×2 latents": 13824, "pixels, not tokens": 768 * 1152},
        {"the given pictures are read too": 4056, "both given pictures are read": 8152},
        {"only the target's rows are kept": 12248},
        {"bf16 takes 2 bytes a number, not 4": 44040192, "those are numbers; how many bytes are they?": 11010048},
        {"offsets count from the end of the header": 1000, "the 8 bytes of the length come first": 3040,
         "the header's own bytes lie in front too": 1008},
    ]  # fmt: skip
    names = ["tokens of the drawing", "image tokens read by the edit", "rows kept", "bytes of txt_in.weight"]
    names += ["first byte of the tensor"]
    expect_five(answer, (3456, 12248, 4056, 22020096, 3048), wrong, names)


# ---------------------------------------------------------------------------------------------------- 05.2


def exit_of(x, temb, linear, proj, silu=True, one=1.0, shift_first=False, unbiased=False, shift_on=1.0, dim=-1):
    """Norm, scale, shift, projection; the keywords are mistakes."""
    mean, var = x.mean(dim, keepdim=True), x.var(dim, keepdim=True, unbiased=unbiased)
    both = linear(F.silu(temb) if silu else temb)
    scale, shift = both[:, None, : x.shape[-1]], both[:, None, x.shape[-1] :]
    if shift_first:
        scale, shift = shift, scale
    return proj((x - mean) / (var + 1e-6).sqrt() * (one + scale) + shift_on * shift)


@exercise("05.2")
def leave(answer):
    """leave(x, temb, linear, proj) over random shapes, both layers called once."""
    for _ in range(4):
        B, N, C, out = random.randint(2, 4), random.randint(5, 9), random.randint(6, 12), random.randint(2, 5)
        linear, proj = nn.Linear(C, 2 * C), nn.Linear(C, out)
        nn.init.normal_(linear.weight, std=0.5)
        x, temb, calls = 3 * torch.randn(B, N, C) + 1, torch.randn(B, C), {"linear": 0, "proj": 0}

        def count(name, calls=calls):
            return lambda *_: calls.update({name: calls[name] + 1})

        with torch.no_grad():
            want = exit_of(x, temb, linear, proj)
            wrong = {
                "shift and scale are exchanged: the scale comes first here": exit_of(
                    x, temb, linear, proj, shift_first=True
                ),
                "temb passes a SiLU before the linear layer": exit_of(x, temb, linear, proj, silu=False),
                "the norm is multiplied by 1 + scale": exit_of(x, temb, linear, proj, one=0.0),
                "the shift is missing": exit_of(x, temb, linear, proj, shift_on=0.0),
                "the variance divides by C, not by C - 1": exit_of(x, temb, linear, proj, unbiased=True),
                "each token is normed by itself, over its channels": exit_of(x, temb, linear, proj, dim=1),
            }
            hooks = [m.register_forward_hook(count(n)) for n, m in (("linear", linear), ("proj", proj))]
            got = ask(answer, x.clone(), temb.clone(), linear, proj, library="transformer.py")
            for hook in hooks:
                hook.remove()
        if max(calls.values()) > 1:
            raise Wrong(f"it loops: linear ran {calls['linear']} times, proj {calls['proj']} times; once will do")
        expect(got, want, wrong, tolerance=1e-4, where=f"x {tuple(x.shape)}")


# ---------------------------------------------------------------------------------------------------- 05.3


@exercise("05.3")
def read_tensor(answer):
    """read_tensor(read, name) from files made up here, reading no more than it must."""
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    for round_ in range(6):
        shapes = [tuple(random.randint(1, 5) for _ in range(random.randint(1, 3))) for _ in range(5)] + [()]
        tensors = {f"layer.{k}.weight": torch.randn(shape).to(random.choice(dtypes)) for k, shape in enumerate(shapes)}
        tensors["layer.first"] = torch.randn(3, 40).to(dtypes[round_ % 3])
        data = save(tensors, metadata={"format": "pt"} if round_ % 2 else None)
        header, served = int.from_bytes(data[:8], "little"), []

        def read(start, stop, data=data, served=served):
            if not 0 <= start <= stop <= len(data):
                big = start == 8 and stop > len(data)
                why = ": the length of the header is little-endian, lowest byte first" if big else ""
                raise Wrong(f"asked for bytes {start} to {stop} of a file of {len(data)}{why}")
            served.append(stop - start)
            return data[start:stop]

        name = random.choice(sorted(tensors)) if round_ else "layer.first"
        want = tensors[name]
        got = ask(answer, read, name, library="hub.py")
        need = 8 + header + want.nbytes
        if isinstance(got, torch.Tensor) and sum(served) > need:
            raise Wrong(f"you read {sum(served)} bytes of a file of {len(data)}; {need} are enough")
        if getattr(got, "dtype", None) != want.dtype:
            raise Wrong(f"{name} is stored as {want.dtype}; yours is {getattr(got, 'dtype', type(got).__name__)}")
        begin = _begin(data, header, name)
        wrong = {
            why: torch.frombuffer(bytearray(data[place : place + want.nbytes]), dtype=want.dtype).view(want.shape)
            for why, place in (
                ("offsets count from the end of the header, not from the start of the file", begin),
                ("the 8 bytes of the length lie in front of the header", begin + header),
                ("the header lies in front of the numbers", begin + 8),
            )
        }
        expect(got.double(), want.double(), {w: t.double().nan_to_num() for w, t in wrong.items()}, where=name)


def _begin(data: bytes, header: int, name: str) -> int:
    return json.loads(data[8 : 8 + header])[name]["data_offsets"][0]


# ---------------------------------------------------------------------------------------------------- 05.4


@cache
def real() -> tuple:
    """The trained model and a real batch: an edit under two prompts of different length, at noise level 0.7."""
    pipe = QwenImagePipeline.from_pretrained(TINY, device="cpu")
    task = sample_edit(default_rng(5), "replace")
    prompts = [pipe.encode_prompt(words, [task.source]) for words in (task.instruction, " ")]
    embeds, mask = pad_prompts(prompts)
    x0, reference = (pack_latents(pipe.encode_image(picture)) for picture in (task.target, task.source))
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    latents = torch.cat([0.3 * x0 + 0.7 * noise, reference], dim=1).expand(2, -1, -1)
    shapes = [[(1, picture.height // 16, picture.width // 16) for picture in (task.target, task.source)]] * 2
    inputs = (latents, embeds, mask, torch.tensor([0.7, 0.7]), shapes)
    return pipe.transformer, tuple(x.clone() if isinstance(x, torch.Tensor) else x for x in inputs), noise - x0


def whole(model, latents, embeds, mask, sigma, shapes, **fault):
    """The forward pass, station by station; the keywords are mistakes."""
    img = model.img_in(latents)
    txt = model.txt_in(embeds if fault.get("raw") else model.txt_norm(embeds))
    temb = model.time_text_embed(sigma * fault.get("times", 1), img)
    rotary = model.pos_embed(shapes[0], txt.shape[1])
    blocks = list(model.transformer_blocks)
    for block in blocks[:: fault.get("step", 1)][: len(blocks) - fault.get("short", 0)]:
        turned = None if fault.get("unturned") else rotary
        txt, img = block(img, txt, temb, None if fault.get("unmasked") else mask, turned)
    linear = model.norm_out.linear
    return exit_of(img, temb, linear, model.proj_out, **fault.get("exit", {}))


@exercise("05.4")
def velocity(answer):
    """velocity(model, latents, embeds, mask, sigma, shapes) on the trained model and a real edit."""
    model, inputs, true = real()
    with torch.no_grad():
        want = whole(model, *inputs)
        wrong = {
            why: whole(model, *inputs, **fault)
            for why, fault in {
                "the words pass txt_norm before txt_in": {"raw": True},
                "time_text_embed takes σ in 0 to 1, and multiplies by 1000 itself": {"times": 1000},
                "the mask is missing: the second prompt is padded": {"unmasked": True},
                "the blocks run from the first to the last": {"step": -1},
                "one block is missing": {"short": 1},
                "the blocks need the tables of pos_embed": {"unturned": True},
                "in the exit the scale comes first, then the shift": {"exit": {"shift_first": True}},
                "in the exit temb passes a SiLU": {"exit": {"silu": False}},
            }.items()
        } | {"the sign: nothing is to be turned round, the model answers with noise minus picture": -want}
        got = ask(answer, model, *inputs, library="transformer.py")
        kept = true.shape[1]
        if isinstance(got, torch.Tensor) and got.shape == want[:, :kept].shape:
            raise Wrong("return all image tokens, the given picture's too; the pipeline cuts")
        expect(got, want, wrong, tolerance=1e-3, where="an edit at σ = 0.7")
        error = (got[:1, :kept] - true).square().mean()
    return f"From the true velocity, noise minus picture, it is {error:.3f} away (mean square)."


# ---------------------------------------------------------------------------------------------------- 05.5

EXCHANGED = ("transformer_blocks.1.img_mlp.net.2.weight", "transformer_blocks.4.img_mlp.net.2.weight")  # spoiler


def right() -> QwenImageTransformer2DModel:
    """The tiny transformer."""
    return Checkpoint(TINY).load(QwenImageTransformer2DModel, "transformer")


def broken() -> QwenImageTransformer2DModel:
    """The tiny transformer as a loader with a bug left it."""
    model = right()
    state = model.state_dict()
    a, b = EXCHANGED
    model.load_state_dict(state | {a: state[b].clone(), b: state[a].clone()})
    return model


def inputs() -> dict:
    """What a transformer takes, by name, with random numbers."""
    generator, config = torch.Generator().manual_seed(0), Checkpoint(TINY).config("transformer/config.json")
    return {
        "hidden_states": torch.randn(1, 72, config["in_channels"], generator=generator),
        "encoder_hidden_states": torch.randn(1, 9, config["joint_attention_dim"], generator=generator),
        "timestep": torch.tensor([0.8]),
        "img_shapes": [[(1, 6, 6), (1, 6, 6)]],
    }


@exercise("05.5")
def exchanged(answer):
    """The names of the two tensors that were exchanged, in any order."""
    names = list(answer) if isinstance(answer, tuple | list | set) else [answer]
    known = right().state_dict()
    if len(names) != 2 or not all(isinstance(name, str) for name in names):
        raise Wrong(f"expected the names of two tensors, got {str(answer)[:80]}")
    for name in names:
        if name not in known:
            hint = f": a tensor's name, such as {name}.weight" if f"{name}.weight" in known else ""
            raise Wrong(f"the model has no tensor {name}{hint}")
    if names[0] == names[1]:
        raise Wrong("two different tensors changed places")
    if set(names) == set(EXCHANGED):
        return "Both have the same shape, so the strictest loader cannot see it."
    if any(name.endswith(".bias") for name in names):
        raise Wrong("compare the tensors themselves: the biases are where they belong")
    if not set(names) & set(EXCHANGED):
        raise Wrong("these two are where they belong; which is the first sub-module that differs?")
    partner = next(name for name in names if name not in EXCHANGED)
    if EXCHANGED[0] not in names:
        raise Wrong("that is the later one of the two; the finder names the first")
    raise Wrong(f"one is right; {partner} is where it belongs. Which right tensor equals the broken one's?")


# ---------------------------------------------------------------------------------------------------- 05.6


def dead(model, given) -> set[str]:
    """The tensors that may hold anything: given random numbers one by one, the velocity stays as it is.

    (NaN would not do: attention on the CPU passes over scores that are NaN, so a query of NaN leaves no trace.)
    """
    found = set()
    with torch.no_grad():
        want = model(**given)
        for name, parameter in model.named_parameters():
            before = parameter.detach().clone()
            parameter.copy_(3 * torch.randn_like(parameter))
            if torch.allclose(model(**given), want, atol=1e-6):
                found.add(name)
            parameter.copy_(before)
    return found


REASONS = {
    "txt_mod": "the first shift and scale of txt_mod act before attention, and the picture reads what they make",
    "add_k_proj": "the picture reads the words' keys and values in the last block too",
    "add_v_proj": "the picture reads the words' keys and values in the last block too",
    "norm_added_k": "the words' keys pass norm_added_k, and the picture reads them",
}
FORGOTTEN = {
    "txt_mlp": "what the words' MLP gives in the last block, nobody reads",
    "to_add_out": "to_add_out makes the words' share of attention, which nobody reads in the last block",
    "add_q_proj": "the words' queries decide only what the words get: who reads that in the last block?",
    "norm_added_q": "the words' queries are not needed in the last block, so neither is their norm",
    "img_mlp": "the matrix behind it is all zeros in this model; measure, a list of names does not know that",
}


@exercise("05.6")
def unused(answer):
    """unused(model, inputs) -> names, on random models of one to three blocks; the last one has a matrix of zeros."""
    for layers, zeros in ((2, False), (random.choice((1, 3)), False), (2, True)):
        config = {"num_layers": layers, "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 8}
        config |= {"out_channels": 2, "joint_attention_dim": 12, "axes_dims_rope": (4, 2, 2)}
        model = QwenImageTransformer2DModel(**config)
        if zeros:  # then what the layer in front of it makes reaches nothing: a list of names does not know that
            nn.init.zeros_(random.choice(model.transformer_blocks).img_mlp.net[2].weight)
        given = {"hidden_states": torch.randn(1, 6, 8), "encoder_hidden_states": torch.randn(1, 4, 12)}
        given |= {"timestep": torch.rand(1), "img_shapes": [[(1, 2, 3)]]}
        want, weights = dead(model, given), {n: p.detach().clone() for n, p in model.named_parameters()}
        got = ask(answer, model, dict(given))
        if any(not torch.equal(p, weights[n]) for n, p in model.named_parameters()):
            raise Wrong("the model came back with other weights: put back what you change")
        if not isinstance(got, set | list | tuple) or not all(isinstance(name, str) for name in got):
            raise Wrong(f"expected a set of names, got {str(got)[:60]}")
        got, last = set(got), f"transformer_blocks.{layers - 1}."
        for name in sorted(got - want):
            if name not in weights:
                raise Wrong(f"this model of {layers} blocks has no tensor {name}")
            if not name.startswith(last):
                raise Wrong(f"{name} is needed: only the last block's words are read by nobody ({layers} blocks)")
            part = next((part for part in REASONS if part in name), None)
            raise Wrong(f"{name} is needed: {REASONS.get(part, 'the picture passes through it')}")
        for name in sorted(want - got):
            part = next(part for part in FORGOTTEN if part in name)
            raise Wrong(f"{name} is missing: {FORGOTTEN[part]}")

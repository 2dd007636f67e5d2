"""Trains the tiny checkpoint's text encoder and transformer together: python data/recipes/train_transformer.py --help

Two phases: in the `small` world from nothing, then in the `full` one from the small one's averaged weights.
Needs vae_joint.pt and vae_config.json (train_vae.py joint) and tokenizer/ (make_tokenizer.py) in runs/.
Drawing from words and editing are mixed: in an edit most tokens are copies and words earn little gradient, in a
drawing every token depends on them. Writes into runs/: transformer_PHASE.pt, which resumes, log_transformer_PHASE.csv
and, at every measurement, transformer_PHASE.png, a sheet of pictures.
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from common import Log, Run, device, pictures
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm
from train_vae import build_vae

from minqwen.images import pack_latents, pixels_to_image, unpack_latents
from minqwen.prompt import EDIT, T2I, Template, tokenize_prompts
from minqwen.sampling import euler_step, get_sigmas, time_shift
from minqwen.text_encoder import Qwen2_5_VLTextEncoder, mrope_positions
from minqwen.tokenizer import load_tokenizer
from minqwen.transformer import QwenImageTransformer2DModel
from minqwen.vision import rotate
from minqwen.world import SMALL, WORLD, Edit, World, judge, random_item, sample_drawing, sample_edit

STEPS = {"small": 3200, "full": 24320}
RATES = {"small": 2e-3, "full": 1.5e-3}
CYCLES = {"small": 1, "full": 2}  # how often the rate rises and falls
DECAYS = {"small": 0.1, "full": 0.5}  # the last share of a cycle, in which the rate falls to 0
WORLDS = {"small": SMALL, "full": WORLD}
DRAWN = {"small": 0.4, "full": 0.25}  # the share of batches that draw instead of edit
HARD = {"swap": 3, "recolour": 2, "shape": 2}  # in the full world these come two or three times as often as the rest
GRID = (1, 4, 4)  # tokens of a 64x64 picture
TRANSFORMER = {
    "attention_head_dim": 32,
    "axes_dims_rope": [4, 14, 14],
    "guidance_embeds": False,
    "in_channels": 64,
    "joint_attention_dim": 128,
    "num_attention_heads": 4,
    "num_layers": 6,
    "out_channels": 16,
    "patch_size": 2,
}


def text_config(tokenizer) -> dict:
    """text_encoder/config.json in the released, flat form."""
    ids = {name: tokenizer.token_to_id(f"<|{name}|>") for name in ("image_pad", "video_pad", "endoftext", "im_end")}
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": {"mrope_section": [4, 6, 6], "rope_type": "default", "type": "default"},
        "max_position_embeddings": 4096,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "bos_token_id": ids["endoftext"],
        "eos_token_id": ids["im_end"],
        "image_token_id": ids["image_pad"],
        "video_token_id": ids["video_pad"],
        "vision_start_token_id": tokenizer.token_to_id("<|vision_start|>"),
        "vision_end_token_id": tokenizer.token_to_id("<|vision_end|>"),
        "vision_token_id": tokenizer.token_to_id("<|vision_pad|>"),
        "torch_dtype": "bfloat16",
        "vision_config": {
            "depth": 2,
            "hidden_act": "silu",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "in_channels": 3,
            "in_chans": 3,
            "out_hidden_size": 128,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": 112,
            "fullatt_block_indexes": [1],
            "model_type": "qwen2_5_vl",
        },
    }


def build(tokenizer) -> nn.ModuleDict:
    """Fresh text encoder and transformer; modulation and output begin at zero, so that every block is the identity."""
    net = nn.ModuleDict(
        {
            "transformer": QwenImageTransformer2DModel(**TRANSFORMER),
            "text_encoder": Qwen2_5_VLTextEncoder(**text_config(tokenizer)),
        }
    )
    transformer = net["transformer"]
    zero = [transformer.norm_out.linear, transformer.proj_out]
    for block in transformer.transformer_blocks:
        zero += [block.img_mod[1], block.txt_mod[1]]
    for layer in zero:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    nn.init.normal_(net["text_encoder"].model.embed_tokens.weight, std=0.1)
    return net


class Batch(NamedTuple):
    """Everything that a training step reads; rows of edits or of drawings, never both."""

    tokens: tuple  # of tokenize_prompts: ids, mask, patches, grids, drop
    target: Tensor  # (B, 16, 64) clean packed latents
    source: Tensor | None  # (B, 16 for each picture, 64), None for drawings
    changed: Tensor  # (B, 16) 1 where the instruction changes the picture

    def to(self, device: str) -> "Batch":
        tokens = tuple(x.to(device) if isinstance(x, Tensor) else x for x in self.tokens)
        return Batch(tokens, *(None if x is None else x.to(device) for x in self[1:]))


def sample_batch(
    rng: np.random.Generator, size: int, draw: bool, world: World, tokenizer, encode, no_caption: float = 0.1
) -> Batch:
    kinds = [kind for kind in world.kinds for _ in range(HARD.get(kind, 1) if world == WORLD else 1)]
    if draw:
        edits = [sample_drawing(rng, world) for _ in range(size)]
    else:
        edits = [sample_edit(rng, random_item(rng, kinds), world) for _ in range(size)]
    dropped = rng.random(size) < no_caption
    noisy = world == WORLD and rng.random() < 0.2
    words = [chatty(rng, e.instruction) if noisy else e.instruction for e in edits]
    prompts = [" " if drop else text for text, drop in zip(words, dropped, strict=True)]
    return make_batch(edits, prompts, tokenizer, encode, T2I if draw else EDIT)


def make_batch(edits: list[Edit], prompts: list[str], tokenizer, encode, template: Template) -> Batch:
    """Edits of as many pictures each (none: drawings), with what is said of them."""
    target = encode(pictures([e.target_scene for e in edits]))
    if template is T2I:
        return Batch(tokenize_prompts(tokenizer, prompts), target, None, torch.ones(len(edits), 16))
    tokens = tokenize_prompts(tokenizer, prompts, [e.sources for e in edits], template)
    scenes = zip(*(e.scenes for e in edits), strict=True)  # all first pictures, all second ones
    source = torch.cat([encode(pictures(list(each))) for each in scenes], dim=1)
    return Batch(tokens, target, source, torch.stack([changed_tokens(e) for e in edits]))


def chatty(rng: np.random.Generator, instruction: str) -> str:
    """The instruction with one to three words of random letters among its own: unknown words should do no harm."""
    words = instruction.split(" ")
    for _ in range(int(rng.integers(1, 4))):
        letters = "".join(chr(97 + k) for k in rng.integers(0, 26, int(rng.integers(2, 8))))
        words.insert(int(rng.integers(len(words) + 1)), letters)
    return " ".join(words)


def changed_tokens(edit: Edit) -> Tensor:
    """1 for the tokens (16 pixels square) in which source and target differ."""
    differs = np.any(np.asarray(edit.source) != np.asarray(edit.target), axis=-1)
    return torch.from_numpy(differs.reshape(4, 16, 4, 16).any((1, 3)).reshape(16)).float()


def encode_prompts(encoder: Qwen2_5_VLTextEncoder, tokens: tuple) -> Tensor:
    """What `encoder` and `drop_prefix` give, (B, Nt, C), with the template's prefix computed once for all rows.

    Its keys and values are the same for every prompt, since attention is causal.
    """
    ids, mask, patches, grids, drop = tokens
    positions = mrope_positions(ids, mask, grids, encoder.image_token_id)
    angles = encoder.model._angles(positions)
    x = encoder.model.embed_tokens(ids)
    if patches is not None:
        here = (ids == encoder.image_token_id)[..., None]
        x = x.masked_scatter(here, encoder.visual(patches, grids))
    first, rest = x[:1, :drop], x[:, drop:]
    seen = torch.ones(rest.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril(diagonal=drop)
    for layer in encoder.model.layers:
        q, k, v = _heads(layer, first, angles[:1, :, :drop])
        out_first = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        q, k_rest, v_rest = _heads(layer, rest, angles[:, :, drop:])
        k = torch.cat([k.expand(len(ids), -1, -1, -1), k_rest], dim=2)
        v = torch.cat([v.expand(len(ids), -1, -1, -1), v_rest], dim=2)
        out_rest = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        first, rest = _finish(layer, first, out_first), _finish(layer, rest, out_rest)
    return encoder.model.norm(rest)


def _heads(layer: nn.Module, x: Tensor, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    attn, x = layer.self_attn, layer.input_layernorm(x)
    q, k, v = (p(x).unflatten(-1, (-1, attn.head_dim)).transpose(1, 2) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
    k, v = (t.repeat_interleave(attn.shared_by, dim=1) for t in (rotate(k, angles), v))
    return rotate(q, angles), k, v


def _finish(layer: nn.Module, x: Tensor, attended: Tensor) -> Tensor:
    x = x + layer.self_attn.o_proj(attended.transpose(1, 2).flatten(2))
    return x + layer.mlp(layer.post_attention_layernorm(x))


def velocity(net: nn.ModuleDict, batch: Batch, latents: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
    """The transformer's velocity for the target's tokens."""
    count = 0 if batch.source is None else batch.source.shape[1] // 16
    img = latents if batch.source is None else torch.cat([latents, batch.source], dim=1)
    mask = batch.tokens[1][:, batch.tokens[4] :]
    out = net["transformer"](img, text, None if mask.all() else mask, sigma, [[GRID] * (1 + count)] * len(latents))
    return out[:, : latents.shape[1]]


def loss_of(net: nn.ModuleDict, batch: Batch, text: Tensor, shift: float, changed_weight: float) -> Tensor:
    """Flow matching: at a random noise level, how far is the predicted velocity from noise minus picture?

    Chance is drawn on the CPU, whose state the checkpoints hold: the same on every device.
    """
    sigma = time_shift(torch.rand(len(batch.target)), shift).to(batch.target.device)
    noise = torch.randn(batch.target.shape).to(batch.target.device)
    latents = batch.target + sigma[:, None, None] * (noise - batch.target)
    error = (velocity(net, batch, latents, sigma, text) - (noise - batch.target)).square().mean(-1)  # (B, 16)
    weight = 1 + (changed_weight - 1) * batch.changed
    return (error * weight).sum() / weight.sum()


@torch.no_grad()
def accuracy(
    net: nn.ModuleDict, vae, kinds: tuple[str, ...], world: World, tokenizer, encode, sheet: Path, device: str,
    template: Template = EDIT, rows: int = 40, steps: int = 10,
) -> dict[str, float]:  # fmt: skip
    """Per cent right by kind, on scenes of seeds that training never uses; 10 steps, no guidance.

    Writes a sheet of pictures: a row for each kind, each edit as source and result.
    """
    right, pairs = {}, []
    for number, kind in enumerate(kinds):
        rng = np.random.default_rng(10**7 + number)
        edits = [sample_drawing(rng, world) if kind == "draw" else sample_edit(rng, kind, world) for _ in range(rows)]
        prompts = [e.instruction for e in edits]
        batch = make_batch(edits, prompts, tokenizer, encode, T2I if kind == "draw" else template).to(device)
        text = encode_prompts(net["text_encoder"], batch.tokens)
        latents = torch.randn(rows, 16, 64, generator=torch.Generator().manual_seed(0)).to(device)
        sigmas = get_sigmas(steps, 16).tolist()
        for sigma, following in zip(sigmas, sigmas[1:], strict=False):
            v = velocity(net, batch, latents, torch.full((rows,), sigma, device=device), text)
            latents = euler_step(latents, v, sigma, following)
        images = to_images(vae, latents)
        right[kind] = 100 * sum(map(judge, images, edits)) / rows
        pairs.append(sum(([*(e.sources or [None]), image] for e, image in zip(edits, images, strict=True)), [])[:12])
    page = Image.new("RGB", (12 * 68, len(pairs) * 68), "white")
    for y, row in enumerate(pairs):
        for x, image in enumerate(row):
            if image:
                page.paste(image, (68 * x, 68 * y))
    page.save(sheet)
    return right


def to_images(vae, latents: Tensor) -> list:
    pixels = vae.decode(vae.denormalize(unpack_latents(latents, 8, 8)))
    return [pixels_to_image(p[None]) for p in pixels]


def load_vae(runs: Path, decoder: bool = False):
    """The trained autoencoder, frozen; its decoder from the later phase where that has begun."""
    vae = build_vae(json.loads((runs / "vae_config.json").read_text()))
    later = decoder and (runs / "vae_decoder.pt").exists()
    state = torch.load(runs / ("vae_decoder.pt" if later else "vae_joint.pt"), map_location="cpu", weights_only=True)
    vae.load_state_dict(state["vae"])
    return vae.eval().requires_grad_(False)


def encoder(vae, args: argparse.Namespace):
    """A function: pictures -> packed, normalised latents, in parts of one size (a compiled function knows no other)."""
    mode = lambda x: vae.encode(x).mode()  # noqa: E731
    if args.compile:
        mode = torch.compile(mode, dynamic=False)

    @torch.no_grad()
    def encode(x: Tensor) -> Tensor:
        padded = F.pad(x.to(args.device), (0,) * 9 + (-len(x) % 16,))
        latents = torch.cat([mode(part) for part in padded.split(16)])[: len(x)]
        return pack_latents(vae.normalize(latents))

    return encode


def optimizers(net: nn.ModuleDict, lr: float) -> nn.Module:
    """Muon for the matrices inside the blocks, AdamW for embeddings, modulation, ends, norms and biases."""
    inside = {n for n, p in net.named_parameters() if p.ndim == 2 and any(k in n for k in (".attn.", "attn.", "mlp."))}
    matrices = [p for n, p in net.named_parameters() if n in inside and "merger" not in n]
    rest = [p for n, p in net.named_parameters() if n not in inside or "merger" in n]
    return {
        "muon": torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        "adamw": torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=0.0),
    }


def rate_share(step: int, steps: int, cycles: int, decay: float) -> float:
    """The learning rate as a share of its height: in each cycle 100 steps of warm-up, level, then linearly to 0."""
    period = steps / cycles
    step -= period * min(cycles - 1, step // period)  # steps beyond the last stay in the last cycle
    return min(1, (step + 1) / 100, max(0.01, (1 - step / period) / decay))


def shuffled(rng: np.random.Generator, args: argparse.Namespace) -> Iterator[int]:
    """Numbers of a pool's batches: each is drawn and encoded once, and used `reuse` times with other noise."""
    for _ in range(args.reuse):
        yield from rng.permutation(args.pool)


def step(
    run: Run, loss: Tensor, rate: float, trained: list[Tensor], means: list[Tensor], opts: dict, average: float
) -> None:
    """One step at a learning rate; then `means`, the moving averages of what is trained, follow."""
    for opt in opts.values():
        opt.param_groups[0]["lr"] = rate
        opt.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(trained, 1.0)
    for opt in opts.values():
        opt.step()
    run.step += 1
    keep = min(average, run.step / (run.step + 10))
    torch._foreach_lerp_(means, [parameter.detach() for parameter in trained], 1 - keep)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    runs, steps, lr = args.runs, args.steps or STEPS[args.phase], args.lr or RATES[args.phase]
    tokenizer, vae = load_tokenizer(runs / "tokenizer"), load_vae(runs).to(args.device)
    net, average = build(tokenizer).to(args.device), build(tokenizer).to(args.device)
    average.load_state_dict(net.state_dict())
    average.requires_grad_(False)
    opts = optimizers(net, lr)
    drawn = DRAWN[args.phase]
    world, path = WORLDS[args.phase], runs / f"transformer_{args.phase}.pt"
    run = Run(path, {"net": net, "average": average} | opts, rng)
    if not run.resume() and args.phase == "full":
        start = torch.load(runs / "transformer_small.pt", map_location="cpu", weights_only=True)["average"]
        net.load_state_dict(start)
        average.load_state_dict(start)
    kinds = (*world.kinds, "draw")
    fields = ["minutes", "samples", "loss_edit", "loss_draw", *kinds]
    log = Log(runs / f"log_transformer_{args.phase}.csv", fields)

    encode = encoder(vae, args)
    if args.compile:
        net["transformer"].compile(dynamic=True)
    bar = tqdm(total=steps, initial=run.step, desc=f"transformer, {args.phase} world", disable=None)
    while run.step < steps:
        pool = [sample_batch(rng, args.batch, rng.random() < drawn, world, tokenizer, encode) for _ in range(args.pool)]
        losses = {False: [], True: []}
        for index in shuffled(rng, args):
            batch = pool[index].to(args.device)
            text = encode_prompts(net["text_encoder"], batch.tokens)
            loss = loss_of(net, batch, text, args.shift, args.changed_weight)
            rate = lr * rate_share(run.step, steps, CYCLES[args.phase], DECAYS[args.phase])
            step(run, loss, rate, list(net.parameters()), list(average.parameters()), opts, args.average)
            losses[batch.source is None].append(loss.item())
            bar.update()
        # a pool is the unit of resumption: a run that is cut off inside one repeats it, to the same weights
        run.save()
        means = {f"loss_{k}": float(np.mean(losses[k == "draw"] or [math.nan])) for k in ("edit", "draw")}
        print(f"step {run.step} of {steps}, {run.elapsed() / 60:.1f} min, {means}", flush=True)
        pools, right = run.step // (args.pool * args.reuse), {}
        if args.check_every and (pools % args.check_every == 0 or run.step >= steps):
            decoder = load_vae(runs, decoder=True).to(args.device)
            right = accuracy(average, decoder, kinds, world, tokenizer, encode, path.with_suffix(".png"), args.device)
        means = {name: mean for name, mean in means.items() if math.isfinite(mean)}
        log(minutes=run.elapsed() / 60, samples=run.step * args.batch, **means, **right)
    bar.close()


def add_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """What every training of the transformer can be told."""
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--shift", type=float, default=3.0, help="pushes training towards high noise")
    parser.add_argument("--changed-weight", type=float, default=3.0, help="loss weight of tokens that an edit changes")
    parser.add_argument("--average", type=float, default=0.999, help="moving average of what is trained")
    parser.add_argument("--pool", type=int, default=40, help="batches that are encoded at a time")
    parser.add_argument("--reuse", type=int, default=8, help="times that each is used")
    parser.add_argument("--check-every", type=int, default=3, help="pools between measurements of accuracy, 0: none")
    parser.add_argument("--compile", action="store_true", help="torch.compile: faster, needs a C++ compiler")
    parser.add_argument("--device", default=device())
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of checkpoints and logs")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=STEPS)
    parser.add_argument("--steps", type=int, help="by default " + ", ".join(f"{k} {v}" for k, v in STEPS.items()))
    parser.add_argument("--lr", type=float, help="by default " + ", ".join(f"{k} {v}" for k, v in RATES.items()))
    return add_options(parser)


if __name__ == "__main__":
    train(parser().parse_args())

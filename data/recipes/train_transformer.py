"""Trains the tiny checkpoint's text encoder and transformer together: python data/recipes/train_transformer.py --help

Needs vae.pt and vae_config.json (train_vae.py) and tokenizer/ (make_tokenizer.py) in runs/.
Drawing from words and editing are mixed: in an edit most tokens are copies and words earn little gradient, in a
drawing every token depends on them. Writes into runs/: transformer.pt, which resumes, log_transformer.csv and, at every
measurement, transformer.png, a sheet of pictures.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from common import Chance, Muon, device, fast, note, pictures, settings
from PIL import Image
from tiny_models import build, load_vae
from torch import Tensor, nn
from tqdm import tqdm

from minqwen.flow import Batch, flow_error, sample_sigmas
from minqwen.images import pack_latents, pixels_to_image, unpack_latents
from minqwen.prompt import EDIT, T2I, Template, TokenizedPrompts, drop_prefix, tokenize_prompts
from minqwen.run import Run
from minqwen.sampling import denoise, get_sigmas
from minqwen.text_encoder import Qwen2_5_VLTextEncoder
from minqwen.tokenizer import load_tokenizer
from minqwen.vae import AutoencoderKLQwenImage
from minqwen.world import KINDS, SIZE, WORLD, Edit, judge, pick, sample_drawing, sample_edit

STEPS = {"transformer": 17408}
DECAY = 0.3  # the last share of the steps, in which the rate falls to 0
DRAWN = 0.45  # the share of batches that draw instead of edit
DRAWINGS = replace(WORLD, open=0.7, several=0.7)  # the harder, the more often
OFTEN = {"remove": 1, "move": 2, "swap": 2, "add": 2, "replace": 3, "background": 8}  # the same
BATCH = 64
SIDE = SIZE // 16  # tokens on a side of a picture
GRID = (1, SIDE, SIDE)


class Tasks(NamedTuple):
    """Edits of as many pictures each, or drawings, computed as far as training does not change it: up to the words."""

    tokens: TokenizedPrompts
    target: Tensor  # (B, 36, 64) clean packed latents
    control: Tensor  # (B, 36 for each picture, 64), none for drawings
    changed: Tensor  # (B, 36) 1 where the instruction changes the picture

    def to(self, device: str) -> "Tasks":
        tokens = TokenizedPrompts(*(x.to(device) if isinstance(x, Tensor) else x for x in self.tokens))
        return Tasks(tokens, *(x.to(device) for x in self[1:]))


def sample_tasks(
    rng: np.random.Generator, size: int, draw: bool, tokenizer, encode, no_caption: float = 0.1
) -> Tasks:
    kinds = [kind for kind, times in OFTEN.items() for _ in range(times)]
    edits = [sample_drawing(rng, DRAWINGS) if draw else sample_edit(rng, pick(rng, kinds)) for _ in range(size)]
    dropped = rng.random(size) < no_caption
    noisy = rng.random() < 0.2
    words = [chatty(rng, e.instruction) if noisy else e.instruction for e in edits]
    prompts = [" " if drop else text for text, drop in zip(words, dropped, strict=True)]
    return make_tasks(edits, prompts, tokenizer, encode, T2I if draw else EDIT)


def make_tasks(edits: list[Edit], prompts: list[str], tokenizer, encode, template: Template) -> Tasks:
    """Edits of as many pictures each (none: drawings), with what is said of them."""
    target = encode(pictures([e.target_scene for e in edits]))
    if template is T2I:
        return Tasks(tokenize_prompts(tokenizer, prompts), target, target[:, :0], torch.ones(target.shape[:2]))
    tokens = tokenize_prompts(tokenizer, prompts, [e.sources for e in edits], template)
    scenes = zip(*(e.scenes for e in edits), strict=True)  # all first pictures, all second ones
    control = torch.cat([encode(pictures(list(each))) for each in scenes], dim=1)
    return Tasks(tokens, target, control, torch.stack([changed_tokens(e) for e in edits]))


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
    return torch.from_numpy(differs.reshape(SIDE, 16, SIDE, 16).any((1, 3)).reshape(SIDE**2)).float()


def with_words(text_encoder: Qwen2_5_VLTextEncoder, tasks: Tasks) -> Batch:
    """Tasks as the library's loss takes them: with what the text encoder makes of their words and pictures."""
    ids, mask, patches, grids, drop = tasks.tokens
    embeds, mask = drop_prefix(text_encoder(ids, mask, patches, grids), mask, drop)
    shapes = [GRID] * (1 + tasks.control.shape[1] // tasks.target.shape[1])
    return Batch(tasks.target, tasks.control, embeds, mask, shapes)


def weighted_loss(
    transformer: nn.Module, batch: Batch, changed: Tensor, shift: float, changed_weight: float
) -> Tensor:
    """The library's flow matching at random noise levels; tokens that an edit changes count more.

    Chance is drawn on the CPU, whose state the checkpoints hold: the same on every device.
    """
    sigma = sample_sigmas(len(batch.target), "shifted", shift).to(batch.target.device)
    noise = torch.randn(batch.target.shape).to(batch.target.device)
    error = flow_error(transformer, batch, sigma, noise).mean(-1)  # (B, 36)
    weight = 1 + (changed_weight - 1) * changed
    return (error * weight).sum() / weight.sum()


@torch.no_grad()
def accuracy(
    net: nn.ModuleDict, vae, kinds: tuple[str, ...], tokenizer, encode, sheet: Path, device: str,
    template: Template = EDIT, rows: int = 40, steps: int = 10,
) -> dict[str, float]:  # fmt: skip
    """Per cent right by kind, on scenes of seeds that training never uses; 10 steps, no guidance.

    Writes a sheet of pictures: a row for each kind, each edit as source and result.
    """
    right, lines = {}, []
    for number, kind in enumerate(kinds):
        rng = np.random.default_rng(10**7 + number)
        drawn = kind in ("draw", "open")
        edits = [sample_drawing(rng, WORLD, kind == "open") if drawn else sample_edit(rng, kind) for _ in range(rows)]
        prompts = [e.instruction for e in edits]
        tasks = make_tasks(edits, prompts, tokenizer, encode, T2I if drawn else template).to(device)
        images = paint(net["transformer"], vae, with_words(net["text_encoder"], tasks), steps)
        right[kind] = 100 * sum(map(judge, images, edits)) / rows
        line = []
        for edit, image in zip(edits, images, strict=True):
            line += [*(edit.sources or [None]), image]
        lines.append(line[:12])
    page = Image.new("RGB", (12 * (SIZE + 4), len(lines) * (SIZE + 4)), "white")
    for y, line in enumerate(lines):
        for x, image in enumerate(line):
            if image:
                page.paste(image, ((SIZE + 4) * x, (SIZE + 4) * y))
    page.save(sheet)
    return right


def paint(transformer: nn.Module, vae: AutoencoderKLQwenImage, batch: Batch, steps: int) -> list[Image.Image]:
    """The pictures that a batch asks for, all from the noise of one seed, without guidance."""
    rows, tokens, _ = batch.target.shape

    def velocity(latents: Tensor, sigma: float) -> Tensor:
        img = torch.cat([latents, batch.control], dim=1)
        level = torch.full((rows,), sigma, device=latents.device)
        return transformer(img, batch.embeds, batch.mask, level, [batch.shapes] * rows)[:, :tokens]

    noise = torch.randn(batch.target.shape, generator=torch.Generator().manual_seed(0)).to(batch.target.device)
    latents = denoise(velocity, noise, get_sigmas(steps, tokens))
    pixels = vae.decode(vae.denormalize(unpack_latents(latents, 2 * SIDE, 2 * SIDE)))
    return [pixels_to_image(p[None]) for p in pixels]


def encoder(vae: AutoencoderKLQwenImage, args: argparse.Namespace) -> Callable[[Tensor], Tensor]:
    """A function: pictures -> packed, normalised latents, in parts of one size (a compiled function knows no other)."""

    def mode(x: Tensor) -> Tensor:
        return vae.encode(x).mode()

    if args.compile:
        mode = torch.compile(mode, dynamic=False)

    @torch.no_grad()
    def encode(x: Tensor) -> Tensor:
        padded = F.pad(x.to(args.device), (0,) * 9 + (-len(x) % 16,))
        with fast(args):
            latents = torch.cat([mode(part) for part in padded.split(16)])[: len(x)]
        return pack_latents(vae.normalize(latents.float()))

    return encode


def optimizers(net: nn.ModuleDict, lr: float) -> dict[str, torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for embeddings, modulation, ends, norms and biases."""
    matrices, rest = [], []
    for name, parameter in net.named_parameters():
        inside = any(part in name for part in ("attn.", "mlp.")) and "merger" not in name
        (matrices if parameter.ndim == 2 and inside else rest).append(parameter)
    return {
        "muon": Muon(matrices, lr),
        "adamw": torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True),
    }


def rate_share(step: int, steps: int) -> float:
    """The learning rate as a share of its height: 100 steps of warm-up, level, then linearly to 0."""
    return min(1, (step + 1) / 100, max(0.01, (1 - step / steps) / DECAY))


def from_pools(
    run: Run, steps: int, args: argparse.Namespace, rng: np.random.Generator, sample: Callable, finish: Callable
) -> Iterator:
    """What to train on, step by step: a pool is sampled and encoded, and each of it used `reuse` times, noise apart.

    finish() ends a pool, which is the unit of resumption: a run cut off inside one repeats it, to the same weights.
    """
    with tqdm(total=steps, initial=run.step, desc=run.state.stem, disable=None) as bar:
        while run.step < steps:
            pool = [sample() for _ in range(args.pool)]
            for _ in range(args.reuse):
                for index in rng.permutation(args.pool):
                    yield pool[index]
                    bar.update()
            finish()


def is_due(run: Run, steps: int, args: argparse.Namespace) -> bool:
    """Whether accuracy is to be measured after this pool."""
    pools = run.step // (args.pool * args.reuse)
    return args.check_every > 0 and (pools % args.check_every == 0 or run.step >= steps)


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
    runs, steps = args.runs, args.steps
    tokenizer, vae = load_tokenizer(runs / "tokenizer"), load_vae(runs).to(args.device)
    net, average = build(tokenizer).to(args.device), build(tokenizer).to(args.device)
    average.load_state_dict(net.state_dict())
    average.requires_grad_(False)
    opts, kinds = optimizers(net, args.lr), (*KINDS, "draw", "open")
    fields = ("minutes", "samples", "loss_edit", "loss_draw", *kinds)
    state, log = runs / "transformer.pt", runs / "log_transformer.csv"
    run = Run(state, log, fields, {"net": net, "average": average, "chance": Chance(rng)} | opts, settings(args))
    run.resume()
    encode = encoder(vae, args)
    if args.compile:
        net["transformer"].compile(dynamic=True)
    weights = list(net.parameters()), list(average.parameters())
    losses = {"loss_edit": [], "loss_draw": []}

    def sample() -> Tasks:
        return sample_tasks(rng, args.batch, rng.random() < DRAWN, tokenizer, encode)

    def finish() -> None:
        right = {}
        if is_due(run, steps, args):
            right = accuracy(average, vae, kinds, tokenizer, encode, state.with_suffix(".png"), args.device)
        means = {name: float(np.mean(each)) for name, each in losses.items() if each}
        note(run, minutes=run.elapsed() / 60, samples=run.step * args.batch, **means, **right)
        run.save()
        for each in losses.values():
            each.clear()

    for tasks in from_pools(run, steps, args, rng, sample, finish):
        tasks = tasks.to(args.device)
        with fast(args):
            batch = with_words(net["text_encoder"], tasks)
            loss = weighted_loss(net["transformer"], batch, tasks.changed, args.shift, args.changed_weight)
            step(run, loss, args.lr * rate_share(run.step, steps), *weights, opts, args.average)
        losses["loss_edit" if batch.control.shape[1] else "loss_draw"].append(loss.item())


def add_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """What every training of the transformer can be told."""
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--shift", type=float, default=3.0, help="pushes training towards high noise")
    parser.add_argument("--changed-weight", type=float, default=3.0, help="loss weight of tokens that an edit changes")
    parser.add_argument("--average", type=float, default=0.999, help="moving average of what is trained")
    parser.add_argument("--pool", type=int, default=16, help="batches that are encoded at a time")
    parser.add_argument("--reuse", type=int, default=8, help="times that each is used")
    parser.add_argument("--check-every", type=int, default=3, help="pools between measurements of accuracy, 0: none")
    parser.add_argument("--compile", action="store_true", help="torch.compile: needs a C++ compiler")
    parser.add_argument("--bf16", action="store_true", help="products in bfloat16: faster where there are units for it")
    parser.add_argument("--device", default=device())
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of checkpoints and logs")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS["transformer"])
    parser.add_argument("--lr", type=float, default=2e-3)
    return add_options(parser)


if __name__ == "__main__":
    train(parser().parse_args())

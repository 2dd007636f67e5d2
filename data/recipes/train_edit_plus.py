"""Trains the adapter that lets a tiny checkpoint combine two pictures: python data/recipes/train_edit_plus.py --help

The checkpoint edits one picture, as Qwen-Image-Edit does. With this LoRA on its transformer, and the prompt form of
Qwen-Image-Edit-2509 ("Picture 1:", "Picture 2:"), it does "put the cat of Picture 2 on Picture 1" as well, always in
this direction: three batches of four are of that kind, one of its other edits. All else stays frozen, so prompts are
encoded once a batch. Writes into runs/: edit_plus.pt, which resumes, log_edit_plus.csv, edit_plus.png, a sheet of
pictures, at every measurement, and at the end edit_plus_lora.safetensors.
"""

import argparse
import copy
from pathlib import Path

import numpy as np
import torch
from common import Chance, fast, note, settings
from torch import Tensor, nn
from train_transformer import (
    accuracy,
    add_options,
    chatty,
    encoder,
    from_pools,
    is_due,
    make_tasks,
    rate_share,
    step,
    weighted_loss,
    with_words,
)

from minqwen.flow import Batch
from minqwen.lora import add_lora, save_lora
from minqwen.pipeline import QwenImagePipeline
from minqwen.prompt import EDIT_PLUS
from minqwen.run import Run
from minqwen.world import COMBINE, KINDS, sample_edit

STEPS = {"edit_plus": 640}
SINGLE = 0.25  # the share of batches that edit one picture
TARGETS = "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out net.0.proj net.2".split()
FILE = "edit_plus_lora.safetensors"


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    pipe = QwenImagePipeline.from_pretrained(args.checkpoint, device=args.device, dtype=torch.float32)
    transformer, text_encoder = pipe.transformer, pipe.text_encoder.requires_grad_(False)
    trained = add_lora(transformer, args.rank, targets=TARGETS)
    average = copy.deepcopy(transformer).requires_grad_(False)
    averaged = nn.ModuleDict({"transformer": average, "text_encoder": text_encoder})
    means = [mean for name, mean in average.named_parameters() if ".lora_" in name]
    opts = {"adamw": torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0)}
    parts = {"transformer": transformer, "average": average, "chance": Chance(rng)} | opts
    fields = ("minutes", "samples", "loss", COMBINE, *KINDS)
    state = args.runs / "edit_plus.pt"
    run = Run(state, args.runs / "log_edit_plus.csv", fields, parts, settings(args))
    run.resume()
    encode = encoder(pipe.vae, args)
    if args.compile:
        transformer.compile(dynamic=True)
    losses = []

    @torch.no_grad()
    def sample() -> tuple[Batch, Tensor]:
        kind = None if rng.random() < SINGLE else COMBINE
        edits = [sample_edit(rng, kind) for _ in range(args.batch)]
        noisy = rng.random() < 0.2
        words = [chatty(rng, e.instruction) if noisy else e.instruction for e in edits]
        prompts = [" " if drop else text for text, drop in zip(words, rng.random(args.batch) < 0.1, strict=True)]
        tasks = make_tasks(edits, prompts, pipe.tokenizer, encode, EDIT_PLUS).to(args.device)
        return with_words(text_encoder, tasks), tasks.changed

    def finish() -> None:
        right = {}
        if is_due(run, args.steps, args):
            kinds, sheet = (COMBINE, *KINDS), state.with_suffix(".png")
            right = accuracy(averaged, pipe.vae, kinds, pipe.tokenizer, encode, sheet, args.device, EDIT_PLUS)
        note(run, minutes=run.elapsed() / 60, samples=run.step * args.batch, loss=float(np.mean(losses)), **right)
        run.save()
        losses.clear()

    for batch, changed in from_pools(run, args.steps, args, rng, sample, finish):
        with fast(args):
            loss = weighted_loss(transformer, batch, changed, args.shift, args.changed_weight)
        step(run, loss, args.lr * rate_share(run.step, args.steps), trained, means, opts, args.average)
        losses.append(loss.item())
    save_lora(average, args.out or args.runs / FILE)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a folder: data/tiny, or what make_tiny.py wrote")
    parser.add_argument("--steps", type=int, default=STEPS["edit_plus"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--out", type=Path, help=f"the adapter's file, by default {FILE} in the folder of --runs")
    return add_options(parser)


if __name__ == "__main__":
    train(parser().parse_args())

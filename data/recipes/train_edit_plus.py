"""Trains the adapter that lets a tiny checkpoint combine two pictures: python data/recipes/train_edit_plus.py --help

The checkpoint edits one picture, as Qwen-Image-Edit does. With this LoRA on its transformer, and the prompt form of
Qwen-Image-Edit-2509 ("Picture 1:", "Picture 2:"), it does "put the star of Picture 2 on Picture 1" as well, always in
this direction: three batches of four are of that kind, one of its other edits. All else stays frozen, so prompts are
encoded once a batch. Writes into runs/: edit_plus.pt, which resumes, log_edit_plus.csv, edit_plus.png, a sheet of
pictures, at every measurement, and at the end edit_plus_lora.safetensors.
"""

import argparse
import copy
from pathlib import Path

import numpy as np
import torch
from common import Log, Run
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm
from train_transformer import (
    accuracy,
    add_options,
    chatty,
    encode_prompts,
    encoder,
    loss_of,
    make_batch,
    rate_share,
    shuffled,
    step,
)

from minqwen.lora import adapters, add_lora, merge_lora, save_lora
from minqwen.pipeline import QwenImagePipeline
from minqwen.prompt import EDIT_PLUS
from minqwen.world import COMBINE, KINDS, WORLD, sample_edit

STEPS = {"edit_plus": 3840}
ALONE = 0.25  # the share of batches that edit one picture
TARGETS = "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out net.0.proj net.2".split()
FILE = "edit_plus_lora.safetensors"


class Merged(nn.Module):
    """A model with the adapters of another one added into its weights, anew in each pass: W + BA, one sum a layer."""

    def __init__(self, plain: nn.Module, adapted: nn.Module):
        super().__init__()
        self.plain, self.layers = plain, adapters(adapted)

    def forward(self, *inputs) -> Tensor:
        weights = {
            f"{name}.weight": layer.weight + layer.scale * (layer.lora_B.weight @ layer.lora_A.weight)
            for name, layer in self.layers.items()
        }
        return functional_call(self.plain, weights, inputs)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    pipe = QwenImagePipeline.from_pretrained(args.checkpoint, device=args.device, dtype=torch.float32)
    tokenizer, vae = pipe.tokenizer, pipe.vae
    net = nn.ModuleDict({"transformer": pipe.transformer, "text_encoder": pipe.text_encoder}).requires_grad_(False)
    trained = add_lora(net["transformer"], args.rank, targets=TARGETS)
    average = copy.deepcopy(net["transformer"]).requires_grad_(False)
    averaged = nn.ModuleDict({"transformer": average, "text_encoder": pipe.text_encoder})
    means = [mean for name, mean in average.named_parameters() if ".lora_" in name]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0)
    run = Run(args.runs / "edit_plus.pt", {"net": net, "average": average, "optimizer": optimizer}, rng)
    run.resume()
    kinds = (COMBINE, *KINDS)
    log = Log(args.runs / "log_edit_plus.csv", ["minutes", "samples", "loss", *kinds])
    encode = encoder(vae, args)
    plain = copy.deepcopy(pipe.transformer)
    merge_lora(plain)  # for its form alone: `Merged` puts other weights in their place in each pass
    if args.compile:
        plain.compile(dynamic=True)
    merged = nn.ModuleDict({"transformer": Merged(plain, net["transformer"]), "text_encoder": pipe.text_encoder})

    def sample():
        kind = None if rng.random() < ALONE else COMBINE
        edits = [sample_edit(rng, kind) for _ in range(args.batch)]
        noisy = rng.random() < 0.2
        words = [chatty(rng, e.instruction) if noisy else e.instruction for e in edits]
        prompts = [" " if drop else text for text, drop in zip(words, rng.random(args.batch) < 0.1, strict=True)]
        batch = make_batch(edits, prompts, tokenizer, encode, EDIT_PLUS).to(args.device)
        with torch.no_grad():
            return batch, encode_prompts(net["text_encoder"], batch.tokens)

    bar = tqdm(total=args.steps, initial=run.step, desc="adapter for two pictures", disable=None)
    while run.step < args.steps:
        pool, losses = [sample() for _ in range(args.pool)], []
        for index in shuffled(rng, args):
            loss = loss_of(merged, *pool[index], args.shift, args.changed_weight)
            rate = args.lr * rate_share(run.step, args.steps, 1, 0.5)
            step(run, loss, rate, trained, means, {"adamw": optimizer}, args.average)
            losses.append(loss.item())
            bar.update()
        run.save()  # a pool is the unit of resumption
        pools, right = run.step // (args.pool * args.reuse), {}
        if args.check_every and (pools % args.check_every == 0 or run.step >= args.steps):
            sheet = run.path.with_suffix(".png")
            right = accuracy(averaged, vae, kinds, WORLD, tokenizer, encode, sheet, args.device, EDIT_PLUS)
        log(minutes=run.elapsed() / 60, samples=run.step * args.batch, loss=float(np.mean(losses)), **right)
    bar.close()
    save_lora(average, args.out or args.runs / FILE)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a folder: data/tiny, or what make_tiny.py wrote")
    parser.add_argument("--steps", type=int, default=STEPS["edit_plus"])
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--out", type=Path, help=f"the adapter's file, by default {FILE} in the folder of --runs")
    return add_options(parser)


if __name__ == "__main__":
    train(parser().parse_args())

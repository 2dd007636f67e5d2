"""Counts what a checkpoint gets right, by kind of instruction: python data/recipes/evaluate.py --help

Scenes are drawn with seeds that training never uses; pictures come out of `edit` and `generate` with their defaults.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from minqwen.pipeline import QwenImagePipeline
from minqwen.shapes import WORLD, draw, judge, sample_drawing, sample_edit, sample_scene

SEED = 10**8  # training draws from small seeds, the checks during training from 10**7


def evaluate(pipe: QwenImagePipeline, rows: int, **options) -> dict[str, int]:
    """How many of `rows` are right, for each kind of edit and for drawing."""
    right = {}
    for number, kind in enumerate((*WORLD.kinds, "draw")):
        rng = np.random.default_rng(SEED + number)
        right[kind] = 0
        for row in tqdm(range(rows), desc=kind):
            task = sample_drawing(rng) if kind == "draw" else sample_edit(rng, kind)
            generator = torch.Generator().manual_seed(SEED + row)
            if kind == "draw":
                image = pipe.generate(task.instruction, generator=generator, progress=False, **options)
            else:
                image = pipe.edit(task.source, task.instruction, generator=generator, progress=False, **options)
            right[kind] += judge(image, task)
    return right


@torch.inference_mode()
def reconstruction(pipe: QwenImagePipeline, rows: int = 256) -> float:
    """Decibels of the mean squared error of the autoencoder on scenes that it never saw."""
    rng, squares = np.random.default_rng(SEED), []
    for _ in range(rows):
        image = draw(sample_scene(rng))
        latents = pipe.encode_image(image)
        again = pipe.vae.decode(pipe.vae.denormalize(latents))
        squares.append(
            ((again + 1) / 2 - torch.from_numpy(np.array(image) / 255).permute(2, 0, 1)[:, None]).square().mean()
        )
    return -10 * math.log10(torch.stack(squares).mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default="data/tiny")
    parser.add_argument("--rows", type=int, default=100, help="tasks of each kind")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--scale", type=float, default=4.0, help="guidance")
    parser.add_argument("--out", type=Path, help="add a line to this file")
    args = parser.parse_args()
    pipe = QwenImagePipeline.from_pretrained(args.checkpoint)
    right = evaluate(pipe, args.rows, num_inference_steps=args.steps, true_cfg_scale=args.scale)
    edits = [count for kind, count in right.items() if kind != "draw"]
    line = {"rows": args.rows, "steps": args.steps, "scale": args.scale, "right": right,
            "edits_per_cent": round(100 * sum(edits) / (args.rows * len(edits)), 1),
            "vae_psnr": round(reconstruction(pipe), 2)}  # fmt: skip
    print(json.dumps(line))
    if args.out:
        with args.out.open("a") as file:
            file.write(json.dumps(line) + "\n")

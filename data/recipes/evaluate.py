"""Counts what a checkpoint gets right, by kind of instruction: python data/recipes/evaluate.py --help

Scenes are drawn with seeds that training never uses; pictures come out of `edit` and `generate` with their defaults.
"""

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from minqwen.lora import load_lora
from minqwen.pipeline import QwenImagePipeline
from minqwen.prompt import EDIT_PLUS
from minqwen.world import (
    COMBINE,
    HELD_BACK,
    KINDS,
    PLACES,
    WORLD,
    Edit,
    World,
    draw,
    in_cell,
    judge,
    sample_drawing,
    sample_edit,
    sample_scene,
)

SEED = 10**8  # training draws from small seeds, the checks during training from 10**7
TASKS = (*KINDS, "draw", HELD_BACK, COMBINE)
WORLDS = {
    "as trained": WORLD,
    "unseen phrasings": replace(WORLD, unseen=True, chinese=0.0),
    "Chinese": replace(WORLD, chinese=1.0),
    "twins": replace(WORLD, twins=1.0),  # what the words name is in both pictures
}


def evaluate(
    pipe: QwenImagePipeline, rows: int, world: World = WORLD, kinds: tuple[str, ...] = TASKS[:-2], **options
) -> tuple[dict[str, int], list[float]]:
    """How many of `rows` are right, for each kind and for drawing; and `drift` of every edit."""
    right, drifts = {}, []
    for number, kind in enumerate(TASKS):
        if kind not in kinds:
            continue
        rng = np.random.default_rng(SEED + number)
        right[kind] = 0
        for row in tqdm(range(rows), desc=kind, disable=None):
            task = sample_drawing(rng, world) if kind == "draw" else sample_edit(rng, kind, world)
            generator = torch.Generator().manual_seed(SEED + row)
            if kind == "draw":
                image = pipe.generate(task.instruction, generator=generator, progress=False, **options)
            else:
                image = pipe.edit(task.sources, task.instruction, generator=generator, progress=False, **options)
                drifts += drift(image, task)
            right[kind] += judge(image, task)
    return right, drifts


def drift(image: Image.Image, edit: Edit) -> list[float]:
    """The mean difference from the source, in levels of 255, over the cells that the edit leaves alone, if any."""
    picture, source, target = (np.asarray(i, np.float32) for i in (image, edit.source, edit.target))
    cells = [in_cell(place) for place in PLACES]
    same = [abs(picture[cell] - source[cell]).mean() for cell in cells if (source[cell] == target[cell]).all()]
    return [float(np.mean(same))] if same else []


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
    parser.add_argument("--scale", type=float, help="guidance, by default the checkpoint's own")
    parser.add_argument("--words", choices=WORLDS, default="as trained", help=f"twins: {COMBINE}'s hardest tasks")
    few = f"by default all but {HELD_BACK} and {COMBINE}"
    parser.add_argument("--kinds", nargs="+", choices=TASKS, default=TASKS[:-2], help=few)
    parser.add_argument("--lora", type=Path, help="a LoRA file to put on the checkpoint")
    parser.add_argument("--plus", action="store_true", help=f"number the pictures in the prompt, as {COMBINE} needs")
    parser.add_argument("--out", type=Path, help="add a line to this file")
    args = parser.parse_args()
    pipe, start = QwenImagePipeline.from_pretrained(args.checkpoint), time.time()
    if args.lora:
        print(load_lora(pipe.transformer, args.lora))
    if args.plus:
        pipe.edit_template = EDIT_PLUS
    options = {"num_inference_steps": args.steps, "true_cfg_scale": args.scale}
    right, drifts = evaluate(pipe, args.rows, WORLDS[args.words], tuple(args.kinds), **options)
    edits = [count for kind, count in right.items() if kind != "draw"]
    line = {
        "words": args.words,
        "rows": args.rows,
        "steps": args.steps,
        "scale": args.scale or pipe.true_cfg_scale,
        "right": right,
        "edits_per_cent": round(100 * sum(edits) / (args.rows * max(1, len(edits))), 1),
        "drift_mean": round(float(np.mean(drifts)), 2),
        "drift_99": round(float(np.percentile(drifts, 99)), 2),
        "seconds_each": round((time.time() - start) / (args.rows * len(right)), 3),
        "vae_psnr": round(reconstruction(pipe), 2),
    }
    print(json.dumps(line))
    if args.out:
        with args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

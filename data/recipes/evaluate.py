"""Counts what a checkpoint gets right, by kind of instruction: python data/recipes/evaluate.py --help

Scenes are drawn with seeds that training never uses; pictures are those of `edit` and `generate`, painted in batches.
Several numbers of steps, or several guidances, make a table: a line for each.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from common import as_pixels, pictures
from PIL import Image
from tqdm import tqdm
from train_vae import UNSEEN, piece

from minqwen.images import pack_latents
from minqwen.lora import load_lora
from minqwen.pipeline import QwenImagePipeline, starting_noise
from minqwen.prompt import EDIT_PLUS, pad_prompts
from minqwen.sampling import denoise, get_sigmas, guide
from minqwen.world import (
    COMBINE,
    HELD_BACK,
    KINDS,
    PLACES,
    SIZE,
    WORLD,
    Edit,
    World,
    in_cell,
    judge,
    read,
    sample_drawing,
    sample_edit,
    sample_scene,
)

SEED = 10**8  # training draws from small seeds, the checks during training from 10**7
DRAWN = ("draw", "open")
TASKS = (*KINDS, *DRAWN, HELD_BACK, COMBINE)
BATCH = 50
WORLDS = {
    "as trained": WORLD,
    "unseen phrasings": replace(WORLD, unseen=True, chinese=0.0),
    "English": replace(WORLD, chinese=0.0),
    "Chinese": replace(WORLD, chinese=1.0),
    "twins": replace(WORLD, twins=1.0),  # what the words name is in both pictures
}


def sample(kind: str, rows: int, world: World = WORLD) -> list[Edit]:
    """The tasks of a kind that all counts use: always the same ones."""
    rng = np.random.default_rng(SEED + TASKS.index(kind))
    return [sample_drawing(rng, world, kind == "open") if kind in DRAWN else sample_edit(rng, kind, world)
            for _ in range(rows)]  # fmt: skip


@torch.inference_mode()
def paint(
    pipe: QwenImagePipeline, tasks: Sequence[Edit], steps: int, scale: float | None, seeds: Sequence[int] = ()
) -> list[Image.Image]:
    """What `edit` or `generate` makes of tasks with equally many pictures, all at once; seeds: of their noise."""
    scale, side, painted = pipe.true_cfg_scale if scale is None else scale, SIZE // 16, []
    seeds = seeds or range(SEED, SEED + len(tasks))
    for first in range(0, len(tasks), BATCH):
        part = tasks[first : first + BATCH]
        shown = [pipe.resize_references(task.sources) for task in part]
        references = [[pack_latents(pipe.encode_image(image)) for image in images] for images, _ in shown]
        clean = [torch.cat(each, dim=1) for each in references if each]
        texts = [[task.instruction for task in part]] + [[" "] * len(part)] * (scale > 1)
        prompts = [
            pad_prompts([pipe.encode_prompt(text, seen) for text, (_, seen) in zip(each, shown, strict=True)])
            for each in texts
        ]
        shapes = [[(1, side, side)] * (1 + len(part[0].sources))] * len(part)

        def velocity(latents: torch.Tensor, sigma: float, clean=clean, prompts=prompts, shapes=shapes) -> torch.Tensor:
            tokens = torch.cat([latents.to(pipe.dtype), *([torch.cat(clean)] if clean else [])], dim=1)
            level = torch.full((len(tokens),), sigma, device=pipe.device)
            found = [pipe.transformer(tokens, *prompt, level, shapes)[:, : side**2] for prompt in prompts]
            return guide(*found, scale) if len(found) == 2 else found[0]

        chance = [torch.Generator().manual_seed(seed) for seed in seeds[first : first + BATCH]]
        noise = torch.cat([starting_noise(side, side, generator) for generator in chance])
        latents = denoise(velocity, noise.to(pipe.device), get_sigmas(steps, side**2, **pipe.schedule))
        painted += [pipe.decode(each, SIZE, SIZE) for each in latents.split(1)]
    return painted


def drift(image: Image.Image, edit: Edit) -> list[float]:
    """The mean difference from the source, in levels of 255, over the cells that the edit leaves alone, if any."""
    picture, source, target = (np.asarray(i, np.float32) for i in (image, edit.source, edit.target))
    cells = [in_cell(place) for place in PLACES]
    same = [abs(picture[cell] - source[cell]).mean() for cell in cells if (source[cell] == target[cell]).all()]
    return [float(np.mean(same))] if same else []


def count(pipe: QwenImagePipeline, rows: int, kinds: Sequence[str], world: World, steps: int, scale) -> dict:
    """How many of `rows` are right, for each kind; and of the edits how far what should stay has moved."""
    right, drifts = {}, []
    for kind in tqdm(kinds, desc=f"{steps} steps, guidance {scale}", disable=None):
        tasks = sample(kind, rows, world)
        images = paint(pipe, tasks, steps, scale)
        right[kind] = sum(map(judge, images, tasks))
        drifts += [d for image, task in zip(images, tasks, strict=True) if task.sources for d in drift(image, task)]
    edits = [number for kind, number in right.items() if kind not in DRAWN]
    line = {"right": right, "edits_per_cent": round(100 * sum(edits) / (rows * max(1, len(edits))), 1)}
    if drifts:
        line |= {"drift_mean": round(float(np.mean(drifts)), 2), "drift_99": round(float(np.percentile(drifts, 99)), 2)}
    return line


def variety(pipe: QwenImagePipeline, steps: int, scale: float | None, tasks: int = 10, noises: int = 10) -> list[int]:
    """Of open descriptions, each painted from ten noises: how many different right pictures come out."""
    found = []
    for task in sample("open", tasks):
        images = paint(pipe, [task] * noises, steps, scale, range(SEED, SEED + noises))
        shown = [read(image) for image, ok in zip(images, (judge(i, task) for i in images), strict=True) if ok]
        found.append(len({(s.background, *((place, t.name, t.size) for place, t in s.things.items())) for s in shown}))
    return found


@torch.inference_mode()
def reconstruction(pipe: QwenImagePipeline, x: torch.Tensor) -> float:
    """Decibels of the autoencoder's mean squared error on pictures (B, 3, 1, H, W) that it never saw."""
    x = x.to(pipe.device, pipe.dtype)
    back = pipe.vae.decode(pipe.vae.encode(x).mode())
    return -10 * math.log10((back - x).div(2).float().square().mean())


def unseen_scenes(rows: int = 64) -> torch.Tensor:
    rng = np.random.default_rng(SEED)
    return pictures([sample_scene(rng) for _ in range(rows)])


def unseen_photo(rows: int = 32) -> torch.Tensor:
    rng, photo = np.random.default_rng(SEED), Image.open(UNSEEN).convert("RGB")
    return as_pixels([piece(rng, photo, SIZE) for _ in range(rows)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default="data/tiny")
    parser.add_argument("--rows", type=int, default=100, help="tasks of each kind")
    parser.add_argument("--steps", type=int, nargs="+", default=[20])
    parser.add_argument("--scale", type=float, nargs="+", default=[None], help="guidance, by default the checkpoint's")
    parser.add_argument("--words", choices=WORLDS, default="as trained", help=f"twins: {COMBINE}'s hardest tasks")
    few = f"by default all but {HELD_BACK} and {COMBINE}"
    parser.add_argument("--kinds", nargs="+", choices=TASKS, default=TASKS[:-2], help=few)
    parser.add_argument("--lora", type=Path, help="a LoRA file to put on the checkpoint")
    parser.add_argument("--plus", action="store_true", help=f"number the pictures in the prompt, as {COMBINE} needs")
    parser.add_argument("--variety", action="store_true", help="paint ten open descriptions from ten noises each too")
    parser.add_argument("--out", type=Path, help="add the lines to this file")
    args = parser.parse_args()
    pipe = QwenImagePipeline.from_pretrained(args.checkpoint)
    if args.lora:
        print(load_lora(pipe.transformer, args.lora))
    if args.plus:
        pipe.edit_template = EDIT_PLUS
    for steps, scale in product(args.steps, args.scale):
        start = time.time()
        line = {"words": args.words, "rows": args.rows, "steps": steps, "scale": scale or pipe.true_cfg_scale}
        line |= count(pipe, args.rows, args.kinds, WORLDS[args.words], steps, scale)
        if args.variety:
            line["different"] = variety(pipe, steps, scale)
        print(json.dumps(line | {"seconds": round(time.time() - start)}), flush=True)
        if args.out:
            with args.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
    scenes, photo = reconstruction(pipe, unseen_scenes()), reconstruction(pipe, unseen_photo())
    print(f"The autoencoder brings scenes back at {scenes:.1f} dB, a photo at {photo:.1f} dB.")

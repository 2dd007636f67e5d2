"""Fine-tuning: the loss of chapter 09 on precomputed samples, with adapters (or every weight) to move.

    dataset of Sample, pipe  ->  the pipe's transformer, trained; a log of (step, sigma, loss), one row for each sample

A step takes samples of one shape, mixes each with noise at a random level sigma, asks for the velocity, and pulls it
towards noise minus picture. Chance is a function of the seed and the step's number alone, so a checkpoint holds no
random state, and a run that is killed goes on to the same weights, bit for bit (on a CPU; CUDA adds in any order).
The surprise: the control picture passes through the whole model with the noisy one, but the loss is taken on the
target's tokens only, and in most trainers sigma is uniform although nobody samples that way.
Source: Lipman et al. 2022; the trainers of diffusers and FlyMyAI. Tests: tests/test_finetune.py. Chapter 10.
As a command: python -m minqwen.finetune --help
"""

import argparse
import csv
import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import trange

from minqwen.images import pack_latents
from minqwen.lora import ATTENTION, add_lora, save_lora
from minqwen.pipeline import QwenImagePipeline
from minqwen.precompute import Precomputed, Sample
from minqwen.sampling import time_shift

TIMESTEP_SAMPLING = ("shifted", "uniform", "logit-normal")
CHECKPOINT, LOG, LORA = "checkpoint.pt", "log.csv", "lora.safetensors"  # the files in out_dir


class Batch(NamedTuple):
    """Samples of one shape, prompts padded to the longest."""

    target: Tensor  # (B, Ni, 64) packed, clean
    control: Tensor  # (B, Nc, 64) packed, Nc = 0 for drawing
    embeds: Tensor  # (B, Nt, C)
    mask: Tensor | None  # (B, Nt), None where every token is valid
    shapes: list[tuple[int, int, int]]  # (1, h, w) in tokens, of the target and of its control picture

    def to(self, device: torch.device, dtype: torch.dtype) -> "Batch":
        target, control, embeds = (x.to(device, dtype) for x in (self.target, self.control, self.embeds))
        return Batch(target, control, embeds, None if self.mask is None else self.mask.to(device), self.shapes)


class Row(NamedTuple):
    """One sample's part in one step."""

    step: int
    sigma: float
    loss: float


def make_batch(samples: Sequence[Sample], dropped: Sequence[bool] | None = None) -> Batch:
    """Samples of one shape as a batch; those that are dropped say the empty prompt instead of their caption."""
    dropped = dropped or [False] * len(samples)
    embeds = [s.empty if drop else s.embeds for s, drop in zip(samples, dropped, strict=True)]
    longest = max(e.shape[1] for e in embeds)
    mask = torch.stack([torch.arange(longest) < e.shape[1] for e in embeds])
    padded = torch.cat([F.pad(e, (0, 0, 0, longest - e.shape[1])) for e in embeds])
    latents = [torch.cat(column) for column in zip(*((s.latents, *s.control) for s in samples), strict=True)]
    target, *control = map(pack_latents, latents)
    shapes = [(1, z.shape[-2] // 2, z.shape[-1] // 2) for z in latents]
    return Batch(target, control[0] if control else target[:, :0], padded, None if mask.all() else mask, shapes)


def flow_loss(transformer: nn.Module, batch: Batch, sigma: Tensor, noise: Tensor) -> Tensor:
    """Flow matching's loss of each sample, (B,): how far is the velocity from noise minus picture?

    sigma (B,) in [0, 1]; noise (B, Ni, 64). The control's tokens are seen by the model, not by the loss.
    """
    picture, level = batch.target.float(), sigma[:, None, None]
    noisy = (1 - level) * picture + level * noise
    tokens = torch.cat([noisy.to(batch.control.dtype), batch.control], dim=1)
    velocity = transformer(tokens, batch.embeds, batch.mask, sigma, [batch.shapes] * len(tokens))[:, : noise.shape[1]]
    return (velocity.float() - (noise - picture)).square().mean((1, 2))


def resolution_shift(tokens: int, **schedule) -> float:
    """e^mu, by which sampling shifts the noise levels of a picture of so many tokens (see get_sigmas)."""
    if not schedule.get("use_dynamic_shifting", True):
        return schedule.get("shift", 1.0)
    low, high = schedule.get("base_image_seq_len", 256), schedule.get("max_image_seq_len", 8192)
    base, most = schedule.get("base_shift", 0.5), schedule.get("max_shift", 0.9)
    return math.exp(base + (most - base) * (tokens - low) / (high - low))


def sample_sigmas(count: int, how: str, shift: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """Noise levels to train at, (count,) in [0, 1]: "uniform", "logit-normal", or "shifted", uniform then shifted."""
    if how not in TIMESTEP_SAMPLING:
        raise ValueError(f"timestep_sampling {how!r}: expected one of {', '.join(TIMESTEP_SAMPLING)}")
    if how == "logit-normal":
        return torch.randn(count, generator=generator).sigmoid()
    return time_shift(torch.rand(count, generator=generator), shift if how == "shifted" else 1.0)


def chance_of(seed: int, *what: str | int) -> torch.Generator:
    """A generator that depends on all of these. (torch's own for CPUs reads only the low 32 bits of a seed.)"""
    digest = hashlib.sha256(repr((seed, *what)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def step_order(groups: list[list[int]], size: int, seed: int, epoch: int) -> list[list[int]]:
    """The steps of an epoch: every sample once, in random order, at most `size` to a step, all of one group."""
    generator = chance_of(seed, "order", epoch)
    steps = []
    for group in groups:
        order = torch.randperm(len(group), generator=generator).tolist()
        steps += [[group[k] for k in order[i : i + size]] for i in range(0, len(order), size)]
    return [steps[k] for k in torch.randperm(len(steps), generator=generator).tolist()]


def learning_rate(lr: float, step: int, steps: int) -> float:
    """Up over the first 20 steps, constant, then down to nothing over the last half of the run."""
    return lr * min(1, (step + 1) / 20, 2 * (1 - step / steps))


def finetune(
    pipe: QwenImagePipeline,
    dataset: Precomputed | Sequence[Sample],
    out_dir: str | os.PathLike | None = None,
    *,
    steps: int = 1000,
    batch_size: int = 1,
    lr: float = 1e-4,
    rank: int | None = 16,
    targets: Sequence[str] = ATTENTION,
    timestep_sampling: str = "shifted",
    caption_dropout: float = 0.1,
    accumulate: int = 1,
    checkpointing: bool = False,
    seed: int = 0,
    save_every: int = 100,
    preview: Callable[[int], None] | None = None,
    progress: bool = True,
) -> list[Row]:
    """Train pipe.transformer on a dataset of Samples (see precompute); returns the log. The adapters stay on it.

    out_dir: takes checkpoint.pt and log.csv every `save_every` steps and lora.safetensors at the end (for full
    fine-tuning a folder `transformer` in the released layout). A run that was cut off goes on from there.
    rank, targets: of the adapters; rank None or 0 trains every weight, in float32. timestep_sampling: "shifted" as
    sampling does at this size, "uniform" or "logit-normal". caption_dropout: the share of captions replaced by the
    empty one. accumulate: a step is made of so many batches. checkpointing: recompute the blocks in the backward
    pass instead of keeping what is inside them. preview(step): called at step 0 and after every save.
    The pipe may lack its text encoder and VAE unless the preview needs them. Raises ValueError for a dataset that is
    empty or mixed, and for settings other than those of the run in out_dir; FloatingPointError when a loss is no
    longer finite. On CUDA the forward pass runs in bfloat16 autocast.
    """
    settings = {"steps": steps, "batch_size": batch_size, "lr": lr, "rank": rank or 0, "targets": list(targets),
                "timestep_sampling": timestep_sampling, "caption_dropout": caption_dropout,
                "accumulate": accumulate, "seed": seed, "samples": len(dataset)}  # fmt: skip
    groups, model, dtype = group_by_shape(dataset), pipe.transformer, pipe.dtype
    sample_sigmas(0, timestep_sampling)  # a wrong word is reported before any work
    if min(steps, batch_size, accumulate, save_every) < 1:
        raise ValueError("steps, batch_size, accumulate and save_every must be at least 1")
    parameters = trainable(model, rank, targets, seed)
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    run = Run(out_dir, parameters, optimizer, settings)
    run.resume()
    size = batch_size * accumulate
    order, per_epoch = partial(step_order, groups, size, seed), len(step_order(groups, size, seed, 0))
    wrapped = checkpoint_blocks(model) if checkpointing else []
    try:
        if preview and not run.step:
            preview(0)
        for step in trange(run.step, steps, initial=run.step, total=steps, desc="finetune", disable=not progress):
            samples = [dataset[i] for i in order(step // per_epoch)[step % per_epoch]]
            chance = chance_of(seed, "step", step)
            sigma, losses = accumulate_gradients(
                pipe, samples, batch_size, timestep_sampling, caption_dropout, chance
            )
            if not all(map(math.isfinite, losses)):
                names = [s.name for s, value in zip(samples, losses, strict=True) if not math.isfinite(value)]
                raise FloatingPointError(f"step {step}: the loss of {names} is not finite; try a lower lr than {lr}")
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.param_groups[0]["lr"] = learning_rate(lr, step, steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            run.add(sigma, losses)
            if run.step % save_every == 0 or run.step == steps:
                run.save()
                if preview:
                    preview(run.step)
    finally:
        for block in wrapped:
            del block.forward
        model.requires_grad_(False)
    if not rank:
        model.to(dtype)
    if out_dir is not None:
        save_result(pipe, Path(out_dir), rank)
    return run.log


def accumulate_gradients(
    pipe: QwenImagePipeline,
    samples: list[Sample],
    batch_size: int,
    timestep_sampling: str,
    caption_dropout: float,
    chance: torch.Generator,
) -> tuple[list[float], list[float]]:
    """The gradient of one step, batch by batch; returns each sample's sigma and loss.

    All chance is drawn for the whole step first, on the CPU: the same however the step is cut and wherever it runs.
    """
    device, tokens = pipe.device, samples[0].latents[0, 0].numel() // 4
    dropped = (torch.rand(len(samples), generator=chance) < caption_dropout).tolist()
    shift = resolution_shift(tokens, **pipe.schedule)
    sigma = sample_sigmas(len(samples), timestep_sampling, shift, chance)
    noise = torch.randn(len(samples), tokens, 64, generator=chance)
    losses = []
    for i in range(0, len(samples), batch_size):
        part = slice(i, i + batch_size)
        batch = make_batch(samples[part], dropped[part]).to(device, pipe.dtype)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = flow_loss(pipe.transformer, batch, sigma[part].to(device), noise[part].to(device))
        (loss.sum() / len(samples)).backward()  # adds up to the gradient of the mean over the whole step
        losses += loss.tolist()
    return sigma.tolist(), losses


def group_by_shape(dataset: Precomputed | Sequence[Sample]) -> list[list[int]]:
    """Indices of samples that may share a batch: equal sizes of target and control."""
    groups: dict[tuple, list[int]] = {}
    for i in range(len(dataset)):
        sample = dataset[i]
        groups.setdefault(tuple(z.shape for z in (sample.latents, *sample.control)), []).append(i)
    if not groups:
        raise ValueError("the dataset is empty: there is nothing to train on")
    if len({len(shapes) for shapes in groups}) > 1:
        alone = [dataset[group[0]].name for shapes, group in groups.items() if len(shapes) == 1]
        raise ValueError(f"some samples have a control picture and some have none (such as {alone[0]}): train one kind")
    return list(groups.values())


def trainable(model: nn.Module, rank: int | None, targets: Sequence[str], seed: int) -> list[nn.Parameter]:
    """What the optimiser moves: fresh adapters, or all weights, which full fine-tuning turns to float32."""
    if rank:
        return add_lora(model, rank, targets=tuple(targets), generator=chance_of(seed, "adapters"))
    return list(model.float().requires_grad_(True).parameters())


def checkpoint_blocks(model: nn.Module) -> list[nn.Module]:
    """Keep only what enters each block, and compute its inside again when the backward pass comes by."""
    for block in model.transformer_blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return list(model.transformer_blocks)


class Run:
    """Where a run stands, in memory and in out_dir: weights, the optimiser's moments, the log."""

    def __init__(self, out_dir, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, settings: dict):
        self.folder = None if out_dir is None else Path(out_dir)
        self.parameters, self.optimizer, self.settings = parameters, optimizer, settings
        self.step, self.log = 0, []

    def add(self, sigma: list[float], losses: list[float]) -> None:
        self.log += [Row(self.step, *pair) for pair in zip(sigma, losses, strict=True)]
        self.step += 1

    def save(self) -> None:
        """All or nothing: old files stay until new ones are whole. The checkpoint, which says what is done, is last."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        half = self.folder / "checkpoint.part"
        with open(half, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([Row._fields, *self.log])
        os.replace(half, self.folder / LOG)
        state = {"step": self.step, "settings": json.dumps(self.settings), "log": list(map(tuple, self.log)),
                 "weights": [p.detach() for p in self.parameters],
                 "optimizer": self.optimizer.state_dict()}  # fmt: skip
        torch.save(state, half)
        os.replace(half, self.folder / CHECKPOINT)

    def resume(self) -> None:
        """Go on where the run in the folder stopped, if there is one."""
        if self.folder is None or not (self.folder / CHECKPOINT).exists():
            return
        state = torch.load(self.folder / CHECKPOINT, map_location="cpu", weights_only=True)
        before = json.loads(state["settings"])
        if other := {k: (before.get(k), v) for k, v in self.settings.items() if before.get(k) != v}:
            told = ", ".join(f"{key} {was} there, {now} now" for key, (was, now) in other.items())
            raise ValueError(f"{self.folder} holds a run with other settings ({told}): go on with those, or elsewhere")
        with torch.no_grad():
            for parameter, saved in zip(self.parameters, state["weights"], strict=True):
                parameter.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.log = state["step"], [Row(*row) for row in state["log"]]


def save_result(pipe: QwenImagePipeline, folder: Path, rank: int | None) -> None:
    """The adapters as diffusers loads them, or the whole transformer as it was released."""
    folder.mkdir(parents=True, exist_ok=True)
    if rank:
        return save_lora(pipe.transformer, folder / LORA)
    folder = folder / "transformer"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of(pipe.transformer), indent=2) + "\n", encoding="utf-8")
    save_file(pipe.transformer.state_dict(), folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})


def config_of(model: nn.Module) -> dict:
    """transformer/config.json, read off the modules."""
    block = model.transformer_blocks[0]
    config = {"_class_name": type(model).__name__, "patch_size": 2, "in_channels": model.config["in_channels"],
              "out_channels": model.proj_out.out_features // 4, "num_layers": len(model.transformer_blocks),
              "attention_head_dim": block.attn.norm_q.weight.numel(), "num_attention_heads": block.attn.heads,
              "joint_attention_dim": model.txt_in.in_features, "axes_dims_rope": list(model.pos_embed.axes_dim),
              "guidance_embeds": False}  # fmt: skip
    return config | ({"zero_cond_t": True} if model.zero_cond_t else {})


def picture_preview(pipe: QwenImagePipeline, out_dir: str | os.PathLike, prompt: str, image=None, **options):
    """A preview for `finetune`: draws, or edits `image`, from the same noise each time, into preview_STEP.png.

    options: those of pipe.edit and pipe.generate, such as num_inference_steps.
    """

    def preview(step: int) -> None:
        generator = torch.Generator().manual_seed(0)
        words = {"generator": generator, "progress": False} | options
        picture = pipe.generate(prompt, **words) if image is None else pipe.edit(image, prompt, **words)
        Path(out_dir).mkdir(parents=True, exist_ok=True)
        picture.save(Path(out_dir) / f"preview_{step:06}.png")

    return preview


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m minqwen.finetune",
        description="Train a LoRA (or with --rank 0 every weight) on what python -m minqwen.precompute left in a "
        "folder. Interrupted, run it again: it goes on, to the same weights.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("cache", metavar="CACHE", help="folder that python -m minqwen.precompute filled")
    add("--out", metavar="DIR", required=True, help="folder for checkpoint, log, previews and the result")
    add("--model", default="Qwen/Qwen-Image-Edit", help="checkpoint folder or hub repository, as in precompute")
    add("--steps", type=int, default=1000)
    add("--batch-size", type=int, default=1)
    add("--accumulate", type=int, default=1, help="batches that make one step")
    add("--lr", type=float, default=1e-4, help="the highest learning rate")
    add("--rank", type=int, default=16, help="of the adapters; 0: train every weight")
    add("--targets", nargs="+", metavar="NAME", default=list(ATTENTION), help="ends of the adapted layers' names")
    add("--timestep-sampling", choices=TIMESTEP_SAMPLING, default="shifted")
    add("--caption-dropout", type=float, default=0.1, help="share of captions replaced by the empty one")
    add("--checkpointing", action="store_true", help="less memory, a third more time: recompute the blocks")
    add("--seed", type=int, default=0)
    add("--save-every", type=int, default=100, help="steps between two checkpoints")
    add("--preview-prompt", help="paint this at every checkpoint")
    add("--preview-image", metavar="FILE", help="the picture that the preview edits")
    add("--device", help="cuda, mps or cpu; None: the first of these that is there")
    add("--dtype", choices=("bfloat16", "float32"), help="of the frozen weights; None: bfloat16 on a GPU, else float32")
    add("--quiet", action="store_true", help="no progress bar")
    said = vars(parser.parse_args(arguments))
    cache, out, model, device, dtype, prompt, image, quiet = (
        said.pop(k) for k in ("cache", "out", "model", "device", "dtype", "preview_prompt", "preview_image", "quiet")
    )
    try:
        dataset = Precomputed.open(cache)  # before minutes are spent on loading a model
        unused = () if prompt else ("text_encoder", "vae")
        pipe = QwenImagePipeline.from_pretrained(model, device, dtype and getattr(torch, dtype), without=unused)
        preview = picture_preview(pipe, out, prompt, image) if prompt else None
        log = finetune(pipe, dataset, out, preview=preview, progress=not quiet, **said)
    except (ValueError, OSError, FloatingPointError, KeyboardInterrupt) as error:
        stopped = "interrupted; run it again to go on" if isinstance(error, KeyboardInterrupt) else error
        raise SystemExit(f"finetune: {stopped}") from None
    last = [row.loss for row in log[-100:]]
    print(f"{log[-1].step + 1} steps in {out}, mean loss of the last {len(last)} samples {sum(last) / len(last):.4f}")


if __name__ == "__main__":
    main()

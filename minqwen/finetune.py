"""Fine-tuning: the loss of flow.py on precomputed samples, with adapters (or every weight) to move.

    dataset of Sample, pipe  ->  the pipe's transformer, trained; a log of (step, sigma, loss), one row for each sample

A step takes samples of one shape, mixes each with noise at a random level sigma, asks for the velocity, and pulls it
towards noise minus picture. Chance is a function of the seed and the step's number alone, so a run keeps no random
state, and one that is killed goes on to the same weights, bit for bit (on a CPU; CUDA adds in any order).
The surprise: bfloat16 rounds most of a step away; so what is trained is float32, and the rest stays as it is.
Tests: tests/test_finetune.py. Chapter 10.
As a command: python -m minqwen.finetune --help
"""

import argparse
import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import trange

from minqwen import parallel
from minqwen.checkpoint import Checkpoint, choose_device
from minqwen.command import Parser, expect_fit, keyword, model_options, number, one_line, open_pipeline, read_picture
from minqwen.files import whole_file, write_json
from minqwen.flow import TIMESTEP_SAMPLING, flow_loss, make_batch, sample_sigmas
from minqwen.lora import ATTENTION, add_lora, save_lora
from minqwen.memory import LevelTable
from minqwen.pipeline import PARTS, QwenImagePipeline
from minqwen.precompute import Precomputed, Sample
from minqwen.quantize import QuantizedLinear
from minqwen.run import Run, check_finite, locked, look_at, model_of
from minqwen.sampling import resolution_shift

STATE, LOG, LORA = "checkpoint.pt", "log.csv", "lora.safetensors"  # the files in out_dir
MAY_CHANGE = ("checkpointing", "save_every")  # settings that change no number: a run may go on with others


def setting(default, help: str, least=None, most=None, **option):
    """A field of Settings; its range, and what argparse needs to know of it, stand beside it."""
    kind = {"type": number(type(default), least, most)} if most else {}
    return field(default=default, metadata={"help": help} | kind | option)


@dataclass(frozen=True)
class Settings:
    """The keywords of `finetune`, and the options of the command."""

    steps: int = setting(1000, "steps of the optimiser", 1, 10**9)
    batch_size: int = setting(1, "samples that pass through the model at once", 1, 2**16)
    accumulate: int = setting(1, "batches that make one step", 1, 2**16)
    lr: float = setting(1e-4, "the highest learning rate", 1e-12, 1000)
    rank: int | None = setting(16, "of the adapters; 0: train every weight, in float32", 0, 2**12)
    levels: int = setting(0, "noise levels in a table, not a third of the weights; 0: every level, no table", 0, 10**5)
    targets: Sequence[str] = setting(ATTENTION, "ends of the adapted layers' names", nargs="+", metavar="END")
    timestep_sampling: str = setting("shifted", "noise levels; shifted: as sampling does", choices=TIMESTEP_SAMPLING)
    caption_dropout: float = setting(0.1, "share of captions replaced by the empty one", 0, 1)
    checkpointing: bool = setting(False, "less memory, a third more time: blocks are run twice", action="store_true")
    seed: int = setting(0, "of adapters, order, noise and dropped captions", 0, 2**64 - 1)
    save_every: int = setting(100, "steps between two saves", 1, 10**9)

    def __post_init__(self):
        object.__setattr__(self, "rank", 0 if self.rank is None else self.rank)
        for each in fields(self):
            if read := each.metadata.get("type"):
                object.__setattr__(self, each.name, keyword(each.name, getattr(self, each.name), read))
        if not (isinstance(self.targets, list | tuple) and self.targets and isinstance(self.checkpointing, bool)):
            raise ValueError("targets must be a list of ends of layers' names, checkpointing True or False")
        sample_sigmas(0, self.timestep_sampling)  # a wrong word is reported before any work


class Row(NamedTuple):
    """One sample's part in one step."""

    step: int
    sigma: float
    loss: float


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


def steps_from(first: int, groups: list[list[int]], size: int, seed: int) -> Iterator[list[int]]:
    """The samples of a step and of all later ones. An epoch's order is drawn once."""
    per_epoch = sum(math.ceil(len(group) / size) for group in groups)
    epoch, done = divmod(first, per_epoch)
    while True:
        yield from step_order(groups, size, seed, epoch)[done:]
        epoch, done = epoch + 1, 0


def finetune(
    pipe: QwenImagePipeline,
    dataset: Precomputed | Sequence[Sample],
    out_dir: str | os.PathLike | None = None,
    *,
    preview: Callable[[int], None] | None = None,
    progress: bool = True,
    **keywords,
) -> list[Row]:
    """Train pipe.transformer on a dataset of Samples (see precompute); returns the log. The adapters stay on it.

    out_dir: takes checkpoint.pt (the state of the run) and log.csv every `save_every` steps and lora.safetensors at
    the end (for full fine-tuning a folder `transformer` in the released layout). A run that was cut off goes on from
    there; two runs take turns. preview(step): called at step 0 and after every save. keywords: those of `Settings`,
    such as steps=1000, lr=1e-4, rank=16; rank None or 0 trains every weight. The pipe may lack its text encoder and VAE
    unless the preview needs them. On CUDA the forward pass runs in bfloat16 autocast.
    Raises TypeError for a keyword that is unknown; ValueError for a dataset that is empty, damaged or of another model,
    a setting that cannot be, and settings, data or a model other than those of the run in out_dir; OSError that names
    the file that cannot be written; FloatingPointError when a loss is no longer finite.
    """
    settings = Settings(**keywords)
    if bool(pipe.turns) != bool(settings.levels) or (pipe.turns and (pipe.turns.streams or not settings.rank)):
        way = 'memory="resident" and levels=0, or, to train adapters, memory="turns" and levels=1000'
        raise ValueError(f"training needs the transformer at hand: open the pipeline with {way}")
    groups, data = look_at(dataset, pipe.transformer.config)
    steps, size = settings.steps, settings.batch_size * settings.accumulate
    folder = None if out_dir is None else Path(out_dir)
    lasting = {name: value for name, value in asdict(settings).items() if name not in MAY_CHANGE}
    lasting |= {"samples": len(dataset), "data": data, "model": model_of(pipe)}
    with locked(folder) if folder else nullcontext():
        with training(pipe.transformer, settings) as parameters:
            optimizer = torch.optim.AdamW(parameters, lr=settings.lr, betas=(0.9, 0.99), weight_decay=0.0)
            parts = {"weights": nn.ParameterList(parameters), "optimizer": optimizer}
            if not settings.rank and folder:
                parts = {"shards": parallel.Shards(pipe.transformer, optimizer, folder)}
            run = Run(folder and folder / STATE, folder and folder / LOG, Row._fields, parts, lasting)
            run.resume()
            table = LevelTable(pipe.turns, settings.levels) if settings.levels else None
            if preview and not run.step:
                preview(0)
            order = steps_from(run.step, groups, size, settings.seed)
            for step in trange(run.step, steps, initial=run.step, total=steps, desc="finetune", disable=not progress):
                samples = [dataset[i] for i in next(order)]
                rows = accumulate_gradients(pipe, samples, settings, step, table)
                parallel.add_up_gradients(parameters)
                norm = parallel.entire(nn.utils.clip_grad_norm_(parameters, 1.0))
                check_finite(samples, rows, norm, settings.lr)
                optimizer.param_groups[0]["lr"] = learning_rate(settings.lr, step, steps)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                run.rows += rows
                run.step += 1
                if run.step % settings.save_every == 0 or run.step == steps:
                    run.save()
                    if preview:
                        preview(run.step)
        if folder:
            save_result(pipe, folder, settings.rank > 0)
    return [Row(*row) for row in run.rows]


def accumulate_gradients(pipe, samples: list[Sample], settings: Settings, step: int, table=None) -> list[Row]:
    """The gradient of one step, batch by batch; returns each sample's row of the log.

    All chance is drawn for the whole step first, on the CPU: the same however the step is cut and wherever it runs.
    table: a LevelTable that stands in for the modulation layers, at noise levels of its own, or None.
    """
    device, tokens = pipe.device, samples[0].latents[0, 0].numel() // 4
    chance = chance_of(settings.seed, "step", step)
    dropped = (torch.rand(len(samples), generator=chance) < settings.caption_dropout).tolist()
    shift = resolution_shift(tokens, **pipe.schedule)
    sigma = sample_sigmas(len(samples), settings.timestep_sampling, shift, chance)
    noise = torch.randn(len(samples), tokens, 64, generator=chance)
    sigma = sigma if table is None else table.nearest(sigma)
    parts, losses = [slice(i, i + settings.batch_size) for i in range(0, len(samples), settings.batch_size)], {}
    sharded = parallel.is_sharded(pipe.transformer.img_in.weight) and not settings.rank
    as_mean = parallel.size() if sharded else 1  # FSDP2 divides by it
    for index, part, counts in parallel.share(parts):
        batch = make_batch(samples[part], dropped[part]).to(device, pipe.dtype)
        said = {} if table is None else {"modulations": table.rows(sigma[part], device)}
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = flow_loss(partial(pipe.transformer, **said), batch, sigma[part].to(device), noise[part].to(device))
        (loss.sum() * (counts * as_mean / len(samples))).backward()  # adds up to the gradient of the whole step's mean
        losses[index] = loss.tolist()
    found = {index: told for each in parallel.gathered(losses) for index, told in each.items()}
    told = [loss for index in range(len(parts)) for loss in found[index]]
    return [Row(step, *pair) for pair in zip(sigma.tolist(), told, strict=True)]


@contextmanager
def training(model: nn.Module, settings: Settings) -> Iterator[list[nn.Parameter]]:
    """The parameters to train: fresh adapters, or all weights, which are float32 meanwhile. At the end all are frozen.

    (bfloat16 would round most of a step away.) checkpointing: keep only what enters each block, and compute its inside
    again when the backward pass comes by.
    """
    stored_dtype = model.img_in.weight.dtype
    if settings.rank:
        chance = chance_of(settings.seed, "adapters")
        parameters = add_lora(model, settings.rank, targets=tuple(settings.targets), generator=chance)
    elif any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise ValueError("weights of 8 or 4 bits cannot be trained: give a rank, for adapters on them")
    else:
        parameters = list(model.float().requires_grad_(True).parameters())
    if settings.checkpointing:
        for block in model.transformer_blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield parameters
    finally:
        model.requires_grad_(False)
        if not settings.rank:
            model.to(stored_dtype)
        for block in model.transformer_blocks:
            vars(block).pop("forward", None)


def save_result(pipe: QwenImagePipeline, folder: Path, adapted: bool) -> None:
    """The adapters as diffusers loads them, or the whole transformer as it was released."""
    weights = {} if adapted else pipe.transformer.state_dict()
    state = {name: parallel.entire(each).cpu() for name, each in weights.items()}  # each process holds a part
    if parallel.rank():
        return
    if adapted:
        return save_lora(pipe.transformer, folder / LORA)
    folder = folder / "transformer"
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", {"_class_name": type(pipe.transformer).__name__} | pipe.transformer.config)
    with whole_file(folder / "diffusion_pytorch_model.safetensors") as path:
        save_file(state, path, {"format": "pt"})


def picture_preview(pipe: QwenImagePipeline, out_dir: str | os.PathLike, prompt: str, image=None, **options):
    """A preview for `finetune`: draws, or edits `image`, from the same noise each time, into preview_STEP.png.

    options: those of pipe.edit and pipe.generate, such as num_inference_steps.
    """

    def preview(step: int) -> None:
        same = {"generator": torch.Generator().manual_seed(0), "progress": False} | options
        picture = pipe.generate(prompt, **same) if image is None else pipe.edit(image, prompt, **same)
        Path(out_dir).mkdir(parents=True, exist_ok=True)
        with whole_file(Path(out_dir) / f"preview_{step:06}.png") as path:
            picture.save(path, "PNG")

    return preview


def command_line() -> Parser:
    """The command's options: its own, then one for each of Settings."""
    purpose = "Train a LoRA on what python -m minqwen.precompute left in a folder. Run again, it goes on."
    parser = Parser("finetune", purpose, "python -m minqwen.finetune cache/ --out run/ --rank 16")
    add = parser.add_argument
    add("cache", metavar="CACHE", help="folder that python -m minqwen.precompute filled, with the same --model")
    add("--out", metavar="DIR", required=True, help="folder for the run's state, log, previews and the result")
    model_options(parser)
    for each in fields(Settings):
        add(f"--{each.name.replace('_', '-')}", default=each.default, **each.metadata)
    add("--preview-prompt", help="paint this at every save")
    add("--preview-image", metavar="FILE", help="the picture that the preview edits")
    add("--quiet", action="store_true", help="no progress bar")
    return parser


def open_model(asked: argparse.Namespace, without: tuple[str, ...]) -> QwenImagePipeline:
    """The pipeline to train; among several processes the transformer's weights are shared out, unless a table
    stands in for a third of them."""
    if parallel.size() == 1 or asked.levels:
        return open_pipeline(asked, without, "turns" if asked.levels else "resident")
    pipe, device = open_pipeline(asked, (*without, "transformer")), choose_device(asked.device)
    dtype = getattr(torch, asked.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    source, kind = Checkpoint(asked.model), PARTS["transformer"]
    pipe.transformer = parallel.load_sharded(source, kind, "transformer", device, dtype)
    return pipe


@one_line("finetune", "interrupted; run it again to go on", status=1)
def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = command_line()
    asked = parser.parse_args(arguments)
    if asked.preview_image and not asked.preview_prompt:
        parser.error("--preview-image without --preview-prompt: say what to do with it")
    keywords = {each.name: getattr(asked, each.name) for each in fields(Settings)}
    for path in (asked.cache, asked.out, asked.model):
        path.encode()  # safetensors takes no other names
    dataset = Precomputed.open(asked.cache)  # looked at before minutes are spent on loading a model
    look_at(dataset, Checkpoint(asked.model).config("transformer/config.json"))
    Path(asked.out).mkdir(parents=True, exist_ok=True)
    if image := asked.preview_image and read_picture(asked.preview_image):
        expect_fit(asked.preview_image, image, open_pipeline(asked, tuple(PARTS)))
    prompt = asked.preview_prompt
    with parallel.joined(asked.device) as asked.device:
        pipe = open_model(asked, () if prompt else ("text_encoder", "vae"))
        preview = prompt and picture_preview(pipe, asked.out, prompt, image)
        log = finetune(pipe, dataset, asked.out, preview=preview, progress=not asked.quiet, **keywords)
        last = torch.tensor([row.loss for row in log[-100:]])
        print(f"{log[-1].step + 1} steps in {asked.out}, mean loss of the last {len(last)} samples {last.mean():.4f}")


if __name__ == "__main__":
    main()

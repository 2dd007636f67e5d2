"""The command that edits: pictures and words in, a picture's file out.

    python -m minqwen.edit photo.jpg "make it winter" --out winter.png
    python -m minqwen.edit "a small cat" --out cat.png --model data/tiny

Without a picture it draws. The same seed gives the same picture as `pipe.edit` and `pipe.generate` with
generator=torch.Generator().manual_seed(seed).
The surprise: most of this file runs before the model does. A name that cannot be written, or a picture that is none,
would else be found after minutes of loading and painting.
Tests: tests/test_edit_command.py. Chapter 09.
"""

import argparse
import io
import os
import sys
import time
import warnings
from itertools import count
from pathlib import Path

import torch
from PIL import Image

from minqwen.checkpoint import Checkpoint
from minqwen.command import Parser, expect_fit, model_options, number, one_line, open_pipeline, read_picture
from minqwen.files import whole_file
from minqwen.images import MAX_AREA, MAX_SIDE
from minqwen.lightning import load_lightning, steps_of
from minqwen.lora import load_lora
from minqwen.parallel import joined, rank
from minqwen.pipeline import PARTS, QwenImagePipeline
from minqwen.plans import WAYS
from minqwen.prompt import IMAGE_PAD
from minqwen.shrink import adapters_of


def command_line() -> Parser:
    """The command's options."""
    purpose = "Change a picture, or make one out of several, as the prompt says. Without a picture: draw one."
    example = 'python -m minqwen.edit photo.jpg "make it winter" --out winter.png'
    parser = Parser("edit", purpose, example)
    add = parser.add_argument
    add("pictures", metavar="PICTURE", nargs="*", help="file to change; several where the checkpoint takes them")
    add("prompt", metavar="PROMPT", help="what to do, in quotes: the last of these words")
    add("--out", metavar="FILE", type=output, help="the result; None: PICTURE_edited.png or drawn.png, with a number")
    model_options(parser)
    ways = f"{', '.join(WAYS)}, or the GiB that it may take; auto: the first of these that fits"
    add("--memory", type=way, default="auto", help=f"how the model is held: {ways}")
    add("--steps", type=number(int, 1, 1000), help="from noise to picture; None: 50, or those of a Lightning file")
    add("--seed", type=number(int, 0, 2**64 - 1), default=0, help="of the noise: another one, another picture")
    add("--guidance", type=number(float, 0, 100), help="towards the prompt, off up to 1; None: the checkpoint's own")
    add("--negative", metavar="PROMPT", default=" ", help="what to keep away from (default: %(default)r)")
    add("--area", type=number(int, 32**2, MAX_AREA), help="pixels at work, 1024x1024 is 1048576; None: as the model")
    add("--width", type=number(int, 16, MAX_SIDE), help="pixels, in 16s; None: as the last picture, or else a square")
    add("--height", type=number(int, 16, MAX_SIDE), help="as --width")
    add("--lora", metavar="FILE", help="adapters (.safetensors) to put on the model; Lightning's with their schedule")
    add("--lora-scale", type=number(float, -100, 100), default=1.0, help="times the scale that the file asks for")
    return parser


def way(text: str) -> str | float:
    """The type of --memory: a word, or a number of GiB."""
    return text if text in ("auto", *WAYS) else number(float, 0.001, 2**20)(text)


def output(text: str) -> Path:
    """The type of --out: a name with the suffix of a format in which Pillow writes RGB."""
    try:
        Image.new("RGB", (16, 16)).save(io.BytesIO(), Image.registered_extensions()[Path(text).suffix.lower()])
    except Exception as error:  # there is none, or Pillow only reads it, or it knows no RGB
        raise argparse.ArgumentTypeError(f"Pillow cannot write {text}: end it in .png, .jpg or .webp") from error
    return Path(text)


def free_name(pictures: list[str]) -> Path:
    """A name in this folder that no file has."""
    stem = f"{Path(pictures[0]).stem[:50]}_edited" if pictures else "drawn"
    names = (Path(f"{stem}_{n}.png" if n > 1 else f"{stem}.png") for n in count(1))
    return next(path for path in names if not path.exists())


def check_together(parser: Parser, asked: argparse.Namespace) -> None:
    """What no option can know alone: a wrong one ends the command, a picture that is missing is a FileNotFoundError."""
    out = asked.out or Path("here")
    if not (out.parent.is_dir() and os.access(out.parent, os.W_OK)):
        parser.error(f"--out: there is no folder {out.parent} that may be written to")
    if os.path.isfile(asked.prompt):
        parser.error(f"{asked.prompt} is a file: what to do with it comes last, in quotes")
    if IMAGE_PAD in asked.prompt + asked.negative:
        parser.error(f"the prompt or --negative holds {IMAGE_PAD}, which stands for a picture: take it out")
    if asked.area and not asked.pictures:
        parser.error("--area is the working size of a picture, and there is none: use --width and --height")
    if asked.lora_scale != 1 and not asked.lora:
        parser.error("--lora-scale without --lora: there is nothing to scale")
    if asked.lora and not os.path.isfile(asked.lora):
        parser.error(f"--lora: no such file: {asked.lora}")
    if missing := [path for path in asked.pictures if not os.path.isfile(path)]:
        raise FileNotFoundError(f"no such picture: {missing[0]} (a prompt of several words stands in quotes)")
    if asked.out and out.exists() and (out.is_dir() or any(map(out.samefile, asked.pictures))):
        parser.error(f"--out {out} is {'a folder' if out.is_dir() else 'one of the pictures'}: choose another name")


def open_model(asked: argparse.Namespace, pictures: list[Image.Image]) -> QwenImagePipeline:
    """The pipeline with its adapters. What its small files tell is looked at before the large ones are opened."""
    light = open_pipeline(asked, tuple(PARTS))
    light.check_pictures(len(pictures))
    for path, picture in zip(asked.pictures, pictures, strict=True):
        expect_fit(path, picture, light, asked.area)
    if not asked.lora:
        return open_pipeline(asked, memory=asked.memory)
    adapters_of(Checkpoint(asked.model), asked.lora)
    pipe = open_pipeline(asked, memory=asked.memory)
    if steps := steps_of(asked.lora):
        load_lightning(pipe, asked.lora, asked.lora_scale)
        print(f"{asked.lora}: made for {steps} steps without guidance, with a schedule of its own")
    else:
        load_lora(pipe.transformer, asked.lora, asked.lora_scale)
    return pipe


@one_line("edit")
def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = command_line()
    asked = parser.parse_intermixed_args(arguments)
    check_together(parser, asked)
    asked.steps = asked.steps or steps_of(asked.lora) or 50
    how = {"prompt": asked.prompt, "width": asked.width, "height": asked.height, "num_inference_steps": asked.steps}
    how |= {"negative_prompt": asked.negative, "true_cfg_scale": asked.guidance}
    how["generator"] = torch.Generator().manual_seed(asked.seed)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"edit: {message}", file=sys.stderr)
        pictures = [read_picture(path) for path in asked.pictures]
        with joined(asked.device) as asked.device:
            start = time.perf_counter()
            pipe = open_model(asked, pictures)
            loaded = time.perf_counter()
            image = pipe.edit(pictures, area=asked.area, **how) if pictures else pipe.generate(**how)
            if rank():
                return
    out = asked.out or free_name(asked.pictures)
    with whole_file(out) as path:
        image.save(path, Image.registered_extensions()[out.suffix.lower()])  # it has another suffix until it is whole
    seconds = f"{time.perf_counter() - loaded:.1f} s, after {loaded - start:.1f} s of loading"
    print(f"{out}: {image.width}x{image.height} pixels, {asked.steps} steps in {seconds}")


if __name__ == "__main__":
    main()

"""What the commands share: the options that open a model, numbers with a range, and an end in one line.

    python -m minqwen.edit, minqwen.precompute, minqwen.finetune, minqwen.shrink, minqwen.doctor,
    minqwen.verify

What is wrong with an option is said before a model is loaded, which may take minutes; argparse puts the option's name
before it. A command ends with 2 for a wrong option, 130 for Ctrl-C (1 where a run goes on later), 1 for any other error
that is foreseen.
The surprise: float("nan") is a number, and no comparison finds it too small or too large; it has to be found inside.
Tests: tests/test_edit_command.py.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from numbers import Real

import torch
from PIL import Image

from minqwen.checkpoint import choose_device
from minqwen.files import content_of
from minqwen.images import UNSEEN, expect_no_strip, load_image
from minqwen.parallel import first_to_say
from minqwen.pipeline import QwenImagePipeline, area_seen


class Parser(argparse.ArgumentParser):
    """The options of python -m minqwen.NAME, defaults in --help; an error is one line."""

    def __init__(self, name: str, purpose: str, example: str):
        layout = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(f"python -m minqwen.{name}", description=purpose, epilog=example, formatter_class=layout)
        self.name = name

    def error(self, message: str) -> None:
        self.exit(2, f"{self.name}: {message}\n" if first_to_say() else None)


def number(kind: type, least: float, most: float) -> Callable[[str], float]:
    """The type of an option: an int or a float from `least` to `most`."""

    def read(text: str) -> float:
        with suppress(ValueError):
            if least <= (value := kind(text)) <= most:
                return value
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"expected {what} from {least} to {most}, got {text!r}")

    return read


def keyword(name: str, value: object, read: Callable[[str], float]) -> float:
    """A number given in a call, read as the option of the command is; ValueError for another one or no number."""
    try:
        return read(str(value) if isinstance(value, Real) else repr(value))
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{name}: {error}") from None


def device(text: str) -> str:
    """The type of --device: its name, if a number can be put there and read back."""
    try:
        return str(choose_device(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def model_options(parser: argparse.ArgumentParser) -> None:
    """--model, --device and --dtype."""
    add = parser.add_argument
    add("--model", default="Qwen/Qwen-Image-Edit", help="checkpoint folder (data/tiny) or hub repository")
    add("--device", type=device, help="cuda, mps or cpu; None: the first of these that is there")
    add("--dtype", choices=("bfloat16", "float32"), help="of the model; None: bfloat16 on a GPU, else float32")


def open_pipeline(
    asked: argparse.Namespace, without: tuple[str, ...] = (), memory: str | float = "resident"
) -> QwenImagePipeline:
    """The pipeline that `model_options` ask for."""
    dtype = asked.dtype and getattr(torch, asked.dtype)
    return QwenImagePipeline.from_pretrained(asked.model, asked.device, dtype, without, memory)


def read_picture(path: str) -> Image.Image:
    """A picture that is given to a command; ValueError that names it, also where it is too long for any model."""
    image = load_image(path)
    with content_of(path):
        expect_no_strip(*image.size, UNSEEN)
    return image


def expect_fit(path: str, image: Image.Image, light: QwenImagePipeline, area: int | None = None) -> None:
    """Raise ValueError for a picture that is too long at the working size of the pipeline, which needs no weights."""
    with content_of(path):
        expect_no_strip(*image.size, area_seen(light.edit_template, area or light.area))


@contextmanager
def one_line(command: str, interrupted: str = "interrupted", status: int = 130) -> Iterator[None]:
    """Decorates a command's main: errors that are foreseen, and Ctrl-C, end it with one line and no traceback.

    interrupted, status: what it says and ends with at Ctrl-C.
    """
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # a service has none, and a bar needs it
    with suppress(AttributeError):  # of what stands in for a console
        sys.stdout.reconfigure(errors="replace")  # one of Windows may lack a letter of a folder's name
    try:
        yield
    except KeyboardInterrupt:
        if first_to_say():
            print(f"{command}: {interrupted}", file=sys.stderr)
        raise SystemExit(status) from None
    except UnicodeEncodeError as error:  # half an emoji, or a name on a disk of another system
        _end(f"{command}: {error.object!r} is no text in UTF-8: use another name")
    except (ValueError, OSError, FloatingPointError, torch.OutOfMemoryError) as error:
        _end(f"{command}: {error}")


def _end(message: str) -> None:
    raise SystemExit(message if first_to_say() else 1) from None

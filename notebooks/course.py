"""What every chapter starts and ends with: where things lie, which tier runs, one style of figures, the ledger."""

import os
import platform
import random
import sys
import time
from importlib.util import find_spec
from pathlib import Path

if MISSING := [
    name
    for name in "einops filelock huggingface_hub matplotlib minqwen numpy PIL safetensors tokenizers torch tqdm".split()
    if find_spec(name) is None
]:
    raise ImportError(
        f"not installed for {sys.executable}: {', '.join(MISSING)}. Choose the kernel of the environment that make lab "
        'set up, or, in the repository\'s folder, install what the course needs: pip install -e ".[course]"'
    )

import matplotlib.pyplot as plt
import numpy as np
import torch

try:
    import resource
except ImportError:  # Windows has none: the ledger then leaves memory out
    resource = None

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "data" / "tiny"
TIER = os.environ.get("MINQWEN_TIER", "tiny")  # "slice" and "full" open the released weights
MODEL = TINY if TIER == "tiny" else os.environ.get("MINQWEN_MODEL", "Qwen/Qwen-Image-Edit")
DEVICE = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
BLUE, GREEN, RED, GREY, ORANGE = "#3b76af", "#4f9a5b", "#c0504d", "#8a8a8a", "#d98b30"  # image, text, time, rest, marks
_STARTED = time.time()


def style() -> None:
    """One look for all figures."""
    plt.rcParams |= {
        "figure.facecolor": "white",  # readable on a dark page too
        "figure.constrained_layout.use": True,
        "figure.dpi": 80,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "axes.labelsize": 9,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "image.interpolation": "nearest",
    }


def start(seed: int = 0) -> None:
    """Seeds every generator, sets the style of figures, prints what this run runs on."""
    if TIER not in ("tiny", "slice", "full"):
        raise ValueError(f"MINQWEN_TIER is {TIER!r}: expected tiny, slice or full")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    style()
    print(f"tier {TIER} | {DEVICE} | Python {platform.python_version()} | PyTorch {torch.__version__.split('+')[0]}")


def ledger(checkpoint=None) -> None:
    """What this run took: seconds, memory, what was read over the network (of the chapter's Checkpoint), on what."""
    line = [f"tier {TIER}", f"{time.time() - _STARTED:.0f} s"]
    if resource is not None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)
        line.append(f"{peak:.2f} GB peak memory")
    if torch.cuda.is_available():
        line.append(f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB peak GPU memory, {torch.cuda.get_device_name()}")
    if checkpoint is not None:
        line.append(f"{checkpoint.fetched / 1e6:.1f} MB read over the network")
    threads = torch.get_num_threads()
    line.append(f"{threads} thread{'s' if threads > 1 else ''}, {platform.machine()}")
    print(" | ".join(line))


def weights_of(checkpoint, component: str, prefix: str) -> dict:
    """The tensors of a component whose names start with prefix, in float32: name -> Tensor.

    A checkpoint that minqwen.shrink wrote holds codes and scales; from it come the weights that they stand for.
    """
    from minqwen.pipeline import PARTS
    from minqwen.quantize import QuantizedLinear

    stored = checkpoint.tensors(component, prefix)
    codes = {name: stored[name].dtype for name in stored if f"{name}_scale" in stored}
    if codes:
        rename = getattr(PARTS[component], "released_name", str)
        with torch.device("meta"):
            shapes = PARTS[component](**checkpoint.config(f"{component}/config.json")).state_dict()
    for name, dtype in codes.items():
        out, width = shapes[rename(name)].shape
        layer = QuantizedLinear(width, out, 8 if dtype == torch.int8 else 4, bias=False, device="meta")
        found = {end: stored.pop(f"{name}{end}", None) for end in ("", "_scale", "_offset")}
        layer.load_state_dict({f"weight{end}": t for end, t in found.items() if t is not None}, assign=True)
        stored[name] = layer.unpacked()
    return {name: tensor.float() for name, tensor in stored.items()}


def show(pictures, titles=None, size: float = 1.9, rows: int = 1):
    """Pictures (PIL images or arrays) side by side, small ones enlarged without smoothing."""
    columns = -(-len(pictures) // rows)
    figure, axes = plt.subplots(rows, columns, figsize=(size * columns, (size + 0.45) * rows), squeeze=False)
    for axis, picture, title in zip(axes.flat, pictures, titles or [""] * len(pictures), strict=False):
        axis.imshow(picture, cmap="gray")
        axis.set_title(title)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    plt.show()


def matrix(axis, numbers: torch.Tensor, x: float, y: float, colour: str, name: str = "") -> float:
    """A matrix as a table of numbers, its upper left corner at (x, y); returns where its right side is."""
    rows, columns = numbers.shape
    for i, row in enumerate(numbers.tolist()):
        for j, number in enumerate(row):
            axis.add_patch(plt.Rectangle((x + j, y - i - 1), 1, 1, facecolor=colour, edgecolor="white", lw=2))
            axis.text(x + j + 0.5, y - i - 0.5, f"{number:g}", ha="center", va="center", fontsize=11)
    axis.text(x + columns / 2, y + 0.3, name, ha="center", fontsize=10)
    return x + columns


def flow(boxes: dict, arrows: list, size=(10, 4), here: str | None = None):
    """A flow chart. boxes: name -> (x, y, title, detail, colour) in a plane of units of one box; arrows: name pairs."""
    figure, axis = plt.subplots(figsize=size)
    width, height = 0.86, 0.62
    for name, (x, y, title, detail, colour) in boxes.items():
        edge, line = (RED, 3) if name == here else ("#444444", 1)
        shape = plt.Rectangle((x - width / 2, y - height / 2), width, height, facecolor=colour, edgecolor=edge, lw=line)
        axis.add_patch(shape)
        axis.text(x, y + (0.13 if detail else 0), title, ha="center", va="center", fontsize=9, weight="bold")
        axis.text(x, y - 0.13, detail, ha="center", va="center", fontsize=8)
    for a, b in arrows:
        (ax, ay), (bx, by) = boxes[a][:2], boxes[b][:2]
        if abs(bx - ax) > 1.5 * abs(by - ay):  # beside each other, else one above the other
            ends = (ax + np.sign(bx - ax) * width / 2, ay), (bx - np.sign(bx - ax) * width / 2, by)
        else:
            ends = (ax, ay + np.sign(by - ay) * height / 2), (bx, by - np.sign(by - ay) * height / 2)
        axis.annotate("", xy=ends[1], xytext=ends[0], arrowprops={"arrowstyle": "->", "color": "#444444", "lw": 1.2})
    xs, ys = [b[0] for b in boxes.values()], [b[1] for b in boxes.values()]
    axis.set(xlim=(min(xs) - 0.5, max(xs) + 0.5), ylim=(min(ys) - 0.4, max(ys) + 0.4))
    axis.axis("off")
    plt.show()


def model_map(here: str) -> None:
    """The files of the model in the order in which data pass through them, with the chapter's own framed in red."""
    text, picture, core = "#dcefdc", "#dceaf7", "#f9dede"
    boxes = {
        "prompt": (0, 2, "prompt", "chapter 07", text),
        "text_encoder": (1, 2, "text_encoder", "vision, chapter 07", text),
        "vae": (0, 1, "vae", "encode, chapter 06", picture),
        "images": (1, 1, "images", "pack, chapter 06", picture),
        "sampling": (0, 0, "sampling", "chapter 09", core),
        "timestep": (1, 0, "timestep", "chapter 01", core),
        "rope": (2, 2, "rope", "chapter 02", core),
        "attention": (3, 2, "attention", "chapter 03", core),
        "transformer": (2, 1, "transformer", "chapter 05", core),
        "block": (3, 1, "block", "chapter 04", core),
        "decode": (4, 1, "vae", "decode, chapter 06", picture),
        "precompute": (3, 0, "precompute", "chapter 08", picture),
        "finetune": (4, 0, "finetune, lora", "chapter 10", core),
    }
    arrows = [("prompt", "text_encoder"), ("text_encoder", "transformer"), ("vae", "images"), ("images", "transformer")]
    arrows += [("sampling", "timestep"), ("timestep", "transformer"), ("rope", "attention"), ("attention", "block")]
    arrows += [("transformer", "block"), ("block", "decode")]
    arrows += [("precompute", "finetune")]
    flow(boxes, arrows, size=(9.5, 3.4), here=here)

"""What this machine can do with the real model: which way fits, at what peak, about how long a step takes.

    python -m minqwen.doctor                     the released models, whole and shrunk; nothing is downloaded
    python -m minqwen.doctor --model data/tiny   a checkpoint in a folder, from the headers of its files

Of a released model the names and shapes are known without its files. What they need is counted; how fast this machine
is gets measured, on one block, in a few seconds.
The surprise: what decides is rarely the whole of the weights. A card of 8 GB runs 20 billion of them, if the host has
room for the others or the disk is fast.
Tests: tests/test_doctor.py. Chapter 11.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from minqwen.checkpoint import Checkpoint, choose_device
from minqwen.command import Parser, device, number, one_line
from minqwen.images import MAX_AREA
from minqwen.memory import Shell
from minqwen.pipeline import AREA, PARTS
from minqwen.plans import PROBE, SPARE, Plan, faster_dtype, free_memory, in_bytes, plans, rates
from minqwen.quantize import QuantizedLinear, bits_of

BITS = {16: "as released", 8: "shrunk to 8 bits", 4: "shrunk to 4 bits"}


class Machine(NamedTuple):
    """Bytes that are free on its device, and on its host for blocks that stream; operations and bytes a second."""

    name: str
    free: float
    host: float
    rate: float  # in bfloat16
    link: float  # from the host's memory to the device
    disk: float
    beside: bool = True  # blocks come while it computes

    def seconds(self, plan: Plan) -> float:
        """Of a step."""
        link = self.link if plan.kept <= self.host else min(self.link, self.disk)
        return plan.seconds(self.rate, link, self.beside)


class Released(Shell):
    """What `plans` and `rates` ask of a Shell, for a part of a released model: the weights are zeros."""

    def __init__(self, name: str, bits: int, device: torch.device | str, dtype: torch.dtype, **config):
        with torch.device("meta"):
            self.module = PARTS[name](**config).to(torch.bfloat16)
        for path, layer in list(self.module.named_modules()) if bits < 16 else ():
            if type(layer) is nn.Linear and bits_of(path, bits):
                sizes = layer.in_features, layer.out_features, bits_of(path, bits), layer.bias is not None
                self.module.set_submodule(path, QuantizedLinear(*sizes, device="meta", dtype=torch.bfloat16))
        self.stored = self.module.state_dict()
        self.device, self.dtype, self.mapped = torch.device(device), dtype, {}

    def fetch(self, name: str) -> Tensor:
        return torch.zeros(self.stored[name].shape, dtype=self.type_of(name)).to(self.device)


def released(bits: int, device="cpu", dtype: torch.dtype = torch.bfloat16) -> dict[str, Shell]:
    """The parts of the released models, which all have the same, at so many bits; 16: as they are."""
    return {name: Released(name, bits, device, dtype) for name in PARTS}


def disk_rate(folder: str | os.PathLike) -> float:
    """Bytes a second at which a file comes from the disk of a folder; infinite where that cannot be found out."""
    if not hasattr(os, "posix_fadvise"):
        return float("inf")
    with tempfile.TemporaryFile("w+b", dir=folder) as file:
        file.write(bytes(PROBE))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, PROBE, os.POSIX_FADV_DONTNEED)  # what is still in memory is not asked for
        start = time.perf_counter()
        file.seek(0)
        while file.read(2**22):
            pass
        return PROBE / (time.perf_counter() - start)


def python_itself() -> int:
    """Bytes of the host's memory that this process holds, Python and PyTorch; 0 where that cannot be found out."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return 1024 * next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))
    except (OSError, StopIteration):
        return 0


def here(shells: dict[str, Shell], area: int, pictures: int, disk: float) -> Machine:
    """This machine, timed with these parts."""
    shell, host = shells["transformer"], free_memory(torch.device("cpu"))
    measured = *rates(shell, area, pictures), disk, shell.device.type != "cpu"
    return Machine("this machine", free_memory(shell.device), host, *measured)


def lines(name: str, shells: dict[str, Shell], machine: Machine, asked: argparse.Namespace) -> Iterator[tuple]:
    """A row of the table for each way to hold a model."""
    for plan in plans(shells, asked.area, asked.pictures):
        fits = plan.peak <= SPARE * machine.free
        times = [in_time(count * machine.seconds(plan)) if fits else "" for count in (1, asked.steps)]
        yield name, plan.way, in_bytes(plan.peak), "yes" if fits else "no", *times


def in_time(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.2g} s"


def table(head: str, rows: Iterable[tuple[str, ...]]) -> str:
    """Markdown."""
    return "\n".join([head, "|" + "---|" * head.count(" | ") + "---|", *(f"| {' | '.join(row)} |" for row in rows)])


def command_line() -> Parser:
    """The command's options."""
    purpose = "What fits on this machine, by which way, at what peak, and about how long it takes."
    parser = Parser("doctor", purpose, "python -m minqwen.doctor --area 262144 --steps 8")
    add = parser.add_argument
    add("--model", metavar="FOLDER", help="a checkpoint on this disk; None: the released models, without a download")
    add("--device", type=device, help="cuda, mps or cpu; None: the first of these that is there")
    add("--dtype", choices=("bfloat16", "float32"), help="of the model; None: bfloat16 on a GPU, else the faster one")
    add("--area", type=number(int, 32**2, MAX_AREA), default=AREA, help="pixels; 1024x1024 is 1048576")
    add("--pictures", type=number(int, 0, 9), default=1, help="that are edited; 0: drawing from words")
    add("--steps", type=number(int, 1, 10**4), default=50, help="of a picture, with guidance")
    return parser


@one_line("doctor")
def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = command_line()
    asked = parser.parse_args(arguments)
    if asked.model and not os.path.isdir(asked.model):
        parser.error(f"--model: no such folder: {asked.model} (the released models are looked at without it)")
    where = choose_device(asked.device)
    dtype = getattr(torch, asked.dtype) if asked.dtype else faster_dtype() if where.type == "cpu" else torch.bfloat16
    memory = f"{in_bytes(free_memory(where))} free on it, {in_bytes(free_memory(torch.device('cpu')))} on the host"
    disk, what = disk_rate("."), f"an edit of {asked.pictures} picture(s)" if asked.pictures else "a drawing"
    print(f"{where}, {str(dtype).removeprefix('torch.')}: {memory}; this disk reads {in_bytes(disk)} a second")
    print(f"{what}, {asked.area} pixels, {asked.steps} steps with guidance:\n", flush=True)
    if asked.model:
        checkpoint = Checkpoint(asked.model)
        found = {asked.model: {name: Shell(checkpoint, PARTS[name], name, where, dtype) for name in PARTS}}
    else:
        found = {name: released(bits, where, dtype) for bits, name in BITS.items()}
    rows = []
    for name, shells in tqdm(found.items(), desc="timing a block", unit=" models", leave=False):
        rows += lines(name, shells, here(shells, asked.area, asked.pictures, disk), asked)
    print(table("| weights | way | at the peak | fits | a step | a picture |", rows))
    if where.type == "cpu" and (itself := python_itself()):
        print(f"\nTo each peak come {in_bytes(itself)}, which Python and PyTorch hold themselves.")
    print("\nThe way is chosen by itself, or by --memory; python -m minqwen.shrink makes weights of fewer bits.")


if __name__ == "__main__":
    main()

"""Which way to hold a model fits into this machine, what it needs at the peak, and about how long a step takes.

    shells of the parts, the working size  ->  a Plan for each way of memory.py; `choose` takes the fastest that fits

Weights are counted from names and shapes, to the byte. What lives beside them is counted in numbers a token (the
transformer) and a pixel (the autoencoder), which were measured; time follows from one block that is run here.
The surprise: at few bits the autoencoder's activations, not the weights, can be what a large picture needs most.
Tests: tests/test_memory.py. Chapter 11.
"""

import os
from collections.abc import Callable, Container
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.benchmark import Timer

from minqwen.checkpoint import BLOCK, Checkpoint
from minqwen.memory import BLOCKS, MODULATION, Shell, Turns, unread_layers

WAYS = ("resident", "turns", "stream")
SPARE = 0.9  # the share of free memory that is counted on
ACTIVATIONS = 22  # numbers a token and channel that live at once in a forward pass, measured on a CPU at full width
PIXEL = 700  # numbers a pixel that live at once in the autoencoder, measured in the same way
TILE = 1024 * 1024  # pixels; of a larger picture the autoencoder sees a part at a time
LEVELS = 50  # of noise, for which the table is counted
PROBE = 2**28  # bytes that are fetched, or written and read again, to time it; two blocks at least
LARGE = 2**32  # bytes of a transformer from which a CPU is asked in which dtype it is faster
TOGETHER = 1024  # up to so many image tokens both prompts share one forward pass: fewer, fuller operations


class Plan(NamedTuple):
    """A way to hold the model: its name, bytes on the device at the peak, bytes fetched and operations in each step.

    kept: of what is fetched, once; the host has room for it, or it comes from the disk.
    """

    way: str
    peak: int
    fetched: int
    operations: float
    kept: int = 0

    def __str__(self) -> str:
        return f"{self.way}, about {in_bytes(self.peak)} at the peak"

    def seconds(self, rate: float, link: float, beside: bool) -> float:
        """Of a step, on a device of so many operations a second, to which so many bytes a second come.

        beside: blocks are fetched while it computes, as on a GPU; a CPU does both with the same cores.
        """
        parts = self.operations / rate, self.fetched / link
        return max(parts) if beside else sum(parts)


def plans(shells: dict[str, Shell], area: int, pictures: int = 1) -> list[Plan]:
    """Every way, the fastest first, for a guided edit of so many pictures at so many pixels; of none, for a drawing."""
    whole, without_table, streamed = {}, {}, {}
    for name, shell in shells.items():
        blocks, unread = {"": 0}, unread_layers(shell.stored)
        for each in shell.stored:
            if MODULATION not in each and not each.startswith(unread):
                blocks[BLOCK.match(each)[0]] = blocks.get(BLOCK.match(each)[0], 0) + shell.size(each)
        whole[name] = sum(map(shell.size, shell.stored))
        without_table[name] = sum(blocks.values())
        streamed[name] = blocks.pop("") + (2 if shell.copies else 1) * max(blocks.values(), default=0)
    itemsize = next(iter(shells.values())).dtype.itemsize
    painting = PIXEL * min(area, TILE) * itemsize
    computing = operations = table = fetched = 0
    if "transformer" in shells:
        model, (image, text) = shells["transformer"].module, tokens_of(area, pictures)
        width, layers = model.img_in.out_features, len(model.transformer_blocks)
        passes = 1 if image <= TOGETHER else 2
        computing = 2 // passes * (image + text) * ACTIVATIONS * width * itemsize
        operations = 2 * layers * block_operations(width, image, text)
        table, fetched = LEVELS * 12 * width * layers * itemsize, passes * without_table["transformer"]

    def by_turns(sizes: dict[str, int]) -> int:
        others = sum(size for name, size in sizes.items() if name != "transformer")
        return max(sizes.get("transformer", 0) + table + computing, others + painting)

    return [
        Plan("resident", sum(whole.values()) + max(computing, painting), 0, operations),
        Plan("turns", by_turns(without_table), 0, operations),
        Plan("stream", by_turns(streamed), fetched, operations, without_table.get("transformer", 0)),
    ]


def tokens_of(area: int, pictures: int) -> tuple[int, int]:
    """About how many tokens pass through the transformer: of the new picture and of those given, and of the text."""
    return (1 + pictures) * area // 256, pictures * area // 784 + 64


def block_operations(width: int, image: int, text: int) -> float:
    """Of one pass through a block: a product and a sum for each weight and token, and for each pair of tokens."""
    tokens = image + text
    return 2 * 12 * width**2 * tokens + 4 * width * tokens**2


def hold(pipe, shells: dict[str, Shell], area: int, memory: str | float) -> None:
    """Give a pipeline its parts: as attributes, or by turns, and then a line says what that means here."""
    if not shells:
        return
    device = next(iter(shells.values())).device
    plan = choose(plans(shells, area), memory, device)
    if plan.way == "resident":
        for name, shell in shells.items():
            setattr(pipe, name, shell.open())
        return
    step, beside = 0, device.type != "cpu"
    if "transformer" in shells:
        step = plan.seconds(*rates(shells["transformer"], area, streams=plan.fetched > 0), beside)
    print(f"memory: {plan}; a step takes about {step:.1f} s")
    pipe.turns = Turns(shells, streams=plan.way == "stream")
    for name in shells:
        delattr(pipe, name)


def choose(found: list[Plan], memory: str | float, device: torch.device) -> Plan:
    """The plan that is named, or the first that fits into a budget in GiB, or into what is free on this machine.

    Raises ValueError for a word that is none, and for a budget into which nothing fits.
    """
    if isinstance(memory, str) and memory in WAYS:
        return found[WAYS.index(memory)]
    if memory != "auto" and (isinstance(memory, bool) or not (isinstance(memory, int | float) and memory > 0)):
        raise ValueError(f"memory={memory!r}: expected auto, {', '.join(WAYS)}, or a number of GiB")
    budget = SPARE * free_memory(device) if memory == "auto" else memory * 2**30
    fitting = [plan for plan in found if plan.peak <= budget]
    if not fitting:
        least = f"this checkpoint needs about {in_bytes(found[-1].peak)}, streamed, at its working size"
        raise ValueError(f"memory={memory}: {in_bytes(budget)} are too little; {least}")
    return fitting[0]


def free_memory(device: torch.device) -> float:
    """Bytes that are free on a device; on a CPU of which nobody says it, half of all there is."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return 1024 * next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        known = "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ())
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2 if known else float("inf")


def default_dtype(device: torch.device, checkpoint: Checkpoint, parts: Container[str]) -> torch.dtype:
    """bfloat16; on a CPU float32, except for a large transformer where the CPU multiplies faster in bfloat16."""
    if device.type != "cpu":
        return torch.bfloat16
    if "transformer" not in parts or sum(checkpoint.stored_bytes("transformer").values()) < LARGE:
        return torch.float32
    return faster_dtype()


def faster_dtype() -> torch.dtype:
    """The one in which this CPU multiplies faster."""
    matrices = {dtype: torch.ones(1024, 1024, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    return min(matrices, key=lambda dtype: clocked(lambda: matrices[dtype] @ matrices[dtype]))


def rates(shell: Shell, area: int, pictures: int = 1, streams: bool = True) -> tuple[float, float]:
    """Operations a second in a transformer's block with so many tokens, and bytes a second at which it is fetched.

    On a CPU both take the same cores, and are slower together: there the time of fetching is what it adds to computing.
    """
    (image, text), width = tokens_of(area, pictures), shell.module.img_in.out_features
    rows, image, text = (2 if image <= TOGETHER else 1), min(image, TOGETHER), min(text, TOGETHER)
    run = block_run(shell, rows, image, text)
    alone = clocked(run)
    rate = rows * block_operations(width, image, text) / alone
    if not streams:
        return rate, float("inf")
    walk = shell.streamed(BLOCKS, lambda name: MODULATION not in name)
    sizes = [sum(map(shell.size, names.values())) for names in walk.names]
    count = max(2, min(len(sizes), PROBE // sizes[0]))
    shared = shell.device.type == "cpu"

    def some_blocks() -> None:
        for _ in zip(range(count - 1), walk, strict=False):  # while one is used, the next comes
            if shared:
                run()

    added = clocked(some_blocks) - shared * (count - 1) * alone
    return rate, sum(sizes[:count]) / max(added, 1e-9)


def block_run(shell: Shell, rows: int, image: int, text: int) -> Callable[[], object]:
    """A pass of so many tokens through a transformer's first block; its weights are zeros: no faster than others."""
    block, width = deepcopy(shell.module.transformer_blocks[0]), shell.module.img_in.out_features
    block.img_mod = block.txt_mod = nn.Identity()  # the table stands in for them
    like = {"dtype": shell.dtype, "device": shell.device}
    types = {name: shell.type_of(f"{BLOCKS}.0.{name}") for name in block.state_dict()}
    zeros = {n: torch.zeros(t.shape, dtype=types[n], device=shell.device) for n, t in block.state_dict().items()}
    block.load_state_dict(zeros, assign=True)
    of_level = torch.zeros(rows, 6 * width, **like)
    img, txt = (torch.zeros(rows, count, width, **like) for count in (image, text))
    vectors = (torch.cat([of_level, of_level]), of_level) if block.zero_cond_t else (of_level, of_level)

    @torch.inference_mode()
    def run() -> float:
        return block(img, txt, None, target_tokens=image // 2, modulations=vectors)[1].sum().item()

    return run


def clocked(work: Callable[[], object]) -> float:
    """Seconds that it takes once it has run before; of short work, the median of several runs."""
    timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.1).median


def in_bytes(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"

"""The real model in less memory than its weights take: parts by turns, a table for a third of them, blocks that stream.

    resident    every part on the device, whole: the fastest, 57.7 GB in bfloat16
    turns       text encoder and VAE go before the transformer comes, and come back after it. What its modulation
                layers, a third of it, say at each noise level is computed once into a table; they stay away.
                So do the layers with which the last block would change the text, which nobody reads any more
    stream      the same, and of a part's blocks only two are there: one computes while the next is fetched

Weights are mapped from their files: what is not used is not read, and what was dropped can be read again.
The surprise: the modulation layers, 6.8 of 20.4 billion weights, see nothing of picture or words. All that goes in is
the noise level, and the noise levels of a run are known before its first step.
plans.py chooses between them. Tests: tests/test_memory.py. Chapter 11.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn
from tqdm import tqdm

from minqwen.checkpoint import BLOCK, Checkpoint
from minqwen.lora import adapters
from minqwen.quantize import keeps_dtype
from minqwen.transformer import Modulations

MODULATION = "_mod."  # in the names of a block's modulation layers
BLOCKS = "transformer_blocks"
UNREAD = ("attn.add_q_proj", "attn.to_add_out", "txt_mlp")  # in the last block: what they give goes to nobody


class Shell:
    """A part of a pipeline whose weights come and go. Adapters that are put on it stay; any other change is lost.

    Raises as Checkpoint.load does. Until `open` and after `close` its module is on the meta device.
    """

    def __init__(
        self, checkpoint: Checkpoint, module_class: type[nn.Module], component: str, device, dtype: torch.dtype
    ):
        self.module, _ = checkpoint.skeleton(module_class, component)
        self.stored = self.module.state_dict()  # on the meta device, in the dtypes of the files
        self.checkpoint, self.mapped, self.places = checkpoint, {}, {}
        rename = getattr(module_class, "released_name", str)
        for theirs, file in checkpoint.weight_map(component).items():
            if name := rename(theirs):
                self.places.setdefault(BLOCK.match(name)[0], {})[name] = theirs, file
        self.component, self.device, self.dtype = component, torch.device(device), dtype
        self.left_out: tuple[str, ...] = ()

    def arrange(self, streams: bool) -> None:
        """What `open` leaves out: a transformer's modulation and unread layers; streams: blocks, which come singly."""
        self.module.comes_and_goes = True
        unread = unread_layers(self.stored)
        for name in unread:
            self.module.get_submodule(name).forward = nn.Identity().forward
        self.left_out = tuple(name for name in self.stored if MODULATION in name or name.startswith(unread))
        blocks = {BLOCK.match(each)[0].rsplit(".", 2)[0] for each in self.stored} - {""}  # "transformer_blocks"
        for name in sorted(blocks) if streams else ():
            self.module.set_submodule(name, self.streamed(name, lambda each: each not in self.left_out))
            self.left_out += tuple(each for each in self.stored if each.startswith(f"{name}."))

    def streamed(self, name: str, wanted: Callable[[str], bool]) -> "StreamedBlocks":
        """A list of blocks that get those of their tensors which are wanted, one block at a time."""
        pairs = []
        for number, block in self.module.get_submodule(name).named_children():
            prefix = f"{name}.{number}."
            names = [each for each in self.stored if each.startswith(prefix) and wanted(each)]
            pairs.append((block, {each.removeprefix(prefix): each for each in names}))
        return StreamedBlocks(pairs, self.fetch, self.device)

    def fetch(self, name: str) -> Tensor:
        """A tensor where and in the dtype in which it computes.

        Each block is mapped anew, and only the last one is kept: what was read of the others leaves the memory.
        """
        block = BLOCK.match(name)[0]
        if block not in self.mapped:
            tensors = self.checkpoint.read(dict(self.places[block].values()))
            self.mapped = {block: {ours: tensors[theirs] for ours, (theirs, _) in self.places[block].items()}}
        return self.mapped[block][name].to(self.device, self.type_of(name), non_blocking=True)

    def type_of(self, name: str) -> torch.dtype:
        """The dtype of a tensor once it is fetched."""
        return self.stored[name].dtype if keeps_dtype(name, self.stored[name]) else self.dtype

    @property
    def copies(self) -> bool:
        """Whether what is fetched is a copy; else it is the mapped file, of which no more is there than is used."""
        same = (self.type_of(name) == tensor.dtype for name, tensor in self.stored.items())
        return self.device.type != "cpu" or not all(same)

    def size(self, name: str) -> int:
        """Its bytes then."""
        return self.stored[name].numel() * self.type_of(name).itemsize

    @torch.inference_mode(False)  # a gradient may go through them later
    def open(self) -> nn.Module:
        names = [name for name in self.stored if name not in self.left_out]
        bar = tqdm(names, desc=f"loading {self.component}", unit=" tensors", leave=False, disable=len(names) < 500)
        self.module.load_state_dict({name: self.fetch(name) for name in bar}, strict=False, assign=True)
        return self.module

    def close(self) -> None:
        self.module.load_state_dict(self.stored, strict=False, assign=True)

    @torch.no_grad()
    def modulations(self, sigmas: Tensor, keep_on: torch.device | str | None = None) -> dict[float, Modulations]:
        """What each noise level says to every block of an open transformer and to its exit, made block by block.

        keep_on: where the table lies, by default where the transformer is.
        """
        keep_on, like = keep_on or self.device, torch.empty(0, dtype=self.dtype, device=self.device)
        temb = self.module.embed_timestep(sigmas.to(self.device), like)
        blocks = self.streamed(BLOCKS, lambda name: MODULATION in name)
        of_blocks = [tuple(part.to(keep_on) for part in block.modulations(temb)) for block in blocks]
        self.mapped = {}  # what was read of the last block
        of_exit = self.module.norm_out.modulations(temb[: len(sigmas)]).to(keep_on)
        return {
            sigma: ([at_level(vectors, row) for vectors in of_blocks], of_exit[row : row + 1])
            for row, sigma in enumerate(sigmas.tolist())
        }


class StreamedBlocks(nn.ModuleList):
    """Blocks whose weights are there while they are used: a walk through them fills one after the other."""

    def __init__(self, pairs: list[tuple[nn.Module, dict[str, str]]], fetch: Callable[[str], Tensor], device):
        super().__init__(block for block, _ in pairs)
        self.names, self.fetch_one = [names for _, names in pairs], fetch
        self.side = torch.cuda.Stream(device) if torch.device(device).type == "cuda" else None

    def __iter__(self) -> Iterator[nn.Module]:
        blocks = list(self._modules.values())
        with ThreadPoolExecutor(1) as beside:
            ahead = beside.submit(self.fetch, 0)
            for number, block in enumerate(blocks):
                tensors = self.arrived(ahead.result())
                if number + 1 < len(blocks):
                    ahead = beside.submit(self.fetch, number + 1)
                empty = {name: tensor.to("meta") for name, tensor in tensors.items()}
                block.load_state_dict(tensors, strict=False, assign=True)
                del tensors
                try:
                    yield block
                finally:
                    block.load_state_dict(empty, strict=False, assign=True)

    def fetch(self, number: int) -> dict[str, Tensor]:
        """A block's tensors; on CUDA they come on a second stream, while the first computes."""
        with torch.cuda.stream(self.side):  # None: as it is
            return {name: self.fetch_one(stored) for name, stored in self.names[number].items()}

    def arrived(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.side is not None:
            here = torch.cuda.current_stream(self.side.device)
            here.wait_stream(self.side)
            for tensor in tensors.values():
                tensor.record_stream(here)  # its memory is not given away before this stream has used it
        return tensors


def at_level(vectors: tuple[Tensor, Tensor], row: int) -> tuple[Tensor, Tensor]:
    """Of a block's vectors those of one noise level: of the image (with zero_cond_t two rows) and of the text."""
    img, txt = vectors
    return img[row :: len(txt)], txt[row : row + 1]


def unread_layers(names: Iterable[str]) -> tuple[str, ...]:
    """Those of UNREAD in the last block of a transformer, by their whole names; none in another part."""
    last = max((int(name.split(".")[1]) for name in names if name.startswith(f"{BLOCKS}.")), default=None)
    return () if last is None else tuple(f"{BLOCKS}.{last}.{layer}" for layer in UNREAD)


class Turns:
    """The parts of a pipeline by name, opened when they are asked for; the transformer is never there with another."""

    def __init__(self, shells: dict[str, Shell], streams: bool):
        self.shells, self.opened, self.streams = shells, set(), streams
        first = next(iter(shells.values()))
        self.like = torch.empty(0, dtype=first.dtype, device=first.device)
        self.table = {}
        for shell in shells.values():
            shell.arrange(streams)

    def __getitem__(self, name: str) -> nn.Module:
        if name not in self.opened:
            for other in [each for each in self.opened if "transformer" in (each, name)]:
                self.shells[other].close()
                self.opened.remove(other)
            self.shells[name].open()
            self.opened.add(name)
        return self.shells[name].module

    def prepare(self, sigmas: Tensor) -> None:
        """Make the table for the noise levels of a run, unless it is there; always where adapters have a say in it."""
        adapted = any(MODULATION in name for name in adapters(self["transformer"]))
        if adapted or not set(sigmas.tolist()) <= self.table.keys():
            self.table = self.shells["transformer"].modulations(sigmas)

    def modulations(self, sigma: float) -> Modulations:
        """What the noise level sigma says; at a level that `prepare` was not told of it is computed now."""
        if sigma not in self.table and self["transformer"] is not None:  # which opens it
            self.table |= self.shells["transformer"].modulations(torch.tensor([sigma], dtype=torch.float64))
        return self.table[sigma]


class LevelTable:
    """What the noise levels 1 / count, 2 / count, ..., 1 say, in the host's memory: with it a transformer that is open
    by turns trains adapters, while its modulation layers stay away. Raises ValueError for adapters on those layers.
    """

    def __init__(self, turns: Turns, count: int):
        if any(MODULATION in name for name in adapters(turns["transformer"])):
            raise ValueError("adapters on modulation layers change what a table holds: train them with levels=0")
        levels = torch.arange(1, count + 1) / count
        self.count, self.said = count, list(turns.shells["transformer"].modulations(levels, "cpu").values())

    def nearest(self, sigmas: Tensor) -> Tensor:
        """The nearest of its levels, (B,)."""
        return (sigmas * self.count).round().clamp(min=1) / self.count

    def rows(self, sigmas: Tensor, device: torch.device) -> Modulations:
        """What levels of its own say to the samples of a batch; with zero_cond_t noisy rows come before clean ones."""
        said = [self.said[round(sigma * self.count) - 1] for sigma in sigmas.tolist()]
        of_blocks = []
        for vectors in zip(*(blocks for blocks, _ in said), strict=True):
            img, txt = zip(*vectors, strict=True)
            of_blocks.append((torch.stack(img, dim=1).flatten(0, 1).to(device), torch.cat(txt).to(device)))
        return of_blocks, torch.cat([of_exit for _, of_exit in said]).to(device)

"""Several cards, several machines: torchrun starts a process for each, torch's own collectives move what moves.

    torchrun --nproc-per-node 2 -m minqwen.finetune cache/ --out run/
    torchrun --nproc-per-node 4 -m minqwen.edit photo.jpg "make it winter"
    torchrun --nproc-per-node 8 -m minqwen.precompute images/ --cache cache/

Training shares out the samples of each step, and its frozen weights (FSDP2: each process holds a part of every matrix
and borrows the others when a block runs). An edit gives guidance's two passes to two halves of the processes, and
shares out the picture's tokens within each half. Alone, every function here does nothing.
The surprise: attention is the one place where a token needs the others. Each process asks for its own tokens alone, but
must have the keys and values of all.
Tests: tests/test_parallel.py. Chapter 11.
"""

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from math import ceil, prod
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minqwen.checkpoint import Checkpoint, assign
from minqwen.quantize import keeps_dtype


def rank() -> int:
    """Of this process among all; 0 if it is alone."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextmanager
def joined(device: str | None = None) -> Iterator[str | None]:
    """Under torchrun this process joins the others, and only the first of them speaks; alone nothing changes.

    Yields the device: on CUDA each process has the card of its number. Raises ValueError if there are too few cards.
    """
    if "LOCAL_RANK" not in os.environ or dist.is_initialized():
        yield device
        return
    number, cuda = int(os.environ["LOCAL_RANK"]), torch.cuda.is_available() and device != "cpu"
    if cuda and (wanted := int(os.environ["LOCAL_WORLD_SIZE"])) > (there := torch.cuda.device_count()):
        raise ValueError(f"{wanted} processes on a machine of {there} card(s): give torchrun --nproc-per-node {there}")
    if cuda:
        torch.cuda.set_device(number)
    there = store()
    place = {"store": there, "rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
    dist.init_process_group("nccl" if cuda else "gloo", **(place if there else {}))
    with ExitStack() as stack:
        if rank():
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        yield f"cuda:{number}" if cuda else device
        dist.destroy_process_group()  # not behind an error: the others may be waiting for this one


def store() -> "dist.Store | None":
    """What the processes of torchrun can tell each other before they are joined; None without torchrun.

    Each start of all of them has a part of its own: the addresses of those before, which torchrun leaves there, would
    be taken for new ones.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    there = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return dist.PrefixStore(f"minqwen {os.environ['TORCHELASTIC_RESTART_COUNT']}", there)


def first_to_say() -> bool:
    """Whether an error of this process is for it to say: what ends all of them at once is said by one."""
    there = store()
    return there is None or there.add("said", 1) == 1


def wait() -> None:
    """Until all processes are here."""
    if size() > 1:
        dist.barrier()


def share(things: list) -> Iterator[tuple[int, object, bool]]:
    """This process's part of a list: (index, thing, whether it counts). Parts are equally long: what would be missing
    in one is done twice, and does not count."""
    for k in range(rank(), ceil(len(things) / size()) * size(), size()):
        yield k % len(things), things[k % len(things)], k < len(things)


def gathered(thing) -> list:
    """What each process has, in the order of their ranks."""
    if size() == 1:
        return [thing]
    found = [None] * size()
    dist.all_gather_object(found, thing)
    return found


# ---------------------------------------------------------------------------------------------------------- training


def load_sharded(checkpoint: Checkpoint, module_class: type[nn.Module], component: str, device, dtype) -> nn.Module:
    """A component of which each process holds a part, and reads no more of the files: FSDP2, block by block.

    Layers of 8 or 4 bits are held whole by each.
    """
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Shard

    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nothing is changed in place here
    module, stored = checkpoint.skeleton(module_class, component)
    mesh = dist.init_device_mesh(torch.device(device).type, (size(),))
    for part in (*module.transformer_blocks, module.to(dtype)):
        fully_shard(part, mesh=mesh)
    held, buffers = {}, dict(module.named_buffers())
    for name, tensor in stored.items():
        kind, whole = None if keeps_dtype(name, tensor) else dtype, tensor.shape
        if name in buffers:
            held[name] = tensor.to(device, kind)
            continue
        rows = ceil(len(tensor) / size())
        mine = tensor[rank() * rows : (rank() + 1) * rows].to(device, kind, copy=True)
        held[name] = DTensor.from_local(mine, mesh, [Shard(0)], run_check=False, shape=whole, stride=tensor.stride())
    assign(module, held, f"{checkpoint}/{component}")
    return module


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def entire(tensor: Tensor) -> Tensor:
    """All of a tensor of which each process may hold a part."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def add_up_gradients(parameters: list[nn.Parameter]) -> None:
    """The sum of all processes' gradients, of parameters that each holds whole."""
    if size() > 1 and not is_sharded(parameters[0]):
        flat = torch.cat([torch.zeros_like(p).ravel() if p.grad is None else p.grad.ravel() for p in parameters])
        dist.all_reduce(flat)
        for each, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            each.grad = grad.view_as(each)


@contextmanager
def named(what: str) -> Iterator[None]:
    """torch's own error, which no `except Exception` catches, as an OSError that begins so."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise OSError(f"{what} {str(cause).strip().splitlines()[0]}") from None


class Shards:
    """What training every weight keeps, as a part of a Run: in two folders beside its state file, used by turns, each
    process its own part; any number of processes goes on from there."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path):
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is no mistake
        self.model, self.optimizer, self.folder, self.last = model, optimizer, folder, "shards-b"

    def state(self) -> dict:
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def state_dict(self) -> dict[str, str]:
        from torch.distributed.checkpoint import save  # imported where it is used, as it takes a second

        self.last = "shards-a" if self.last == "shards-b" else "shards-b"
        if not rank():
            shutil.rmtree(self.folder / self.last, ignore_errors=True)
        wait()
        with named(f"cannot write {self.folder / self.last}: is the disk full?"):
            save(self.state(), checkpoint_id=self.folder / self.last, no_dist=size() == 1)
        return {"folder": self.last}

    def load_state_dict(self, saved: dict[str, str]) -> None:
        from torch.distributed.checkpoint import DefaultLoadPlanner, load
        from torch.distributed.checkpoint.state_dict import set_state_dict

        self.last, state = saved["folder"], self.state()
        some = DefaultLoadPlanner(allow_partial_load=True)  # what no gradient reached has no state in the optimiser
        with named(f"cannot read {self.folder / self.last}:"):
            load(state, checkpoint_id=self.folder / self.last, planner=some, no_dist=size() == 1)
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


# --------------------------------------------------------------------------------------------------------- inference


class Gather(TorchFunctionMode):
    """Attention whose keys and values are those of all processes; the text's, which come first, each has itself."""

    def __init__(self, text_tokens: int, group: "dist.ProcessGroup"):
        super().__init__()
        self.text, self.group = text_tokens, group

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        q, *mine = args
        of_all = (whole(x[:, :, self.text :], 2, self.group) for x in mine)
        keys, values = (torch.cat([x[:, :, : self.text], rest], 2) for x, rest in zip(mine, of_all, strict=True))
        mask = (kwargs or {}).get("attn_mask")
        if mask is not None:
            mask = F.pad(mask[..., : self.text], (0, keys.shape[2] - self.text), value=True)
        return function(q, keys, values, attn_mask=mask)


def whole(part: Tensor, dim: int, group: "dist.ProcessGroup") -> Tensor:
    """Equal parts of a tensor, one behind the other in a dimension."""
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, part.contiguous(), group)
    return torch.cat(parts, dim)


def split_tokens(model: nn.Module, group: "dist.ProcessGroup | None"):
    """The model, called with all tokens in every process of a group: each computes a part of the picture's tokens.

    Raises ValueError if they cannot be shared out equally.
    """
    count = 1 if group is None else dist.get_world_size(group)
    if count == 1:
        return model

    def call(img: Tensor, txt: Tensor, mask, timestep, shapes: list, **table) -> Tensor:
        if img.shape[1] % count:
            raise ValueError(f"{img.shape[1]} tokens cannot be shared out to {count} processes: take another size")
        each = img.shape[1] // count
        first = dist.get_rank(group) * each
        mine, target = slice(first, first + each), prod(shapes[0][0])

        def of_block(block: nn.Module, args: tuple) -> tuple:
            img, txt, temb, mask, (of_img, of_txt), _ = args
            img = img[:, mine] if block is model.transformer_blocks[0] else img
            rotary = tuple(x[mine] for x in of_img), of_txt
            return img, txt, temb, mask, rotary, min(max(target - first, 0), each)

        hooks = [block.register_forward_pre_hook(of_block) for block in model.transformer_blocks.children()]
        hooks.append(model.proj_out.register_forward_hook(lambda _, args, out: whole(out, 1, group)))
        try:
            with Gather(txt.shape[1], group):
                return model(img, txt, mask, timestep, shapes, **table)
        finally:
            for hook in hooks:
                hook.remove()

    return call


class Passes:
    """Who computes which of the passes of a picture, one or guidance's two: an equal number of processes each.

    Raises ValueError where there are too many processes, or too few.
    """

    def __init__(self, count: int):
        if size() > 1 and size() % count:
            raise ValueError(f"guidance's two passes need an even number of processes, these are {size()}")
        self.count, self.each, self.group = count, size() // count, None
        for number in range(count if size() > 1 else 0):
            team = list(range(number * self.each, (number + 1) * self.each))
            group = dist.new_group(team)
            self.group = group if rank() in team else self.group

    def mine(self, passes: list) -> list:
        return passes if size() == 1 else [passes[rank() // self.each]]

    def exchanged(self, result: Tensor) -> list[Tensor]:
        """The results of all passes, in order."""
        if size() == 1:
            return [result]
        return list(whole(result, 0, dist.group.WORLD).split(len(result))[:: self.each])

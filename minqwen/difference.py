"""The difference finder: two modules should compute the same and do not; which sub-module is the first to differ?

    mine, reference, inputs  ->  the first sub-module whose result differs, or None

Both run on the same inputs; every result is kept under its sub-module's name, in the order in which they finish, so
that the first difference is also the innermost. The surprise: a sub-module whose inputs differ already is innocent;
the fault then lies in the code between it and the last one that agrees. Tests: tests/test_difference.py. Chapter 05.
"""

from dataclasses import dataclass

import torch
from torch import nn

Activations = dict[str, torch.Tensor]  # "to_q > 0": the first tensor that to_q returns; "to_q < 0": that it takes


@dataclass(frozen=True)
class Difference:
    """The first sub-module whose result differs. `str` says it in words."""

    name: str  # "" for the module itself
    absolute: float  # largest difference; infinite where the shapes differ
    relative: float  # the same, as a share of the reference's largest number
    inputs_agree: bool
    last_equal: str | None  # the sub-module that finished before it, and agrees
    mine: str  # shape and dtype
    reference: str

    def __str__(self) -> str:
        name = self.name or "the module itself"
        text = f"{name}: differs by up to {self.absolute:.3g} ({100 * self.relative:.3g} % of the largest number)"
        text += f"\n  mine {self.mine}, reference {self.reference}"
        if self.inputs_agree:
            return text + "\n  its inputs agree: look inside it, at its weights, its options, its code"
        after = f"between {self.last_equal or 'the start'} and {name}"
        return text + f"\n  its inputs differ already: look at the code {after}"


def record(module: nn.Module, *args, **kwargs) -> Activations:
    """Run a module; keep what each sub-module takes and returns, in the order in which they finish.

    Keys are "name > i" for the i-th tensor that a sub-module returns and "name < i" for those that it takes;
    a sub-module that runs again is "name#2". The dictionary can be saved with safetensors.torch.save_file.
    """
    kept, runs = {}, {}

    def keep(name: str):
        def hook(_, args, kwargs, result):
            runs[name] = runs.get(name, 0) + 1
            key = name if runs[name] == 1 else f"{name}#{runs[name]}"
            for mark, tensors in (("<", _tensors([args, kwargs])), (">", _tensors(result))):
                for i, tensor in enumerate(tensors):
                    kept[f"{key} {mark} {i}"] = tensor.detach().clone().contiguous()

        return hook

    hooks = [m.register_forward_hook(keep(name), with_kwargs=True) for name, m in module.named_modules()]
    try:
        with torch.no_grad():
            module(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return kept


def first_difference(
    mine: nn.Module | Activations, reference: nn.Module | Activations, *args, tolerance: float = 1e-5, **kwargs
) -> Difference | None:
    """The first sub-module, in the order in which mine finish, whose result differs from the reference's of that name.

    mine, reference: modules, run on the same args and kwargs, or what `record` gave for one. A sub-module that only
    one of them has is passed over. tolerance: the largest absolute difference that still counts as equal.
    Raises ValueError if they have no name in common.
    """
    mine = mine if isinstance(mine, dict) else record(mine, *args, **kwargs)
    reference = reference if isinstance(reference, dict) else record(reference, *args, **kwargs)
    results = [key for key in mine if " > " in key and key in reference]
    if not results:
        raise ValueError("mine and the reference have no sub-module's name in common, so nothing can be compared")
    last_equal = None
    for key in results:
        name = key.split(" > ")[0]
        absolute = _apart(mine[key], reference[key])
        if absolute > tolerance:
            largest = reference[key].double().abs().max().item() if reference[key].numel() else 0.0
            relative = absolute / largest if largest else float("inf")
            agree = _inputs_agree(name, mine, reference, tolerance)
            return Difference(name, absolute, relative, agree, last_equal, _form(mine[key]), _form(reference[key]))
        last_equal = name
    return None


def _inputs_agree(name: str, mine: Activations, reference: Activations, tolerance: float) -> bool:
    """Whether each tensor that mine takes is among those that the reference takes, in whatever order."""
    theirs = [tensor for key, tensor in reference.items() if key.startswith(f"{name} < ")]
    ours = [tensor for key, tensor in mine.items() if key.startswith(f"{name} < ")]
    return all(any(_apart(a, b) <= tolerance for b in theirs) for a in ours)


def _form(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest absolute difference; infinite for other shapes and where one is not a number and the other is."""
    if a.shape != b.shape:
        return float("inf")
    apart = (a.cpu().double() - b.cpu().double()).abs()
    apart[(a == b).cpu() | (a.isnan() & b.isnan()).cpu()] = 0  # equal infinities too
    return apart.nan_to_num(nan=float("inf")).max().item() if apart.numel() else 0.0


def _tensors(value) -> list[torch.Tensor]:
    """The tensors in nested tuples, lists and dictionaries, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list | tuple):
        return []
    return [tensor for item in value for tensor in _tensors(item)]

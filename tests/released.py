"""Small weights in the released layout, whole and then damaged."""

import json
from pathlib import Path

import torch
from reference import randomise_
from safetensors.torch import save_file

from minqwen.transformer import QwenImageTransformer2DModel

CONFIG = {
    "in_channels": 8,
    "out_channels": 2,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "axes_dims_rope": (4, 6, 6),
}
STEM = "diffusion_pytorch_model.safetensors"
BLOCK = "transformer_blocks.0."


def small_transformer() -> QwenImageTransformer2DModel:
    return randomise_(QwenImageTransformer2DModel(**CONFIG))


def write_sharded(tensors: dict[str, torch.Tensor], folder: Path, shards: int = 4) -> None:
    """Tensors dealt out to several files, so that a block lies in each, and the index that says which where."""
    folder.mkdir(parents=True)
    weight_map = {}
    for shard in range(shards):
        file = STEM.replace(".safetensors", f"-{shard + 1:05d}-of-{shards:05d}.safetensors")
        dealt = {name: tensors[name] for name in sorted(tensors)[shard::shards]}
        save_file(dealt, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(dealt, file)
    (folder / f"{STEM}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def edit_index(folder: Path, change) -> None:
    path = folder / f"{STEM}.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def edit_header(path: Path, change) -> None:
    """Change the header of a safetensors file; its data stay as they are."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    """The same names with the same numbers in the same type, bit for bit."""
    return found.keys() == wanted.keys() and all(
        found[name].dtype == wanted[name].dtype and torch.equal(found[name], wanted[name]) for name in wanted
    )

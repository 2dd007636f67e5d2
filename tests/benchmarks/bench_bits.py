"""What fewer bits cost: make bench-bits.

python tests/benchmarks/bench_bits.py --help

Relative error of one layer's weights, made from a normal distribution and with outliers, and of the tiny checkpoint's;
of a velocity of the tiny checkpoint; and how many of its edits are right, by kind. At 8, 4 and 3 bits, beside all of
them (32). The last lines are a table, for tests/README.md.
"""

import argparse
import copy
from pathlib import Path

import numpy as np
import torch
from tables import put
from torch import nn
from tqdm import tqdm

from minqwen.pipeline import QwenImagePipeline
from minqwen.quantize import QuantizedLinear, quantize, quantize_blocks
from minqwen.world import KINDS, judge, sample_edit

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "data" / "tiny"
BITS = (8, 4, 3)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The length of the difference, as a share of theirs."""
    return ((ours - theirs).norm() / theirs.norm()).item()


def made(outliers: bool) -> nn.Linear:
    """A layer of normal weights; with outliers, 2 of 1000 are 20 times as large."""
    chance = torch.Generator().manual_seed(0)
    layer = nn.Linear(3072, 1024, bias=False)
    layer.weight.data = torch.randn(layer.weight.shape, generator=chance) * 0.02
    if outliers:
        layer.weight.data[torch.rand(layer.weight.shape, generator=chance) < 0.002] *= 20
    return layer


def errors(plain: QwenImagePipeline, fewer: QwenImagePipeline, bits: int) -> dict[str, float]:
    """Relative errors: of made layers, of the checkpoint's layers (the mean), of a velocity (the mean over edits)."""
    layers = dict(plain.transformer.named_modules())
    pairs = {name: m for name, m in fewer.transformer.named_modules() if isinstance(m, QuantizedLinear)}
    drawn = {"made layer": made(False), "made layer, outliers": made(True)}
    found = {name: relative(quantize(layer, bits).unpacked(), layer.weight) for name, layer in drawn.items()}
    own = [relative(layer.unpacked(), layers[name].weight) for name, layer in pairs.items() if "_mod." not in name]
    apart, rng = [], np.random.default_rng(0)
    for _ in range(20):
        edit = sample_edit(rng)
        working, conditions = plain.resize_references([edit.source])
        prompt, reference = plain.encode_prompt(edit.instruction, conditions), plain.encode_image(working[0])
        given = [prompt], [reference], *working[0].size, 1.0
        latents = torch.randn(1, working[0].width * working[0].height // 256, 64)
        apart.append(relative(*(pipe.velocity(*given)(latents, 0.7) for pipe in (fewer, plain))))
    return found | {"layers of data/tiny": np.mean(own), "velocity": np.mean(apart)}


def right(pipe: QwenImagePipeline, kind: str, count: int, steps: int) -> float:
    """Per cent of edits of a kind that are right, the same scenes and noise for every pipeline."""
    rng, good = np.random.default_rng(10**8), 0
    for number in range(count):
        edit, chance = sample_edit(rng, kind), torch.Generator().manual_seed(number)
        options = {"num_inference_steps": steps, "generator": chance, "progress": False}
        good += judge(pipe.edit(edit.source, edit.instruction, **options), edit)
    return 100 * good / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="edits of each kind")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--write", action="store_true", help="the table into tests/README.md")
    args = parser.parse_args()
    torch.manual_seed(0)
    plain = QwenImagePipeline.from_pretrained(TINY, "cpu", torch.float32, memory="resident")
    columns = {32: {}}
    pipes = {32: plain}
    for bits in BITS:
        pipes[bits] = copy.copy(plain)
        pipes[bits].transformer = copy.deepcopy(plain.transformer)
        quantize_blocks(pipes[bits].transformer, bits)
        found = errors(plain, pipes[bits], bits)
        columns[bits] = {f"error of: {name}": f"{error:.4f}" for name, error in found.items()}
    for bits, pipe in pipes.items():
        scores = {kind: right(pipe, kind, args.count, args.steps) for kind in tqdm(KINDS, desc=f"{bits} bits")}
        columns[bits] |= {f"right: {kind}": f"{score:.0f}" for kind, score in scores.items()}
        columns[bits]["right: all"] = f"{np.mean(list(scores.values())):.1f}"
    rows = dict.fromkeys(name for column in columns.values() for name in column)
    head = f"| bits ({args.count} edits of each kind, {args.steps} steps) |"
    lines = [head + "".join(f" {bits} |" for bits in columns), "|---|" + "---|" * len(columns)]
    for name in sorted(rows, key=lambda name: name.startswith("right")):
        lines.append(f"| {name} |" + "".join(f" {column.get(name, '–')} |" for column in columns.values()))
    print("\n".join(lines))
    if args.write:
        put(ROOT / "tests/README.md", "bench-bits", lines)


if __name__ == "__main__":
    main()

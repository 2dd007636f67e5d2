"""What a process holds when one, two or four share a transformer out: blocks of the released width, a step of training.

    python tests/benchmarks/bench_parallel.py --layers 8

The weights are zeros in files that take no room. Counted is what the process itself has in memory at the peak, beyond
what it had before (mapped pages of files do not count: the system takes them back). Foreseen are weights: a part of
all, and, where it is only a part, what belongs to no block, whole, and two blocks, one that computes and one that
arrives, one of the two twice while it is put together. malloc is told to give back at once what is freed
(MALLOC_MMAP_THRESHOLD_): by itself it keeps pieces of up to 32 MB for later, here half a gigabyte and more. The table
goes into tests/README.md.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import kills
import torch
from gpu import made_folder
from tables import ROOT, machine, put

from minqwen import parallel
from minqwen.checkpoint import Checkpoint
from minqwen.finetune import Settings, training
from minqwen.transformer import QwenImageTransformer2DModel

SIDE, WORDS = 8, 16  # tokens
GIVES_BACK = kills.alone() | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}  # bytes: larger pieces go back to the system


def own() -> float:
    """Bytes that this process holds and no file has."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


class Watch(threading.Thread):
    """The most of them, looked at every few milliseconds."""

    def __init__(self):
        super().__init__(daemon=True)
        self.before = self.most = own()

    def run(self) -> None:
        while True:
            self.most = max(self.most, own())
            time.sleep(0.003)


def step(folder: str) -> None:
    """In each of several processes: the weights, a forward and a backward pass; the first prints what they held."""
    torch.set_num_threads(1)
    with parallel.joined("cpu"):
        watch = Watch()
        watch.start()
        checkpoint, kind = Checkpoint(folder), QwenImageTransformer2DModel
        if parallel.size() == 1:
            model = checkpoint.load(kind, "transformer", dtype=torch.bfloat16)
            model.load_state_dict({name: t.clone() for name, t in model.state_dict().items()}, assign=True)
        else:
            model = parallel.load_sharded(checkpoint, kind, "transformer", "cpu", torch.bfloat16)
        sizes = [p.numel() * 2 for p in model.parameters()]
        block = sum(p.numel() * 2 for p in model.transformer_blocks[0].parameters())
        with training(model, Settings(rank=4, checkpointing=True)) as parameters:
            tokens = torch.zeros(1, SIDE * SIDE, 64, dtype=torch.bfloat16)
            words = torch.zeros(1, WORDS, model.config["joint_attention_dim"], dtype=torch.bfloat16)
            model(tokens, words, None, torch.full((1,), 0.5), [[(1, SIDE, SIDE)]]).float().sum().backward()
            parallel.add_up_gradients(parameters)
        most = max(parallel.gathered(watch.most - watch.before))
        ends = sum(sizes) - len(model.transformer_blocks) * block
        foreseen = sum(sizes) / parallel.size() + (3 * block + ends if parallel.size() > 1 else 0)
        print(json.dumps({"GB at the peak": most / 1e9, "foreseen": foreseen / 1e9}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8, help="blocks")
    parser.add_argument("--write", action="store_true", help="put the table into tests/README.md")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.folder:
        return step(asked.folder)
    lines = [f"| {asked.layers} blocks, on {machine()} | GB of a process at the peak | foreseen |", "|---|---|---|"]
    with tempfile.TemporaryDirectory() as place:
        made_folder(Path(place), None, layers=asked.layers)
        for processes in (1, 2, 4):
            command = [*kills.torchrun(processes), __file__, "--folder", place]
            ran = subprocess.run(command, capture_output=True, text=True, env=GIVES_BACK)
            if ran.returncode:
                raise RuntimeError(ran.stderr[-3000:])
            found = json.loads(ran.stdout.splitlines()[-1])
            lines.append(
                f"| {processes} process(es) | " + " | ".join(f"{value:.2f}" for value in found.values()) + " |"
            )
            print(lines[-1], flush=True)
    if asked.write:
        put(ROOT / "tests" / "README.md", "bench_parallel", lines)


if __name__ == "__main__":
    main()

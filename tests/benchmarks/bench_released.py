"""The released geometry at 4 bits on this machine, with made numbers: make bench-released.

PYTHONPATH=tests python tests/benchmarks/bench_released.py --help

    shrink     57.7 GB from a hub on this machine, block by block, to 20 GB in a folder
    forward    one pass of the transformer, its table and its blocks from that folder, against its matrix products alone
    edit       a whole edit of few steps: text encoder, transformer and VAE by turns
    train      one step of a LoRA on the frozen 4-bit weights

Each runs in a process of its own, whose peak memory is that of the kernel's count, mapped files included. What is done
in the folder is not done twice. The last lines are a table, for README.md.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hub import ask_only
from made import MadeHub
from PIL import Image

from minqwen.finetune import flow_loss, make_batch
from minqwen.lora import add_lora
from minqwen.pipeline import QwenImagePipeline
from minqwen.precompute import Sample
from minqwen.quantize import QuantizedLinear
from minqwen.shrink import shrink

SIDE, WORDS = 256, 64


def run_shrink(folder: Path, layers: int | None) -> dict:
    import threading

    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "hub").mkdir()
        hub = MadeHub(Path(place) / "hub", layers)
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        with pytest.MonkeyPatch.context() as patch:
            ask_only(hub, Path(place) / "cache", patch)
            shrink("owner/name", folder, 4)
        hub.stop()
    return {"GB on disk": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e9}


def opened(folder: Path, **options) -> QwenImagePipeline:
    return QwenImagePipeline.from_pretrained(folder, "cpu", torch.float32, memory="turns", **options)


def products(model: torch.nn.Module, image_tokens: int, text_tokens: int) -> float:
    """Seconds of the matrix products of all linear layers that a forward pass runs, with weights of numbers."""
    seconds, known = 0.0, {}
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear) and "_mod." not in name:
            text = any(part in name for part in ("add_", "txt_"))
            key = (layer.in_features, layer.out_features, text_tokens if text else image_tokens)
            if key not in known:
                x, w = torch.randn(key[2], key[0]), torch.randn(key[1], key[0])
                known[key] = min(timed(lambda x=x, w=w: F.linear(x, w)) for _ in range(3))
            seconds += known[key]
    return seconds


def timed(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def run_forward(folder: Path, layers: int | None) -> dict:
    pipe = opened(folder, without=("vae", "text_encoder"))
    tokens = (SIDE // 16) ** 2
    sigmas = torch.tensor([0.7])
    table = timed(lambda: pipe.turns.prepare(sigmas))
    prompt = (torch.randn(1, WORDS, pipe.transformer.config["joint_attention_dim"]), None)
    velocity = pipe.velocity([prompt], [], SIDE, SIDE, 1.0)
    latents = torch.randn(1, tokens, 64)
    sigma = sigmas.item()
    seconds = min(timed(lambda: velocity(latents, sigma)) for _ in range(2))
    held = sum(b.nbytes for b in [*pipe.transformer.buffers(), *pipe.transformer.parameters()] if not b.is_meta)
    alone = products(pipe.transformer, tokens, WORDS)
    return {"s": seconds, "times its products": seconds / alone, "s for the table": table, "GB of weights": held / 1e9}


def run_edit(folder: Path, layers: int | None) -> dict:
    pipe = opened(folder)
    picture = Image.new("RGB", (SIDE, SIDE), "teal")
    options = {"area": SIDE * SIDE, "num_inference_steps": 2, "true_cfg_scale": 1.0}
    seconds = timed(lambda: pipe.edit(picture, "make it winter", **options))
    return {"s": seconds}


def run_train(folder: Path, layers: int | None) -> dict:
    pipe = QwenImagePipeline.from_pretrained(
        folder, "cpu", torch.float32, ("vae", "text_encoder"), memory="resident"
    )
    side = SIDE // 8
    parameters = add_lora(pipe.transformer, 16)
    embeds = torch.randn(1, WORDS, pipe.transformer.config["joint_attention_dim"])
    batch = make_batch([Sample("", torch.randn(1, 16, 1, side, side), (), embeds, embeds)])
    noise = torch.randn(1, (side // 2) ** 2, 64)
    seconds = timed(lambda: flow_loss(pipe.transformer, batch, torch.tensor([0.7]), noise).sum().backward())
    assert all(p.grad.isfinite().all() for p in parameters)
    return {"s": seconds}


RUNS = {"shrink": run_shrink, "forward": run_forward, "edit": run_edit, "train": run_train}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="takes 20 GB; what lies there is used")
    parser.add_argument("--layers", type=int, help="so many blocks instead of all, to try it")
    parser.add_argument("--only", choices=RUNS, help="one of the runs, in this process")
    args = parser.parse_args()
    if args.only:
        start = time.perf_counter()
        found = RUNS[args.only](args.folder, args.layers)
        found |= {"s in all": time.perf_counter() - start}
        found |= {"GiB at the peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
        print(json.dumps({key: round(value, 2) for key, value in found.items()}))
        return
    lines = []
    for name in RUNS:
        command = [sys.executable, __file__, str(args.folder), "--only", name]
        command += ["--layers", str(args.layers)] if args.layers else []
        print(name, flush=True)
        out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        found = json.loads(out.splitlines()[-1])
        lines.append(f"| {name} | " + ", ".join(f"{key} {value:g}" for key, value in found.items()) + " |")
        print(lines[-1], flush=True)
    print("\n".join(["", "| run | measured |", "|---|---|", *lines]))


if __name__ == "__main__":
    main()

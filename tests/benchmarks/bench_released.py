"""The released geometry at 4 bits on this machine, with made numbers: make bench-released.

PYTHONPATH=tests python tests/benchmarks/bench_released.py --help

    shrink     57.7 GB from a hub on this machine, block by block, to 21 GB in a folder; beside it the same into another
               folder, killed at 20 random moments: are the bytes the same?
    block      one block in float32 against its matrix products alone, and against diffusers
    forward    one pass of the transformer, its table and its blocks from that folder, against its matrix products alone
    edit       a whole edit of few steps: text encoder, transformer and VAE by turns
    train      one step of a LoRA on the frozen 4-bit weights, its modulation from a table

Each runs in a process of its own, whose peak memory is that of the kernel's count, mapped files included. Ratios are
the median over rounds in which what is compared takes turns. The last lines are a table; that of a whole run goes into
tests/README.md.
"""

import argparse
import hashlib
import json
import math
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope as TheirRope
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock as TheirBlock
from made import MadeHub
from PIL import Image
from reference import randomise_
from tables import machine, put
from tqdm import tqdm

from minqwen.block import QwenImageTransformerBlock
from minqwen.finetune import finetune
from minqwen.pipeline import QwenImagePipeline
from minqwen.precompute import Sample
from minqwen.rope import QwenEmbedRope

SIDE, WORDS = 256, 64
IMAGE = (SIDE // 16) ** 2  # tokens
WIDTH, HEADS = 3072, 24
KILLS = 20
SHRINK = [sys.executable, "-m", "minqwen.shrink", "owner/name"]


def peak() -> float:
    """GiB that this process has held at once, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@contextmanager
def made_hub(layers: int | None) -> Iterator[dict[str, str]]:
    """The environment in which a process finds the made checkpoint as owner/name."""
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "hub").mkdir()
        hub = MadeHub(Path(place) / "hub", layers)
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        where = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": f"{place}/cache"}
        yield os.environ | where | {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        hub.stop()


# ------------------------------------------------------------------------------------------------------ shrink


def run_shrink(folder: Path, layers: int | None) -> dict:
    """Beside it the same goes into another folder, and is killed at random moments until it is there as well."""
    other, ended = folder.with_name(folder.name + "_killed"), []
    with made_hub(layers) as environment:
        environment |= {"OMP_NUM_THREADS": "1"}  # a core for each of the two
        killer = threading.Thread(target=lambda: ended.append(killed(other, layers, environment)))
        killer.start()
        child = subprocess.Popen([*SHRINK, str(folder)], env=environment)
        _, status, used = os.wait4(child.pid, 0)
        killer.join()
    assert status == 0 and ended, "a shrink has failed"
    same = size_of(folder) == size_of(other) and all(
        hashlib.file_digest(open(folder / name, "rb"), "sha256").digest()
        == hashlib.file_digest(open(other / name, "rb"), "sha256").digest()
        for name in tqdm(size_of(folder), desc="comparing")
    )
    shutil.rmtree(other)
    found = {"GB on disk": sum(size_of(folder).values()) / 1e9, "GiB at the peak": used.ru_maxrss / 2**20}
    return found | {"kills beside it": ended[0], "the same bytes": same}


def killed(folder: Path, layers: int | None, environment: dict[str, str]) -> int:
    """Each start writes some of the files, dies within a block, and leaves the rest to the next; the last one ends."""
    files, chance, kills = 3 * layers + 3 if layers else 123, random.Random(0), 0
    while True:
        child = subprocess.Popen([*SHRINK, str(folder), "--quiet"], env=environment, stdout=subprocess.DEVNULL)
        goal = len(size_of(folder)) + chance.randint(0, files // KILLS)
        while child.poll() is None and (kills == KILLS or len(size_of(folder)) < goal):
            time.sleep(0.2)
        time.sleep(chance.uniform(0, 8))
        if child.poll() is not None:
            assert child.returncode == 0, "the last start has failed"
            return kills
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        kills += 1


def size_of(folder: Path) -> dict[str, int]:
    """The bytes of each file, by its name in the folder; the lock and other hidden files are no part of it."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


# ----------------------------------------------------------------------------------------- against matrix products


def products(image_tokens: int, text_tokens: int, blocks: int) -> Callable[[], None]:
    """What runs the matrix products of so many blocks, and nothing else; at most two blocks' weights are different.

    That is: the linear layers, with their biases, and attention's two products.
    """
    layers, sizes = [], [*[(WIDTH, WIDTH)] * 4, (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)]
    for tokens in (image_tokens, text_tokens):
        inputs = {width: torch.randn(1, tokens, width) for width in (WIDTH, 4 * WIDTH)}
        for width, out in sizes * min(blocks, 2):
            layers.append((inputs[width], torch.randn(out, width), torch.randn(out)))
    q = torch.randn(HEADS, image_tokens + text_tokens, WIDTH // HEADS)

    @torch.inference_mode()
    def run() -> None:
        for _ in range(math.ceil(blocks / 2)):
            for x, weight, bias in layers:
                F.linear(x, weight, bias)
        for _ in range(blocks):
            torch.bmm(torch.bmm(q, q.transpose(1, 2)), q)

    return run


def run_block(folder: Path, layers: int | None) -> dict:
    ours = QwenImageTransformerBlock(WIDTH, HEADS, WIDTH // HEADS).eval()
    theirs = TheirBlock(WIDTH, HEADS, WIDTH // HEADS).eval()
    ours.load_state_dict(randomise_(theirs).state_dict())
    side = 16  # a picture of 512x512
    rope = QwenEmbedRope(10000, (16, 56, 56), scale_rope=True)([(1, side, side)], WORDS, torch.device("cpu"))
    their_rope = TheirRope(10000, [16, 56, 56], True)([[(1, side, side)]], max_txt_seq_len=WORDS)
    img, txt, temb = torch.randn(1, side * side, WIDTH), torch.randn(1, WORDS, WIDTH), torch.randn(1, WIDTH)
    inside, modulation = products(side * side, WORDS, 1), [torch.randn(6 * WIDTH, WIDTH) for _ in range(2)]

    def alone() -> None:
        inside()
        for weight in modulation:
            F.linear(temb, weight)

    runs = {
        "ours": lambda: ours(img, txt, temb, None, rope),
        "theirs": lambda: theirs(img, txt, None, temb, their_rope),
        "alone": alone,
    }
    with torch.inference_mode():
        rounds = [{name: timed(work) for name, work in runs.items()} for _ in range(21)][1:]
    share, faster = (statistics.median(each[name] / each["ours"] for each in rounds) for name in ("alone", "theirs"))
    seconds = statistics.median(each["ours"] for each in rounds)
    return {"s": seconds, "of its products' speed": share, "times as fast as diffusers": faster}


def opened(folder: Path, without: tuple[str, ...] = ()) -> QwenImagePipeline:
    return QwenImagePipeline.from_pretrained(folder, "cpu", torch.float32, without, memory="turns")


def run_forward(folder: Path, layers: int | None) -> dict:
    pipe = opened(folder, ("vae", "text_encoder"))
    sigmas = torch.tensor([0.7])
    table = timed(lambda: pipe.turns.prepare(sigmas))
    prompt = (torch.randn(1, WORDS, pipe.transformer.config["joint_attention_dim"]), None)
    velocity, latents = pipe.velocity([prompt], [], SIDE, SIDE, 1.0), torch.randn(1, IMAGE, 64)
    blocks = len(pipe.transformer.transformer_blocks)
    held = sum(b.nbytes for b in [*pipe.transformer.buffers(), *pipe.transformer.parameters()] if not b.is_meta)
    timed(lambda: velocity(latents, sigmas.item()))
    highest, alone = peak(), products(IMAGE, WORDS, blocks)
    timed(alone)
    rounds = [(timed(lambda: velocity(latents, sigmas.item())), timed(alone)) for _ in range(3 if blocks > 2 else 11)]
    forward, times = (statistics.median(each) for each in zip(*((f, f / a) for f, a in rounds), strict=True))
    return {
        "s": forward, "times its products": times, "s for the table": table,
        "GB of weights": held / 1e9, "GiB at the peak": highest,
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------- edit and train


def run_edit(folder: Path, layers: int | None) -> dict:
    pipe = opened(folder)
    picture = Image.new("RGB", (SIDE, SIDE), "teal")
    options = {"area": SIDE * SIDE, "num_inference_steps": 2, "true_cfg_scale": 1.0}
    return {"s": timed(lambda: pipe.edit(picture, "make it winter", **options))}


def run_train(folder: Path, layers: int | None) -> dict:
    pipe = opened(folder, ("vae", "text_encoder"))
    embeds = torch.randn(1, WORDS, pipe.transformer.config["joint_attention_dim"])
    latents = torch.randn(1, 16, 1, SIDE // 8, SIDE // 8)
    sample, log = Sample("made", latents, (latents,), embeds, embeds), []
    seconds = timed(lambda: log.extend(finetune(pipe, [sample], steps=1, levels=1000, checkpointing=True)))
    return {"s, the table of 1000 levels included": seconds, "loss": log[0].loss}


RUNS = {
    "shrink": run_shrink,
    "block": run_block,
    "forward": run_forward,
    "edit": run_edit,
    "train": run_train,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="takes 21 GB, twice that while killed runs are compared")
    parser.add_argument("--layers", type=int, help="so many blocks in each part instead of all, to try it")
    parser.add_argument("--only", choices=RUNS, help="one of the runs, in this process")
    args = parser.parse_args()
    if args.only:
        start = time.perf_counter()
        found = RUNS[args.only](args.folder, args.layers)
        found = {"s in all": time.perf_counter() - start, "GiB at the peak": peak()} | found
        print(json.dumps({key: round(value, 3) for key, value in found.items()}))
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
    lines = [f"| on {machine()} | measured |", "|---|---|", *lines]
    print("\n".join(lines))
    if not args.layers:
        put(Path(__file__).resolve().parents[1] / "README.md", "bench-released", lines)


if __name__ == "__main__":
    main()

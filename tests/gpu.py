"""Everything that waits for a card, in at most eight minutes: make gpu.

    python tests/gpu.py                                    on the first CUDA device, at the released size
    python tests/gpu.py --device cpu --like data/tiny --side 64 --only forward     to try it

The weights are made: zeros in files of the released names and shapes that take no room on the disk, since nothing was
ever written into them, or random numbers on the card. Speed and memory do not depend on which numbers they are, but a
card that multiplies zeros stays cooler. Each part runs in a process of its own; one that fails, or that time does not
suffice for, is named, and the others go on. The last lines are a table, also as JSON, and go into tests/README.md.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from made import STEMS, TINY, configs
from PIL import Image
from tables import ROOT, machine, put

from minqwen.doctor import Released
from minqwen.finetune import finetune
from minqwen.memory import BLOCKS, MODULATION
from minqwen.pipeline import PARTS, QwenImagePipeline
from minqwen.plans import block_operations, plans
from minqwen.precompute import Sample
from minqwen.shrink import shrink
from minqwen.transformer import QwenImageTransformer2DModel
from minqwen.vae import AutoencoderKLQwenImage

PEAK = "GiB at the peak"
WORDS = 128  # text tokens of a drawing
DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.uint8: "U8", torch.int8: "I8"}
# part, figure -> what it should be, and at most or at least that
WANTED = {
    ("forward", "times as fast as diffusers"): (1.15, "least"),
    ("forward", "compiled, share of the card's rate"): (0.6, "least"),
    ("vae", "encode, times as fast as diffusers"): (2, "least"),
    ("vae", "decode, times as fast as diffusers"): (2, "least"),
    ("vae", "peak, times diffusers'"): (0.5, "most"),
    ("turns", PEAK): (30, "most"),
    ("stream", PEAK): (8, "most"),
    ("stream", "times what moving the bytes takes"): (1.3, "most"),
    ("turns at 4 bits", PEAK): (12, "most"),
}


class Card:
    """The device of a run: waits for it, times work on it, and says how much of its memory was in use at once."""

    def __init__(self, name: str):
        self.device = torch.device(name)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Callable, times: int = 3) -> float:
        """The median of so many runs, after one more that warms up."""
        found = []
        for _ in range(times + 1):
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            found.append(time.perf_counter() - start)
        return statistics.median(found[1:] or found)

    def begin(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> dict[str, float]:
        """GiB since `begin`; on a CPU nobody counts them."""
        return {PEAK: torch.cuda.max_memory_allocated() / 2**30} if self.device.type == "cuda" else {}


def config_of(like: Path | None, component: str) -> dict:
    if like is None:
        return configs()[component]
    return json.loads((like / component / "config.json").read_text(encoding="utf-8"))


def write_zeros(path: Path, tensors: dict[str, torch.Tensor], ones: str | None = None) -> None:
    """A safetensors file of zeros that takes no room: a header, and then nothing. ones: a tensor of ones in it."""
    table, place = {}, 0
    for name, tensor in tensors.items():
        end = place + tensor.nbytes
        table[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [place, end]}
        place = end
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + place)
        if ones:
            first, last = table[ones]["data_offsets"]
            file.seek(8 + len(header) + first)
            file.write(b"\x80\x3f" * ((last - first) // 2))


def made_folder(folder: Path, like: Path | None, bits: int = 16, layers: int | None = None) -> Path:
    """A checkpoint of zeros in the released layout; the exit's bias is 1, so that guidance divides by no zero."""
    for name in ("tokenizer", "processor", "scheduler"):
        shutil.copytree(TINY / name, folder / name)
    index = json.loads((TINY / "model_index.json").read_text(encoding="utf-8"))
    index = {key: value for key, value in index.items() if key not in ("_area", "_true_cfg_scale")}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    for name in PARTS:
        config = config_of(like, name) | ({"num_layers": layers} if layers and name == "transformer" else {})
        stored = Released(name, bits, "cpu", torch.bfloat16, **config).stored
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
        ones = "proj_out.bias" if name == "transformer" else None
        write_zeros(folder / name / f"{STEMS[name]}.safetensors", stored, ones)
    return folder


# ------------------------------------------------------------------------------------------------------- the parts


def tests(asked: argparse.Namespace, card: Card) -> dict:
    """The tests that need a card."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    last = done.stdout.strip().splitlines()[-1]
    if done.returncode:
        raise RuntimeError(done.stdout[-3000:])
    return {"result": last}


@torch.inference_mode()
def forward(asked: argparse.Namespace, card: Card) -> dict:
    """The whole transformer in bfloat16, one pass, beside diffusers' on the same weights."""
    like = {"device": card.device, "dtype": torch.bfloat16}
    config = config_of(asked.like, "transformer")
    with torch.device("meta"):
        ours = QwenImageTransformer2DModel(**config).eval()
    chance = torch.Generator(card.device).manual_seed(0)
    weights = {n: torch.randn(t.shape, generator=chance, **like).mul_(0.02) for n, t in ours.state_dict().items()}
    ours.load_state_dict(weights, assign=True)
    side, width = asked.side // 16, ours.img_in.out_features
    inputs = {
        "hidden_states": torch.randn(1, side * side, 64, **like),
        "encoder_hidden_states": torch.randn(1, WORDS, config["joint_attention_dim"], **like),
        "timestep": torch.full((1,), 0.7, **like),
        "img_shapes": [[(1, side, side)]],
    }
    mine = card.seconds(lambda: ours(**inputs, encoder_hidden_states_mask=None))
    found = {"s": mine} | card.peak()
    if find_spec("diffusers"):
        from diffusers.models.transformers import transformer_qwenimage as reference

        known = {key: value for key, value in config.items() if not key.startswith("_") and key in
                 ("patch_size", "in_channels", "out_channels", "num_layers", "attention_head_dim",
                  "num_attention_heads", "joint_attention_dim", "axes_dims_rope")}  # fmt: skip
        with torch.device("meta"):
            theirs = reference.QwenImageTransformer2DModel(**known).eval()
        theirs.load_state_dict(weights, assign=True)
        theirs.pos_embed = reference.QwenEmbedRope(10000, list(config["axes_dims_rope"]), True)
        mask = torch.ones(1, WORDS, dtype=torch.bool, device=card.device)
        run = lambda: theirs(**inputs, encoder_hidden_states_mask=mask, return_dict=False)[0]  # noqa: E731
        found["times as fast as diffusers"] = card.seconds(run) / mine
        apart = (run().float() - ours(**inputs, encoder_hidden_states_mask=None).float()).abs().max()
        found["largest difference, share of the largest number"] = (apart / run().float().abs().max()).item()
    matrix = torch.randn(*[8192 if card.device.type == "cuda" else 256] * 2, **like)
    rate = 2 * len(matrix) ** 3 / card.seconds(lambda: matrix @ matrix.T)
    found |= {"TFLOP a second of one product": rate / 1e12}
    operations = config["num_layers"] * block_operations(width, side * side, WORDS)
    found["share of the card's rate"] = operations / mine / rate
    if asked.backend != "none":
        ours.compile(backend=asked.backend)
        start = time.perf_counter()
        ours(**inputs, encoder_hidden_states_mask=None)
        card.wait()
        found["s to compile"] = time.perf_counter() - start
        compiled = card.seconds(lambda: ours(**inputs, encoder_hidden_states_mask=None))
        found |= {"compiled, s": compiled, "compiled, share of the card's rate": operations / compiled / rate}
    return found


@torch.inference_mode()
def vae(asked: argparse.Namespace, card: Card) -> dict:
    """The autoencoder in bfloat16, a picture there and back, beside diffusers'."""
    config = {k: v for k, v in config_of(asked.like, "vae").items() if not k.startswith("_")}
    models = {"ours": AutoencoderKLQwenImage(**config).eval()}
    if find_spec("diffusers"):
        from diffusers import AutoencoderKLQwenImage as Reference

        models["theirs"] = Reference(**config).eval()
        models["theirs"].load_state_dict(models["ours"].state_dict())
    pixels = torch.rand(1, 3, 1, asked.side, asked.side, device=card.device, dtype=torch.bfloat16) * 2 - 1
    latents = torch.randn(1, 16, 1, asked.side // 8, asked.side // 8, device=card.device, dtype=torch.bfloat16)
    times, peaks = {}, {}
    for name, model in models.items():
        model.to(card.device, torch.bfloat16)
        card.begin()
        times[name] = [card.seconds(lambda m=model: m.encode(pixels)), card.seconds(lambda m=model: m.decode(latents))]
        peaks[name] = card.peak()
        model.to("cpu")
    found = {"encode, s": times["ours"][0], "decode, s": times["ours"][1]} | peaks["ours"]
    if "theirs" in models:
        for number, way in enumerate(("encode", "decode")):
            found[f"{way}, times as fast as diffusers"] = times["theirs"][number] / times["ours"][number]
        if peaks["ours"]:
            found["peak, times diffusers'"] = peaks["ours"][PEAK] / peaks["theirs"][PEAK]
    return found


def edits(memory: str, bits: int = 16) -> Callable[[argparse.Namespace, Card], dict]:
    """An edit with guidance by one way to hold the model; s a step: of the third and the fourth."""

    def part(asked: argparse.Namespace, card: Card) -> dict:
        with tempfile.TemporaryDirectory() as place:
            pipe = QwenImagePipeline.from_pretrained(
                made_folder(Path(place), asked.like, bits), card.device, torch.bfloat16, memory=memory
            )
            picture = Image.new("RGB", (asked.side, asked.side), "teal")
            options = {"area": asked.side**2, "true_cfg_scale": 4.0, "progress": False}
            took = []
            card.begin()
            for steps in (1, 2, 4):  # the first warms up
                start = time.perf_counter()
                pipe.edit(picture, "make it winter", num_inference_steps=steps, **options)
                card.wait()
                took.append(time.perf_counter() - start)
            found = {"s a step": (took[2] - took[1]) / 2} | card.peak()
            shells = pipe.turns.shells if pipe.turns else None
            if shells:
                planned = next(plan for plan in plans(shells, asked.side**2) if plan.way == memory)
                found["GiB, as planned"] = planned.peak / 2**30
            if memory == "stream":
                shell = shells["transformer"]
                blocks = shell.streamed(BLOCKS, lambda name: MODULATION not in name)
                moved = card.seconds(lambda: [None for _ in blocks], 1)
                passes = max(1, round(planned.fetched / sum(map(shell.size, pass_of(blocks)))))
                found |= {"s to move the bytes of a step": passes * moved}
                found["times what moving the bytes takes"] = found["s a step"] / (passes * moved)
            return found

    return part


def pass_of(blocks) -> list[str]:
    """The tensors that a walk through these blocks fetches."""
    return [stored for names in blocks.names for stored in names.values()]


def shrinking(asked: argparse.Namespace, card: Card) -> dict:
    """Shrinking to 4 bits, on the host: two blocks of the transformer, and all of text encoder and autoencoder."""
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "whole").mkdir()
        whole = made_folder(Path(place) / "whole", asked.like, layers=2)
        start = time.perf_counter()
        shrink(whole, Path(place) / "small", bits=4, progress=False)
        took = time.perf_counter() - start
        pipe = QwenImagePipeline.from_pretrained(Path(place) / "small", card.device, torch.bfloat16, memory="turns")
        picture = Image.new("RGB", (asked.side, asked.side), "teal")
        pipe.edit(picture, "make it winter", num_inference_steps=1, area=asked.side**2, progress=False)
        size = sum(file.stat().st_size for file in (Path(place) / "small").rglob("*") if file.is_file())
    return {"s": took, "GB": size / 1e9}


def training(asked: argparse.Namespace, card: Card) -> dict:
    """Steps of adapters on frozen weights of 4 bits, of one sample."""
    with tempfile.TemporaryDirectory() as place:
        folder = made_folder(Path(place), asked.like, bits=4)
        without = ("vae", "text_encoder")
        embeds = torch.randn(1, WORDS, config_of(asked.like, "transformer")["joint_attention_dim"])
        latents = torch.randn(1, 16, 1, asked.side // 8, asked.side // 8)
        sample, took = Sample("made", latents, (latents,), embeds, embeds), []
        for steps in (1, 3):
            card.begin()
            pipe = QwenImagePipeline.from_pretrained(folder, card.device, torch.bfloat16, without, memory="turns")
            start = time.perf_counter()
            log = finetune(pipe, [sample], steps=steps, levels=100, checkpointing=True, rank=16, progress=False)
            card.wait()
            took.append(time.perf_counter() - start)
    return {"s a step": (took[1] - took[0]) / 2, "loss": log[-1].loss} | card.peak()


def several(asked: argparse.Namespace, card: Card) -> dict:
    """The same edit under torchrun, on all cards (an even number of them), beside one; on a CPU two processes."""
    count = torch.cuda.device_count() // 2 * 2 if card.device.type == "cuda" else 2
    if count < 2:
        return {"not run": "one card"}
    took = {}
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "model").mkdir()
        folder = made_folder(Path(place) / "model", asked.like)
        Image.new("RGB", (asked.side, asked.side), "teal").save(Path(place) / "given.png")
        for processes in (1, count):
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
            edit = ["-m", "minqwen.edit", f"{place}/given.png", "make it winter", "--out", f"{place}/{processes}.png"]
            how = ["--model", str(folder), "--steps", "8", "--area", str(asked.side**2), "--guidance", "4"]
            how += ["--device", asked.device, "--dtype", "bfloat16", "--memory", "turns"]
            done = subprocess.run([*torchrun, *edit, *how], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr[-3000:])
            took[processes] = float(re.search(r"steps in ([\d.]+) s", done.stdout)[1])
    return {"processes": count, "s": took[count], "times as fast as one": took[1] / took[count]}


PARTS_OF_IT = {
    "tests": tests,
    "forward": forward,
    "vae": vae,
    "turns at 4 bits": edits("turns", 4),
    "turns": edits("turns"),
    "stream": edits("stream"),
    "training at 4 bits": training,
    "shrinking": shrinking,
    "resident": edits("resident"),
    "several cards": several,
}


# ------------------------------------------------------------------------------------------------------- the table


def table(found: dict[str, dict]) -> list[str]:
    """A line for each figure, beside what it should be."""
    lines = [f"| on {machine()} | | measured | wanted |", "|---|---|---|---|"]
    for part, figures in found.items():
        for figure, value in figures.items():
            wanted, which = WANTED.get((part, figure), (None, ""))
            told = f"{value:.4g}" if isinstance(value, float | int) else str(value).replace("|", "/")
            kept = wanted is None or (value >= wanted if which == "least" else value <= wanted)
            should = "" if wanted is None else f"at {which} {wanted}" + ("" if kept else ": **missed**")
            lines.append(f"| {part} | {figure} | {told} | {should} |")
    return lines


def run_part(name: str, asked: argparse.Namespace, left: float) -> dict:
    """One part in its own process."""
    command = [sys.executable, __file__, "--only", name, "--device", asked.device, "--side", str(asked.side)]
    command += ["--backend", asked.backend] + (["--like", str(asked.like)] if asked.like else [])
    try:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
        done = subprocess.run(command, capture_output=True, text=True, timeout=left, env=environment)
    except subprocess.TimeoutExpired:
        return {"not finished": "the time was up"}
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr)
        return {"failed": (done.stderr.strip().splitlines() or ["without a word"])[-1][:200]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--like", type=Path, help="a checkpoint whose sizes are taken in place of the released ones")
    parser.add_argument("--side", type=int, default=1024, help="of a picture, in pixels")
    parser.add_argument("--backend", default="inductor", help="of torch.compile; none: without it")
    parser.add_argument("--minutes", type=float, default=8, help="after which no part begins and the last one ends")
    parser.add_argument("--only", choices=PARTS_OF_IT, help="one part, in this process")
    parser.add_argument("--json", type=Path, default=ROOT / "runs" / "gpu.json", help="takes the figures")
    parser.add_argument("--write", action="store_true", help="put the table into tests/README.md")
    asked = parser.parse_args(arguments)
    if asked.device == "cuda" and not torch.cuda.is_available():
        parser.exit(1, "there is no CUDA device here; --device cpu --like data/tiny --side 64 tries the script\n")
    if asked.only:
        print(json.dumps(PARTS_OF_IT[asked.only](asked, Card(asked.device))))
        return
    end, found = time.monotonic() + 60 * asked.minutes, {}
    for name in PARTS_OF_IT:
        left = end - time.monotonic()
        found[name] = run_part(name, asked, left) if left > 10 else {"not begun": "the time was up"}
        print("\n".join(table({name: found[name]})[2:]), flush=True)
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        asked.json.write_text(json.dumps({"machine": machine(), "found": found}, indent=1), encoding="utf-8")
    lines = table(found)
    print("\n" + "\n".join(lines))
    if asked.write:
        put(ROOT / "tests" / "README.md", "gpu", lines)


if __name__ == "__main__":
    main()

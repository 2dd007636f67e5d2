"""What doctor.py and from_pretrained say beforehand, against what then is: seconds of a step, bytes at the peak.

pytest tests/benchmarks/bench_doctor.py -s

On data/tiny, and on four layers of full width with made weights. What is said comes from one process, what is measured
from another, whose peak is the kernel's count of all that it holds: also of what the doctor says that Python holds.
"""

import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from minqwen.checkpoint import Checkpoint
from minqwen.doctor import python_itself
from minqwen.memory import Shell
from minqwen.pipeline import PARTS, QwenImagePipeline
from minqwen.plans import WAYS, plans, rates
from minqwen.transformer import QwenImageTransformer2DModel

TINY = Path(__file__).resolve().parents[2] / "data" / "tiny"
LAYERS = 4
AREAS = {"tiny": 96 * 96, "four layers": 512 * 512}
STEPS = {"tiny": 40, "four layers": 4}


def most_held() -> int:
    """Bytes that this process has held at once (what getrusage says may be of the process that started it)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The tiny checkpoint, and the same with a transformer of full width in place of its own, in float32."""
    wide = tmp_path_factory.mktemp("wide") / "model"
    shutil.copytree(TINY, wide)
    for path in (wide / "transformer").iterdir():
        path.unlink()
    config = {"_class_name": "QwenImageTransformer2DModel", "num_layers": LAYERS}
    (wide / "transformer/config.json").write_text(json.dumps(config), encoding="utf-8")
    with torch.device("meta"):
        model = QwenImageTransformer2DModel(num_layers=LAYERS)
    tensors = {name: torch.full(tensor.shape, 0.01) for name, tensor in model.state_dict().items()}
    save_file(tensors, wide / "transformer/diffusion_pytorch_model.safetensors", {"format": "pt"})
    return {"tiny": TINY, "four layers": wide}


def said(folder: str, way: str, area: int, steps: int) -> tuple[float, float]:
    """Seconds of a step and bytes at the peak, of the transformer alone, as the doctor says them."""
    shells = {"transformer": Shell(Checkpoint(folder), PARTS["transformer"], "transformer", "cpu", torch.float32)}
    plan = plans(shells, area)[WAYS.index(way)]
    seconds = plan.seconds(*rates(shells["transformer"], area, streams=way == "stream"), beside=False)
    return seconds, python_itself() + plan.peak


def took(folder: str, way: str, area: int, steps: int) -> tuple[float, float]:
    """The same, measured."""
    side, seconds = round(area**0.5), []
    pipe = QwenImagePipeline.from_pretrained(folder, "cpu", torch.float32, ("vae", "text_encoder"), way)
    width = pipe.transformer.txt_in.in_features
    sigmas = torch.linspace(1, 0.1, steps, dtype=torch.float64)
    if pipe.turns is not None:
        pipe.turns.prepare(sigmas)
    prompts = [(torch.zeros(1, area // 784 + 64, width), None) for _ in range(2)]
    step = pipe.velocity(prompts, [torch.zeros(1, 16, 1, side // 8, side // 8)], side, side, 4.0)
    for sigma in sigmas.tolist():
        start = time.perf_counter()
        step(torch.zeros(1, area // 256, 64), sigma)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), most_held()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model", AREAS)
def test_the_step_and_the_peak_are_about_what_was_said(model, way, folders):
    found = []
    for asked in (said, took):
        given = f"{str(folders[model])!r}, {way!r}, {AREAS[model]}, {STEPS[model]}"
        call = f"import bench_doctor; print(*bench_doctor.{asked.__name__}({given}))"
        command = [sys.executable, "-c", call]
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        found.append([float(word) for word in done.stdout.splitlines()[-1].split()])
    (seconds, peak), (of_seconds, of_peak) = found[1], (a / b for a, b in zip(*found, strict=True))
    print(f"\n{model}, {way}: a step {seconds:.3g} s, said {of_seconds:.2f} times that; "
          f"peak {peak / 2**20:.0f} MiB, said {of_peak:.2f} times that")  # fmt: skip
    assert 1 / 1.5 <= of_seconds <= 1.5
    assert 0.9 <= of_peak <= 1.1

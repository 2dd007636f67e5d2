"""What doctor.py and from_pretrained say beforehand, against what then is: seconds of a step, bytes at the peak.

pytest tests/benchmarks/bench_doctor.py -s

On data/tiny, and on four layers of full width with made weights. Each way runs in a process of its own, whose peak is
the kernel's count, less what it held before the parts came.
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
from minqwen.memory import Shell
from minqwen.pipeline import PARTS, QwenImagePipeline
from minqwen.plans import WAYS, plans, rates
from minqwen.transformer import QwenImageTransformer2DModel

TINY = Path(__file__).resolve().parents[2] / "data" / "tiny"
LAYERS, STEPS = 4, 4
AREAS = {"tiny": 64 * 64, "four layers": 512 * 512}


def held(key: str) -> int:
    """Bytes of this process: VmRSS, now; VmHWM, at the most."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


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


def measure(folder: str, way: str, area: int) -> dict[str, float]:
    """Said and measured seconds of a step and bytes at the peak, of the transformer alone."""
    side, parts = round(area**0.5), ("transformer",)
    before, seconds = held("VmRSS"), []
    pipe = QwenImagePipeline.from_pretrained(folder, "cpu", torch.float32, ("vae", "text_encoder"), way)
    width = pipe.transformer.txt_in.in_features
    sigmas = torch.linspace(1, 0.1, STEPS, dtype=torch.float64)
    if pipe.turns is not None:
        pipe.turns.prepare(sigmas)
    prompts = [(torch.zeros(1, area // 784 + 64, width), None) for _ in range(2)]
    step = pipe.velocity(prompts, [torch.zeros(1, 16, 1, side // 8, side // 8)], side, side, 4.0)
    for sigma in sigmas.tolist():
        start = time.perf_counter()
        step(torch.zeros(1, area // 256, 64), sigma)
        seconds.append(time.perf_counter() - start)
    peak = held("VmHWM") - before
    del pipe, step
    shells = {name: Shell(Checkpoint(folder), PARTS[name], name, "cpu", torch.float32) for name in parts}
    plan = plans(shells, area)[WAYS.index(way)]
    said = plan.seconds(*rates(shells["transformer"], area, streams=way == "stream"), beside=False)
    return {"said": said, "took": statistics.median(seconds), "said_peak": plan.peak, "peak": peak}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model", AREAS)
def test_the_step_and_the_peak_are_about_what_was_said(model, way, folders):
    given = f"{str(folders[model])!r}, {way!r}, {AREAS[model]}"
    call = f"import bench_doctor, json; print(json.dumps(bench_doctor.measure({given})))"
    here = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", call], cwd=here, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    times, peaks = found["said"] / found["took"], found["said_peak"] / found["peak"]
    print(f"\n{model}, {way}: a step {found['took']:.3g} s, said {times:.2f} times that; "
          f"peak {found['peak'] / 2**20:.0f} MiB, said {peaks:.2f} times that")  # fmt: skip
    assert 1 / 1.5 <= times <= 1.5
    assert model == "tiny" or 0.9 <= peaks <= 1.1  # of tiny the interpreter's own memory is the most

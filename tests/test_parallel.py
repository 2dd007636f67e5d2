"""parallel.py: two and four processes, on a CPU, do what one does. A run under torchrun starts Python as many times."""

import json
import random
import shutil
import subprocess
from pathlib import Path

import kills
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from minqwen import edit, finetune, precompute
from minqwen.parallel import joined, rank, share, size
from minqwen.shrink import shrink

ROOT = Path(__file__).resolve().parents[1]
TINY, SET = ROOT / "data" / "tiny", ROOT / "data" / "finetune"
MODEL = ["--model", str(TINY), "--device", "cpu"]
STEP = ["--steps", "4", "--batch-size", "2", "--accumulate", "3", "--save-every", "2", "--quiet", *MODEL]
pytestmark = pytest.mark.slow


def torchrun(processes: int, module: str, *arguments: str, fails: bool = False) -> str:
    """What a command under torchrun says; of one that should fail, on its error stream."""
    command = [*kills.torchrun(processes), "-m", f"minqwen.{module}", *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, env=kills.alone(), timeout=300)
    assert bool(ran.returncode) == fails, ran.stderr[-3000:]
    return ran.stderr if fails else ran.stdout


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Seven samples, the cache that one process makes of them, and the checkpoint at 4 bits."""
    place = tmp_path_factory.mktemp("data")
    for name in ("images", "control"):
        (place / name).mkdir()
        for path in sorted((SET / name).iterdir())[: 14 if name == "images" else 7]:  # with captions beside
            shutil.copy(path, place / name)
    precompute.main([*sources(place), "--cache", str(place / "cache"), "--quiet", *MODEL])
    shrink(TINY, place / "small", bits=4, progress=False)
    return place


def sources(place: Path) -> list[str]:
    return [str(place / "images"), "--control", str(place / "control")]


def trained(out: Path, full: bool) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """The weights and the log of a run."""
    name = "transformer/diffusion_pytorch_model.safetensors" if full else "lora.safetensors"
    return load_file(out / name), np.loadtxt(out / "log.csv", delimiter=",", skiprows=1)


EDIT = ["make the star green", "--steps", "3", "--area", str(192 * 192), *MODEL]
EDITS = {"guided": ["--guidance", "3"], "streamed": ["--guidance", "1", "--memory", "stream"]}


def all_of_it(data: Path, out: Path) -> list[tuple[str, list[str]]]:
    """Every command once: its module, and its arguments."""
    tune = [str(data / "cache"), *STEP, "--dtype", "float32"]
    jobs = [("precompute", [*sources(data), "--cache", str(out / "cache"), "--quiet", *MODEL])]
    jobs += [("finetune", [*tune, "--out", str(out / name), "--rank", r]) for name, r in (("lora", "4"), ("full", "0"))]
    jobs += [("finetune", [*tune, "--out", str(out / "bits"), "--rank", "4", "--model", str(data / "small")])]
    picture = str(ROOT / "data/pictures/scene.png")
    return jobs + [("edit", [picture, *EDIT, *how, "--out", str(out / f"{name}.png")]) for name, how in EDITS.items()]


RUN = """
import json, sys, torch
from minqwen import edit, finetune, precompute
from minqwen.checkpoint import Checkpoint
from minqwen.parallel import entire, gathered, joined, load_sharded
from minqwen.transformer import QwenImageTransformer2DModel as Model
with joined("cpu"):
    for module, arguments in json.loads(sys.argv[1]):
        globals()[module].main(arguments)
    model = load_sharded(Checkpoint(sys.argv[2]), Model, "transformer", "cpu", torch.float32)
    held = gathered(sum(p.to_local().untyped_storage().nbytes() for p in model.parameters()))
    one = Checkpoint(sys.argv[2]).load(Model, "transformer").state_dict()
    exact = all(torch.equal(entire(t), one[name]) for name, t in model.state_dict().items())
    print(json.dumps([held, sum(t.nbytes for t in one.values()), exact]))
"""


@pytest.fixture(scope="module")
def one(data, tmp_path_factory) -> Path:
    """What one process does."""
    place = tmp_path_factory.mktemp("one")
    for module, arguments in all_of_it(data, place):
        {"precompute": precompute, "finetune": finetune, "edit": edit}[module].main(arguments)
    return place


@pytest.fixture(scope="module")
def cut(data, tmp_path_factory) -> Path:
    """A run of one process that trains every weight, cut off behind its save at step 2."""
    place = tmp_path_factory.mktemp("cut")
    with pytest.raises(KeyboardInterrupt):
        stopped(data / "cache", place, [*STEP, "--dtype", "float32", "--rank", "0"])
    return place


@pytest.fixture(scope="module", params=[2, 4])
def many(request, data, cut, tmp_path_factory) -> Path:
    """What several do; they also go on with the run that was cut off."""
    place = tmp_path_factory.mktemp("many")
    (place / "run.py").write_text(RUN, encoding="utf-8")
    shutil.copytree(cut, place / "cut")
    goes_on = [str(data / "cache"), *STEP, "--dtype", "float32", "--rank", "0", "--out", str(place / "cut")]
    jobs = json.dumps([*all_of_it(data, place), ("finetune", goes_on)])
    command = [*kills.torchrun(request.param), str(place / "run.py"), jobs, str(TINY)]
    ran = subprocess.run(command, capture_output=True, text=True, env=kills.alone(), timeout=300)
    assert not ran.returncode, ran.stderr[-3000:]
    lines = [line for line in ran.stdout.splitlines() if not line.startswith("memory: ")]
    assert len(lines) == 8 and "7 computed, 0 reused" in lines[0], lines  # one of the processes speaks
    held, whole, exact = json.loads(lines[-1])  # a part of the bytes, and the rows that fill up
    assert exact and len(held) == request.param
    assert whole / request.param <= max(held) <= 1.02 * whole / request.param
    return place


def test_precompute_writes_the_same_bytes(one, many):
    files = [
        {path.name: path.read_bytes() for path in (place / "cache").iterdir() if not path.name.startswith(".")}
        for place in (one, many)
    ]
    assert len(files[0]) == 8 and files[0] == files[1]


@pytest.mark.parametrize("name", ["lora", "full", "bits"])
def test_finetune_ends_in_the_same_weights(name, one, many):
    (want, log), (got, theirs) = (trained(place / name, name == "full") for place in (one, many))
    assert got.keys() == want.keys() and max((got[n] - want[n]).abs().max() for n in want) <= 1e-5
    assert log.shape == theirs.shape == (14, 3) and abs(log - theirs).max() <= 1e-5


def test_a_run_goes_on_with_another_number_of_processes(one, many):
    """Of every weight, in shards; of adapters one file is written, and read by all."""
    (want, log), (got, theirs) = trained(one / "full", True), trained(many / "cut", True)
    assert max((got[n] - want[n]).abs().max() for n in want) <= 1e-5 and abs(log - theirs).max() <= 1e-5


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_the_same_picture(name, one, many):
    """192x192 pixels, so that guidance's two passes are two."""
    pictures = [np.asarray(Image.open(place / f"{name}.png"), int) for place in (one, many)]
    assert pictures[0].shape == pictures[1].shape and abs(pictures[0] - pictures[1]).max() <= 1


def stopped(cache: Path, out: Path, how: list[str]) -> None:
    asked = finetune.command_line().parse_args([str(cache), "--out", str(out), *how])
    keywords = {each.name: getattr(asked, each.name) for each in finetune.fields(finetune.Settings)}

    def stop(step: int) -> None:
        if step == 2:
            raise KeyboardInterrupt

    pipe = finetune.open_model(asked, ("text_encoder", "vae"))
    finetune.finetune(pipe, precompute.Precomputed.open(cache), out, preview=stop, progress=False, **keywords)


def test_a_killed_worker_costs_no_more_than_the_steps_since_the_last_save(tmp_path):
    """Once; make kills does it ten times."""
    assert kills.killed_workers(tmp_path, count=1, seed=random.randrange(10**6)) == 1


@pytest.mark.parametrize(
    ("processes", "arguments", "words"),
    [(3, ["--area", 512 * 512], "guidance's two passes need an even number of processes, these are 3"),
     (2, ["--steps", "x"], "--steps: expected a whole number")],
)  # fmt: skip
def test_bad_use_is_one_sentence_of_one_process(processes, arguments, words, tmp_path):
    picture, out = ROOT / "data/pictures/scene.png", tmp_path / "x.png"
    more = ["--out", out, "--steps", 1, *arguments] if "--steps" not in arguments else ["--out", out, *arguments]
    said = torchrun(processes, "edit", picture, "x", *more, *MODEL, fails=True)
    lines = [line for line in said.splitlines() if line.startswith("edit: ")]
    assert len(lines) == 1 and words in lines[0], said


def test_too_few_cards_are_named(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"2 processes on a machine of 1 card\(s\)"), joined():
        pass


def test_alone_everything_is_as_it_was(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with joined("cpu") as device:
        assert (device, rank(), size()) == ("cpu", 0, 1)
    assert list(share(["a", "b"])) == [(0, "a", True), (1, "b", True)]

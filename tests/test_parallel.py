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
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file

from minqwen import edit, finetune, parallel, precompute
from minqwen.parallel import Passes, joined, rank, share, size, split_tokens
from minqwen.shrink import shrink

ROOT = Path(__file__).resolve().parents[1]
TINY, SET = ROOT / "data" / "tiny", ROOT / "data" / "finetune"
MODEL = ["--model", str(TINY), "--device", "cpu"]
STEP = ["--steps", "2", "--batch-size", "2", "--accumulate", "3", "--save-every", "1", "--quiet", *MODEL]
pytestmark = pytest.mark.slow


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


EDIT = ["replace the cat with a fox", "--steps", "2", "--area", str(192 * 192), *MODEL]
EDITS = {"guided": ["--guidance", "3"], "streamed": ["--guidance", "1", "--memory", "stream"]}


def jobs(data: Path, out: Path) -> dict[str, tuple[str, list[str]]]:
    """What is done by one process and by several: its name -> the command, and its arguments."""
    tune = [str(data / "cache"), *STEP, "--dtype", "float32", "--out"]
    picture = str(ROOT / "data/pictures/scene.png")
    edits = {name: [picture, *EDIT, *how, "--out", str(out / f"{name}.png")] for name, how in EDITS.items()}
    return {
        "cache": ("precompute", [*sources(data), "--cache", str(out / "cache"), "--quiet", *MODEL]),
        "lora": ("finetune", [*tune, str(out / "lora"), "--rank", "4"]),
        "full": ("finetune", [*tune, str(out / "full"), "--rank", "0"]),
        "bits": ("finetune", [*tune, str(out / "bits"), "--rank", "4", "--model", str(data / "small")]),
        "cut": ("finetune", [*tune, str(out / "cut"), "--rank", "0"]),  # goes on with what is there
    } | {name: ("edit", arguments) for name, arguments in edits.items()}


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


def by_one(data: Path, place: Path, names: list[str]) -> None:
    for module, arguments in map(jobs(data, place).get, names):
        {"precompute": precompute, "finetune": finetune, "edit": edit}[module].main(arguments)


def by_several(processes: int, data: Path, place: Path, names: list[str]) -> None:
    """All in one start of torchrun; then each process says how much it holds of a model that is shared out."""
    (place / "run.py").write_text(RUN, encoding="utf-8")
    told = json.dumps(list(map(jobs(data, place).get, names)))
    command = [*kills.torchrun(processes), str(place / "run.py"), told, str(TINY)]
    ran = subprocess.run(command, capture_output=True, text=True, env=kills.alone(), timeout=300)
    assert not ran.returncode, ran.stderr[-3000:]
    *lines, last = [line for line in ran.stdout.splitlines() if not line.startswith("memory: ")]
    assert len(lines) == len(names), lines  # one of the processes speaks
    held, whole, exact = json.loads(last)  # a part of the bytes, and the rows that fill up
    assert exact and len(held) == processes and whole / processes <= max(held) <= 1.02 * whole / processes


@pytest.mark.parametrize(
    ("processes", "names"),
    [(2, ["cache", "lora", "full", "bits", "cut", "guided", "streamed"]), (4, ["full", "guided"])],
    ids=["two", "four"],
)
def test_several_processes_do_what_one_does(processes, names, data, tmp_path):
    """Edits are of 192x192 pixels, so that guidance's two passes are two. "cut" is a run of every weight that one
    process began: it goes on in shards (adapters are in one file, which all read)."""
    one, many = tmp_path / "one", tmp_path / "many"
    one.mkdir()
    many.mkdir()
    if "cut" in names:
        with pytest.raises(KeyboardInterrupt):
            stopped(*jobs(data, many)["cut"][1])
    by_one(data, one, names)
    by_several(processes, data, many, names)
    if "cache" in names:
        files = [{p.name: p.read_bytes() for p in (place / "cache").glob("[!.]*")} for place in (one, many)]
        assert len(files[0]) == 8 and files[0] == files[1]
    for name in {"lora", "full", "bits", "cut"} & set(names):
        (want, log), (got, theirs) = (trained(place / name, name in ("full", "cut")) for place in (one, many))
        assert got.keys() == want.keys() and max((got[n] - want[n]).abs().max() for n in want) <= 1e-5, name
        assert log.shape == theirs.shape == (7, 3) and abs(log - theirs).max() <= 1e-5, name
    for name in set(EDITS) & set(names):
        pictures = [np.asarray(Image.open(place / f"{name}.png"), int) for place in (one, many)]
        assert pictures[0].shape == pictures[1].shape and abs(pictures[0] - pictures[1]).max() <= 1, name


def stopped(*arguments: str) -> None:
    """A training that is cut off behind its save at step 1."""
    asked = finetune.command_line().parse_args(arguments)
    keywords = {each.name: getattr(asked, each.name) for each in finetune.fields(finetune.Settings)}

    def stop(step: int) -> None:
        if step == 1:
            raise KeyboardInterrupt

    pipe = finetune.open_model(asked, ("text_encoder", "vae"))
    finetune.finetune(
        pipe, precompute.Precomputed.open(asked.cache), asked.out, preview=stop, progress=False, **keywords
    )


def test_a_killed_worker_costs_no_more_than_the_work_since_the_last_save(tmp_path):
    """Once; make kills does it ten times, and to precompute as well."""
    assert kills.killed_workers("finetune", tmp_path, count=1, seed=random.randrange(10**6)) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--steps", "x"], "--steps: expected a whole number"), (["--model", "no/model"], "no/model")],
)
def test_bad_use_is_one_sentence_of_one_process(arguments, words, tmp_path):
    picture = ROOT / "data/pictures/scene.png"
    command = [*kills.torchrun(2), "-m", "minqwen.edit", str(picture), "x", "--out", str(tmp_path / "x.png")]
    environment = kills.alone() | {"HF_HUB_OFFLINE": "1"}
    ran = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, timeout=300)
    lines = [line for line in ran.stderr.splitlines() if line.startswith("edit: ")]
    assert ran.returncode and len(lines) == 1 and words in lines[0], ran.stderr


def test_processes_that_cannot_share_the_work_are_told(monkeypatch):
    monkeypatch.setattr(parallel, "size", lambda: 3)
    with pytest.raises(ValueError, match="guidance's two passes need an even number of processes, these are 3"):
        Passes(2)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 3)
    with pytest.raises(ValueError, match="32 tokens cannot be shared out to 3 processes"):
        split_tokens(None, object())(torch.zeros(1, 32, 64), torch.zeros(1, 5, 8), None, None, [[(1, 4, 4)] * 2])


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

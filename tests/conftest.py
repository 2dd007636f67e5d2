"""What every test run shares: one seed for all random sizes, and one thread in each of several workers.

`MINQWEN_SEED=123 pytest ...` repeats a run exactly, in one process as in many (`pytest -n auto`); the header prints the
seed. Where diffusers and transformers are missing, the files that compare with them are left out, and named.
"""

import os
import random
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

# The environment carries the seed to the workers, which would each draw another one.
SEED = int(os.environ.setdefault("MINQWEN_SEED", str(random.SystemRandom().randrange(2**31))))
WORKER_MEMORY = 2e9  # bytes: PyTorch and diffusers, the largest test, the kernel of a notebook
COMPARES = re.compile(r"^(?:from|import) (?:diffusers|transformers|peft|reference_pipelines)\b", re.MULTILINE)
LEFT_OUT = []
if any(find_spec(name) is None for name in ("diffusers", "transformers", "peft")):
    here = Path(__file__).parent
    LEFT_OUT = sorted(p.name for p in here.glob("*.py") if COMPARES.search(p.read_text(encoding="utf-8")))
collect_ignore = LEFT_OUT


def pytest_report_header(config):
    lines = [f"MINQWEN_SEED={SEED} (set it to repeat the random configurations of this run)"]
    if LEFT_OUT:
        lines.append(f"without diffusers, transformers and peft, left out: {', '.join(LEFT_OUT)}")
    return lines


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config) -> int:
    """Of `pytest -n auto`: one worker for each core that this process may use and that there is memory for."""
    import psutil  # comes with ipykernel

    allowed = len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else os.cpu_count()
    cores = min(psutil.cpu_count(logical=False) or allowed, allowed)
    return max(1, min(cores, int(psutil.virtual_memory().available / WORKER_MEMORY)))


def pytest_configure(config):
    """Workers, their own processes and the kernels of notebooks have one thread: PyTorch reads this when it starts."""
    if config.getoption("numprocesses", None):
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items):
    """Every worker begins with notebooks, the longest first; short tests come last, when one may help the other.

    xdist gives each worker an equal run of this list to begin with.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    notebooks = sorted((item for item in items if item.path.suffix == ".ipynb"), key=_seconds, reverse=True)
    tests = sorted((item for item in items if item.path.suffix != ".ipynb"), key=lambda item: item.path not in slow)
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    total, ordered = len(items), []
    for k in range(workers):
        mine = notebooks[k::workers]
        share = total * (k + 1) // workers - total * k // workers - len(mine)
        ordered += mine + tests[:share]
        tests = tests[share:]
    items[:] = ordered + tests


def _seconds(item) -> float:
    """What a notebook took when its outputs were made: the ledger in them says it."""
    return max(map(float, re.findall(r"tier tiny \| (\d+) s", item.path.read_text(encoding="utf-8"))), default=0)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(SEED)
    yield
    assert torch.is_grad_enabled(), "this test leaves gradients off, for all that follow"


@pytest.fixture
def rng(request) -> random.Random:
    """A generator of its own for each test, so that tests can be run alone and in any order."""
    return random.Random(f"{SEED}{request.node.nodeid}")

"""Every test that draws random sizes takes them from one seed, which the header prints.

`MINQWEN_SEED=123 pytest ...` repeats a run exactly.
"""

import os
import random

import pytest
import torch

SEED = int(os.environ.get("MINQWEN_SEED", random.SystemRandom().randrange(2**31)))


def pytest_report_header(config):
    return f"MINQWEN_SEED={SEED} (set it to repeat the random configurations of this run)"


@pytest.fixture(autouse=True)
def _seeded(request):
    torch.manual_seed(SEED)


@pytest.fixture
def rng(request) -> random.Random:
    """A generator of its own for each test, so that tests can be run alone and in any order."""
    return random.Random(f"{SEED}{request.node.nodeid}")

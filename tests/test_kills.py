"""kills.py in small: long work that is killed at random moments, twice at once too, ends in the same bytes."""

import os

import pytest
from conftest import SEED
from kills import run


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
@pytest.mark.parametrize("job", ["precompute", "finetune", "shrink"])
def test_killed_work_ends_in_the_bytes_of_an_undisturbed_run(job):
    kills, rounds = run([job], kills=20, seed=SEED)[job]
    assert kills >= 20 and rounds > 0

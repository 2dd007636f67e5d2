"""kills.py in small: long work that is killed at random moments, twice at once too, ends in the same bytes."""

import os

import pytest
from conftest import SEED
from kills import JOBS, WORKERS, run


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
@pytest.mark.parametrize("job", [job for job in JOBS if job not in WORKERS])  # those: test_parallel.py
def test_killed_work_ends_in_the_bytes_of_an_undisturbed_run(job):
    wanted = 5 if job == "tiny" else 20  # a round of which takes seconds
    kills, rounds = run([job], wanted, seed=SEED)[job]
    assert kills >= wanted and rounds > 0

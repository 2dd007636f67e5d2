"""A whole guided edit of data/tiny, 20 steps, against diffusers on the same weights, latents and machine.

pytest tests/benchmarks/bench_edit.py -s
"""

import statistics
import time
from pathlib import Path

import numpy as np
import torch
from reference_pipelines import edit_pipeline

from minqwen.pipeline import QwenImagePipeline
from minqwen.world import sample_edit

TINY = Path(__file__).resolve().parents[2] / "data" / "tiny"


def measure(repeats: int, monkeypatch) -> tuple[float, float]:
    """Median seconds of an edit: ours, diffusers'. Runs alternate, so that both meet the same machine."""
    ours, theirs = QwenImagePipeline.from_pretrained(TINY, device="cpu"), edit_pipeline(TINY, 96 * 96, monkeypatch)
    edit = sample_edit(np.random.default_rng(0))
    options = {
        "num_inference_steps": 20,
        "true_cfg_scale": 4.0,
        "latents": torch.randn(1, 16, 64),
        "negative_prompt": " ",
    }
    runs = {
        "minqwen": lambda: ours.edit(edit.source, edit.instruction, **options, progress=False),
        "diffusers": lambda: theirs(edit.source, edit.instruction, **options).images[0],
    }
    seconds = {name: [] for name in runs}
    for k in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if k:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    medians = [statistics.median(times) for times in seconds.values()]
    print(f"\nedit 64x64, 20 steps, guidance, {torch.get_num_threads()} threads: minqwen {medians[0]:.2f} s, "
          f"diffusers {medians[1]:.2f} s, {medians[1] / medians[0]:.2f} times as fast")  # fmt: skip
    return medians[0], medians[1]


def test_an_edit_is_at_least_one_and_a_half_times_as_fast(monkeypatch):
    ours, theirs = measure(5, monkeypatch)
    assert theirs / ours >= 1.5
    assert ours < 3

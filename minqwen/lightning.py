"""Four or eight steps in place of fifty: adapters that were trained for it, the schedule that they want, no guidance.

    load_lightning(pipe, "Qwen-Image-Edit-Lightning-4steps-V1.0.safetensors")  ->  pipe.edit(..., num_inference_steps=4)

Noise levels of 4 steps: 1, 0.9, 0.75, 0.5, 0. A step runs the model once, not twice, since guidance is off: 4 runs
where there were 100.
The surprise: the adapters alone make it worse. On the released schedule, or at scale 1, the pictures are grids.
Source: ModelTC's Qwen-Image-Lightning. Tests: tests/test_lightning.py. Chapter 11.
"""

import math
import os
import re
from pathlib import Path

from minqwen.lora import LoraReport, load_lora
from minqwen.pipeline import QwenImagePipeline

SCHEDULE = {  # in scheduler_config.json: every picture's levels are shifted by 3, and the last is not stretched to 0.02
    "base_shift": math.log(3),
    "max_shift": math.log(3),
    "shift_terminal": None,
    "use_dynamic_shifting": True,
}


def load_lightning(pipe: QwenImagePipeline, file: str | os.PathLike, scale: float = 1.0) -> LoraReport:
    """Put a Lightning file's adapters on a pipeline and make it sample as they were trained to: few steps, unguided.

    scale: times the file's own, alpha / rank. Raises as load_lora does. The number of steps is in the file's name.
    """
    report = load_lora(pipe.transformer, file, scale)
    pipe.schedule = pipe.schedule | SCHEDULE
    pipe.true_cfg_scale = 1.0
    return report


def steps_of(file: str | os.PathLike | None) -> int | None:
    """The steps for which a Lightning file is made, from its name; None for every other file."""
    name = re.search(r"lightning.*?(\d+)[ _-]?steps", Path(file or "").name, re.IGNORECASE)
    return int(name[1]) if name else None

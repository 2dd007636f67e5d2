"""Draws the small fine-tuning set: python data/recipes/make_finetune_set.py data/finetune

    images/NAME.png, images/NAME.txt    what should come out, and the instruction
    control/NAME.png                    the picture that it speaks of

Edits of the kind that the checkpoint was never shown (`mirror`) and, so that it does not forget what it can, some of
each kind that it was. Seeds are none that training (small ones), its checks (from 10**7) or evaluation (10**8) use.
"""

import argparse
from pathlib import Path

import numpy as np

from minqwen.world import HELD_BACK, KINDS, sample_edit

SEED = 5 * 10**8
COUNTS = {HELD_BACK: 96} | dict.fromkeys(KINDS, 8) | {"swap": 48}  # swap is nearest to mirror, and suffers most


def make(folder: Path, counts: dict[str, int] = COUNTS) -> None:
    for name in ("images", "control"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number, (kind, count) in enumerate(counts.items()):
        rng = np.random.default_rng(SEED + number)
        for k in range(count):
            edit, name = sample_edit(rng, kind), f"{kind}_{k:03}"
            edit.target.save(folder / "images" / f"{name}.png", optimize=True)
            edit.source.save(folder / "control" / f"{name}.png", optimize=True)
            (folder / "images" / f"{name}.txt").write_text(edit.instruction + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("data/finetune"))
    make(parser.parse_args().folder)

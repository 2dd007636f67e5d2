"""Draws the curves of a training from its logs: python data/recipes/curves.py FOLDER_OF_LOGS PICTURE"""

import csv
import sys
from pathlib import Path

import matplotlib.pyplot as plt

COLUMNS = ("recolour", "remove", "add", "background", "shape", "move", "swap", "draw", "combine")
DASHES = {"draw": "--", "combine": "-"}
NAMES = {"transformer_small": "small world", "transformer_full": "full world", "edit_plus": "adapter for two pictures"}


def read(path: Path) -> list[dict[str, float]]:
    with path.open() as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def curves(logs: Path, picture: Path) -> None:
    phases = [phase for phase in NAMES if (logs / f"log_{phase}.csv").exists()]
    figure, axes = plt.subplots(1, len(phases), figsize=(5 * len(phases), 4), sharey=True, facecolor="white")
    for axis, phase in zip(axes, phases, strict=True):
        rows = [row for row in read(logs / f"log_{phase}.csv") if "recolour" in row]
        for column in COLUMNS:
            points = [(row["samples"] / 1000, row[column]) for row in rows if column in row]
            if points:
                style = {"color": "black", "linestyle": DASHES[column]} if column in DASHES else {}
                axis.plot(*zip(*points, strict=True), label=column, **style)
        axis.set_title(NAMES[phase])
        axis.set_xlabel("thousand samples")
        axis.grid(alpha=0.3)
        axis.legend(loc="lower right", fontsize=9)
    axes[0].set_ylabel("right, per cent (40 of each kind, 10 steps)")
    figure.tight_layout()
    figure.savefig(picture, dpi=90)


if __name__ == "__main__":
    curves(Path(sys.argv[1]), Path(sys.argv[2]))

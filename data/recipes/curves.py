"""Draws the curves of a training from its logs: python data/recipes/curves.py FOLDER_OF_LOGS PICTURE"""

import csv
import sys
from pathlib import Path

import matplotlib.pyplot as plt

COLUMNS = ("recolour", "remove", "add", "background", "shape", "move", "swap", "draw")


def read(path: Path) -> list[dict[str, float]]:
    with path.open(encoding="utf-8") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def curves(logs: Path, picture: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, facecolor="white")
    for axis, phase in zip(axes, ("small", "full"), strict=True):
        rows = [row for row in read(logs / f"log_transformer_{phase}.csv") if "draw" in row]
        for column in COLUMNS:
            points = [(row["samples"] / 1000, row[column]) for row in rows if column in row]
            if points:
                style = {"color": "black", "linestyle": "--"} if column == "draw" else {}
                axis.plot(*zip(*points, strict=True), label=column, **style)
        axis.set_title(f"{phase} world")
        axis.set_xlabel("thousand samples")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("right, per cent (40 of each kind, 10 steps)")
    axes[1].legend(loc="lower right", fontsize=9)
    figure.tight_layout()
    figure.savefig(picture, dpi=90)


if __name__ == "__main__":
    curves(Path(sys.argv[1]), Path(sys.argv[2]))

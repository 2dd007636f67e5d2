"""Draws the curves of a training from its log: python data/recipes/curves.py LOG PICTURE"""

import csv
import sys
from pathlib import Path

import matplotlib.pyplot as plt

KINDS = ("replace", "remove", "add", "move", "swap", "background")


def read(path: Path) -> list[dict[str, float]]:
    with path.open(encoding="utf-8") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def curves(log: Path, picture: Path) -> None:
    rows = read(log)
    figure, (losses, right) = plt.subplots(1, 2, figsize=(11, 4), facecolor="white")
    for name, label in (("loss_edit", "edits"), ("loss_draw", "drawings")):
        losses.plot([row["samples"] / 1000 for row in rows], [row[name] for row in rows], label=label)
    losses.set_title("loss")
    losses.set_ylim(0, 0.6)
    counted = [row for row in rows if KINDS[0] in row]
    samples, edits = [row["samples"] / 1000 for row in counted], [[row[kind] for kind in KINDS] for row in counted]
    right.plot(samples, [sum(each) / len(each) for each in edits], label="edits, all kinds")
    right.fill_between(
        samples, [min(e) for e in edits], [max(e) for e in edits], alpha=0.2, label="from worst to best kind"
    )
    right.plot(samples, [row["draw"] for row in counted], color="black", label="draw")
    right.plot(samples, [row["open"] for row in counted], color="black", linestyle="--", label="open")
    right.set_title("right, per cent (40 of each kind, 10 steps, no guidance)")
    for axis in (losses, right):
        axis.set_xlabel("thousand samples")
        axis.grid(alpha=0.3)
    losses.legend()
    right.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.tight_layout()
    figure.savefig(picture, dpi=90)


if __name__ == "__main__":
    curves(Path(sys.argv[1]), Path(sys.argv[2]))

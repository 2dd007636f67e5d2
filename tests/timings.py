"""Times an edit, make check, make test and in it every chapter, and writes the figures into README.md: make timings

    python tests/timings.py --print     nothing is written

Takes about as long as the two. Leave the machine alone meanwhile.
"""

import argparse
import re
import statistics
import subprocess
import time

import numpy as np
from tables import ROOT, machine, put

from minqwen.pipeline import QwenImagePipeline
from minqwen.world import sample_edit

CHAPTER = re.compile(r"^([\d.]+)s call +notebooks/(\d\d)_", re.MULTILINE)  # a line of pytest's slowest parts
MEMORY = re.compile(r"([\d.]+) GB peak memory")  # in the ledger that a chapter prints at its end


def edit_seconds(repeats: int = 5) -> float:
    """Median seconds of a guided edit of 20 steps."""
    pipe, seconds = QwenImagePipeline.from_pretrained(ROOT / "data" / "tiny"), []
    edit = sample_edit(np.random.default_rng(0))
    for _ in range(repeats + 1):
        started = time.perf_counter()
        pipe.edit(edit.source, edit.instruction, num_inference_steps=20, true_cfg_scale=4.0, progress=False)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def made(target: str) -> tuple[float, str]:
    """Seconds that `make target` took, and what it printed, which is shown meanwhile."""
    started, lines = time.perf_counter(), []
    with subprocess.Popen(["make", target], cwd=ROOT, stdout=subprocess.PIPE, text=True, encoding="utf-8") as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        raise SystemExit(f"make {target} failed: no figures were written")
    return time.perf_counter() - started, "".join(lines)


def chapter_seconds(printed: str) -> dict[str, float]:
    """Chapter -> seconds, from what make test printed; each chapter has one thread there."""
    return {chapter: float(seconds) for seconds, chapter in CHAPTER.findall(printed)}


def chapter_memory() -> dict[str, float]:
    """Chapter -> gigabytes at the peak, from the outputs that the chapters were committed with."""
    chapters = {path.name[:2]: "" for path in (ROOT / "notebooks").glob("[0-9]*.ipynb")}
    for place in ("", "appendix"):  # one of the two ends with a ledger
        for path in (ROOT / "notebooks" / place).glob("[0-9]*.ipynb"):
            chapters[path.name[:2]] += path.read_text(encoding="utf-8")
    return {number: max(map(float, MEMORY.findall(text)), default=0) for number, text in chapters.items()}


def duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"


def span(costs: dict[str, float], unit: str, digits: int) -> str:
    """From least to most, and which chapters those are: "11 s (02) to 95 s (10)"."""
    low, high = min(costs, key=costs.get), max(costs, key=costs.get)
    parts = [f"{costs[chapter]:.{digits}f} {unit} ({chapter})" for chapter in (low, high)]
    return parts[0] if low == high else " to ".join(parts)


def table(edit: float, makes: dict[str, float], chapters: dict[str, float], memory: dict[str, float]) -> list[str]:
    """The lines between the markers of README.md."""
    rows = [
        ("one guided edit of 20 steps", duration(edit)),
        ("a lesson, on one core", f"{span(chapters, 's', 0)}, all together {duration(sum(chapters.values()))}"),
        ("a notebook's memory", span(memory, "GB", 1)),
    ]
    rows += [(f"`make {target}`, once everything is installed", duration(took)) for target, took in makes.items()]
    return [f"| on {machine()} | |", "|---|---|", *(f"| {what} | {cost} |" for what, cost in rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", help="write nothing, only print the lines")
    args = parser.parse_args()
    edit = edit_seconds()
    check, _ = made("check")
    test, printed = made("test")
    lines = table(edit, {"check": check, "test": test}, chapter_seconds(printed), chapter_memory())
    print("\n".join(lines))
    if not args.print:
        put(ROOT / "README.md", "timings", lines)


if __name__ == "__main__":
    main()

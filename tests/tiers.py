"""Every lesson and appendix in the tier `full`, on a folder that minqwen.shrink wrote: make tiers.

    python tests/tiers.py FOLDER [--only 03 --layers 2]

The folder is made once: the released geometry with made numbers, from a hub on this machine, with the first block of
each part only, and of 64x64 pixels in place of 1024x1024, so that a CPU gets through it. The last lines are a table,
for tests/README.md.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat
from benchmarks.bench_released import made_hub
from situations import failure, kernel
from tables import ROOT, machine, put
from tqdm import tqdm

AREA = 64 * 64  # pixels of an edit


def make(folder: Path, layers: int) -> None:
    """The shrunk folder, unless it is there."""
    index = folder / "model_index.json"
    if not index.exists():
        with made_hub(layers) as environment:
            subprocess.run([sys.executable, "-m", "minqwen.shrink", "owner/name", folder], env=environment, check=True)
    index.write_text(json.dumps(json.loads(index.read_text(encoding="utf-8")) | {"_area": AREA}), encoding="utf-8")


def run(notebook: Path, folder: Path) -> str:
    """What a notebook ends with."""
    cells = [cell.source for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]
    tier = {"MINQWEN_TIER": "full", "MINQWEN_MODEL": str(folder.resolve()), "MPLBACKEND": "agg"}
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"), "PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    with kernel(notebook.parent, tier | threads) as client:
        for number, source in enumerate(cells):
            if said := failure(client, source):
                return f"cell {number}: {said}"[:200].replace("|", "/").replace("\n", " ")
    return f"runs, {time.perf_counter() - start:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="takes some 5 GB")
    parser.add_argument("--layers", type=int, default=1, help="blocks in each part")
    parser.add_argument("--only", default="", help="notebooks whose names begin so")
    parser.add_argument("--write", action="store_true", help="put the table into tests/README.md")
    asked = parser.parse_args()
    make(asked.folder, asked.layers)
    lessons = sorted((ROOT / "notebooks").glob(f"{asked.only or '[0-9]'}*.ipynb"))
    lines = [f"| on {machine()} | lesson | appendix |", "|---|---|---|"]
    for lesson in tqdm(lessons, desc="chapters"):
        told = [run(each, asked.folder) for each in (lesson, lesson.parent / "appendix" / lesson.name)]
        lines.append(f"| {lesson.stem} | {told[0]} | {told[1]} |")
        tqdm.write(lines[-1])
    if asked.write:
        put(ROOT / "tests" / "README.md", "tiers", lines)
    raise SystemExit(any("cell" in line for line in lines[2:]))


if __name__ == "__main__":
    main()

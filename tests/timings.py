"""Times an edit, every chapter, make check and make test, and writes the figures into README.md: make timings

    python tests/timings.py --chapters 01 02 --no-make --print     only these, and nothing is written

Takes about as long as `make test` and all chapters one after another. Leave the machine alone meanwhile.
"""

import argparse
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import torch
from nbclient import NotebookClient

from minqwen.pipeline import QwenImagePipeline
from minqwen.world import sample_edit

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- what make timings writes -->\n", "<!-- end of what make timings writes -->\n"
LEDGER = re.compile(r"^tier \w+ \| (\d+) s \|(?: ([\d.]+) GB peak memory)?", re.MULTILINE)


def machine() -> str:
    """This machine as a reader would name it: processor, cores, GPU or none, Python, PyTorch."""
    name, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"^model name\s*: (.+)$", info.read_text(encoding="utf-8"), re.MULTILINE)):
        name = found[1]
    elif sys.platform == "darwin":
        name = subprocess.check_output(["sysctl", "-n", "machdep.cpu.brand_string"], text=True).strip()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    version = torch.__version__.split("+")[0]
    return f"{name}, {cores} cores, {gpu}, Python {platform.python_version()}, PyTorch {version}"


def edit_seconds(repeats: int = 5) -> float:
    """Median seconds of a guided edit of 20 steps."""
    pipe, seconds = QwenImagePipeline.from_pretrained(ROOT / "data" / "tiny"), []
    edit = sample_edit(np.random.default_rng(0))
    for _ in range(repeats + 1):
        started = time.perf_counter()
        pipe.edit(edit.source, edit.instruction, num_inference_steps=20, true_cfg_scale=4.0, progress=False)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def chapter_costs(path: Path) -> tuple[float, float | None]:
    """Seconds and gigabytes of a chapter, from the ledger that it prints at its end."""
    notebook = nbformat.read(path, as_version=4)
    place, quiet = {"metadata": {"path": str(path.parent)}}, ["--IPKernelApp.log_level=40"]
    NotebookClient(notebook, timeout=900, resources=place, extra_arguments=quiet).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    seconds, memory = LEDGER.findall(printed)[-1]
    return float(seconds), float(memory) if memory else None


def make_seconds(target: str) -> float:
    started = time.perf_counter()
    subprocess.run(["make", target], cwd=ROOT, check=True)
    return time.perf_counter() - started


def duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"


def span(costs: dict[str, float], unit: str, digits: int) -> str:
    """From least to most, and which chapters those are: "11 s (02) to 95 s (10)"."""
    low, high = min(costs, key=costs.get), max(costs, key=costs.get)
    parts = [f"{costs[chapter]:.{digits}f} {unit} ({chapter})" for chapter in (low, high)]
    return parts[0] if low == high else " to ".join(parts)


def table(edit: float, chapters: dict[str, tuple[float, float | None]], makes: dict[str, float]) -> str:
    """The lines between the markers of README.md."""
    rows = [("one guided edit of 20 steps", duration(edit))]
    if chapters:
        seconds = {number: cost[0] for number, cost in chapters.items()}
        memory = {number: cost[1] for number, cost in chapters.items() if cost[1] is not None}
        rows.append(("a notebook", f"{span(seconds, 's', 0)}, all together {duration(sum(seconds.values()))}"))
        if memory:
            rows.append(("a notebook's memory", span(memory, "GB", 1)))
    rows += [(f"`make {target}`, once everything is installed", duration(took)) for target, took in makes.items()]
    lines = [f"| on {machine()} | |", "|---|---|", *(f"| {what} | {cost} |" for what, cost in rows)]
    return "\n".join(lines) + "\n"


def written(readme: str, lines: str) -> str:
    """The README with these lines between the markers. Raises ValueError if it has not one pair of them."""
    if (readme.count(BEGIN), readme.count(END)) != (1, 1):
        raise ValueError(f"README.md must hold {BEGIN.strip()} and {END.strip()} once each")
    return readme[: readme.index(BEGIN) + len(BEGIN)] + lines + readme[readme.index(END) :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chapters", nargs="*", help="numbers of the chapters to time, such as 01; without it, all")
    parser.add_argument("--no-make", action="store_true", help="without make check and make test")
    parser.add_argument("--print", action="store_true", help="write nothing, only print the lines")
    args = parser.parse_args()
    paths = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    paths = [path for path in paths if args.chapters is None or path.name[:2] in args.chapters]
    makes = {} if args.no_make else {target: make_seconds(target) for target in ("check", "test")}
    chapters = {}
    for path in paths:
        chapters[path.name[:2]] = chapter_costs(path)
        print(f"{path.name}: {chapters[path.name[:2]][0]:.0f} s", flush=True)
    lines = table(edit_seconds(), chapters, makes)
    print(lines)
    if not args.print:
        readme = ROOT / "README.md"
        readme.write_text(written(readme.read_text(encoding="utf-8"), lines), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Tables that commands measure and write into a page, each between a pair of markers of its own."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


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


def put(page: Path, name: str, lines: list[str]) -> None:
    """Write lines into a page, in place of those that `make NAME` wrote before."""
    page.write_text(written(page.read_text(encoding="utf-8"), name, lines), encoding="utf-8")


def written(text: str, name: str, lines: list[str]) -> str:
    """A page with these lines between the markers of `make NAME`. ValueError if it has not one pair of them."""
    begin, end = f"<!-- what make {name} writes -->\n", f"<!-- end of what make {name} writes -->\n"
    if (text.count(begin), text.count(end)) != (1, 1):
        raise ValueError(f"the page must hold {begin.strip()} and {end.strip()} once each")
    return text[: text.index(begin) + len(begin)] + "\n".join(lines) + "\n" + text[text.index(end) :]

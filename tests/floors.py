"""Runs the fast tests with the lowest and the highest versions that pyproject.toml admits: make floors

    lowest      every dependency at its floor. diffusers, transformers and peft are left out, as they ask for newer
                ones, and with them the tests that compare with them
    yardsticks  the same with these three: what they ask for is raised, all else stays at its floor
    highest     the newest of everything

All three with the oldest Python that pyproject.toml admits, for which the floors are; `highest` also with the newest
on this machine (on the PATH, or pyenv's) for which every dependency is built. The versions that pip chose and what
passed become a table.

Each environment is built by pip in a temporary folder and removed afterwards. On Linux pip takes PyTorch with
several gigabytes of CUDA libraries, unless `--pip="--extra-index-url ..."` names a place that has it without.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from xml.etree import ElementTree

from tables import ROOT, put

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
ALL = [*PROJECT["dependencies"], *EXTRAS["course"], *(r for r in EXTRAS["test"] if not r.startswith("minqwen["))]
YARDSTICKS = [r for r in ALL if re.match(r"(diffusers|transformers|peft)\b", r)]
RAISED = ("huggingface-hub", "tokenizers", "safetensors")  # by diffusers and transformers
SHOWN = ("torch", "numpy", "pillow", "safetensors", "huggingface-hub", "diffusers", "transformers", "peft")
OLDEST = tuple(map(int, PROJECT["requires-python"].removeprefix(">=").split(".")))
PAGE = ROOT / "tests/README.md"


def name(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0]


def lowest(requirement: str) -> str:
    """The requirement with its floor as the only version: "numpy>=1.23" gives "numpy==1.23"."""
    floor = re.search(r"[>=]=([\w.]+)", requirement)
    if floor is None:
        raise ValueError(f"{requirement} has no floor in pyproject.toml")
    return f"{name(requirement)}=={floor[1]}"


STEPS = {  # what is installed; "yardsticks" goes on in the environment of "lowest"
    "lowest": [lowest(r) for r in ALL if r not in YARDSTICKS],
    "yardsticks": [lowest(r) for r in ALL if name(r) not in RAISED] + [r for r in ALL if name(r) in RAISED],
    "highest": ALL,
}


# ------------------------------------------------------------------------------------------- Pythons, environments


def version(python: str | Path) -> tuple[int, int] | None:
    """Of a Python that can make environments; of anything else None."""
    ask = "import sys, venv, ensurepip; print(*sys.version_info[:2])"
    try:
        said = subprocess.run([python, "-c", ask], capture_output=True, text=True)
    except OSError:
        return None
    return tuple(map(int, said.stdout.split())) if said.returncode == 0 else None


def pythons() -> dict[tuple[int, int], str]:
    """One Python of each version that pyproject.toml admits, the newest first."""
    places = [Path(place) for place in os.environ.get("PATH", "").split(os.pathsep) if place]
    if shutil.which("pyenv"):
        root = subprocess.run(["pyenv", "root"], capture_output=True, text=True).stdout.strip()
        places += sorted(Path(root).glob("versions/*/bin"), reverse=True)
    found = {sys.version_info[:2]: sys.executable}
    for path in (path for place in places for path in sorted(place.glob("python3.*"))):
        told = re.fullmatch(r"python3\.(\d+)(\.exe)?", path.name)
        if told and (3, int(told[1])) >= OLDEST and (3, int(told[1])) not in found and version(path):
            found[3, int(told[1])] = str(path)
    return dict(sorted(found.items(), reverse=True))


def environment(python: str, folder: Path) -> Path:
    """The interpreter of an environment, which is made unless it is there."""
    inside = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not inside.exists():
        subprocess.run([python, "-m", "venv", folder], check=True)
        # From 25.1 on, pip resolves versions without downloading what it would install.
        subprocess.run([inside, "-m", "pip", "install", "--quiet", "--upgrade", "pip"], check=True)
    return inside


def pip(inside: Path, requirements: list[str], *more: str) -> bool:
    command = [inside, "-m", "pip", "install", "--only-binary=:all:", *more, *requirements]
    return subprocess.run(command).returncode == 0


def newest(folder: Path, pip_args: list[str]) -> str | None:
    """The newest Python for which all dependencies are built, if it is newer than the oldest."""
    for (major, minor), python in pythons().items():
        if (major, minor) == OLDEST:
            return None
        print(f"Python {major}.{minor} ({python}): is everything built for it?", flush=True)
        place = folder / f"{major}.{minor}-highest"
        if pip(environment(python, place), ALL, "--quiet", "--dry-run", *pip_args):
            return python
        print("No.", flush=True)
        shutil.rmtree(place)
    return None


def oldest() -> str:
    try:
        return pythons()[OLDEST]
    except KeyError:
        told = ".".join(map(str, OLDEST))
        raise SystemExit(f"The floors are those of Python {told}, which is not on this machine.") from None


# -------------------------------------------------------------------------------------------------------- the runs


def run(inside: Path, step: str, args: argparse.Namespace) -> tuple[list[str], int]:
    """Installs a step's versions and runs the fast tests: the cells of its row, and how many tests failed."""
    if not pip(inside, STEPS[step], *shlex.split(args.pip)):
        return [*["–"] * len(SHOWN), "not installed", "", ""], 1
    ask = """import importlib.metadata as m, json, sys
have = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in m.distributions()}
print(json.dumps([have.get(n, "–") for n in sys.argv[1:]]))"""
    told = subprocess.run([inside, "-c", ask, *SHOWN], check=True, capture_output=True, text=True).stdout
    print(f"{step}: {', '.join(map(' '.join, zip(SHOWN, json.loads(told), strict=True)))}", flush=True)
    report = inside.parents[1] / "report.xml"
    report.unlink(missing_ok=True)  # of the step before
    tests = [inside, "-m", "pytest", "-n", "auto", "--dist", "worksteal", "-m", "not slow", f"--junitxml={report}"]
    around = os.environ | {"PYTHONPATH": str(ROOT)}  # the project itself is not installed
    ended = subprocess.run([*tests, *shlex.split(args.pytest)], cwd=ROOT, env=around).returncode
    if not report.exists():
        return [*json.loads(told), "not run", "", ""], 1
    passed, skipped, failed = counts(report.read_text(encoding="utf-8"))
    return [*json.loads(told), str(passed), str(skipped), str(failed)], failed or ended


def counts(report: str) -> tuple[int, int, int]:
    """Tests that passed, were skipped, failed, from pytest's report."""
    suites = list(ElementTree.fromstring(report).iter("testsuite"))
    total, skipped, *bad = (sum(int(s.get(k)) for s in suites) for k in ("tests", "skipped", "failures", "errors"))
    return total - skipped - sum(bad), skipped, sum(bad)


def table(rows: dict[tuple[str, str], list[str]]) -> list[str]:
    """Rows by Python and step, in this order. A Python "3.11" in a row's key stands for "3.11.7" in its first cell."""
    head = ["Python", "versions", *SHOWN, "passed", "skipped", "failed"]
    order = sorted(rows, key=lambda key: (int(key[0].split(".")[1]), list(STEPS).index(key[1])))
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *(rows[key] for key in order))]


def table_of(page: str) -> dict[tuple[str, str], list[str]]:
    """The rows that `table` wrote into a page."""
    lines = re.findall(rf"^\| (3\.\d+[^|]* \| (?:{'|'.join(STEPS)}) \| .*) \|$", page, re.MULTILINE)
    rows = [line.split(" | ") for line in lines]
    return {(re.match(r"3\.\d+", row[0])[0], row[1]): row for row in rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", nargs="?", choices=STEPS, help="only this one")
    parser.add_argument("--python", help="only this one: 3.12, or a path")
    parser.add_argument("--pip", default="", help="more arguments for pip, in quotes after a =")
    parser.add_argument("--pytest", default="", help="more arguments for pytest, in quotes after a =")
    parser.add_argument("--write", action="store_true", help="the table into tests/README.md")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an end that still removes the environments
    with tempfile.TemporaryDirectory(prefix="floors", ignore_cleanup_errors=True) as folder:
        return work(args, Path(folder))


def work(args: argparse.Namespace, folder: Path) -> int:
    if args.python:
        named = {".".join(map(str, key)): path for key, path in pythons().items()}.get(args.python, args.python)
        found = version(named)
        if found is None:
            raise SystemExit(f"{args.python} is no Python that can make environments.")
        todo = [(named, step) for step in STEPS if step == "highest" or found == OLDEST or step == args.step]
    else:
        todo = [(oldest(), step) for step in STEPS]
        if args.step in (None, "highest") and (python := newest(folder, shlex.split(args.pip))):
            todo.append((python, "highest"))
    todo = [(python, step) for python, step in todo if args.step in (None, step)]
    rows, mine, worst = table_of(PAGE.read_text(encoding="utf-8")), {}, 0
    for number, (python, step) in enumerate(todo, start=1):
        key = ".".join(map(str, version(python))), step
        print(f"\n{number} of {len(todo)}: Python {key[0]}, {step}: {', '.join(STEPS[step])}", flush=True)
        place = folder / f"{key[0]}-{'highest' if step == 'highest' else 'lowest'}"
        inside = environment(python, place)
        full = subprocess.run([inside, "-c", "import platform; print(platform.python_version())"], capture_output=True)
        cells, failed = run(inside, step, args)
        mine[key] = [full.stdout.decode().strip(), step, *cells]
        worst = worst or failed
        print("\n" + "\n".join(table(mine)), flush=True)
        if args.write:  # what is done is kept if the rest is interrupted
            put(PAGE, "floors", table(rows | mine))
        if (python, "yardsticks") not in todo[number:]:
            shutil.rmtree(place)
    if args.write and not (args.step or args.python):
        put(PAGE, "floors", table(mine))  # without rows of Pythons that are no longer tried
    return 1 if worst else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. The environments are removed; rows of finished steps stay in the table.")

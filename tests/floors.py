"""Runs the fast tests with the lowest and the highest versions that pyproject.toml admits: make floors

    lowest      every dependency at its floor. diffusers, transformers and peft are left out, as they ask for newer
                ones, and with them the tests that compare with them
    yardsticks  the same with these three: what they ask for is raised, all else stays at its floor
    highest     the newest of everything

Each environment is built by pip in a temporary folder and removed afterwards. On Linux the lowest PyTorch brings
several gigabytes of CUDA libraries. Floors are those of the oldest Python that pyproject.toml admits: it must be there.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
ALL = [*PROJECT["dependencies"], *EXTRAS["course"], *(r for r in EXTRAS["test"] if not r.startswith("minqwen["))]
YARDSTICKS = [r for r in ALL if re.match(r"(diffusers|transformers|peft)\b", r)]
RAISED = ("huggingface-hub", "tokenizers", "safetensors")  # by diffusers and transformers


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


def python_for(step: str) -> str:
    """Floors exist for the oldest Python; the newest versions are tried with the one that runs this."""
    oldest = PROJECT["requires-python"].removeprefix(">=")
    if step == "highest" or f"{sys.version_info[0]}.{sys.version_info[1]}" == oldest:
        return sys.executable
    found = shutil.which(f"python{oldest}")
    if found is None:
        raise SystemExit(f"The floors are those of Python {oldest}, which is not on this machine.")
    return found


def run(step: str, folder: Path, pytest_args: list[str]) -> bool:
    """Builds the environment of a step, says what is in it, runs the fast tests. Whether all of it went well."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    print(f"\n{step}: {', '.join(STEPS[step])}", flush=True)
    if not python.exists():
        subprocess.run([python_for(step), "-m", "venv", folder], check=True)
    install = [python, "-m", "pip", "install", "--quiet", "--only-binary=:all:", *STEPS[step]]
    if subprocess.run(install).returncode:
        return False
    names = [name(requirement) for requirement in ALL]
    shown = f"from importlib.metadata import version; print(*(f'{{n}} {{version(n)}}' for n in {names}), sep=', ')"
    if step != "lowest":  # where three are missing by intention
        subprocess.run([python, "-c", shown], check=True)
    tests = [python, "-m", "pytest", "-n", "auto", "--dist", "worksteal", "-m", "not slow", *pytest_args]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # the project itself is not installed
    return subprocess.run(tests, cwd=ROOT, env=environment).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", nargs="?", choices=STEPS, help="only this one of the three")
    parser.add_argument("--pytest", default="", help="more arguments for pytest, in quotes")
    args = parser.parse_args()
    good = {}
    with tempfile.TemporaryDirectory() as folder:
        for step in [args.step] if args.step else STEPS:
            place = Path(folder) / ("highest" if step == "highest" else "lowest")
            good[step] = run(step, place, args.pytest.split())
            if step != "lowest":
                shutil.rmtree(place)
    print("\n" + "\n".join(f"{step}: {'all fast tests pass' if ok else 'FAILED'}" for step, ok in good.items()))
    return 0 if all(good.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

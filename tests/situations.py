"""Every notebook in the situations that readers meet: make situations, or python tests/situations.py --help

    alone      opened without its repository: the first cell says how to get it
    elsewhere  started in the repository's own folder instead of the notebook's
    headless   without a display, on matplotlib's backend without windows
    offline    without a network: no connection but to this machine
    read-only  nothing in the repository can be written, created or deleted
    ascii      consoles and files are ASCII wherever no encoding is named
    twice      from top to bottom again in the same kernel, each cell twice in a row
    reverse    after that, from the last cell to the first

Each notebook runs in a kernel of its own, in a copy of what git holds, where no other notebook has run. The conditions
that are asked for hold together, so a cell that fails counts against all of them; asked for alone, each says its own.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from tables import put
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
CONDITIONS = ("elsewhere", "headless", "offline", "read-only", "ascii")
SITUATIONS = ("alone", *CONDITIONS, "twice", "reverse")
ENVIRONMENT = {
    "headless": {"MPLBACKEND": "Agg"},
    "offline": {"HF_HUB_OFFLINE": "1"},
    "ascii": {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"},
}
PROVED = {  # what a kernel runs first: it fails where the condition does not hold
    "elsewhere": "import os\nassert os.path.isdir('minqwen') and os.path.isdir('notebooks')",
    "headless": "import os\nassert not {'DISPLAY', 'WAYLAND_DISPLAY'} & set(os.environ)",
    "offline": """
import socket, sys
def refuse(event, words):
    if event == "socket.getaddrinfo" and words[0] not in (None, "localhost", "127.0.0.1", "::1"):
        raise OSError(f"no network here: {words[0]}")
    if event == "socket.connect" and isinstance(words[1], tuple) and words[1][0] not in ("127.0.0.1", "::1"):
        raise OSError(f"no network here: {words[1][0]}")
sys.addaudithook(refuse)
try:
    socket.create_connection(("192.0.2.1", 80), timeout=1)
except OSError as error:
    assert "no network here" in str(error)
""",
    "read-only": """
import os
from minqwen import __file__ as library
for place in (library, os.path.dirname(library) + "/new"):
    try:
        open(place, "a").close()
    except OSError:
        continue
    raise AssertionError(f"{place} can be written")
""",
    "ascii": "import locale\nassert locale.getpreferredencoding(False) in ('ascii', 'US-ASCII', 'ANSI_X3.4-1968')",
}


@contextmanager
def checkout(read_only: bool) -> Iterator[Path]:
    """A copy of the files that git holds, as they are in the working tree."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / "minqwen"
        for name in filter(None, listed.split("\0")):
            if (ROOT / name).is_file():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, copy / name)
        if read_only:
            change_modes(copy, lambda mode: mode & ~0o222)
        yield copy
        change_modes(copy, lambda mode: mode | 0o200)


def change_modes(folder: Path, change) -> None:
    for path in [folder, *folder.rglob("*")]:
        path.chmod(change(path.stat().st_mode))


@contextmanager
def kernel(folder: Path, environment: dict[str, str], bound: bool = False) -> Iterator[NotebookClient]:
    """A fresh kernel in this folder, of this environment alone. bound: file modes bind it, even where root runs it."""
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=40"]
    if bound and hasattr(os, "geteuid") and os.geteuid() == 0:
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
    client = NotebookClient(nbformat.v4.new_notebook(), resources={"metadata": {"path": str(folder)}}, timeout=3600)
    client.create_kernel_manager().kernel_spec.argv = command
    dropped = ("LC_", "LANG", "PYTHON", "MPL", "DISPLAY", "WAYLAND_DISPLAY", "MINQWEN_", "HF_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
    with client.setup_kernel(env=kept | environment):
        yield client


def failure(client: NotebookClient, source: str) -> str | None:
    """Runs this as a cell; None, or the error that it ended with."""
    cell = nbformat.v4.new_code_cell(source)
    client.nb.cells = [cell]
    try:
        client.execute_cell(cell, 0)
    except CellExecutionError as error:
        return f"{error.ename}: {error.evalue}"
    except (CellTimeoutError, DeadKernelError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def faults(name: str, asked: tuple[str, ...]) -> dict[str, list[str]]:
    """Of a notebook (a path in the repository): situation -> what failed in it."""
    cells = [cell.source for cell in nbformat.read(ROOT / name, as_version=4).cells if cell.cell_type == "code"]
    conditions, found = [one for one in CONDITIONS if one in asked], {one: [] for one in asked}
    numbers = range(len(cells))
    if "alone" in asked:
        with tempfile.TemporaryDirectory() as empty, kernel(Path(empty), {}) as client:
            said = failure(client, cells[0]) or ""
            if not (said.startswith("ModuleNotFoundError") and "git clone" in said):
                found["alone"].append(f"{name} ends with {said}")
    if asked == ("alone",):
        return found
    with checkout("read-only" in asked) as copy:
        environment = {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
        for one in conditions:
            environment |= ENVIRONMENT.get(one, {})
        folder = copy if "elsewhere" in asked else (copy / name).parent
        with kernel(folder, environment, bound="read-only" in asked) as client:
            for one in conditions:
                if said := failure(client, PROVED[one]):
                    raise RuntimeError(f"{one} does not hold here: {said}")
            rounds = [(conditions or asked, numbers)]
            rounds += [(["twice"], [k for k in numbers for _ in range(2)])] if "twice" in asked else []
            rounds += [(["reverse"], reversed(numbers))] if "reverse" in asked else []
            for situations, order in rounds:
                for k in order:
                    if said := failure(client, cells[k]):
                        for one in situations:
                            found[one].append(f"{name}, code cell {k + 1}: {said}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("situations", nargs="*", help=f"by default all: {', '.join(SITUATIONS)}")
    parser.add_argument("--only", default="", help="notebooks whose path holds these letters: --only solutions/03")
    parser.add_argument("--jobs", type=int, default=1, help="how many notebooks at once; each takes 0.5 to 1.5 GB")
    parser.add_argument("--write", action="store_true", help="the table into tests/README.md")
    args = parser.parse_args()
    if unknown := set(args.situations) - set(SITUATIONS):
        parser.error(f"no such situation: {', '.join(unknown)}")
    asked = tuple(one for one in SITUATIONS if not args.situations or one in args.situations)
    places = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "notebooks").rglob("*.ipynb"))]
    places = [place for place in places if args.only in place and ".ipynb_checkpoints" not in place]
    failed = dict.fromkeys(asked, 0)
    with ProcessPoolExecutor(args.jobs) as pool:
        for found in tqdm(pool.map(partial(faults, asked=asked), places), total=len(places), unit="notebook"):
            for one, lines in found.items():
                failed[one] += bool(lines)
                for line in lines:
                    tqdm.write(f"{one}: {line}"[:400])
    lines = ["| situation | notebooks | passed |", "|---|---|---|"]
    lines += [f"| {one} | {len(places)} | {len(places) - failed[one]} |" for one in asked]
    print("\n".join(lines))
    if args.write:
        put(ROOT / "tests/README.md", "situations", lines)
    return 1 if any(failed.values()) else 0


if __name__ == "__main__":
    sys.exit(main())

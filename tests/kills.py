"""Long work, killed at random moments and run again: make kills, or python tests/kills.py --help

precompute, finetune, shrink and make tiny (with next to none of its steps) run in child processes that are killed
(SIGKILL, which nothing can catch) after a random time, until one of them ends by itself; then its files must be those
of an undisturbed run, byte for byte. Then the next round begins, until the job has been killed so many times. In every
other round two runs work on the folder at once, and both are killed at moments of their own. Last, workers of
runs under torchrun are killed, one after the other. Needs os.fork: Linux or macOS.
"""

import argparse
import contextlib
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from tables import put
from tqdm import tqdm

from minqwen import finetune, precompute, shrink

ROOT = Path(__file__).resolve().parents[1]
TINY, SET = ROOT / "data" / "tiny", ROOT / "data" / "finetune"
MODEL = ["--model", str(TINY), "--device", "cpu", "--quiet"]
TUNE = ["--steps", "12", "--rank", "2", "--batch-size", "2", "--save-every", "1"]
WORKERS = ("finetune by two", "precompute by two")
JOBS = ("precompute", "finetune", "shrink", "tiny", *WORKERS)


def data_set(place: Path, samples: int) -> tuple[str, str]:
    """So many of the samples of data/finetune: the folders of targets, with captions, and of controls."""
    for name, count in (("images", 2 * samples), ("control", samples)):
        (place / name).mkdir(parents=True)
        for path in sorted((SET / name).iterdir())[:count]:
            shutil.copy(path, place / name)
    return str(place / "images"), str(place / "control")


def jobs(place: Path) -> dict[str, Callable[[Path], object]]:
    """Each writes into a folder. The data set is small, so that a round takes seconds."""
    images, control = data_set(place, 12)
    cache, data = place / "cache", [images, "--control", control]
    precompute.main([*data, "--cache", str(cache), *MODEL])
    return {
        "precompute": lambda out: precompute.main([*data, "--cache", str(out), *MODEL]),
        "finetune": lambda out: finetune.main([str(cache), "--out", str(out), *TUNE, *MODEL]),
        "shrink": lambda out: shrink.main([str(TINY), str(out), "--quiet"]),
        "tiny": make_tiny_in,
    }


def make_tiny_in(out: Path) -> None:
    """A tiny checkpoint from nothing, of few steps with small batches."""
    sys.path.append(str(ROOT / "data" / "recipes"))
    import make_tiny
    import train_transformer
    import train_vae

    scenes = train_vae.scenes
    train_transformer.BATCH, train_vae.scenes = 2, lambda rng, count: scenes(rng, min(count, 2))
    train_vae.unseen = dict  # nothing is measured
    words = ["--share", "0.0001", "--runs", str(out / "runs"), "--out", str(out / "tiny"), "--device", "cpu"]
    make_tiny.make(make_tiny.parser().parse_args([*words, "--no-estimate"]))


def started(job: Callable[[Path], object], out: Path) -> int:
    """A child process that does the job in silence."""
    if child := os.fork():
        return child
    status = 1
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            job(out)
        status = 0
    finally:
        os._exit(status)


def contents(folder: Path) -> dict[str, str]:
    """A hash of each file. What holds the seconds that a run took is left out (its state); so are hidden files."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    kept = [path for path in files if path.name != finetune.STATE and "runs" not in path.relative_to(folder).parts]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}


def killed_round(job: Callable[[Path], object], out: Path, chance: random.Random, life: float, at_once: int) -> int:
    """Starts and kills until a run has ended by itself; the number of kills. Raises RuntimeError for one that fails.

    life: seconds that a start may have at most; a little more after each kill, or a slow start might never end.
    """
    kills = 0
    while True:
        ends = sorted((time.monotonic() + chance.uniform(0, life), started(job, out)) for _ in range(at_once))
        finished = 0
        for moment, child in ends:
            while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < moment:
                time.sleep(0.002)
            if ended == (0, 0):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                kills, life = kills + 1, 1.05 * life
            elif ended[1]:
                raise RuntimeError(f"a run in {out} ended with status {os.waitstatus_to_exitcode(ended[1])}")
            else:
                finished += 1
        if finished:
            return kills


def torchrun(processes: int, restarts: int = 0) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
            "--max-restarts", str(restarts), "--monitor-interval", "0.1"]  # fmt: skip


def alone() -> dict[str, str]:
    """An environment with one thread a process, in which this tree's minqwen is found."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TORCH_NCCL_DUMP_ON_TIMEOUT": "0"}


def killed_workers(name: str, place: Path, count: int, seed: int) -> int:
    """Two processes work under torchrun; one of them is killed, again and again; torchrun starts both anew.

    The number of kills. Raises RuntimeError where the files are not those of an undisturbed run.
    """
    calm, out, chance, killed, seen = place / "calm", place / "killed", random.Random(seed), 0, set()
    if name == "finetune":
        jobs(place / "data")
        steps, log = str(6 * (count + 2)), out / finetune.LOG
        work, to, apart = [str(place / "data" / "cache"), TUNE[0], steps, *TUNE[2:]], "--out", 12
    else:
        images, control = data_set(place, 26 + 16 * count)
        work, to, apart = [images, "--control", control], "--cache", 14
    work = ["-m", f"minqwen.{name}", *work, *MODEL, to]
    undisturbed = subprocess.Popen([*torchrun(2), *work, str(calm)], env=alone(), stderr=subprocess.DEVNULL)
    with open(place / "said", "w", encoding="utf-8") as said:
        run = subprocess.Popen([*torchrun(2, restarts=count), *work, str(out)], env=alone(), stdout=said, stderr=said)
        while run.poll() is None:
            if name == "finetune":
                done = log.read_text().count("\n") if log.exists() else 0
            else:
                done = len(list(out.glob("[!.]*")))
            alive = [p for p in psutil.Process(run.pid).children() if p.status() != psutil.STATUS_ZOMBIE]
            workers = [p for p in alive if f"minqwen.{name}" in p.cmdline()]
            wanted = apart * killed + chance.randint(4, 14)
            if killed < count and done >= wanted and len(workers) == 2 and not seen & set(workers):
                time.sleep(chance.uniform(0, 0.3))
                chance.choice(workers).kill()
                killed, seen = killed + 1, seen | set(workers)
            time.sleep(0.05)
    if run.returncode or undisturbed.wait():
        raise RuntimeError((place / "said").read_text(encoding="utf-8")[-2000:])
    if contents(calm) != contents(out):
        raise RuntimeError(f"{name}, seed {seed}: the files are others than those of an undisturbed run")
    return killed


def run(names: list[str], kills: int, seed: int) -> dict[str, tuple[int, int]]:
    """Kills and rounds of each job. Raises RuntimeError where a round ends in other files than an undisturbed run."""
    found = {}
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        for name, job in jobs(place).items():
            if name not in names:
                continue
            start = time.monotonic()
            os.waitpid(started(job, place / f"{name} undisturbed"), 0)
            life, want = time.monotonic() - start, contents(place / f"{name} undisturbed")
            assert want, f"{name} wrote nothing"
            chance, count, rounds = random.Random(f"{name} {seed}"), 0, 0
            with tqdm(total=kills, desc=name, unit=" kills") as bar:
                while count < kills:
                    out = place / f"{name} {rounds}"
                    more = killed_round(job, out, chance, 0.7 * life, 1 + rounds % 2)
                    if contents(out) != want:
                        other = [n for n, h in contents(out).items() if want.get(n) != h]
                        raise RuntimeError(f"{name}, seed {seed}, round {rounds}: {other} differ")
                    shutil.rmtree(out)
                    count, rounds = count + more, rounds + 1
                    bar.update(more)
            found[name] = count, rounds
        for name in WORKERS:
            if name in names:
                (place / name).mkdir()
                found[name] = killed_workers(name.split()[0], place / name, min(kills, 10), seed), 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=JOBS, metavar="JOB", help=f"of {', '.join(JOBS)}; by default all")
    parser.add_argument("--kills", type=int, default=100, help="of each job, at least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="the table into tests/README.md")
    args = parser.parse_args()
    found = run(args.names, args.kills, args.seed)
    lines = ["| job | killed | rounds that ended in the same bytes |", "|---|---|---|"]
    lines += [f"| {name} | {count} | {rounds} |" for name, (count, rounds) in found.items()]
    print("\n".join(lines))
    if args.write:
        put(ROOT / "tests/README.md", "kills", lines)


if __name__ == "__main__":
    main()

"""Makes the tiny checkpoint from nothing: make tiny, or python data/recipes/make_tiny.py --help

Tokenizer, autoencoder, text encoder and transformer, export, adapter for two pictures. It can be stopped
at any moment and started again: what is done is not done twice, and the weights come out the same.
"""

import argparse
import contextlib
import io
import math
import tempfile
import time
from pathlib import Path

import make_tokenizer
import train_edit_plus
import train_transformer
import train_vae
from common import device
from export import export
from train_edit_plus import FILE

from minqwen.run import locked

PHASES = [
    (train_vae, "vae"),
    (train_transformer, "transformer"),
    (train_edit_plus, "edit_plus"),
]


def train(module, phase: str, steps: int, runs: Path, out: Path, device: str, *more: str) -> None:
    """One phase. The last one, the adapter for two pictures, is trained on the finished checkpoint."""
    what = {train_vae: [], train_transformer: [], train_edit_plus: [str(out), "--out", str(out / FILE)]}
    if module is train_edit_plus:
        export(out, runs)
    words = [*what[module], "--steps", str(steps), "--runs", str(runs), "--device", device, *more]
    module.train(module.parser().parse_args(words))


def rehearse(args: argparse.Namespace) -> dict[str, float]:
    """Seconds a step of each phase on this machine, not compiled, from a few steps in a folder that is thrown away."""
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)
        make_tokenizer.save(make_tokenizer.build(), runs / "tokenizer")
        for module, phase in PHASES:
            more = ["--pool", "1", "--check-every", "0"] if module is not train_vae else []
            more += ["--bf16"] * args.bf16
            took = []
            for steps in (8, 16, 32):  # 8 steps, 8 more, 16 more: the last two differ by 8 steps and nothing else
                start = time.time()
                with contextlib.redirect_stdout(io.StringIO()):
                    train(module, phase, steps, runs, runs / "tiny", args.device, *more)
                took.append(time.time() - start)
            seconds[phase] = max(0.0, took[2] - took[1]) / 8
    return seconds


def make(args: argparse.Namespace) -> None:
    steps = {phase: max(1, round(module.STEPS[phase] * args.share)) for module, phase in PHASES}
    if not args.no_estimate:
        print("Trying each phase for a few steps, to say how long the whole will take.", flush=True)
        seconds = rehearse(args)
        left = [phase for phase in steps if not (args.runs / f"{phase}.done").exists()]
        minutes = {phase: steps[phase] * seconds[phase] / 60 for phase in left}
        parts = ", ".join(f"{phase} {part:.0f}" for phase, part in minutes.items())
        less = "; less, as --compile was asked for" if args.compile else ""
        total = f"About {sum(minutes.values()):.0f} minutes on this machine ({args.device}), alone on it{less}"
        print(f"{total}: {parts}.", flush=True)
    with locked(args.runs):
        make_parts(args, steps)
    print(f"Wrote {args.out}; the logs are in {args.runs}.")
    print(f"Count what it gets right: python data/recipes/evaluate.py {args.out}")


def make_parts(args: argparse.Namespace, steps: dict[str, int]) -> None:
    """All phases, each from where it stopped."""
    make_tokenizer.save(make_tokenizer.build(), args.runs / "tokenizer")
    for module, phase in PHASES:
        done = args.runs / f"{phase}.done"
        if done.exists() and module is not train_edit_plus:  # which also writes the checkpoint
            print(f"{phase}: done before", flush=True)
            continue
        more = ["--compile"] * args.compile + ["--bf16"] * args.bf16
        if args.share < 0.1 and module is not train_vae:  # a trial: pools that are not longer than the phase
            pool = min(8, math.ceil(steps[phase] / 2))
            more += ["--pool", str(pool), "--reuse", "2", "--check-every", "0"]
        train(module, phase, steps[phase], args.runs, args.out, args.device, *more)
        done.touch()


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/tiny"), help="where the checkpoint goes")
    parser.add_argument("--share", type=float, default=1.0, help="share of the full recipe's steps: 0.003 is a trial")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of unfinished work and logs")
    parser.add_argument("--compile", action="store_true", help="torch.compile: needs a C++ compiler")
    parser.add_argument("--bf16", action="store_true", help="products in bfloat16: faster where there are units for it")
    parser.add_argument("--no-estimate", action="store_true", help="begin at once")
    parser.add_argument("--device", default=device())
    return parser


if __name__ == "__main__":
    try:
        make(parser().parse_args())
    except KeyboardInterrupt:
        raise SystemExit("\nmake_tiny: interrupted; run it again to go on") from None

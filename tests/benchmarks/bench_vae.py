"""How much faster is the VAE in two dimensions? Ours against diffusers', released geometry, random weights, fp32.

    python tests/benchmarks/bench_vae.py --size 256 --repeats 5
    pytest tests/benchmarks/bench_vae.py

Both models run in this process in turn, so that a busy machine slows both; the medians are compared, which
leaves the first, cold runs out.
"""

import argparse
import statistics
import time

import torch
from diffusers import AutoencoderKLQwenImage as Reference

from minqwen.vae import AutoencoderKLQwenImage


def seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@torch.no_grad()
def measure(size: int, repeats: int) -> dict[str, tuple[float, float]]:
    """{"encode", "decode"} -> median seconds (ours, diffusers') for one picture of size x size pixels."""
    reference = Reference().eval()
    with torch.device("meta"):
        vae = AutoencoderKLQwenImage()
    vae.load_state_dict(reference.state_dict(), assign=True)
    pixels, latents = torch.rand(1, 3, 1, size, size) * 2 - 1, torch.randn(1, 16, 1, size // 8, size // 8)
    medians = {}
    for way, x in (("encode", pixels), ("decode", latents)):
        runs = [lambda m=model, f=way, x=x: getattr(m, f)(x) for model in (vae, reference)]
        times = [[seconds(run) for run in runs] for _ in range(repeats)]
        medians[way] = tuple(statistics.median(column) for column in zip(*times, strict=True))
    return medians


def test_vae_at_least_twice_as_fast():
    for way, (ours, theirs) in measure(size=256, repeats=3).items():
        assert theirs / ours >= 2, f"{way}: {ours:.2f} s against diffusers' {theirs:.2f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256, help="side of the picture in pixels, a multiple of 8")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    for way, (ours, theirs) in measure(args.size, args.repeats).items():
        print(f"{way} {args.size}x{args.size}: ours {ours:.2f} s, diffusers {theirs:.2f} s, {theirs / ours:.2f} times")


if __name__ == "__main__":
    main()

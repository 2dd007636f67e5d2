"""Trains the tiny checkpoint's autoencoder: python data/recipes/train_vae.py --help

Two phases. `joint`: encoder and decoder together on crops of drawn scenes, then on whole scenes. `decoder`: the
encoder is frozen, so latents no longer change and a transformer can be trained on them meanwhile; the decoder goes on.
Writes vae_PHASE.pt, which resumes, and log_vae_PHASE.csv into runs/.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import Chance, device, note, pictures, settings
from tiny_models import VAE, build_vae
from tqdm import tqdm

from minqwen.run import Run, read_state
from minqwen.vae import AutoencoderKLQwenImage
from minqwen.world import WORLD, sample_scene

STEPS = {"joint": 5000, "decoder": 5000}


def scenes(rng: np.random.Generator, count: int) -> list:
    return [sample_scene(rng, WORLD, least=0, most=4) for _ in range(count)]


def crops(pixels: torch.Tensor, rng: np.random.Generator, size: int = 32) -> torch.Tensor:
    """One crop of each picture, (B, 3, 1, size, size)."""
    corners = rng.integers(0, 64 - size + 1, (len(pixels), 2))
    return torch.stack([p[..., y : y + size, x : x + size] for p, (y, x) in zip(pixels, corners, strict=True)])


def psnr(vae: AutoencoderKLQwenImage) -> float:
    """Decibels of the mean squared error over 128 pictures that training never sees."""
    x = pictures(scenes(np.random.default_rng(10**6), 128)).to(vae.quant_conv.weight.device)
    with torch.no_grad():
        error = (vae.decode(vae.encode(x).mode()) - x).div(2).square().mean()
    return -10 * torch.log10(error).item()


def train(args: argparse.Namespace) -> None:
    phase, lr, runs = args.phase, args.lr, args.runs
    steps = args.steps or STEPS[phase]
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed + (phase == "decoder"))
    vae = build_vae().to(args.device)
    if phase == "decoder":
        vae.load_state_dict(read_state(runs / "vae_joint.pt")["parts"]["vae"])
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    optimizer = torch.optim.AdamW(
        [p for p in vae.parameters() if p.requires_grad], lr=lr, betas=(0.9, 0.99), weight_decay=0
    )
    parts = {"vae": vae, "optimizer": optimizer, "chance": Chance(rng)}
    fields = ("minutes", "step", "loss", "psnr")
    run = Run(runs / f"vae_{phase}.pt", runs / f"log_vae_{phase}.csv", fields, parts, settings(args))
    run.resume()
    loss_of = torch.compile(reconstruction_loss, dynamic=False) if args.compile else reconstruction_loss

    bar = tqdm(total=steps, initial=run.step, desc=f"autoencoder, {phase}", disable=None)
    while run.step < steps:
        done = run.step / steps
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (run.step + 1) / 100, 2 * (1 - done))
        x = pictures(scenes(rng, args.batch))
        if done < 0.75:  # crops, a quarter of a picture each, for three quarters of the steps
            x = crops(x, rng)
        elif run.step % 4:
            x = x[: args.batch // 4]
        x = x.to(args.device)
        loss = loss_of(vae, x)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        run.step += 1
        bar.update()
        if run.step % args.save_every == 0 or run.step == steps:
            note(run, minutes=run.elapsed() / 60, step=run.step, loss=loss.item(), psnr=psnr(vae))
            run.save()
    bar.close()
    if phase == "joint":
        write_statistics(vae, runs)


def reconstruction_loss(vae: AutoencoderKLQwenImage, x: torch.Tensor) -> torch.Tensor:
    posterior = vae.encode(x)
    y = vae.decode(posterior.sample())
    kl = 0.5 * (posterior.mean.square() + posterior.logvar.exp() - 1 - posterior.logvar).mean()
    return F.l1_loss(y, x) + F.mse_loss(y, x) + 1e-4 * kl


def write_statistics(vae: AutoencoderKLQwenImage, runs: Path) -> None:
    """The mean and deviation of each latent channel over 2048 pictures, as the released config has them."""
    x = torch.cat([pictures(scenes(np.random.default_rng(k), 128)) for k in range(16)])
    with torch.no_grad():
        z = torch.cat([vae.encode(part.to(vae.quant_conv.weight.device)).mode() for part in x.split(128)])
    config = VAE | {
        "latents_mean": [round(v, 4) for v in z.mean((0, 2, 3, 4)).tolist()],
        "latents_std": [round(v, 4) for v in z.std((0, 2, 3, 4)).tolist()],
    }
    (runs / "vae_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=STEPS)
    parser.add_argument("--steps", type=int, help="by default " + ", ".join(f"{k} {v}" for k, v in STEPS.items()))
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--lr", type=float, default=2.5e-3)
    parser.add_argument("--save-every", type=int, default=250, help="steps between two checkpoints")
    parser.add_argument("--compile", action="store_true", help="torch.compile: twice as fast, needs a C++ compiler")
    parser.add_argument("--device", default=device())
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of checkpoints and logs")
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    train(parser().parse_args())

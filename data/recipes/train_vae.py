"""Trains the tiny checkpoint's autoencoder: python data/recipes/train_vae.py --help

On crops for three quarters of the steps, then on whole pictures. Half of what it sees are drawn scenes, half pieces of
the photos in data/recipes/photos, so that a photo comes back as a photo. Writes vae.pt, which resumes, log_vae.csv and,
at the end, vae_config.json into runs/.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import Chance, Muon, as_pixels, device, fast, note, pictures, settings
from PIL import Image
from tiny_models import VAE, build_vae
from tqdm import tqdm

from minqwen.run import Run
from minqwen.vae import AutoencoderKLQwenImage
from minqwen.world import SIZE, WORLD, draw_array, sample_scene

STEPS = {"vae": 4000}
CROP = 48  # pixels on a side of what is trained on for three quarters of the steps
PHOTOS = Path(__file__).with_name("photos")
UNSEEN = Path(__file__).parents[1] / "pictures" / "coffee.png"  # a photo that training never sees


def scenes(rng: np.random.Generator, count: int) -> list:
    return [sample_scene(rng, WORLD, least=0, most=4) for _ in range(count)]


def piece(rng: np.random.Generator, photo: Image.Image, side: int) -> np.ndarray:
    """A square of a photo of any size from `side` up, shrunk to side x side."""
    taken = int(rng.integers(side, min(photo.size) + 1))
    left, top = (int(rng.integers(length - taken + 1)) for length in photo.size)
    return np.asarray(photo.resize((side, side), Image.Resampling.LANCZOS, (left, top, left + taken, top + taken)))


def crop(rng: np.random.Generator, picture: np.ndarray, side: int) -> np.ndarray:
    y, x = rng.integers(0, SIZE - side + 1, 2)
    return picture[y : y + side, x : x + side]


def psnr(vae: AutoencoderKLQwenImage, x: torch.Tensor) -> float:
    """Decibels of the mean squared error of pictures that come back."""
    with torch.no_grad():
        parts = x.to(vae.quant_conv.weight.device).split(32)
        squares = [(vae.decode(vae.encode(part).mode()) - part).div(2).square() for part in parts]
        error = sum(each.mean((1, 2, 3, 4)).sum() for each in squares)
    return -10 * torch.log10(error / len(x)).item()


def unseen() -> dict[str, torch.Tensor]:
    """128 scenes, and 32 pieces of a photo, that training never sees."""
    rng, photo = np.random.default_rng(10**6), Image.open(UNSEEN).convert("RGB")
    return {"scenes": pictures(scenes(rng, 128)), "photo": as_pixels([piece(rng, photo, SIZE) for _ in range(32)])}


def train(args: argparse.Namespace) -> None:
    runs, steps = args.runs, args.steps
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    vae = build_vae().to(args.device)
    trained = list(vae.parameters())
    opts = {
        "muon": Muon([p for p in trained if p.ndim > 3], args.lr),
        "adamw": torch.optim.AdamW([p for p in trained if p.ndim <= 3], args.lr, betas=(0.9, 0.99), weight_decay=0),
    }
    parts = {"vae": vae, "chance": Chance(rng)} | opts
    fields = ("minutes", "step", "loss", "scenes", "photo")
    run = Run(runs / "vae.pt", runs / "log_vae.csv", fields, parts, settings(args))
    run.resume()
    compiled = args.compile and not args.bf16  # torch 2.13 loses gradients of an upsampling compiled in bfloat16
    loss_of = torch.compile(reconstruction_loss, dynamic=False) if compiled else reconstruction_loss
    photos = [Image.open(path).convert("RGB") for path in sorted(PHOTOS.glob("*.jpg"))]

    bar = tqdm(total=steps, initial=run.step, desc="autoencoder", disable=None)
    while run.step < steps:
        done = run.step / steps
        whole = done >= 0.75
        count, side = (args.batch // 4, SIZE) if whole else (args.batch, CROP)
        drawn = [crop(rng, draw_array(scene), side) for scene in scenes(rng, count // 2)]
        seen = [piece(rng, photos[int(rng.integers(len(photos)))], side) for _ in drawn]
        x = as_pixels(drawn + seen).to(args.device)
        with fast(args):
            loss = loss_of(vae, x)
        for opt in opts.values():
            opt.param_groups[0]["lr"] = args.lr * min(1, (run.step + 1) / 100, 2 * (1 - done))
            opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for opt in opts.values():
            opt.step()
        run.step += 1
        bar.update()
        if run.step % args.save_every == 0 or run.step == steps:
            found = {name: psnr(vae, x) for name, x in unseen().items()}
            note(run, minutes=run.elapsed() / 60, step=run.step, loss=loss.item(), **found)
            run.save()
    bar.close()
    write_statistics(vae, runs)


def reconstruction_loss(vae: AutoencoderKLQwenImage, x: torch.Tensor) -> torch.Tensor:
    posterior = vae.encode(x)
    y = vae.decode(posterior.sample()).float()
    kl = 0.5 * (posterior.mean.square() + posterior.logvar.exp() - 1 - posterior.logvar).mean()
    return F.l1_loss(y, x) + F.mse_loss(y, x) + 1e-4 * kl


def write_statistics(vae: AutoencoderKLQwenImage, runs: Path) -> None:
    """The mean and deviation of each latent channel over 2048 scenes, as the released config has them."""
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
    parser.add_argument("--steps", type=int, default=STEPS["vae"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--save-every", type=int, default=250, help="steps between two checkpoints")
    parser.add_argument("--compile", action="store_true", help="torch.compile, not with --bf16: needs a C++ compiler")
    parser.add_argument("--bf16", action="store_true", help="products in bfloat16: faster where there are units for it")
    parser.add_argument("--device", default=device())
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of checkpoints and logs")
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    train(parser().parse_args())

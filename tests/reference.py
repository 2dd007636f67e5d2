"""What the parity tests share: random weights that hide nothing, random sizes, the largest difference."""

import random

import torch

TOLERANCE = 1e-5  # largest absolute difference to the reference, float32


def randomise_(module: torch.nn.Module) -> torch.nn.Module:
    """Give every parameter random numbers, norms and biases too, so that a forgotten one shows."""
    for name, p in module.named_parameters():
        fan_in = p[0].numel() if p.ndim > 1 else 1
        noise = torch.randn_like(p)
        p.data = 1 + 0.2 * noise if p.ndim == 1 and name.endswith("weight") else noise * 0.5 / fan_in**0.5
    return module.eval()


def copy_weights(reference: torch.nn.Module, ours: torch.nn.Module) -> torch.nn.Module:
    """Hand the reference's weights over under their own names, strictly."""
    ours.load_state_dict(reference.state_dict(), strict=True)
    return ours.eval()


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape, f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}"
    return (a.float() - b.float()).abs().max().item()


def small_transformer_config(rng: random.Random, **fixed) -> dict:
    """A random config of the released form, with the three axes summing to the head's width."""
    axes = [2 * rng.randint(1, 3), 2 * rng.randint(1, 4), 2 * rng.randint(1, 4)]
    config = {
        "patch_size": 2,
        "in_channels": 4 * rng.randint(1, 5),
        "out_channels": rng.randint(1, 5),
        "num_layers": rng.randint(1, 3),
        "attention_head_dim": sum(axes),
        "num_attention_heads": rng.randint(1, 4),
        "joint_attention_dim": rng.randint(5, 40),
        "axes_dims_rope": axes,
    }
    return config | fixed


def random_inputs(rng: random.Random, config: dict, shapes: list[tuple[int, int, int]], batch: int) -> dict:
    tokens = sum(t * h * w for t, h, w in shapes)
    length = rng.randint(1, 12)
    return {
        "hidden_states": torch.randn(batch, tokens, config["in_channels"]),
        "encoder_hidden_states": torch.randn(batch, length, config["joint_attention_dim"]),
        "timestep": torch.rand(batch),
        "img_shapes": [shapes] * batch,
    }

"""lightning.py: files of that layout, at their own scale, with their schedule, in as many passes as steps."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file, save_file

from minqwen import edit as command
from minqwen.lightning import SCHEDULE, load_lightning, steps_of
from minqwen.pipeline import QwenImagePipeline
from minqwen.sampling import get_sigmas
from minqwen.shrink import shrink

ROOT = Path(__file__).resolve().parents[1]
TINY, PICTURE = ROOT / "data" / "tiny", ROOT / "data/pictures/scene.png"
ALPHA, RANK = 8.0, 64  # of the released files
LAYERS = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj",
          "attn.add_v_proj", "attn.to_add_out", "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj",
          "txt_mlp.net.2")  # fmt: skip
SIGMAS = {4: [1, 0.9, 0.75, 0.5, 0], 8: [1, 0.954545, 0.9, 0.833333, 0.75, 0.642857, 0.5, 0.3, 0]}
WORDS = "replace the cat with a fox"


def opened(folder: Path = TINY, **options) -> QwenImagePipeline:
    return QwenImagePipeline.from_pretrained(folder, "cpu", torch.float32, **{"memory": "resident"} | options)


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """What lightx2v's files hold, for the tiny transformer: all twelve layers of each block, and no modulation."""
    chance, tensors, model = torch.Generator().manual_seed(0), {}, opened().transformer
    for number in range(len(model.transformer_blocks)):
        for layer in LAYERS:
            name = f"transformer_blocks.{number}.{layer}"
            linear = model.get_submodule(name)
            tensors[f"{name}.alpha"] = torch.tensor(ALPHA, dtype=torch.bfloat16)
            for part, shape in (("down", (RANK, linear.in_features)), ("up", (linear.out_features, RANK))):
                drawn = torch.randn(shape, generator=chance) * 0.05
                tensors[f"{name}.lora_{part}.weight"] = drawn.bfloat16()
    path = tmp_path_factory.mktemp("lightning") / "Qwen-Image-Edit-Lightning-4steps-V1.0-bf16.safetensors"
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("steps", SIGMAS)
@pytest.mark.parametrize("tokens", [16, 1024, 4096, 9000])
def test_the_schedule_is_the_published_one_at_every_size_and_diffusers(steps, tokens):
    sigmas = get_sigmas(steps, tokens, **SCHEDULE)
    assert sigmas.tolist() == pytest.approx(SIGMAS[steps], abs=1e-6)
    theirs = FlowMatchEulerDiscreteScheduler(**SCHEDULE)
    theirs.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=SCHEDULE["base_shift"])
    assert (sigmas - theirs.sigmas).abs().max() <= 1e-6


@pytest.mark.slow
def test_one_call_is_the_adapters_at_an_eighth_the_schedule_and_one_pass_a_step(file):
    by_hand, pipe, tensors = opened(), opened(), load_file(file)
    for name in {key.rsplit(".lora_", 1)[0] for key in tensors if ".lora_" in key}:
        update = tensors[f"{name}.lora_up.weight"].float() @ tensors[f"{name}.lora_down.weight"].float()
        by_hand.transformer.get_submodule(name).weight.data += ALPHA / RANK * update
    report = load_lightning(pipe, file)
    assert len(report.matched) == 12 * len(pipe.transformer.transformer_blocks) and not report.unmatched
    assert set(report.matched.values()) == {0.125}
    by_hand.schedule = by_hand.schedule | SCHEDULE
    noise, visited = torch.randn(1, 16, 64), []
    passes = pipe.transformer.register_forward_hook(lambda *_: visited.append(1))

    def seen(step, sigma, latents, velocity) -> None:
        visited.append(sigma)

    size = {"width": 64, "height": 64, "num_inference_steps": 4, "latents": noise, "progress": False}
    ours = pipe.edit(Image.open(PICTURE), WORDS, callback=seen, **size)
    passes.remove()
    assert visited == pytest.approx([1, 1.0, 1, 0.9, 1, 0.75, 1, 0.5], abs=1e-6)
    theirs = by_hand.edit(Image.open(PICTURE), WORDS, true_cfg_scale=1.0, **size)
    assert abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1


@pytest.mark.slow
def test_shrunk_with_it_a_folder_samples_that_way(file, tmp_path):
    shrink(TINY, tmp_path / "small", 8, file, progress=False)
    pipe = opened(tmp_path / "small")
    assert pipe.true_cfg_scale == 1 and get_sigmas(4, 64, **pipe.schedule).tolist() == pytest.approx(SIGMAS[4])
    index = json.loads((TINY / "model_index.json").read_text(encoding="utf-8"))
    assert opened().true_cfg_scale == index.get("_true_cfg_scale", 4.0)


@pytest.mark.slow
def test_the_command_knows_it_by_its_name(file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command.main([str(PICTURE), WORDS, "--out", "x.png", "--model", str(TINY), "--lora", str(file), "--device", "cpu"])
    assert "made for 4 steps without guidance" in (said := capsys.readouterr().out) and ", 4 steps in" in said
    pipe = opened()
    load_lightning(pipe, file)
    chance = torch.Generator().manual_seed(0)
    expected = pipe.edit(PICTURE, WORDS, num_inference_steps=4, generator=chance, progress=False)
    assert np.array_equal(np.asarray(Image.open("x.png")), np.asarray(expected))


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("Qwen-Image-Edit-2511-Lightning-8steps-V1.0-fp32.safetensors", 8),
        ("qwen_image_lightning_4_steps.safetensors", 4),
        ("lightning/my_4steps_style.safetensors", None),
        ("lightning.safetensors", None),
        (None, None),
    ],
)
def test_the_steps_are_in_the_name(name, steps):
    assert steps_of(name) == steps

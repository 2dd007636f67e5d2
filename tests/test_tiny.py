"""data/tiny is whole, small, and does what its card says: it understands edits on scenes that it never saw."""

from pathlib import Path

import numpy as np
import pytest
import torch
from evaluate import SEED, paint, reconstruction, sample, unseen_photo, unseen_scenes
from safetensors import safe_open
from tokenizers import Tokenizer

from minqwen.lora import load_lora
from minqwen.pipeline import QwenImagePipeline
from minqwen.prompt import EDIT, EDIT_PLUS, T2I
from minqwen.tokenizer import load_tokenizer
from minqwen.world import COMBINE, KINDS, Edit, judge, sample_drawing, sample_edit

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "data" / "tiny"

LAYOUT = """
model_index.json scheduler/scheduler_config.json text_encoder/config.json text_encoder/model.safetensors
tokenizer/vocab.json tokenizer/merges.txt tokenizer/tokenizer_config.json tokenizer/special_tokens_map.json
tokenizer/added_tokens.json processor/preprocessor_config.json processor/tokenizer.json transformer/config.json
transformer/diffusion_pytorch_model.safetensors vae/config.json vae/diffusion_pytorch_model.safetensors
""".split()


@pytest.fixture(scope="module")
def pipe():
    return QwenImagePipeline.from_pretrained(TINY, device="cpu")


def test_it_has_the_released_layout_in_bf16_and_is_small():
    assert [name for name in LAYOUT if not (TINY / name).is_file()] == []
    assert sum(path.stat().st_size for path in TINY.rglob("*") if path.is_file()) < 25e6
    for path in TINY.rglob("*/*.safetensors"):  # an adapter, beside them, is always in float32
        with safe_open(path, framework="pt") as file:
            assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}


def test_both_forms_of_the_tokenizer_agree_and_the_templates_have_the_released_lengths():
    tokenizer, other = load_tokenizer(TINY / "tokenizer"), Tokenizer.from_file(str(TINY / "tokenizer/tokenizer.json"))
    for text in (T2I.text, EDIT.text, "把猫换成狐狸", "I want the cat to be gone: <|image_pad|> Ω é\n\n 12"):
        assert tokenizer.encode(text).ids == other.encode(text).ids
    for template in (T2I, EDIT):
        assert len(tokenizer.encode(template.text.split("{}")[0]).ids) == template.drop


def test_the_autoencoder_gives_scenes_and_photos_back(pipe):
    assert reconstruction(pipe, unseen_scenes(8)) >= 33  # decibels
    assert reconstruction(pipe, unseen_photo(8)) >= 26


@pytest.mark.parametrize("kind", ["swap", "draw"])
def test_what_is_counted_in_batches_is_what_edit_and_generate_paint(pipe, kind):
    """data/recipes/evaluate.py paints fifty at once."""
    tasks = sample(kind, 3)
    for row, (task, painted) in enumerate(zip(tasks, paint(pipe, tasks, 2, 2.0), strict=True)):
        noise = torch.Generator().manual_seed(SEED + row)
        options = {"num_inference_steps": 2, "true_cfg_scale": 2.0, "generator": noise, "progress": False}
        alone = pipe.edit(task.source, task.instruction, **options) if task.source else pipe.generate(
            task.instruction, **options)  # fmt: skip
        assert abs(np.asarray(painted, int) - np.asarray(alone, int)).max() <= 1


def count_right(pipe, tasks: list[Edit]) -> int:
    """Eight steps are as good as twenty (see the card)."""
    right = 0
    for row, task in enumerate(tasks):
        options = {"num_inference_steps": 8, "generator": torch.Generator().manual_seed(row), "progress": False}
        if task.sources:
            image = pipe.edit(task.sources, task.instruction, **options)
        else:
            image = pipe.generate(task.instruction, **options)
        right += judge(image, task)
    return right


@pytest.mark.slow
def test_words_act_on_scenes_that_training_never_saw(pipe):
    """A sample of what data/recipes/evaluate.py counts; the card has the whole count."""
    rng = np.random.default_rng(10**9)
    tasks = [sample_edit(rng, kind) for kind in KINDS for _ in range(2)] + [sample_drawing(rng) for _ in range(2)]
    assert count_right(pipe, tasks) >= len(tasks) - 1


@pytest.mark.slow
def test_two_pictures_are_combined_as_the_words_say():
    """A sample too; with the adapter it still edits single pictures."""
    pipe = QwenImagePipeline.from_pretrained(TINY, device="cpu")
    pipe.edit_template = EDIT_PLUS
    load_lora(pipe.transformer, TINY / "edit_plus_lora.safetensors")
    rng = np.random.default_rng(10**9)
    tasks = [sample_edit(rng, COMBINE) for _ in range(6)] + [sample_edit(rng, kind) for kind in ("swap", "move", "add")]
    assert count_right(pipe, tasks) >= len(tasks) - 1


@pytest.mark.parametrize("kind", ["replace", "draw"])
def test_one_of_these_tasks_is_right(pipe, kind):
    """What a person who writes sees at once if the shipped weights no longer do their work."""
    rng = np.random.default_rng(10**9 + 1)
    assert count_right(pipe, [sample_drawing(rng) if kind == "draw" else sample_edit(rng, kind)]) == 1

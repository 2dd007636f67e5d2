"""What a reader of the list of faults brought, who knew neither these tests nor the code: right, or a cause by name."""

import importlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from minqwen import edit, finetune, parallel
from minqwen.checkpoint import Checkpoint
from minqwen.images import load_image
from minqwen.lora_files import check_config
from minqwen.pipeline import QwenImagePipeline
from minqwen.precompute import Precomputed, precompute
from minqwen.run import look_at
from minqwen.sampling import get_sigmas
from minqwen.shrink import shrink
from minqwen.text_encoder import Qwen2_5_VLTextModel
from minqwen.tokenizer import load_tokenizer
from minqwen.vae import AutoencoderKLQwenImage

ROOT = Path(__file__).resolve().parents[1]
TINY, SCENE = ROOT / "data" / "tiny", ROOT / "data" / "pictures" / "scene.png"


@pytest.fixture(scope="module")
def pipe() -> QwenImagePipeline:
    return QwenImagePipeline.from_pretrained(TINY, "cpu")


def test_whole_numbers_without_scales_are_not_shrunk(tmp_path):
    shutil.copytree(TINY, tmp_path / "model")
    (file,) = (tmp_path / "model" / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    name = "transformer_blocks.2.attn.to_q.weight"
    tensors[name] = tensors[name].mul(100).to(torch.int8)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"{name} holds whole numbers"):
        shrink(tmp_path / "model", tmp_path / "small", progress=False)


@pytest.mark.parametrize("bits", [3, "4", 16])
def test_a_checkpoint_has_8_bits_or_4(bits, tmp_path):
    with pytest.raises(ValueError, match="8 bits or 4"):
        shrink(TINY, tmp_path / "small", bits)


def test_half_of_the_merges_in_tokenizer_json_are_missed(tmp_path):
    whole = json.loads(load_tokenizer(TINY / "tokenizer").to_str())
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(whole), encoding="utf-8")
    assert load_tokenizer(tmp_path).encode("a cat").ids == load_tokenizer(TINY / "tokenizer").encode("a cat").ids
    whole["model"]["merges"] = whole["model"]["merges"][: len(whole["model"]["merges"]) // 2]
    file.write_text(json.dumps(whole), encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer.json: pieces or merges are damaged"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "loftq", "corda", True, "gaussian", None])
def test_adapters_whose_base_was_changed_are_refused(start):
    config = {"r": 4, "lora_alpha": 4, "init_lora_weights": start}
    if start in (True, "gaussian", None):
        return check_config(config)
    with pytest.raises(ValueError, match="changes the base too"):
        check_config(config)


@pytest.mark.parametrize("shift", [-3, 0])
def test_a_shift_is_above_0(shift):
    with pytest.raises(ValueError, match="shift must be above 0"):
        get_sigmas(4, 16, use_dynamic_shifting=False, shift=shift)


def test_a_transparent_colour_of_16_bits_counts_after_loading_too():
    data = io.BytesIO()
    Image.new("RGB", (4, 4), (200, 10, 10)).save(data, "PNG")
    image = Image.open(data)
    image.load()
    image.info["transparency"] = (200 * 257, 10 * 257, 10 * 257)  # as Pillow leaves it of a picture of 16 bits
    assert np.asarray(load_image(image)).min() == 255


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"latents_mean": [0.0] * 15}, "16 numbers each"), ({"latents_std": [0.0] * 16}, "above 0"),
     ({"latents_std": [float("nan")] * 16}, "above 0"), ({"latents_mean": [float("inf")] * 16}, "16 numbers each")],
)  # fmt: skip
def test_what_latents_are_divided_by_is_looked_at(changes, words):
    with pytest.raises(ValueError, match=words), torch.device("meta"):
        AutoencoderKLQwenImage(**Checkpoint(TINY).config("vae/config.json") | changes)


def test_a_base_of_angles_is_a_number():
    with pytest.raises(ValueError, match="rope_theta"), torch.device("meta"):
        Qwen2_5_VLTextModel(num_hidden_layers=1, rope_theta="1e6")


def test_an_index_that_lists_nothing_is_named(tmp_path):
    index = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.parent.mkdir()
    index.write_text('{"weight_map": {}}', encoding="utf-8")
    with pytest.raises(ValueError, match=index.name):
        Checkpoint(tmp_path).weight_map("transformer")


def test_a_strip_is_named_before_the_weights_are_opened(tmp_path, capsys, monkeypatch):
    Image.new("RGB", (1950, 10)).save(tmp_path / "strip.png")
    monkeypatch.setattr(QwenImagePipeline, "edit", None)
    with pytest.raises(SystemExit) as end:
        edit.main([str(tmp_path / "strip.png"), "x", "--area", "409600", "--model", str(TINY)])
    assert "strip.png: 1950x10 pixels" in str(end.value.code)


def test_a_result_of_a_long_name_has_a_shorter_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"{'é' * 50}_edited.png").touch()
    assert str(edit.free_name(["é" * 246 + ".png"])) == f"{'é' * 50}_edited_2.png"


@pytest.mark.slow
def test_a_command_needs_no_console(tmp_path):
    out = tmp_path / "x.png"
    words = ["a cat", "--out", str(out), "--model", str(TINY), "--steps", "1", "--device", "cpu"]
    closed = "import os, sys; os.close(2); sys.stderr = None; from minqwen.edit import main; main(sys.argv[1:])"
    assert subprocess.run([sys.executable, "-c", closed, *words], cwd=ROOT).returncode == 0 and out.exists()


@pytest.mark.parametrize("latents", [np.zeros((1, 16, 64)), [[[0.0] * 64] * 16]])
def test_latents_are_a_tensor(latents, pipe):
    with pytest.raises(TypeError, match="latents must be a tensor"):
        pipe.generate("x", latents=latents, num_inference_steps=1, progress=False)


def test_an_area_is_a_number(pipe):
    with pytest.raises(ValueError, match="area must be a number of pixels up to [0-9]+, got '4096'"):
        pipe.edit(SCENE, "x", area="4096")


@pytest.fixture(scope="module")
def sample(pipe, tmp_path_factory) -> Path:
    """The file of a sample in a cache."""
    place = tmp_path_factory.mktemp("set")
    (place / "images").mkdir()
    shutil.copy(SCENE, place / "images" / "a.png")
    (place / "images" / "a.txt").write_text("a scene", encoding="utf-8")
    return precompute(pipe, place / "images", cache_dir=place / "cache", progress=False).kept[0]


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [("controls", torch.zeros(1), "is no sample"), ("latents", torch.zeros(1, 16, 1, 7, 8), "latents"),
     ("latents", torch.zeros(1, 16, 1, 0, 8), "latents"), ("embeds", torch.zeros(1, 0, 128), "embeds"),
     ("latents", torch.zeros(1, 16, 1, 8, 8, dtype=torch.int32), "is no sample")],
)  # fmt: skip
def test_a_sample_that_was_altered_is_named(name, tensor, words, sample, pipe):
    whole = sample.read_bytes()
    tensors = load_file(sample) | {name: tensor}
    save_file(tensors, sample, {"key": sample.stem})
    with pytest.raises(ValueError, match=rf"{sample.name}.*{words}"):
        look_at(Precomputed.open(sample.parent), pipe.transformer.config)
    sample.write_bytes(whole)
    assert look_at(Precomputed.open(sample.parent), pipe.transformer.config)[0] == [[0]]


def test_a_disk_that_fills_up_while_shards_are_written_is_named(tmp_path):
    model = torch.nn.Linear(2, 2)
    shards = parallel.Shards(model, torch.optim.AdamW(model.parameters()), tmp_path / "run")
    shards.folder.write_text("a file in its place", encoding="utf-8")
    with pytest.raises(OSError, match=r"run.*is the disk full"):
        shards.state_dict()


@pytest.mark.parametrize("part", ["encoder.conv_in.weight", "decoder.conv_out.weight"])
def test_damaged_weights_of_the_autoencoder_are_named(part, tmp_path):
    pipe = QwenImagePipeline.from_pretrained(TINY, "cpu")
    pipe.vae.get_parameter(part).data.fill_(float("nan"))
    shutil.copy(SCENE, tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a scene", encoding="utf-8")
    if part.startswith("encoder"):
        with pytest.raises(ValueError, match="a: the encoders give NaN"):
            precompute(pipe, tmp_path, cache_dir=tmp_path / "cache", progress=False)
        assert not list((tmp_path / "cache").glob("[!.]*"))
    else:
        with pytest.raises(ValueError, match="the autoencoder's weights do"):
            pipe.generate("x", num_inference_steps=1, progress=False)


def test_damaged_weights_of_the_transformer_are_no_matter_of_the_dtype():
    pipe = QwenImagePipeline.from_pretrained(TINY, "cpu")
    pipe.transformer.transformer_blocks[1].attn.to_q.weight.data[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="weights or a LoRA hold NaN"):
        pipe.generate("x", num_inference_steps=1, progress=False)


def test_noise_is_finite_and_sides_may_be_numbers_of_numpy(pipe):
    noise = torch.randn(1, 6, 64)
    how = {"width": np.int64(48), "height": np.int32(32), "num_inference_steps": np.int64(1), "progress": False}
    assert pipe.generate("x", latents=noise, **how).size == (48, 32)
    noise[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="latents hold numbers that are not finite"):
        pipe.generate("x", latents=noise, **how)


def test_a_small_file_may_begin_with_a_mark(tmp_path):
    (tmp_path / "model_index.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert Checkpoint(tmp_path).config("model_index.json") == {"a": 1}


@pytest.mark.parametrize("command", ["precompute", "finetune", "shrink"])
def test_of_several_names_the_one_that_is_no_text_is_named(command, tmp_path, capsys):
    odd = str(tmp_path / "b\udce4d")
    words = {"precompute": [str(tmp_path), "--cache", odd], "finetune": [str(tmp_path), "--out", odd],
             "shrink": [str(TINY), odd]}  # fmt: skip
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"minqwen.{command}").main(words[command])
    assert f"{odd!r} is no text" in str(end.value.code)


def test_a_strip_as_a_preview_is_named_before_the_model_is_opened(sample, tmp_path):
    Image.new("RGB", (3600, 20)).save(tmp_path / "wide.png")
    shutil.copytree(TINY, tmp_path / "model")
    index = tmp_path / "model" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_area": 2**20}), encoding="utf-8")
    words = [str(sample.parent), "--out", str(tmp_path / "run"), "--model", str(tmp_path / "model")]
    with pytest.raises(SystemExit) as end:
        finetune.main([*words, "--preview-prompt", "x", "--preview-image", str(tmp_path / "wide.png")])
    assert "wide.png: 3600x20 pixels" in str(end.value.code)

"""verify.py: a checkpoint is told from what was expected of it, and the point where it parts is named.

A hub on this machine serves the released geometry with made numbers, and the tiny checkpoint with one thing changed.
"""

import json
import re
import shutil
import threading
from pathlib import Path

import pytest
import torch
from hub import ask_only, serving
from made import MadeHub
from safetensors.torch import load_file, save_file

from minqwen import verify
from minqwen.checkpoint import Checkpoint
from minqwen.images import load_image
from minqwen.verify import POINTS, rows

ROOT = Path(__file__).resolve().parents[1]
TINY, PHOTO = ROOT / "data" / "tiny", ROOT / "data" / "pictures" / "coffee.png"
HEAVY = ("a block", "the photo, there and back", "the autoencoder", "a block at 4 bits, relative error")
LIGHT = tuple(name for name in POINTS if name not in HEAVY)


def statuses(source, monkeypatch, points=tuple(POINTS)) -> dict[str, tuple[str, str]]:
    """point -> (status, what was found)"""
    monkeypatch.setattr(verify, "POINTS", {name: POINTS[name] for name in points})
    return {name: (status.strip("*"), found) for name, status, found in rows(Checkpoint(source), load_image(PHOTO))}


@pytest.mark.slow
def test_the_tiny_checkpoint_differs_in_its_sizes_and_computes(monkeypatch):
    found = statuses(TINY, monkeypatch)
    assert {name for name, (status, _) in found.items() if status == "fails"} == set()
    assert "num_layers is 6, not 60" in found["transformer/config.json"][1]
    weights, text, image = map(float, re.findall(r"(?:weights|text|image) (0\.\d+)", found[HEAVY[-1]][1]))
    assert found[HEAVY[-1]][0] == "measured" and 0.05 < weights < 0.15 and 0.05 < text < 0.2 and 0.05 < image < 0.2
    for same in ("model_index.json", "scheduler", "processor", "a block", "the autoencoder"):
        assert found[same][0] == "as expected", found[same]


@pytest.mark.slow
def test_the_released_geometry_is_as_expected(tmp_path, monkeypatch):
    """All but the tokenizer, which is the tiny one's; what is computed is tried on the tiny checkpoint."""
    (tmp_path / "hub").mkdir()
    hub = MadeHub(tmp_path / "hub")
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    ask_only(hub, tmp_path / "cache", monkeypatch)
    try:
        found = statuses("owner/name", monkeypatch, LIGHT)
    finally:
        hub.stop()
    others = {name for name, (status, _) in found.items() if status != "as expected"}
    assert others == {"tokenizer", "text_encoder/config.json"}, found
    assert found["text_encoder/config.json"][1].endswith("is 1119, not 151655")
    read = sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*") if file.is_file())
    assert read < 2**20  # what was read of the weights came by ranges


def change_json(file: str, **keys):
    def change(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | keys), encoding="utf-8")

    return change


def change_tensor(component: str, name: str, change):
    def work(folder: Path) -> None:
        (path,) = (folder / component).glob("*.safetensors")
        tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
        change(tensors, name)
        save_file(tensors, path, metadata={"format": "pt"})

    return work


def gone(tensors, name):
    del tensors[name]


def longer(tensors, name):
    tensors[name] = torch.cat([tensors[name], tensors[name]])


def newer(tensors, _):
    for name in [name for name in tensors if name.startswith("visual.")]:
        tensors["model." + name] = tensors.pop(name)


def not_a_number(tensors, name):
    tensors[name][0] = float("nan")


def no_tokens(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json"):
        (folder / "tokenizer" / name).unlink(missing_ok=True)


WEIGHT = "transformer_blocks.0.attn.to_q.weight"
CHANGES = {  # what is changed: the change, the point that names it, its status, words of it
    "another pipeline": (change_json("model_index.json", _class_name="QwenImage21Pipeline"),
                         "model_index.json", "fails", "QwenImage21Pipeline is none of"),
    "another scheduler": (change_json("model_index.json", scheduler=["diffusers", "EulerDiscreteScheduler"]),
                          "model_index.json", "differs", "scheduler is EulerDiscreteScheduler"),
    "2511's key": (change_json("transformer/config.json", zero_cond_t=True),
                   "transformer/config.json", "differs", "zero_cond_t is True, not False"),
    "an unknown key": (change_json("transformer/config.json", use_mixture=True),
                       "transformer/config.json", "differs", "use_mixture (True) is unknown"),
    "attn_scales": (change_json("vae/config.json", attn_scales=[0.5]),
                    "vae/config.json", "differs", "attn_scales is (0.5,), not ()"),
    "another shift": (change_json("scheduler/scheduler_config.json", max_shift=1.15),
                      "scheduler", "differs", "max_shift is 1.15, not 0.9"),
    "smaller pictures": (change_json("processor/preprocessor_config.json", max_pixels=1003520),
                         "processor", "differs", "max_pixels is 1003520, not 12845056"),
    "a sliding window": (change_json("text_encoder/config.json", use_sliding_window=True),
                         "text_encoder/config.json", "fails", "use_sliding_window"),
    "no added tokens": (no_tokens, "tokenizer", "fails", "no tokenizer in"),
    "a tensor is gone": (change_tensor("transformer", WEIGHT, gone),
                         "transformer: names and shapes", "fails", WEIGHT),
    "a shape": (change_tensor("vae", "quant_conv.bias", longer), "vae: names and shapes", "fails", "quant_conv.bias"),
    "newer names": (change_tensor("text_encoder", "", newer),
                    "text_encoder: names and shapes", "differs", "have newer names, such as model.visual."),
    "not a number": (change_tensor("transformer", WEIGHT, not_a_number),
                     "a block", "fails", f"{WEIGHT} holds numbers that are none"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("what", CHANGES)
def test_a_hub_that_differs_in_one_point_is_told_which(what, tmp_path, monkeypatch):
    change, point, status, words = CHANGES[what]
    folder = tmp_path / "hub"
    shutil.copytree(TINY, folder)
    change(folder)
    before = statuses(TINY, monkeypatch, {*LIGHT, point})
    with serving(folder) as hub:
        ask_only(hub, tmp_path / "cache", monkeypatch)
        found = statuses("owner/name", monkeypatch, {*LIGHT, point})
    assert found[point][0] == status and words in found[point][1], found[point]
    others = {name for name in found if found[name] != before[name] and name != point}
    assert others <= {point.replace("/config.json", ": names and shapes")}, others  # a model that is refused has none


def test_the_command_says_what_fails_and_ends_with_1(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(verify, "POINTS", {name: POINTS[name] for name in ("model_index.json", "scheduler")})
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    for pipeline, status in (("QwenImagePipeline", 0), ("Other", 1)):
        change_json("model_index.json", _class_name=pipeline)(tmp_path)
        with pytest.raises(SystemExit) as end:
            verify.main([str(tmp_path), "--photo", str(PHOTO)])
        assert end.value.code == status and f"{status} of 2 points fail" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [([str(TINY), "--photo", "nowhere.jpg"], "nowhere.jpg"), (["nowhere/at/all"], "nowhere/at/all is neither")],
)
def test_what_is_not_there_is_named(arguments, words, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as end:
        verify.main(arguments)
    assert words in str(end.value.code)


def test_a_shrunk_checkpoint_is_refused(tmp_path, monkeypatch):
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    change_json("model_index.json", _shrunk={"format": 2})(tmp_path)
    with pytest.raises(ValueError, match="was written by shrink"):
        statuses(tmp_path, monkeypatch, LIGHT)


def test_without_diffusers_two_points_are_not_run(monkeypatch):
    monkeypatch.setattr(verify, "find_spec", lambda name: None)
    found = statuses(TINY, monkeypatch, ("a block", "the autoencoder"))
    assert {status for status, _ in found.values()} == {"not run"}

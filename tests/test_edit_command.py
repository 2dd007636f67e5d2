"""edit.py and command.py: the picture of pipe.edit to the bit, and one line for an error, before a model is loaded."""

import json
import os
import runpy
import shutil
import sys
import warnings
from argparse import ArgumentTypeError
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minqwen import edit as library
from minqwen import finetune
from minqwen.checkpoint import Checkpoint
from minqwen.command import number
from minqwen.edit import main
from minqwen.lora import load_lora
from minqwen.pipeline import QwenImagePipeline
from minqwen.prompt import IMAGE_PAD
from minqwen.world import sample_edit

TINY = Path(__file__).resolve().parents[1] / "data" / "tiny"
LORA = TINY / "edit_plus_lora.safetensors"
UPRIGHT = 6  # EXIF: turn it by 90 degrees


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder in which the command runs: two pictures, the first a photo that lies on its side, and a text."""
    scene = sample_edit(np.random.default_rng(3), "combine")
    exif = Image.Exif()
    exif[0x0112] = UPRIGHT
    scene.sources[0].resize((80, 48)).save(tmp_path / "photo.jpg", exif=exif)
    scene.sources[1].save(tmp_path / "second.png")
    (tmp_path / "notes.txt").write_text("no picture", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def pipe():
    return QwenImagePipeline.from_pretrained(TINY, device="cpu")


@pytest.fixture
def opened(pipe, monkeypatch):
    """The command finds the model open already."""
    monkeypatch.setattr(library, "open_pipeline", lambda asked, without=(), memory="auto": pipe)
    return pipe


@pytest.fixture
def no_model(monkeypatch):
    """Whoever opens weights fails; the small files beside them may be read."""

    def opens(*_):
        raise AssertionError("weights were opened")

    monkeypatch.setattr(Checkpoint, "_open", opens)


def run(*arguments, model=TINY) -> None:
    main([*map(str, arguments), "--model", str(model), "--device", "cpu", "--steps", "2"])


def end_of(capsys, *arguments, command=main) -> tuple[int, str]:
    """The status with which a command ends early, and the one line that it says."""
    with pytest.raises(SystemExit) as end:
        command([*map(str, arguments)])
    said = capsys.readouterr()
    assert not said.out
    code = end.value.code
    line = said.err if isinstance(code, int) else said.err + code + "\n"  # what Python prints at exit
    assert line.endswith("\n") and line.count("\n") == 1
    return (code if isinstance(code, int) else 1), line.strip()


def seeded(seed: int) -> dict:
    return {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(seed), "progress": False}


def same(file: Path, image: Image.Image) -> bool:
    return np.array_equal(np.asarray(Image.open(file)), np.asarray(image))


class Stub:
    """A pipeline that needs no weights: `result` is a picture or an exception."""

    def __init__(self, result):
        self.result = result

    def generate(self, prompt, **options):
        warnings.warn("so to speak", stacklevel=2)
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result


def stub(monkeypatch, result) -> None:
    monkeypatch.setattr(library, "open_model", lambda *_: Stub(result))


# --------------------------------------------------------------------------------------------- the same picture


@pytest.mark.slow
def test_an_edit_is_that_of_the_pipeline(folder, pipe, capsys):
    run("photo.jpg", "replace the cat with a dog", "--out", "winter.png", "--seed", 7)
    assert same("winter.png", pipe.edit("photo.jpg", "replace the cat with a dog", **seeded(7)))
    said = capsys.readouterr()
    assert said.out.startswith("winter.png: 64x128 pixels, 2 steps in ") and "2/2" in said.err
    assert Image.open("winter.png").format == "PNG"
    assert sorted(path.name for path in folder.iterdir()) == ["notes.txt", "photo.jpg", "second.png", "winter.png"]


def test_every_option_reaches_the_pipeline(folder, opened, capsys):
    size = ["--area", 32 * 32, "--width", 70, "--height", 48]
    run("second.png", "--out", "x.WebP", *size, "make it red", "--guidance", 3, "--negative", "blue", "--seed", 2**32)
    with pytest.warns(UserWarning, match="no multiple of 16"):
        options = {"true_cfg_scale": 3.0, "negative_prompt": "blue", **seeded(2**32)}
        expected = opened.edit("second.png", "make it red", 32 * 32, 70, 48, **options)
    expected.save("expected.webp")
    assert Path("x.WebP").read_bytes() == Path("expected.webp").read_bytes()
    assert "edit: width 70 is no multiple of 16, so the picture has 64\n" in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_may_stream(folder, pipe, capsys):
    run("a cat on a white background", "--out", "cat.png", "--memory", "stream")
    assert "memory: stream, about" in capsys.readouterr().out
    apart = np.asarray(Image.open("cat.png"), int) - np.asarray(
        pipe.generate("a cat on a white background", **seeded(0))
    )
    assert abs(apart).max() <= 1


def test_without_a_picture_it_draws_under_a_name_that_is_free(folder, opened, capsys):
    Path("drawn.png").write_bytes(b"an older one")
    run("a cat on a white background", "--seed", 1)
    assert same("drawn_2.png", opened.generate("a cat on a white background", **seeded(1)))
    assert Path("drawn.png").read_bytes() == b"an older one" and capsys.readouterr().out.startswith("drawn_2.png: ")
    assert library.free_name(["elsewhere/photo.v1.jpg", "second.png"]) == Path("photo.v1_edited.png")


@pytest.mark.slow
def test_several_pictures_and_an_adapter(folder):
    several = folder / "several"
    shutil.copytree(TINY, several)
    index = json.loads((TINY / "model_index.json").read_text(encoding="utf-8"))
    index["_class_name"] = "QwenImageEditPlusPipeline"
    (several / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    words = "add the cat at the top left of Picture 2 to Picture 1"
    lora = ["--lora", LORA, "--lora-scale", 0.5, "--area", 32 * 32]
    run("second.png", "photo.jpg", words, "--out", "both.png", *lora, "--dtype", "bfloat16", model=several)
    plus = QwenImagePipeline.from_pretrained(several, "cpu", torch.bfloat16)
    load_lora(plus.transformer, LORA, 0.5)
    assert same("both.png", plus.edit(["second.png", "photo.jpg"], words, 32 * 32, **seeded(0)))


# ------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["words", "--steps", 0], "argument --steps: expected a whole number from 1 to 1000, got '0'"),
        (["words", "--steps", 2.5], "argument --steps: expected a whole number from 1 to 1000, got '2.5'"),
        (["words", "--seed", -1], f"argument --seed: expected a whole number from 0 to {2**64 - 1}, got '-1'"),
        (["words", "--seed", "seven"], "argument --seed: expected a whole number"),
        (["words", "--seed", 2**64], "argument --seed: expected a whole number"),
        (["words", "--memory", "0"], "argument --memory: expected a number from 0.001"),
        (["words", "--guidance", "nan"], "argument --guidance: expected a number from 0 to 100, got 'nan'"),
        (["words", "--guidance", "inf"], "argument --guidance: expected a number"),
        (["words", "--guidance", "-1"], "argument --guidance: expected a number"),
        (["words", "--width", 8], "argument --width: expected a whole number from 16 to 16384, got '8'"),
        (["words", "--height", "x"], "argument --height: expected a whole number"),
        (["photo.jpg", "words", "--area", 0], "argument --area: expected a whole number from 1024 to "),
        (["words", "--area", 4096], "--area is the working size of a picture, and there is none"),
        (["words", "--lora", LORA, "--lora-scale", "nan"], "argument --lora-scale: expected a number from -100 to 100"),
        (["words", "--lora-scale", 0.5], "--lora-scale without --lora"),
        (["words", "--lora", "gone.safetensors"], "--lora: no such file: gone.safetensors"),
        (["words", "--negative", IMAGE_PAD], f"the prompt or --negative holds {IMAGE_PAD}"),
        (["words", "--dtype", "float16"], "argument --dtype: invalid choice: 'float16'"),
        (["words", "--device", "abacus"], "argument --device: there is no device 'abacus' here: expected "),
        (["words", "--device", "meta"], "argument --device: there is no device 'meta' here"),
        (["words", "--out", "gone/x.png"], "--out: there is no folder gone that"),
        (["words", "--out", "folder.png"], "--out folder.png is a folder: choose another name"),
        (["words", "--out", "x.txt"], "argument --out: Pillow cannot write x.txt: end it in .png, .jpg or .webp"),
        (["words", "--out", "x"], "argument --out: Pillow cannot write x:"),
        (["words", "--out", "x.psd"], "argument --out: Pillow cannot write x.psd:"),  # it only reads these
        (["words", "--out", "x.xbm"], "argument --out: Pillow cannot write x.xbm:"),  # it writes no colours into these
        (["photo.jpg", "words", "--out", "./photo.jpg"], "--out photo.jpg is one of the pictures"),
        (["photo.jpg"], "photo.jpg is a file: what to do with it comes last, in quotes"),
        (["words", "--stepz", 3], "unrecognized arguments: --stepz"),
        ([], "the following arguments are required: PROMPT"),
    ],
)
def test_a_wrong_option_is_named_and_ends_with_2(folder, no_model, capsys, arguments, said):
    Path("folder.png").mkdir()
    status, line = end_of(capsys, *arguments, "--model", "gone")
    assert status == 2 and line.startswith(f"edit: {said}")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gone.jpg", "words"], "no such picture: gone.jpg"),
        (["photo.jpg", "make", "it", "winter"], "no such picture: make (a prompt of several words stands in quotes)"),
        (["notes.txt", "words"], "cannot read notes.txt as a picture"),
        (["float.tif", "words"], "cannot read float.tif as a picture: no agreed way from mode F to RGB"),
        (["long.png", "words"], "long.png: 1000x2 pixels: one side is over 200 times the other"),
        (["photo.jpg", "second.png", "words", "--model", TINY], "this checkpoint edits one picture, got 2"),
        (["words", "--model", "gone"], "gone is neither a folder nor a hub repository"),
        (["words", "--model", ".", "--out", "x.png"], ". has no model_index.json"),
        (["words", "--lora", "notes.txt", "--model", TINY], "notes.txt is damaged"),
        (["words", "--lora", TINY / "vae" / "diffusion_pytorch_model.safetensors", "--model", TINY], TINY / "vae"),
    ],
)
def test_other_errors_are_found_before_weights_are_read_and_end_with_1(folder, no_model, capsys, arguments, said):
    Image.new("F", (32, 32)).save("float.tif")
    Image.new("RGB", (1000, 2)).save("long.png")
    status, line = end_of(capsys, "--device", "cpu", *arguments)
    assert status == 1 and line.startswith(f"edit: {said}")


def test_a_folder_that_may_not_be_written_to(folder, no_model, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert end_of(capsys, "words") == (2, "edit: --out: there is no folder . that may be written to")


def test_ctrl_c_and_numbers_that_overflow_end_in_one_line(folder, capsys, monkeypatch):
    monkeypatch.setattr(warnings, "warn", lambda *_, **__: None)
    stub(monkeypatch, KeyboardInterrupt())
    assert end_of(capsys, "words", "--out", "x.png") == (130, "edit: interrupted")
    stub(monkeypatch, FloatingPointError("step 0: numbers are no longer finite"))
    assert end_of(capsys, "words", "--out", "x.png") == (1, "edit: step 0: numbers are no longer finite")
    assert not Path("x.png").exists()


def test_warnings_are_lines_without_code(folder, capsys, monkeypatch):
    stub(monkeypatch, Image.new("RGB", (16, 16)))
    before = warnings.showwarning
    main(["words", "--out", "x.png"])
    assert capsys.readouterr().err == "edit: so to speak\n" and warnings.showwarning is before


def test_the_old_file_stays_when_the_new_one_cannot_be_written(folder, capsys, monkeypatch):
    monkeypatch.setattr(warnings, "warn", lambda *_, **__: None)
    Path("x.png").write_bytes(b"old")

    def full(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "replace", full)
    stub(monkeypatch, Image.new("RGB", (16, 16)))
    assert end_of(capsys, "words", "--out", "x.png") == (1, "edit: cannot write x.png: the disk is full")
    assert Path("x.png").read_bytes() == b"old" and not list(folder.glob(".*.part"))


# ------------------------------------------------------------------------------------------- what commands share


def test_numbers_stay_in_their_range():
    assert number(int, 1, 12)("12") == 12 and number(float, -1, 1)("-1") == -1
    assert isinstance(number(int, 0, 9)("3"), int)
    for text in ("nan", "inf", "-inf", "1.5", ""):
        with pytest.raises(ArgumentTypeError, match="expected a number from 0 to 1, got "):
            number(float, 0, 1)(text)


def test_finetune_has_the_same_options_and_ends_the_same_way(folder, capsys, monkeypatch):
    status, line = end_of(capsys, "cache", "--out", "out", "--device", "abacus", command=finetune.main)
    assert status == 2 and line.startswith("finetune: argument --device: there is no device 'abacus' here")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune.Precomputed, "open", interrupted)
    expected = 1, "finetune: interrupted; run it again to go on"
    assert end_of(capsys, "cache", "--out", "out", command=finetune.main) == expected


def test_help_runs_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["edit", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(library.__file__, run_name="__main__")
    text = capsys.readouterr().out
    assert ended.value.code == 0 and "[PICTURE ...] PROMPT" in text and "data/tiny" in text and "winter.png" in text

"""gpu.py waits for a card; on a CPU it does its work at the tiny checkpoint's sizes, and says what missed its mark."""

import json
import math
from argparse import Namespace
from pathlib import Path

import gpu
import pytest
from gpu import PARTS, PARTS_OF_IT, Card, made_folder, table

TINY = Path(__file__).resolve().parents[1] / "data" / "tiny"
# On a CPU nobody counts the peak, and the tests of a card are none.
FIGURES = {
    "forward": {"s", "times as fast as diffusers", "compiled, share of the card's rate", "share of the card's rate"},
    "vae": {"encode, s", "decode, s", "encode, times as fast as diffusers", "decode, times as fast as diffusers"},
    "turns at 4 bits": {"s a step", "GiB, as planned"},
    "turns": {"s a step", "GiB, as planned"},
    "stream": {"s a step", "GiB, as planned", "times what moving the bytes takes"},
    "resident": {"s a step"},
    "training at 4 bits": {"s a step", "loss"},
    "shrinking": {"s", "GB"},
}


@pytest.mark.slow
@pytest.mark.parametrize("part", FIGURES)
def test_each_part_works_on_a_cpu_at_a_small_size(part, tmp_path):
    for name in PARTS:
        config = json.loads((TINY / name / "config.json").read_text(encoding="utf-8"))
        (tmp_path / name).mkdir()
        fewer = config | {"num_layers": 2} if name == "transformer" else config
        (tmp_path / name / "config.json").write_text(json.dumps(fewer), encoding="utf-8")
    asked = Namespace(device="cpu", like=tmp_path, side=64, backend="eager")
    found = PARTS_OF_IT[part](asked, Card("cpu"))
    assert FIGURES[part] <= found.keys()
    assert all(math.isfinite(value) for value in found.values()), found  # so small, one run may be quicker than two
    if part == "forward":
        assert found["largest difference, share of the largest number"] < 0.05
    json.dumps(found, allow_nan=False)


def test_files_of_zeros_take_no_room(tmp_path):
    made_folder(tmp_path, None, bits=4)
    files = [file for file in tmp_path.rglob("*.safetensors")]
    assert sum(file.stat().st_size for file in files) > 20e9
    assert sum(512 * file.stat().st_blocks for file in files) < 10e6


def test_what_misses_its_mark_is_said():
    found = {"vae": {"encode, times as fast as diffusers": 1.5, "decode, times as fast as diffusers": 2.5},
             "stream": {"GiB at the peak": 9.0}, "turns": {"failed": "a | b"}}  # fmt: skip
    lines = table(found)[2:]
    assert lines[0].endswith("| 1.5 | at least 2: **missed** |") and lines[1].endswith("| 2.5 | at least 2 |")
    assert lines[2].endswith("| 9 | at most 8: **missed** |") and lines[3] == "| turns | failed | a / b |  |"


def test_without_a_card_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        gpu.main([])
    assert end.value.code == 1 and "no CUDA device here" in capsys.readouterr().err


@pytest.mark.slow
def test_a_part_that_fails_or_takes_too_long_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "PARTS_OF_IT", {"vae": None})
    arguments = ["--device", "cpu", "--like", str(tmp_path), "--side", "64", "--json", str(tmp_path / "found.json")]
    gpu.main([*arguments, "--minutes", "3"])
    found = json.loads((tmp_path / "found.json").read_text())["found"]
    assert "vae/config.json" in found["vae"]["failed"]
    gpu.main([*arguments, "--minutes", "0"])
    assert "the time was up" in capsys.readouterr().out

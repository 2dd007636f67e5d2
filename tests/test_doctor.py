"""doctor.py and plans.py: the sizes are those of the files, the table is the README's, a wrong option is named."""

import re
from pathlib import Path

import machines
import pytest
import torch
from tables import written
from test_released_size import RELEASED

from minqwen import doctor
from minqwen.doctor import BITS, Machine, in_time, main, python_itself, released
from minqwen.pipeline import PARTS
from minqwen.plans import Plan, plans
from minqwen.shrink import bits_given, size_at

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "data" / "tiny"


@pytest.mark.slow
@pytest.mark.parametrize("bits", BITS)
def test_the_parts_of_a_released_model_have_the_sizes_that_shrink_writes(bits):
    for name, shell in released(bits).items():
        wanted, rename = 0, getattr(PARTS[name], "released_name", str)
        for tensor, shape in RELEASED[name].items():
            if rename(tensor):  # lm_head is never opened
                given, size = bits_given(tensor, len(shape), bits), 2 * torch.Size(shape).numel()
                wanted += size_at(shape, None if bits == 16 else given, size)
        assert sum(map(shell.size, shell.stored)) == wanted, name


@pytest.mark.slow
def test_the_table_of_the_readme_is_current():
    page, lines = (ROOT / "README.md").read_text(encoding="utf-8"), machines.lines()
    assert written(page, "machines", lines) == page, "make machines"
    rows = {row.split(" | ")[0]: row.split(" | ")[1:3] for row in lines}
    assert rows["| H100, 80 GB; 128 GB"] == ["as released", "resident"]
    assert rows["| RTX 4060, 8 GB; 32 GB"] == ["as released", "stream"]


@pytest.mark.slow
def test_the_lesson_speaks_of_the_same_machines():
    from figures.chapter_11 import MACHINES

    named = {machine.name.split(";")[0]: machine for machine in machines.NAMED}
    assert MACHINES and all(named[machine.name]._replace(name=machine.name) == machine for machine in MACHINES)


def test_blocks_come_from_the_disk_where_the_host_has_no_room_for_them():
    plan, machine = Plan("stream", 0, 20, 10, kept=10), Machine("", 0, 10, rate=100, link=10, disk=2)
    assert machine.seconds(plan) == 2 and machine._replace(host=9).seconds(plan) == 10
    assert machine.seconds(plan._replace(fetched=0, kept=0)) == 0.1


def test_times_are_said_in_the_usual_units():
    assert [in_time(s) for s in (0.0123, 1.5, 3, 300, 9000)] == ["0.012 s", "1.5 s", "3 s", "5 min", "2.5 h"]


@pytest.mark.slow
def test_it_says_what_the_tiny_checkpoint_needs_here(capsys):
    main(["--model", str(TINY), "--area", "4096", "--steps", "20", "--device", "cpu"])
    said = capsys.readouterr().out
    rows = re.findall(r"^\| (.+) \|$", said, re.MULTILINE)[1:]
    ways = [row.split(" | ") for row in rows]
    assert [way[1] for way in ways] == ["resident", "turns", "stream"]
    assert all(way[0] == str(TINY) and way[3] == "yes" and way[2].endswith("MiB") and way[4] for way in ways)
    assert not python_itself() or "To each peak come " in said


@pytest.mark.slow
def test_what_does_not_fit_gets_no_time(capsys, monkeypatch):
    few = {name: shell for name, shell in released(4).items() if name != "text_encoder"}
    monkeypatch.setattr(doctor, "released", lambda *_: few)
    monkeypatch.setattr(doctor, "here", lambda *_: Machine("", 2**33, 2**33, 1e12, 1e9, 1e9))
    main(["--device", "cpu"])
    rows = [row.split(" | ") for row in capsys.readouterr().out.splitlines() if " | resident | " in row]
    assert rows and all(row[3] == "no" and not "".join(row[4:]).strip(" |") for row in rows)


@pytest.mark.parametrize(
    ("option", "words"),
    [("--area=3", "--area: expected a whole number from 1024"), ("--steps=0", "--steps"),
     ("--pictures=x", "--pictures"), ("--dtype=float16", "--dtype"),
     ("--device=abacus", "--device: there is no device")],
)  # fmt: skip
def test_a_wrong_option_is_named(option, words, capsys):
    with pytest.raises(SystemExit) as end:
        main([option])
    assert end.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("model", ["nowhere", "Qwen/Qwen-Image-Edit"])
def test_a_model_that_is_no_folder_is_named_and_never_downloaded(model, capsys):
    with pytest.raises(SystemExit) as end:
        main(["--model", model])
    assert end.value.code == 2 and f"--model: no such folder: {model}" in capsys.readouterr().err


@pytest.mark.slow
def test_drawing_needs_less_than_editing():
    parts = released(4)
    drawing, edit = (plans(parts, 1024 * 1024, pictures) for pictures in (0, 1))
    assert all(a.peak <= b.peak and a.operations < b.operations for a, b in zip(drawing, edit, strict=True))

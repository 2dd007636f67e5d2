"""run.py: a run goes on from whole files to the same numbers; files that are not its own are refused in a sentence."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from minqwen.run import Run, digest, locked, read_state

FIELDS = ("step", "loss", "right")


class Chance:
    """A random state as a part."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)

    def state_dict(self) -> dict:
        return {"numpy": json.dumps(self.rng.bit_generator.state), "torch": torch.get_rng_state()}

    def load_state_dict(self, state: dict) -> None:
        self.rng.bit_generator.state = json.loads(state["numpy"])
        torch.set_rng_state(state["torch"])


def a_run(folder: Path, width: int = 3, **settings) -> tuple[Run, nn.Module]:
    torch.manual_seed(0)
    net = nn.Linear(width, 1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    parts = {"net": net, "optimizer": optimizer, "chance": Chance(1)}
    settings = {"lr": 0.1, "targets": ("a", "b")} | settings
    return Run(folder / "state.pt", folder / "log.csv", FIELDS, parts, settings), net


def train(run: Run, steps: int) -> None:
    net, optimizer, rng = run.parts["net"], run.parts["optimizer"], run.parts["chance"].rng
    while run.step < steps:
        x = torch.tensor(rng.normal(size=3), dtype=torch.float32) + torch.randn(3)
        loss = net(x).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.rows.append((run.step, loss.item(), None if run.step % 2 else "all"))
        run.step += 1
        run.save()


def outcome(run: Run) -> tuple:
    """All that a reader of the folder sees, but for the seconds."""
    state = read_state(run.state)
    return run.log.read_text(), state["step"], state["rows"], state["parts"]["net"]["weight"].tolist()


def test_a_run_that_stops_goes_on_with_the_same_numbers(tmp_path):
    whole, _ = a_run(tmp_path / "whole")
    train(whole, 5)
    first, _ = a_run(tmp_path / "cut")
    assert not first.resume()
    train(first, 3)
    torch.randn(7)
    again, net = a_run(tmp_path / "cut")
    assert again.resume() and again.step == 3 and again.rows == whole.rows[:3]
    train(again, 5)
    assert outcome(again) == outcome(whole) and torch.equal(net.weight, whole.parts["net"].weight)
    with open(whole.log, newline="") as file:
        head, *rows = csv.reader(file)
    assert tuple(head) == FIELDS and [row[2] for row in rows] == ["all", "", "all", "", "all"]
    assert [float(row[1]) for row in rows] == [row[1] for row in whole.rows]
    assert sorted(path.name for path in again.state.parent.iterdir()) == ["log.csv", "state.pt"]


def test_what_a_killed_save_left_is_cleared_away(tmp_path):
    run, _ = a_run(tmp_path)
    run.save()
    (tmp_path / ".state.pt.12345678.part").write_bytes(b"half a file")
    (tmp_path / ".other.pt.12345678.part").write_bytes(b"of a run beside it, which is being written")
    assert run.resume()
    assert sorted(path.name for path in tmp_path.glob(".*")) == [".other.pt.12345678.part"]


def test_time_goes_on_from_where_it_stopped(tmp_path):
    run, _ = a_run(tmp_path)
    run.seconds = 1000.0
    run.save()
    again, _ = a_run(tmp_path)
    assert again.resume() and 1000 <= again.elapsed() < 1060


@pytest.mark.parametrize(
    "other",
    [{"step": "x"}, {"step": None}, {"seconds": None}, {"rows": None}, {"rows": 3}, {"rows": [1]}, {"settings": [1]}],
    ids=str,
)
def test_a_state_with_contents_of_a_wrong_type_is_refused_in_a_sentence(tmp_path, other):
    run, _ = a_run(tmp_path)
    run.save()
    saved = torch.load(run.state, weights_only=True)
    torch.save(saved | {"run": json.dumps(json.loads(saved["run"]) | other)}, run.state)
    with pytest.raises(ValueError, match="state.pt is damaged, or not the state of a training run"):
        run.resume()


@pytest.mark.parametrize("part", ["net", "optimizer"])
@pytest.mark.parametrize("state", [None, 3, [1], {}, {"state": 3, "param_groups": [{"params": [0, 1]}]}], ids=str)
def test_parts_of_a_wrong_type_are_refused_in_a_sentence(tmp_path, part, state):
    run, _ = a_run(tmp_path)
    run.save()
    saved = torch.load(run.state, weights_only=True)
    torch.save(saved | {"parts": saved["parts"] | {part: state}}, run.state)
    with pytest.raises(ValueError, match="state.pt is of a run that trained another model"):
        run.resume()


def test_words_and_tensors_have_a_digest_of_their_own():
    parts = [
        "a",
        torch.ones(2),
        torch.ones(2, dtype=torch.bfloat16),
        torch.tensor(1.0),
        torch.arange(6).reshape(2, 3).T,
    ]
    assert len({digest([part]) for part in parts}) == len(parts) and digest(parts) == digest(iter(parts))
    assert digest([torch.arange(8)[::2]]) == digest([torch.tensor([0, 2, 4, 6])])


def test_a_lock_makes_its_folder_and_is_taken_off(tmp_path):
    for _ in range(2):
        with locked(tmp_path / "a" / "b"):
            assert (tmp_path / "a" / "b").is_dir()


def test_a_run_without_files_keeps_nothing(tmp_path):
    run = Run(None, None, FIELDS, {}, {})
    run.save()
    assert not run.resume()


STOPS = [(os, "fsync"), (os, "replace"), (torch, "save"), (csv, "writer")]


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("module", "name"), STOPS, ids=[name for _, name in STOPS])
def test_stopped_anywhere_in_a_save_it_goes_on_with_the_same_numbers(tmp_path, monkeypatch, module, name, late):
    """Each operation of a save dies once, at its first call and at its second, before or after it is done."""
    whole, _ = a_run(tmp_path / "whole")
    train(whole, 4)
    operation, calls = getattr(module, name), []

    def dies(*args, **options):
        calls.append(1)
        if len(calls) in (3, 8) and not late:
            raise KeyboardInterrupt
        done = operation(*args, **options)
        if len(calls) in (3, 8) and late:
            raise KeyboardInterrupt
        return done

    deaths = 0
    with monkeypatch.context() as patch:
        patch.setattr(module, name, dies)
        while True:
            run, _ = a_run(tmp_path / "cut")
            run.resume()
            try:
                train(run, 4)
            except KeyboardInterrupt:
                deaths += 1
                lines = run.log.read_text().splitlines() if run.log.exists() else [""]
                done = read_state(run.state)["step"] if run.state.exists() else 0
                assert done <= len(lines) - 1 and all(len(line.split(",")) == 3 for line in lines if line)
                assert not list(run.state.parent.glob(".*"))
            else:
                break
    assert deaths >= 1 and outcome(run) == outcome(whole)


def test_a_file_that_is_half_written_is_never_the_runs_own(tmp_path, monkeypatch):
    def dies(what, path):
        Path(path).write_bytes(b"half a file")
        raise KeyboardInterrupt

    run, _ = a_run(tmp_path)
    train(run, 2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", dies)
        train(run, 3)
    again, _ = a_run(tmp_path)
    assert again.resume() and again.step == 2


def test_a_run_with_other_settings_is_refused_and_they_are_named(tmp_path):
    run, _ = a_run(tmp_path, old=1)
    run.save()
    again, net = a_run(tmp_path, lr=0.2, targets=["a", "b"], new=2)
    with pytest.raises(ValueError, match=r"state.pt .*other settings \(lr 0.1 there, 0.2 now, old 1 there, None now, "):
        again.resume()
    assert a_run(tmp_path, old=1)[0].resume()


def test_another_model_is_refused_in_a_sentence(tmp_path):
    a_run(tmp_path)[0].save()
    with pytest.raises(ValueError, match="state.pt is of a run that trained another model"):
        a_run(tmp_path, width=4)[0].resume()


DAMAGES = {
    "empty": lambda data: b"",
    "cut short": lambda data: data[:-200],
    "half": lambda data: data[: len(data) // 2],
    "words": lambda data: b"hello",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_state_is_refused_in_a_sentence(tmp_path, damage):
    run, _ = a_run(tmp_path)
    run.save()
    run.state.write_bytes(damage(run.state.read_bytes()))
    with pytest.raises(ValueError, match=r"state.pt is damaged, or not the state of a training run") as caught:
        run.resume()
    assert "weights_only" not in str(caught.value) and caught.value.__suppress_context__


class Dangerous:
    def __reduce__(self):
        return os.mkdir, ("opened",)


def test_another_programs_file_is_refused_in_a_sentence_and_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, net = a_run(tmp_path)
    for write in (
        lambda: torch.save(net.state_dict(), run.state),
        lambda: torch.save([1, 2], run.state),
        lambda: torch.save({"run": "{}", "parts": {}}, run.state),
        lambda: torch.save({"run": Dangerous(), "parts": {}}, run.state),
        lambda: save_file(net.state_dict(), run.state),
    ):
        write()
        with pytest.raises(ValueError, match="state.pt is damaged, or not the state of a training run"):
            run.resume()
    assert not (tmp_path / "opened").exists()

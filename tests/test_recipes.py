"""`make tiny` works from nothing, with a small budget; a run that is cut off ends in the same weights."""

import csv
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from minqwen.pipeline import QwenImagePipeline

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "data" / "recipes"))

import make_tiny  # noqa: E402
import make_tokenizer  # noqa: E402
import train_edit_plus  # noqa: E402
import train_transformer  # noqa: E402
import train_vae  # noqa: E402


def make(runs: Path, out: Path) -> None:
    """A checkpoint from nothing, with four thousandths of the steps."""
    words = ["--share", "0.004", "--runs", str(runs), "--out", str(out), "--device", "cpu", "--no-estimate"]
    make_tiny.make(make_tiny.parser().parse_args(words))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    make(folder, folder / "tiny")
    return folder


def test_make_tiny_writes_a_checkpoint_that_opens(made):
    theirs, ours = (
        {str(path.relative_to(folder)) for path in folder.rglob("*.*") if path.suffix not in (".csv", ".md", ".png")}
        for folder in (ROOT / "data" / "tiny", made / "tiny")
    )
    assert ours == theirs  # the shipped folder also holds a card, logs and curves

    def shapes(file) -> dict[str, list[int]]:
        """Without the number of tokens: the shipped tokenizer has some more."""
        found = {name: file.get_slice(name).get_shape() for name in file.keys()}
        by_token = ("embed_tokens.weight", "lm_head.weight")
        return {name: shape[1:] if name.endswith(by_token) else shape for name, shape in found.items()}

    for path in (made / "tiny").rglob("*.safetensors"):
        with safe_open(path, "pt") as new, safe_open(ROOT / "data/tiny" / path.relative_to(made / "tiny"), "pt") as old:
            assert shapes(new) == shapes(old)
            assert all(new.get_tensor(name).isfinite().all() for name in new.keys())
    pipe = QwenImagePipeline.from_pretrained(made / "tiny", device="cpu")
    assert pipe.generate("a red star", num_inference_steps=2, progress=False).size == (64, 64)


@pytest.mark.parametrize(
    ("log", "column", "untrained"),
    [("vae_joint", "loss", 1.1), ("transformer_full", "loss_edit", 2.0)],  # the full world goes on from the small one
)
def test_the_loss_falls(made, log, column, untrained):
    with (made / f"log_{log}.csv").open() as file:
        losses = [float(row[column]) for row in csv.DictReader(file) if row[column]]
    assert losses[-1] < 0.9 * untrained


def test_make_tiny_goes_on_where_it_was_cut_off(made, capsys):
    make(made, made / "again")
    assert capsys.readouterr().out.count("done before") == 4
    for name in ("transformer/diffusion_pytorch_model.safetensors", train_edit_plus.FILE):
        again, first = (load_file(made / folder / name) for folder in ("again", "tiny"))
        assert again.keys() == first.keys() and all(torch.equal(again[key], first[key]) for key in first)


LOGS = {
    train_vae: "data/recipes/log_vae_{}.csv",
    train_transformer: "data/recipes/log_transformer_{}.csv",
    train_edit_plus: "data/tiny/log_{}.csv",  # trained on the shipped weights
}


@pytest.mark.parametrize("module", LOGS)
def test_the_stored_logs_are_of_runs_as_long_as_the_recipe_says(module):
    for phase, steps in module.STEPS.items():
        with (ROOT / LOGS[module].format(phase)).open() as file:
            last = list(csv.DictReader(file))[-1]
        batch = module.parser().parse_args([phase]).batch
        assert int(last.get("step") or int(last["samples"]) / batch) == steps


def test_each_cycle_of_the_learning_rate_rises_and_falls_alike():
    shares = [train_transformer.rate_share(step, 2000, 2, 0.5) for step in range(2010)]
    assert shares[:1000] == shares[1000:2000]
    assert (shares[0], shares[99], shares[500], shares[750], shares[999]) == (0.01, 1, 1, 0.5, 0.01)
    assert max(shares[2000:]) == 0.01  # a run ends with a whole pool, so it may go a little beyond its steps


CASES = {
    "autoencoder": (train_vae, "joint", ["--steps", "5", "--batch", "4", "--save-every", "2"], "vae_joint.pt", "vae"),
    "transformer": (
        train_transformer,
        "small",
        ["--steps", "12", "--batch", "4", "--pool", "2", "--reuse", "2", "--check-every", "0"],
        "transformer_small.pt",
        "average",
    ),
    "adapter": (
        train_edit_plus,
        str(ROOT / "data" / "tiny"),
        ["--steps", "12", "--batch", "4", "--pool", "2", "--reuse", "2", "--check-every", "0"],
        "edit_plus.pt",
        "average",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_is_killed_anywhere_ends_in_the_same_weights(made, tmp_path, monkeypatch, case):
    module, phase, options, file, key = CASES[case]

    def train(folder: Path) -> dict[str, torch.Tensor]:
        if not folder.exists():
            make_tokenizer.save(make_tokenizer.build(), folder / "tokenizer")
            for name in ("vae_joint.pt", "vae_config.json") if module is train_transformer else ():
                (folder / name).write_bytes((made / name).read_bytes())
        module.train(module.parser().parse_args([phase, *options, "--runs", str(folder), "--device", "cpu"]))
        return torch.load(folder / file, weights_only=True)[key]

    whole, clip, calls = train(tmp_path / "whole"), torch.nn.utils.clip_grad_norm_, []

    def dies_now_and_then(*args):
        calls.append(1)
        if len(calls) in (3, 9):
            raise KeyboardInterrupt
        return clip(*args)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", dies_now_and_then)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut")
    if case != "autoencoder":  # a second time
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "cut")
    cut = train(tmp_path / "cut")
    assert all(torch.equal(cut[name], whole[name]) for name in whole)

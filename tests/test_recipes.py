"""`make tiny` works from nothing, with a small budget; a run that is cut off ends in the same weights."""

import csv
import json
from pathlib import Path

import common
import make_tiny
import make_tokenizer
import numpy as np
import pytest
import tiny_models
import torch
import train_edit_plus
import train_transformer
import train_vae
from safetensors import safe_open
from safetensors.torch import load_file

from minqwen.pipeline import QwenImagePipeline
from minqwen.run import Run, read_state
from minqwen.world import Scene, sample_scene

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "data" / "tiny"


def few_scenes(rng: np.random.Generator, count: int) -> list[Scene]:
    """In place of what the autoencoder is trained on and measured with."""
    return [sample_scene(rng) for _ in range(min(count, 2))]


@pytest.fixture
def small(monkeypatch):
    """A transformer of one block, an autoencoder that sees few pictures."""
    monkeypatch.setitem(tiny_models.TRANSFORMER, "num_layers", 1)
    monkeypatch.setattr(train_vae, "scenes", few_scenes)
    monkeypatch.setattr(train_vae, "unseen", dict)


def make(runs: Path, out: Path) -> None:
    """A checkpoint from nothing, with next to none of the steps, of small batches."""
    words = ["--share", "0.0001", "--runs", str(runs), "--out", str(out), "--device", "cpu", "--no-estimate"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_transformer, "BATCH", 2)
        patch.setattr(train_vae, "scenes", few_scenes)
        patch.setattr(train_vae, "unseen", dict)
        make_tiny.make(make_tiny.parser().parse_args(words))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    make(folder, folder / "tiny")
    return folder


@pytest.mark.slow
def test_make_tiny_writes_a_checkpoint_that_opens(made):
    theirs, ours = (
        {str(path.relative_to(folder)) for path in folder.rglob("*.*") if path.suffix not in (".csv", ".md", ".png")}
        for folder in (TINY, made / "tiny")
    )
    assert ours == theirs  # the shipped folder also holds a card, logs and curves

    def shapes(file) -> dict[str, list[int]]:
        """Without the number of tokens: the shipped tokenizer has some more."""
        found = {name: file.get_slice(name).get_shape() for name in file.keys()}
        by_token = ("embed_tokens.weight", "lm_head.weight")
        return {name: shape[1:] if name.endswith(by_token) else shape for name, shape in found.items()}

    for path in (made / "tiny").rglob("*.safetensors"):
        with safe_open(path, "pt") as new, safe_open(TINY / path.relative_to(made / "tiny"), "pt") as old:
            assert shapes(new) == shapes(old)
            assert all(new.get_tensor(name).isfinite().all() for name in new.keys())
    pipe = QwenImagePipeline.from_pretrained(made / "tiny", device="cpu")
    assert pipe.generate("a cat", num_inference_steps=1, progress=False).size == (96, 96)


@pytest.mark.slow
def test_make_tiny_goes_on_where_it_was_cut_off(made, capsys):
    make(made, made / "again")
    assert capsys.readouterr().out.count("done before") == 2
    for name in ("transformer/diffusion_pytorch_model.safetensors", train_edit_plus.FILE):
        again, first = (load_file(made / folder / name) for folder in ("again", "tiny"))
        assert again.keys() == first.keys() and all(torch.equal(again[key], first[key]) for key in first)


def loss_on(net, tasks) -> torch.Tensor:
    """The training loss at the noise of one seed."""
    torch.manual_seed(1)
    batch = train_transformer.with_words(net["text_encoder"], tasks)
    return train_transformer.weighted_loss(net["transformer"], batch, tasks.changed, 3.0, 3.0)


@pytest.mark.slow
def test_training_lowers_the_loss_and_the_average_follows(small):
    torch.manual_seed(0)
    rng, pipe = np.random.default_rng(0), QwenImagePipeline.from_pretrained(TINY, device="cpu")
    encode = train_transformer.encoder(pipe.vae, train_transformer.parser().parse_args([]))
    net, average = tiny_models.build(pipe.tokenizer), tiny_models.build(pipe.tokenizer)
    average.load_state_dict(net.state_dict())
    average.requires_grad_(False)
    opts = train_transformer.optimizers(net, 1e-3)
    run = Run(None, None, (), {}, {})
    pool = [train_transformer.sample_tasks(rng, 2, draw, pipe.tokenizer, encode) for draw in (False, True)]
    before = [loss_on(net, tasks).item() for tasks in pool]
    weights = list(net.parameters()), list(average.parameters())
    for tasks in 4 * pool:
        train_transformer.step(run, loss_on(net, tasks), 1e-3, *weights, opts, 0.999)
    assert all(loss_on(net, tasks).item() < 0.9 * loss for tasks, loss in zip(pool, before, strict=True))
    assert all(loss_on(average, tasks).item() < loss for tasks, loss in zip(pool, before, strict=True))


@pytest.mark.slow
def test_training_the_autoencoder_lowers_its_loss():
    torch.manual_seed(0)
    vae = tiny_models.build_vae()
    x = common.pictures(train_vae.scenes(np.random.default_rng(0), 1))
    optimizer = torch.optim.AdamW(vae.parameters(), 2e-4)
    losses = []
    for _ in range(4):
        losses.append(train_vae.reconstruction_loss(vae, x))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


# ------------------------------------------------------------------------------------ the optimiser


@pytest.mark.parametrize("shape", [(5, 5), (6, 3), (3, 6)])
def test_orthogonal_keeps_directions_and_makes_them_equally_long(shape):
    rank = min(shape)
    u, v = (torch.linalg.qr(torch.randn(side, rank)).Q for side in shape)
    turned = common.orthogonal(u @ torch.diag(torch.linspace(1, 10, rank)) @ v.T)
    lengths = u.T @ turned @ v
    assert turned.shape == shape and lengths.diag().min() > 0.6 and lengths.diag().max() < 1.3
    assert (lengths - lengths.diag().diag()).abs().max() < 1e-4


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no Muon")
def test_a_step_is_that_of_torchs_muon_up_to_its_bfloat16():
    torch.manual_seed(0)
    shapes, moved = [(12, 12), (24, 8), (8, 24)], []
    start, gradients = [torch.randn(s) for s in shapes], [[torch.randn(s) for s in shapes] for _ in range(3)]
    options = {"weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}
    for kind, more in ((common.Muon, {}), (torch.optim.Muon, options)):
        weights = [torch.nn.Parameter(s.clone()) for s in start]
        unused = torch.nn.Parameter(torch.ones(3, 3))  # has no gradient, and stays
        optimizer = kind([*weights, unused], lr=0.01, **more)
        for each in gradients:
            for weight, gradient in zip(weights, each, strict=True):
                weight.grad = gradient
            optimizer.step()
        assert (unused == 1).all()
        moved.append(torch.cat([(w - s).detach().flatten() for w, s in zip(weights, start, strict=True)]))
    assert (moved[0] - moved[1]).norm() < 0.03 * moved[1].norm()


# ------------------------------------------------------------------------------------ the stored logs


FIRST = {  # what each must be told
    train_vae: (),
    train_transformer: (),
    train_edit_plus: (str(TINY),),
}


@pytest.mark.parametrize("module", FIRST)
def test_the_stored_logs_are_of_runs_as_long_as_the_recipe_says(module):
    for phase, steps in module.STEPS.items():
        with (TINY / f"log_{phase}.csv").open(encoding="utf-8") as file:
            last = list(csv.DictReader(file))[-1]
        batch = module.parser().parse_args(FIRST[module]).batch
        assert int(last.get("step") or int(last["samples"]) / batch) == steps


def test_the_learning_rate_rises_and_falls():
    shares = [train_transformer.rate_share(step, 1000) for step in range(1010)]
    assert (shares[0], shares[99], shares[500], shares[850], shares[999]) == pytest.approx((0.01, 1, 1, 0.5, 0.01))
    assert max(shares[1000:]) == 0.01  # a run ends with a whole pool, so it may go a little beyond its steps


# ------------------------------------------------------------------------------------ runs that are cut off


SMALL = ["--steps", "4", "--batch", "2", "--pool", "1", "--reuse", "2", "--check-every", "0"]
CASES = {
    "autoencoder": (train_vae, [], ["--steps", "4", "--save-every", "2"], "vae.pt", "vae"),
    "transformer": (train_transformer, [], SMALL, "transformer.pt", "average"),
    "adapter": (train_edit_plus, [str(TINY)], [*SMALL, "--rank", "2"], "edit_plus.pt", "average"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_run_that_is_killed_anywhere_ends_in_the_same_weights_and_log(small, tmp_path, monkeypatch, case):
    module, first, options, file, part = CASES[case]
    vae = tiny_models.build_vae()

    def train(folder: Path) -> dict:
        if module is train_transformer and not folder.exists():
            make_tokenizer.save(make_tokenizer.build(), folder / "tokenizer")
            (folder / "vae_config.json").write_text(json.dumps(tiny_models.VAE), encoding="utf-8")
            Run(folder / "vae.pt", None, (), {"vae": vae}, {}).save()
        module.train(module.parser().parse_args([*first, *options, "--runs", str(folder), "--device", "cpu"]))
        return read_state(folder / file)

    whole, clip, calls = train(tmp_path / "whole"), torch.nn.utils.clip_grad_norm_, []

    def dies_once(*args):
        calls.append(1)
        if len(calls) == 4:  # in the middle of the second pool
            raise KeyboardInterrupt
        return clip(*args)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", dies_once)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut")
    cut = train(tmp_path / "cut")
    assert len(calls) == 6  # the second pool's two steps once more
    weights, before = cut["parts"][part], whole["parts"][part]
    assert all(torch.equal(weights[name], before[name]) for name in before)
    assert [row[1:] for row in cut["rows"]] == [row[1:] for row in whole["rows"]]  # the first column is time


@pytest.mark.slow
def test_a_run_goes_on_with_its_own_settings_only(small, tmp_path):
    words = ["--steps", "1", "--runs", str(tmp_path), "--device", "cpu"]
    train_vae.train(train_vae.parser().parse_args(words))
    with pytest.raises(ValueError, match="seed 0 there, 1 now"):
        train_vae.train(train_vae.parser().parse_args([*words, "--seed", "1"]))

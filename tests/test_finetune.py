"""finetune.py: the loss and its gradient, batches, chance, runs that are killed and go on to the same bits."""

import csv
import errno
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import fields
from functools import partial
from pathlib import Path
from threading import Thread

import pytest
import torch
from PIL import Image
from reference import randomise_
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minqwen import finetune as library
from minqwen.checkpoint import Checkpoint
from minqwen.files import write_json
from minqwen.finetune import (
    LOG,
    LORA,
    STATE,
    Row,
    Settings,
    accumulate_gradients,
    finetune,
    main,
    picture_preview,
    step_order,
    steps_from,
    training,
)
from minqwen.flow import flow_error, flow_loss, make_batch, sample_sigmas
from minqwen.images import pack_latents
from minqwen.lora import adapters, add_lora, load_lora, lora_state
from minqwen.memory import Shell
from minqwen.pipeline import QwenImagePipeline
from minqwen.plans import hold
from minqwen.precompute import INDEX, Precomputed, Sample, _write_sample, precompute
from minqwen.quantize import quantize_blocks
from minqwen.run import locked, look_at, model_of, read_state
from minqwen.sampling import time_shift
from minqwen.transformer import QwenImageTransformer2DModel
from minqwen.world import sample_edit

ROOT = Path(__file__).resolve().parents[1]
TINY, SET = ROOT / "data" / "tiny", ROOT / "data" / "finetune"
SMALL = {"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 24,
         "axes_dims_rope": (4, 6, 6)}  # fmt: skip
QUICK = {"lr": 1e-2, "rank": 2, "batch_size": 2, "progress": False}


def small_pipe(seed: int = 0, dtype=torch.float32) -> QwenImagePipeline:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = randomise_(QwenImageTransformer2DModel(**SMALL)).to(dtype)
    return QwenImagePipeline(model, None, None, None)


def small_set(count: int = 6, seed: int = 0, size=(4, 6), controls=((4, 4),), dtype=torch.float32) -> list[Sample]:
    """Samples of random numbers, with control pictures of these sizes; prompts have 3 to 6 tokens."""
    g = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        latents, *held = (torch.randn(1, 16, 1, *s, generator=g).to(dtype) for s in (size, *controls))
        embeds, empty = (torch.randn(1, n, 24, generator=g).to(dtype) for n in (3 + i % 4, 2))
        made.append(Sample(f"s{i}", latents, tuple(held), embeds, empty))
    return made


def on_disk(folder: Path, samples: list[Sample], first: int = 0) -> Precomputed:
    """A cache that holds these samples, under the keys first, first + 1, ..."""
    folder.mkdir(exist_ok=True)
    files = [folder / f"{first + i:040}.safetensors" for i in range(len(samples))]
    for file, sample in zip(files, samples, strict=True):
        _write_sample(file, sample, {})
    write_json(folder / INDEX, {"samples": [(s.name, file.name) for s, file in zip(samples, files, strict=True)]})
    return Precomputed.open(folder)


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --------------------------------------------------------------------------------- a table for the modulation layers


def write_transformer(folder: Path, bits: int | None, **config) -> None:
    """A small random transformer as a checkpoint of one part."""
    torch.manual_seed(0)
    model = randomise_(QwenImageTransformer2DModel(**SMALL | config))
    if bits:
        quantize_blocks(model, bits)
    (folder / "transformer").mkdir()
    (folder / "transformer/config.json").write_text(json.dumps(model.config), encoding="utf-8")
    save_file(model.state_dict(), folder / "transformer/model.safetensors")


def pipe_of(folder: Path, way: str) -> QwenImagePipeline:
    pipe = QwenImagePipeline(None, None, None, None)
    shell = Shell(Checkpoint(folder), QwenImageTransformer2DModel, "transformer", "cpu", torch.float32)
    hold(pipe, {"transformer": shell}, 64 * 64, way)
    return pipe


@pytest.mark.parametrize("zero_cond_t", [False, True])
@pytest.mark.parametrize("bits", [None, 4])
def test_a_table_of_levels_trains_as_the_layers_do(tmp_path, monkeypatch, zero_cond_t, bits):
    """The same adapters where the layers see the same levels; and those layers are never there."""
    write_transformer(tmp_path, bits, zero_cond_t=zero_cond_t)
    options = QUICK | {"steps": 3, "batch_size": 3, "rank": 4}
    by_table = pipe_of(tmp_path, "turns")
    log = finetune(by_table, small_set(), levels=8, **options)
    assert len({row.sigma for row in log}) > 2 and all(row.sigma * 8 == round(row.sigma * 8) > 0 for row in log)
    assert all(block.img_mod[1].weight.is_meta for block in by_table.transformer.transformer_blocks)
    plain = pipe_of(tmp_path, "resident")

    def rounded(*given):
        return (sample_sigmas(*given) * 8).round().clamp(min=1) / 8

    monkeypatch.setattr(library, "sample_sigmas", rounded)
    want = finetune(plain, small_set(), **options)
    ours, theirs = lora_state(by_table.transformer), lora_state(plain.transformer)
    assert max((ours[name] - theirs[name]).abs().max() for name in theirs) <= 1e-5
    assert [row.loss for row in log] == pytest.approx([row.loss for row in want], rel=1e-5)


@pytest.mark.parametrize(
    ("way", "options", "said"),
    [
        ("turns", {}, 'memory="turns" and levels=1000'),
        ("stream", {"levels": 8}, 'open the pipeline with memory="resident" and levels=0'),
        ("resident", {"levels": 8}, 'memory="turns" and levels=1000'),
        ("turns", {"levels": 8, "rank": 0}, "to train adapters"),
        ("turns", {"levels": -1}, "levels: expected a whole number from 0"),
        ("turns", {"levels": 8, "targets": ("img_mod.1",)}, "train them with levels=0"),
    ],
)
def test_a_table_that_cannot_be_is_refused(tmp_path, way, options, said):
    write_transformer(tmp_path, None)
    with pytest.raises(ValueError, match=said):
        finetune(pipe_of(tmp_path, way), small_set(), **QUICK | options)


# ---------------------------------------------------------------------------------------------- loss and batches


@pytest.mark.parametrize("controls", [(), ((4, 4),), ((4, 4), (2, 6))], ids=["draw", "one picture", "two pictures"])
def test_the_loss_is_that_of_each_sample_alone(controls):
    """In a batch of unequal prompts each sample has the loss that it has by itself, worked out the long way."""
    pipe, samples = small_pipe(), small_set(5, controls=controls)
    sigma, noise = torch.rand(5), torch.randn(5, 6, 64)
    batch = make_batch(samples)
    errors = flow_error(pipe.transformer, batch, sigma, noise)
    together = flow_loss(pipe.transformer, batch, sigma, noise)
    for i, s in enumerate(samples):
        x0, *held = map(pack_latents, (s.latents, *s.control))
        noisy = (1 - sigma[i]) * x0 + sigma[i] * noise[i]
        shapes = [[(1, h // 2, w // 2) for h, w in ((4, 6), *controls)]]
        v = pipe.transformer(torch.cat([noisy, *held], 1), s.embeds, None, sigma[i : i + 1], shapes)[:, :6]
        error = (v - (noise[i] - x0)).square()
        torch.testing.assert_close(errors[i : i + 1], error, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together[i], error.mean(), rtol=1e-5, atol=1e-6)


def test_a_dropped_caption_becomes_the_samples_own_empty_prompt():
    samples = small_set(3)
    batch = make_batch(samples, [False, True, False])
    assert torch.equal(batch.embeds[1, :2], samples[1].empty[0]) and batch.mask[1].tolist() == [1, 1, 0, 0, 0]
    assert torch.equal(batch.embeds[2], samples[2].embeds[0]) and not batch.embeds[1, 2:].any()
    assert make_batch(samples[:1]).mask is None


def test_control_pictures_lie_one_behind_the_other():
    drawing, two = make_batch(small_set(2, controls=())), make_batch(small_set(2, controls=((4, 4), (2, 6))))
    assert drawing.control.shape == (2, 0, 64) and drawing.shapes == [(1, 2, 3)]
    assert two.control.shape == (2, 4 + 3, 64) and two.shapes == [(1, 2, 3), (1, 2, 2), (1, 1, 3)]


def test_samples_of_one_shape_share_a_batch_and_of_files_the_headers_tell_it(tmp_path, monkeypatch):
    samples = small_set(3) + small_set(2, controls=()) + small_set(1, size=(4, 4)) + small_set(1, controls=((4, 6),))
    assert look_at(samples, SMALL)[0] == [[0, 1, 2], [3, 4], [5], [6]]
    kept = on_disk(tmp_path, samples)
    monkeypatch.setattr(Precomputed, "__getitem__", None)
    assert look_at(kept, SMALL)[0] == [[0, 1, 2], [3, 4], [5], [6]]
    log = finetune(small_pipe(), samples, steps=5, **QUICK)
    assert len(log) == len(samples), "an epoch of mixed samples"


def test_noise_levels_fall_as_they_should():
    draw = lambda how, shift=1.0: sample_sigmas(40_000, how, shift, torch.Generator().manual_seed(1))  # noqa: E731
    uniform, normal, shifted = draw("uniform"), draw("logit-normal"), draw("shifted", 3.0)
    for sigma in (uniform, normal, shifted):
        assert sigma.min() >= 0 and sigma.max() <= 1
    assert abs(uniform.mean() - 0.5) < 0.01 and abs((uniform < 0.1).float().mean() - 0.1) < 0.01
    assert abs(normal.median() - 0.5) < 0.01 and abs((normal < 0.1).float().mean() - 0.014) < 0.004
    assert torch.equal(shifted, time_shift(uniform, 3.0)) and abs(shifted.median() - 0.75) < 0.01
    with pytest.raises(ValueError, match="timestep_sampling 'cosine': expected one of shifted, uniform, logit-normal"):
        sample_sigmas(1, "cosine")


def test_an_epoch_takes_every_sample_once_in_steps_of_one_shape():
    groups = [[0, 2, 4, 6, 8], [1, 3, 5]]
    epochs = [step_order(groups, 2, 7, epoch) for epoch in range(4)]
    for steps in epochs:
        assert sorted(sum(steps, [])) == [0, 1, 2, 3, 4, 5, 6, 8] and len(steps) == 5
        assert all(len({i % 2 for i in step}) == 1 and len(step) <= 2 for step in steps)
    assert epochs[0] != epochs[1] and epochs[0] == step_order(groups, 2, 7, 0) != step_order(groups, 2, 8, 0)


def test_an_order_is_drawn_once_an_epoch_and_may_be_joined_at_any_step(monkeypatch):
    groups, drawn = [[0, 2, 4, 6, 8], [1, 3, 5]], []
    whole = [step for epoch in range(3) for step in step_order(groups, 2, 7, epoch)]
    monkeypatch.setattr(library, "step_order", lambda *a: drawn.append(a[-1]) or step_order(*a))
    for first in (0, 4, 5, 12):
        steps = steps_from(first, groups, 2, 7)
        assert [next(steps) for _ in whole[first:]] == whole[first:]
    assert drawn == [0, 1, 2, 0, 1, 2, 1, 2, 2]


# ---------------------------------------------------------------------------------------------- gradients


def gradients(pipe, samples, batch_size) -> list[torch.Tensor]:
    pipe.transformer.zero_grad()
    accumulate_gradients(pipe, samples, Settings(batch_size=batch_size, caption_dropout=0.5), 3)
    return [p.grad.clone() for p in pipe.transformer.parameters() if p.requires_grad]


def adapted_pipe() -> QwenImagePipeline:
    pipe = small_pipe()
    for p in add_lora(pipe.transformer, 2, generator=torch.Generator().manual_seed(0)):
        torch.nn.init.normal_(p, std=0.1)
    return pipe


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_accumulated_gradients_are_those_of_the_larger_batch(batch_size):
    """Uneven cuts too: 5 samples as 1+1+1+1+1, 2+2+1 or 4+1."""
    pipe, samples = adapted_pipe(), small_set(5)
    whole, parts = gradients(pipe, samples, 5), gradients(pipe, samples, batch_size)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_checkpointing_changes_no_gradient_and_leaves_no_trace():
    samples, found, calls = small_set(3), [], []
    for checkpointing in (False, True):
        pipe = small_pipe()
        with training(pipe.transformer, Settings(rank=2, checkpointing=checkpointing)) as parameters:
            for p in parameters:
                torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(0))
            pipe.transformer.transformer_blocks[0].attn.register_forward_hook(lambda *_: calls.append(1))
            found.append(gradients(pipe, samples, 3))
    assert len(calls) == 1 + 2, "a block that is checkpointed is computed twice"
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not any("forward" in vars(m) for m in pipe.transformer.modules())
    assert not any(p.requires_grad for p in pipe.transformer.parameters())


def test_only_adapters_move_and_the_base_may_be_bfloat16():
    pipe = small_pipe(dtype=torch.bfloat16)
    before = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    finetune(pipe, small_set(dtype=torch.bfloat16), steps=3, **QUICK)
    after = pipe.transformer.state_dict()
    assert all(torch.equal(after[k], v) and after[k].dtype == torch.bfloat16 for k, v in before.items())
    assert all(layer.lora_B.weight.any() for layer in adapters(pipe.transformer).values())
    assert {v.dtype for v in lora_state(pipe.transformer).values()} == {torch.float32}


@pytest.mark.slow
def test_it_learns():
    """One sample, over and over: the loss falls by a third at least."""
    options = {"steps": 30, "lr": 4e-2, "rank": 0, "batch_size": 8, "caption_dropout": 0.0, "progress": False}
    losses = [row.loss for row in finetune(small_pipe(), small_set(1) * 8, **options)]
    first, last = sum(losses[:40]), sum(losses[-40:])
    assert last < 0.67 * first, (first, last)


@pytest.mark.slow
def test_full_finetuning_moves_all_weights_in_float32_and_is_saved_as_released(tmp_path):
    pipe = QwenImagePipeline.from_pretrained(TINY, "cpu", torch.bfloat16, without=("text_encoder", "vae"))
    before = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    g, shapes = torch.Generator().manual_seed(0), ((1, 16, 1, 8, 8), (1, 5, 128), (1, 2, 128))
    latents, embeds, empty = (torch.randn(*shape, generator=g).bfloat16() for shape in shapes)
    during = []
    options = {"steps": 2, "rank": None, "lr": 1e-2, "progress": False, "preview": lambda _: during.append(pipe.dtype)}
    finetune(pipe, [Sample("a", latents, (latents,), embeds, empty)], tmp_path, **options)
    assert during == [torch.float32] * 2 and pipe.dtype == torch.bfloat16
    folder = tmp_path / "transformer"
    saved, trained = load_file(folder / "diffusion_pytorch_model.safetensors"), pipe.transformer.state_dict()
    assert equal(saved, trained) and {v.dtype for v in saved.values()} == {torch.bfloat16}
    unmoved = sum(torch.equal(saved[k], before[k]) for k in before)
    assert unmoved < len(before) / 4  # text layers of the last block reach nothing
    written, released = (json.loads((f / "config.json").read_text()) for f in (folder, TINY / "transformer"))
    assert {k: v for k, v in released.items() if k != "_diffusers_version"}.items() <= written.items()
    assert QwenImageTransformer2DModel(**written).config == QwenImageTransformer2DModel(**released).config
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_full_finetuning_that_breaks_off_gives_the_weights_back_as_they_were_stored():
    pipe, (bad,) = small_pipe(dtype=torch.bfloat16), small_set(1, dtype=torch.bfloat16)
    with pytest.raises(FloatingPointError):
        finetune(pipe, [bad._replace(latents=bad.latents * math.nan)], steps=1, rank=0, progress=False)
    assert pipe.dtype == torch.bfloat16 and not any(p.requires_grad for p in pipe.transformer.parameters())


# ---------------------------------------------------------------------------------------------- runs


def test_the_log_has_a_row_for_every_sample(tmp_path):
    log = finetune(small_pipe(), small_set(5), tmp_path, steps=7, **QUICK)
    assert len(log) == 5 + 5 + 2 and [r.step for r in log] == sorted(r.step for r in log) and log[-1].step == 6
    assert all(0 <= r.sigma <= 1 and math.isfinite(r.loss) for r in log)
    assert len({r.sigma for r in log}) == len(log), "each sample of each step has a noise level of its own"
    with open(tmp_path / LOG) as file:
        rows = [Row(int(step), float(sigma), float(loss)) for step, sigma, loss in list(csv.reader(file))[1:]]
    assert rows == log
    assert sorted(p.name for p in tmp_path.glob("[!.]*")) == sorted([STATE, LOG, LORA])


def test_a_seed_gives_the_same_run_whatever_else_draws_numbers():
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(states))
        pipe = small_pipe()
        finetune(pipe, small_set(), steps=3, seed=seed, **QUICK)
        states.append(lora_state(pipe.transformer))
    assert equal(states[0], states[1]) and not equal(states[0], states[2])


@pytest.mark.slow
@pytest.mark.parametrize("rank", [2, 0])
def test_a_run_that_stops_goes_on_to_the_same_bits(tmp_path, rank):
    options = QUICK | {"rank": rank, "steps": 9, "save_every": 2}

    def run(folder, stop_at=None):
        pipe, seen = small_pipe(), []

        def preview(step):
            seen.append(step)
            if step == stop_at:
                raise KeyboardInterrupt

        try:
            log = finetune(pipe, small_set(5), folder, preview=preview, **options)
        except KeyboardInterrupt:
            return None, seen
        return (pipe.transformer.state_dict(), log), seen

    (whole, log), seen = run(tmp_path / "a")
    assert seen == [0, 2, 4, 6, 8, 9]
    assert run(tmp_path / "b", 4)[1] == [0, 2, 4] and run(tmp_path / "b", 8)[1] == [6, 8]
    (again, other), seen = run(tmp_path / "b")
    assert seen == [9] and log == other and equal(whole, again)
    (finished, other), seen = run(tmp_path / "b")  # nothing is left to do
    assert seen == [] and log == other and equal(whole, finished)


def outcome(folder: Path) -> tuple:
    """What a run leaves, all that is to be the same; safetensors writes metadata in any order."""
    weights = read_state(folder / STATE)["parts"]["weights"]
    with safe_open(folder / LORA, "pt") as file:
        lora, words = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    tensors = {name: tensor.tolist() for name, tensor in (weights | lora).items()}
    return (folder / LOG).read_bytes(), tensors, words


@pytest.mark.slow
def test_stopped_at_any_replacement_of_a_file_it_ends_in_the_same_bits(tmp_path, monkeypatch):
    """Two saves of a log and a state, then the adapters: before each the run stops once, and goes on."""
    options, replace, calls = QUICK | {"steps": 2, "save_every": 1}, os.replace, []

    def stops(*paths):
        calls.append(paths)
        if len(calls) == stop:
            raise KeyboardInterrupt
        replace(*paths)

    monkeypatch.setattr(os, "replace", stops)
    stop = 0
    finetune(small_pipe(), small_set(5), tmp_path / "whole", **options)
    assert len(calls) == 5
    for stop in range(1, 6):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            finetune(small_pipe(), small_set(5), tmp_path / f"{stop}", **options)
        finetune(small_pipe(), small_set(5), tmp_path / f"{stop}", **options)
        assert outcome(tmp_path / f"{stop}") == outcome(tmp_path / "whole"), stop


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from test_finetune import QUICK, outcome, small_pipe, small_set
from minqwen.finetune import finetune

folder, options = Path(sys.argv[1]), QUICK | {"steps": 6, "save_every": 2}
pipe, samples = small_pipe(), small_set(5)
torch.optim.AdamW(pipe.transformer.parameters())  # what is slow to start is started once

def killed(out, module, name, call, share=0):
    original, calls = getattr(module, name), []
    def dies(*args, **more):
        calls.append(1)
        if len(calls) == call:
            if share:  # of the file is written
                original(*args, **more)
                os.truncate(args[1], int(os.path.getsize(args[1]) * share))
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **more)
    setattr(module, name, dies)
    finetune(pipe, samples, out, **options)

def child(out, *kill):
    if (pid := os.fork()) == 0:
        killed(out, *kill) if kill else finetune(pipe, samples, out, **options)
        os._exit(0)
    return os.waitpid(pid, 0)[1]

assert child(folder / "whole") == 0
cut = folder / "cut"
for kill in ((torch, "save", 1, 0.5), (os, "replace", 4), (torch.nn.utils, "clip_grad_norm_", 2)):
    assert child(cut, *kill) == signal.SIGKILL, kill
assert child(cut) == 0 and outcome(cut) == outcome(folder / "whole")
assert not list(cut.glob(".checkpoint*")), "what was half written is cleared away"
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_killed_in_earnest_it_ends_in_the_same_bits(tmp_path):
    """By the system: in the middle of the first state, between the second log and its state, in a step."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_run_with_other_settings_is_not_gone_on_with(tmp_path):
    finetune(small_pipe(), small_set(), tmp_path, steps=2, **QUICK)
    with pytest.raises(ValueError, match=r"other settings \(lr 0.01 there, 0.02 now\)"):
        finetune(small_pipe(), small_set(), tmp_path, steps=2, **QUICK | {"lr": 0.02})
    with pytest.raises(ValueError, match="samples 6 there, 4 now"):
        finetune(small_pipe(), small_set(4), tmp_path, steps=2, **QUICK)


def test_a_run_may_go_on_with_another_rhythm(tmp_path):
    finetune(small_pipe(), small_set(), tmp_path, steps=2, **QUICK)
    finetune(small_pipe(), small_set(), tmp_path, steps=2, save_every=7, checkpointing=True, **QUICK)


def test_borders(tmp_path):
    with pytest.raises(ValueError, match="the dataset is empty"):
        finetune(small_pipe(), [], steps=1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'step'"):
        finetune(small_pipe(), small_set(), step=1)
    with pytest.raises(ValueError, match="timestep_sampling 'none'"):
        finetune(small_pipe(), small_set(), steps=1, timestep_sampling="none")
    pipe = small_pipe()
    finetune(pipe, small_set(), steps=1, **QUICK)
    with pytest.raises(ValueError, match="adapters already"):
        finetune(pipe, small_set(), steps=1, **QUICK)


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_what_is_saved(tmp_path):
    good, bad = small_set(3), small_set(1, seed=9)[0]
    options = QUICK | {"batch_size": 1, "seed": 1}
    for what, why in ((math.nan, "the data hold NaN or infinity"), (1e20, "try an lr below 0.01")):
        spoilt = [*good, bad._replace(name="bad", latents=bad.latents * what)]
        with pytest.raises(FloatingPointError, match=rf"step [1-3]: the loss of \['bad'\] is not finite; {why}"):
            finetune(small_pipe(), spoilt, tmp_path / f"{what}", steps=30, save_every=1, **options)
        weights = read_state(tmp_path / f"{what}" / STATE)["parts"]["weights"]
        assert all(w.isfinite().all() for w in weights.values())


def test_a_gradient_that_is_not_finite_stops_the_run(monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.inf))
    with pytest.raises(FloatingPointError, match="step 0: the gradient is not finite; try an lr below 0.01"):
        finetune(small_pipe(), small_set(), steps=1, **QUICK)


def other(model: QwenImagePipeline, change) -> QwenImagePipeline:
    change(model)
    return model


OTHER_MODELS = {
    "seed": lambda pipe: pipe.transformer.load_state_dict(small_pipe(1).transformer.state_dict()),
    "one weight": lambda pipe: pipe.transformer.transformer_blocks[1].attn.to_v.weight.mul_(1.01),
    "one bias": lambda pipe: pipe.transformer.proj_out.bias[-1].add_(1),
    "dtype": lambda pipe: pipe.transformer.bfloat16(),
    "schedule": lambda pipe: setattr(pipe, "schedule", pipe.schedule | {"max_shift": 2.0}),
}


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("change", OTHER_MODELS.values(), ids=OTHER_MODELS)
def test_a_run_of_another_model_is_not_gone_on_with(tmp_path, change):
    settings = torch.enable_grad()(finetune)
    settings(small_pipe(), small_set(2), tmp_path, steps=1, **QUICK)
    with pytest.raises(ValueError, match=r"other settings \(model float32 \w{16} there, \w+ \w{16} now\)"):
        settings(other(small_pipe(), change), small_set(2), tmp_path, steps=1, **QUICK)


def test_of_large_weights_some_numbers_tell_which_model_it_is():
    pipes = [QwenImagePipeline(torch.nn.Linear(512, 256), None, None, None) for _ in range(2)]
    for pipe in pipes:
        pipe.transformer.config, pipe.transformer.img_in = {}, torch.nn.Linear(1, 1)
        torch.nn.init.ones_(pipe.transformer.weight)
        for small in (pipe.transformer.bias, *pipe.transformer.img_in.parameters()):
            torch.nn.init.zeros_(small)
    assert model_of(pipes[0]) == model_of(pipes[1])
    torch.nn.init.constant_(pipes[1].transformer.weight, 1.001)
    assert model_of(pipes[0]) != model_of(pipes[1])


OTHER_DATA = {
    "picture": lambda s: s._replace(latents=s.latents + 1e-3),
    "control": lambda s: s._replace(control=(s.control[0] * 2,)),
    "caption": lambda s: s._replace(embeds=s.embeds[:, :-1]),
    "empty": lambda s: s._replace(empty=s.empty + 1),
    "name": lambda s: s._replace(name="other"),
    "dtype": lambda s: s._replace(latents=s.latents.bfloat16()),
}


@pytest.mark.parametrize("change", OTHER_DATA.values(), ids=OTHER_DATA)
def test_a_run_on_other_data_is_not_gone_on_with(tmp_path, change):
    """Nor is one that is done: its adapters are not those of the new data."""
    first, *others = small_set(2)
    finetune(small_pipe(), [first, *others], tmp_path, steps=1, **QUICK)
    with pytest.raises(ValueError, match=r"other settings \(data \w{16} there, \w{16} now\)"):
        finetune(small_pipe(), [change(first), *others], tmp_path, steps=1, **QUICK)
    with pytest.raises(ValueError, match=r"other settings \(data"):
        finetune(small_pipe(), [*others, first], tmp_path, steps=1, **QUICK)


def test_a_cache_that_was_moved_is_the_same_data_and_one_with_another_key_is_not(tmp_path):
    kept = on_disk(tmp_path / "a", small_set(2))
    finetune(small_pipe(), kept, tmp_path / "out", steps=1, **QUICK)
    (tmp_path / "a").rename(tmp_path / "b")
    finetune(small_pipe(), Precomputed.open(tmp_path / "b"), tmp_path / "out", steps=1, **QUICK)
    with pytest.raises(ValueError, match=r"other settings \(data"):
        finetune(small_pipe(), on_disk(tmp_path / "c", small_set(2), first=5), tmp_path / "out", steps=1, **QUICK)


def damaged(content: bytes) -> dict[str, bytes]:
    return {"cut": content[:-1], "half": content[: len(content) // 2], "empty": b"", "zeros": bytes(len(content)),
            "longer": content + b"x", "words": b"<html>no such file</html>"}  # fmt: skip


@pytest.mark.parametrize("what", damaged(b""))
def test_a_damaged_sample_is_named_before_the_first_step(tmp_path, what):
    kept = on_disk(tmp_path, small_set(3))
    kept.kept[1].write_bytes(damaged(kept.kept[1].read_bytes())[what])
    with pytest.raises(ValueError, match=rf"{kept.kept[1].name} is damaged .* make it, again"):
        finetune(small_pipe(), kept, tmp_path / "out", steps=1, **QUICK)
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_sample_of_the_cache_is_named(tmp_path):
    kept = on_disk(tmp_path, small_set(3))
    whole, key = load_file(kept.kept[0]), {"key": kept.kept[0].stem}
    without = {name: tensor for name, tensor in whole.items() if name != "empty"}
    for tensors, metadata in (({"a": torch.ones(2)}, None), (without, key), (whole, {"key": kept.kept[1].stem})):
        save_file(tensors, kept.kept[0], metadata)
        with pytest.raises(ValueError, match=f"{kept.kept[0].name} is no sample of this cache: delete it, and run"):
            finetune(small_pipe(), kept, steps=1, **QUICK)


def test_a_sample_of_the_first_format_has_no_key_and_is_taken(tmp_path):
    kept = on_disk(tmp_path, small_set(1))
    save_file(load_file(kept.kept[0]), kept.kept[0])
    assert len(finetune(small_pipe(), kept, steps=1, **QUICK)) == 1


@pytest.mark.parametrize(
    ("part", "shape"),
    [("embeds", (1, 3, 25)), ("empty", (1, 2, 23)), ("embeds", (3, 24)), ("latents", (1, 8, 1, 4, 6)),
     ("latents", (1, 16, 4, 6)), ("latents", (1, 16, 2, 4, 6)), ("control", (1, 4, 1, 4, 4))],
)  # fmt: skip
def test_a_cache_of_another_width_is_refused_in_a_sentence(tmp_path, part, shape):
    tensor = torch.ones(shape)
    good, bad = small_set(2)
    bad = bad._replace(**{part: (tensor,) if part == "control" else tensor})
    said = rf"{part}\w* \({', '.join(map(str, shape))}\), where the model takes .*: the cache is of another model"
    for dataset in ([good, bad], on_disk(tmp_path, [good, bad])):
        with pytest.raises(ValueError, match=said):
            finetune(small_pipe(), dataset, steps=1, **QUICK)


WRONG = {
    "caption_dropout": (10, -1, 1.001, math.nan, math.inf, "0.1", None, True),
    "lr": (0, -1, math.nan, math.inf, "1e-4", None, True),
    "steps": (0, -1, 1.0, 2.5, math.nan, "3", None, True, 10**400),
    "batch_size": (0, 1.0, "3", True),
    "accumulate": (0, 1.0, "3", True),
    "save_every": (0, 1.0, "3", True),
    "rank": (-1, 2.0, "4", True, math.nan),
    "levels": (-1, 2.0, True),
    "seed": (-1, 1.5, "1", None, 2**64),
    "targets": ("to_q", (), None, 5),
    "checkpointing": ("yes", 1, None),
    "timestep_sampling": ("cosine", None),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_setting_outside_its_range_is_named(name, capsys):
    for value in WRONG[name]:
        with pytest.raises(ValueError, match=rf"\b{name}"):
            Settings(**{name: value})
    if name in ("targets", "checkpointing"):
        return
    for value in WRONG[name]:
        if isinstance(value, int | float) and not isinstance(value, bool) and value != 1.0:
            with pytest.raises(SystemExit) as end:
                main(["cache", "--out", "out", f"--{name.replace('_', '-')}={value}"])
            said = capsys.readouterr().err
            assert end.value.code == 2 and said.count("\n") == 1
            assert said.startswith(f"finetune: argument --{name.replace('_', '-')}: expected a")


def test_numbers_at_the_ends_of_their_ranges_and_of_numpy_are_taken():
    import numpy as np

    Settings(steps=1, caption_dropout=0, lr=1, seed=2**64 - 1)
    assert Settings(caption_dropout=1).caption_dropout == 1.0 and Settings(rank=None).rank == 0
    ours = Settings(seed=np.int64(3), lr=np.float64(0.1), steps=np.uint8(4))
    assert ours == Settings(seed=3, lr=0.1, steps=4) and type(ours.seed) is int


@pytest.mark.slow
def test_two_runs_in_one_folder_take_turns(tmp_path, capsys):
    logs, options = [], QUICK | {"steps": 10, "save_every": 1}
    alone, *pipes = (small_pipe() for _ in range(3))
    run = lambda pipe: logs.append(finetune(pipe, small_set(), tmp_path / "both", **options))  # noqa: E731
    finetune(alone, small_set(), tmp_path / "alone", **options)
    with locked(tmp_path / "both"):
        threads = [Thread(target=run, args=[pipe]) for pipe in pipes]
        for thread in threads:
            thread.start()
        time.sleep(1.5)
        assert capsys.readouterr().out.count("another run works on") == 2 and not logs
    for thread in threads:
        thread.join()
    assert len(logs) == 2 and logs[0] == logs[1] and outcome(tmp_path / "both") == outcome(tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.parametrize("full", [LOG, STATE, LORA])
def test_on_a_full_disk_the_file_is_named_and_the_last_state_stays(tmp_path, monkeypatch, full):
    options = QUICK | {"steps": 4, "save_every": 1}
    with pytest.raises(KeyboardInterrupt):
        finetune(small_pipe(), small_set(), tmp_path, preview=lambda step: step < 2 or stop(), **options)
    before, replace = (tmp_path / STATE).read_bytes(), os.replace

    def no_room(half, path):
        if path.name == full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(half, path)

    with monkeypatch.context() as patch, pytest.raises(OSError, match=rf"cannot write .*{full}: .*No space left"):
        patch.setattr(os, "replace", no_room)
        finetune(small_pipe(), small_set(), tmp_path, **options)
    assert full == LORA or (tmp_path / STATE).read_bytes() == before
    assert not list(tmp_path.glob(".*.part"))
    finetune(small_pipe(), small_set(), tmp_path, **options)
    finetune(small_pipe(), small_set(), tmp_path / "whole", **options)
    assert outcome(tmp_path) == outcome(tmp_path / "whole")


def stop() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--preview-image", "a.png"], 2, "--preview-image without --preview-prompt"),
        (["--preview-image", "gone.png", "--preview-prompt", "x"], 1, "no such picture: gone.png"),
        (["--preview-image", "words.txt", "--preview-prompt", "x"], 1, "cannot read words.txt as a picture"),
        (["--out", "words.txt"], 1, "words.txt"),
        (["--out", "odd\udcff"], 1, "is no text in UTF-8"),
        (["--model", "wide"], 1, "the cache is of another model"),
        (["--model", "gone"], 1, "gone is neither a folder nor a hub repository"),
    ],
)
def test_what_is_wrong_is_said_in_a_line_before_a_model_is_loaded(
    tmp_path, monkeypatch, capsys, arguments, status, said
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(library, "open_pipeline", None)
    Path("words.txt").write_text("no picture", encoding="utf-8")
    on_disk(Path("cache"), small_set(1))
    for name, width in (("right", 24), ("wide", 32)):
        Path(name, "transformer").mkdir(parents=True)
        config = {"joint_attention_dim": width, "in_channels": 64}
        Path(name, "transformer", "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(SystemExit) as end:
        main(["cache", "--out", "out", "--model", "right", *arguments])
    line = capsys.readouterr().err if isinstance(end.value.code, int) else f"{end.value.code}\n"
    assert (end.value.code if isinstance(end.value.code, int) else 1) == status
    assert line.startswith("finetune: ") and said in line and line.count("\n") == 1


# ---------------------------------------------------------------------------------------------- with data/tiny


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Six edits in the seed's layout, and their cache."""
    import numpy as np

    folder = tmp_path_factory.mktemp("pairs")
    for name in ("images", "control"):
        (folder / name).mkdir()
    rng = np.random.default_rng(5)
    for k in range(6):
        edit = sample_edit(rng, "mirror")
        edit.target.save(folder / "images" / f"{k}.png")
        edit.source.save(folder / "control" / f"{k}.png")
        (folder / "images" / f"{k}.txt").write_text(edit.instruction)
    pipe = QwenImagePipeline.from_pretrained(TINY, "cpu", torch.float32, without="transformer")
    precompute(pipe, folder / "images", folder / "control", folder / "cache", progress=False)
    return folder


@pytest.mark.slow
def test_training_on_the_cache_equals_training_on_fresh_embeddings(pairs):
    logs, states = [], []
    for cached in (True, False):
        pipe = QwenImagePipeline.from_pretrained(TINY, "cpu", torch.float32)
        folders = pairs / "images", pairs / "control"
        dataset = Precomputed.open(pairs / "cache") if cached else precompute(pipe, *folders, progress=False)
        logs.append(finetune(pipe, dataset, steps=3, batch_size=4, progress=False))
        states.append(lora_state(pipe.transformer))
    assert logs[0] == logs[1] and equal(*states)


@pytest.mark.slow
def test_the_command_trains_saves_previews_and_goes_on(pairs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(library, "picture_preview", partial(picture_preview, num_inference_steps=2))
    arguments = [pairs / "cache", "--out", tmp_path / "out", "--model", TINY, "--device", "cpu", "--steps", 2,
                 "--batch-size", 3, "--lr", "1e-3", "--save-every", 2, "--targets", "to_q", "add_v_proj",
                 "--preview-image", pairs / "control" / "0.png", "--preview-prompt", "mirror the picture",
                 "--quiet"]  # fmt: skip
    main([str(a) for a in arguments])
    assert "2 steps in" in capsys.readouterr().out
    names = sorted(p.name for p in (tmp_path / "out").glob("[!.]*"))
    assert names == [STATE, LOG, LORA, "preview_000000.png", "preview_000002.png"]
    assert Image.open(tmp_path / "out" / "preview_000002.png").size == (96, 96)
    report = load_lora(QwenImagePipeline.from_pretrained(TINY, "cpu").transformer, tmp_path / "out" / LORA)
    assert len(report.matched) == 12 and not report.unmatched
    with pytest.raises(SystemExit, match="finetune: .* other settings"):
        main([str(a) for a in arguments] + ["--seed", "3"])
    with pytest.raises(SystemExit, match="holds no finished cache"):
        main([str(tmp_path), "--out", str(tmp_path / "o")])


def test_every_setting_is_an_option_of_the_command(capsys):
    defaults = library.command_line().parse_args(["cache", "--out", "out"])
    assert all(getattr(defaults, each.name) == each.default for each in fields(Settings))
    words = "cache --out out --steps 3 --lr 0.5 --rank 0 --targets to_q to_k --checkpointing"
    given = library.command_line().parse_args(words.split())
    assert (given.steps, given.lr, given.rank, given.checkpointing) == (3, 0.5, 0, True)
    assert given.targets == ["to_q", "to_k"]
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert "python -m minqwen.finetune" in text
    assert all(each.metadata["help"][:20] in text for each in fields(Settings))


@pytest.mark.slow
def test_the_preview_does_not_touch_the_run(pairs, tmp_path):
    states = []
    for shown in (True, False):
        pipe = QwenImagePipeline.from_pretrained(TINY, "cpu")
        preview = picture_preview(pipe, tmp_path, "a cat on a white background", num_inference_steps=2)
        dataset = Precomputed.open(pairs / "cache")
        finetune(pipe, dataset, steps=2, save_every=1, preview=preview if shown else None, progress=False)
        states.append(lora_state(pipe.transformer))
    assert equal(*states) and (tmp_path / "preview_000002.png").exists()


@pytest.mark.slow  # diffusers takes seconds to start
def test_a_trained_lora_paints_the_same_picture_in_diffusers(pairs, tmp_path, monkeypatch):
    import numpy as np

    for name in ("diffusers", "transformers", "peft"):
        pytest.importorskip(name)
    from reference_pipelines import edit_pipeline

    pipe = QwenImagePipeline.from_pretrained(TINY, "cpu", torch.float32)
    targets = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "to_add_out", "net.0.proj", "net.2", "img_mod.1")
    dataset = Precomputed.open(pairs / "cache")
    finetune(pipe, dataset, tmp_path, steps=10, lr=3e-2, batch_size=6, targets=targets, progress=False)
    reference = edit_pipeline(TINY, pipe.area, monkeypatch)
    edit = sample_edit(np.random.default_rng(11), "mirror")
    noise = torch.randn(1, 36, 64, generator=torch.Generator().manual_seed(0))
    options = {"num_inference_steps": 2, "true_cfg_scale": 2.0, "negative_prompt": " "}
    paint = lambda: np.asarray(reference(edit.source, edit.instruction, latents=noise, **options).images[0], int)  # noqa: E731
    plain = paint()
    reference.load_lora_weights(tmp_path, weight_name=LORA)
    theirs = paint()
    ours = np.asarray(pipe.edit(edit.source, edit.instruction, latents=noise, progress=False, **options), int)
    assert np.abs(ours - theirs).max() <= 1 and np.abs(theirs - plain).max() > 20

"""finetune.py: the loss and its gradient, batches, chance, runs that are killed and go on to the same bits."""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from reference import randomise_
from safetensors.torch import load_file

from minqwen.finetune import (
    CHECKPOINT,
    LOG,
    LORA,
    Row,
    accumulate_gradients,
    checkpoint_blocks,
    finetune,
    flow_loss,
    main,
    make_batch,
    picture_preview,
    resolution_shift,
    sample_sigmas,
    step_order,
)
from minqwen.images import pack_latents
from minqwen.lora import adapters, add_lora, load_lora, lora_state
from minqwen.pipeline import QwenImagePipeline
from minqwen.precompute import Precomputed, Sample, precompute
from minqwen.sampling import get_sigmas, time_shift
from minqwen.transformer import QwenImageTransformer2DModel
from minqwen.world import sample_edit

ROOT = Path(__file__).resolve().parents[1]
TINY, SET = ROOT / "data" / "tiny", ROOT / "data" / "finetune"
KILLS = 50
SMALL = {"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 24,
         "axes_dims_rope": (4, 6, 6)}  # fmt: skip
QUICK = {"lr": 1e-2, "rank": 2, "batch_size": 2, "progress": False}


def small_pipe(seed: int = 0, dtype=torch.float32) -> QwenImagePipeline:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = randomise_(QwenImageTransformer2DModel(**SMALL)).to(dtype)
    return QwenImagePipeline(model, None, None, None)


def small_set(count: int = 6, seed: int = 0, sizes=((4, 6),), control=(4, 4), dtype=torch.float32) -> list[Sample]:
    """Samples of random numbers; the target's sizes take turns, prompts have 3 to 6 tokens."""
    g = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        latents, held = (torch.randn(1, 16, 1, *s, generator=g) for s in (sizes[i % len(sizes)], control or (2, 2)))
        embeds, empty = torch.randn(1, 3 + i % 4, 24, generator=g), torch.randn(1, 2, 24, generator=g)
        parts = [x.to(dtype) for x in (latents, held, embeds, empty)]
        made.append(Sample(f"s{i}", parts[0], (parts[1],) if control else (), *parts[2:]))
    return made


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---------------------------------------------------------------------------------------------- loss and batches


def test_the_loss_is_that_of_each_sample_alone(rng):
    """In a batch of unequal prompts each sample has the loss that it has by itself, worked out the long way."""
    pipe, samples = small_pipe(), small_set(5)
    sigma, noise = torch.rand(5), torch.randn(5, 6, 64)
    together = flow_loss(pipe.transformer, make_batch(samples), sigma, noise)
    for i, s in enumerate(samples):
        x0, control = pack_latents(s.latents), pack_latents(s.control[0])
        noisy = (1 - sigma[i]) * x0 + sigma[i] * noise[i]
        shapes = [[(1, 2, 3), (1, 2, 2)]]
        v = pipe.transformer(torch.cat([noisy, control], 1), s.embeds, None, sigma[i : i + 1], shapes)[:, :6]
        torch.testing.assert_close(together[i], (v - (noise[i] - x0)).square().mean(), rtol=1e-5, atol=1e-6)


def test_a_dropped_caption_becomes_the_samples_own_empty_prompt():
    samples = small_set(3)
    batch = make_batch(samples, [False, True, False])
    assert torch.equal(batch.embeds[1, :2], samples[1].empty[0]) and batch.mask[1].tolist() == [1, 1, 0, 0, 0]
    assert torch.equal(batch.embeds[2], samples[2].embeds[0]) and not batch.embeds[1, 2:].any()
    assert make_batch(samples[:1]).mask is None


def test_drawing_has_no_control():
    pipe, samples = small_pipe(), small_set(2, control=None)
    batch = make_batch(samples)
    assert batch.control.shape == (2, 0, 64) and batch.shapes == [(1, 2, 3)]
    assert flow_loss(pipe.transformer, batch, torch.rand(2), torch.randn(2, 6, 64)).shape == (2,)


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


@pytest.mark.parametrize("tokens", [16, 256, 4096, 8192])
def test_training_shifts_noise_levels_as_sampling_does(tokens):
    sigmas = get_sigmas(10, tokens, shift_terminal=None)[:-1]
    expected = time_shift(torch.linspace(1, 0.1, 10), resolution_shift(tokens))
    torch.testing.assert_close(sigmas, expected)
    assert resolution_shift(tokens, use_dynamic_shifting=False, shift=2.5) == 2.5


def test_an_epoch_takes_every_sample_once_in_steps_of_one_shape():
    groups = [[0, 2, 4, 6, 8], [1, 3, 5]]
    epochs = [step_order(groups, 2, 7, epoch) for epoch in range(4)]
    for steps in epochs:
        assert sorted(sum(steps, [])) == [0, 1, 2, 3, 4, 5, 6, 8] and len(steps) == 5
        assert all(len({i % 2 for i in step}) == 1 and len(step) <= 2 for step in steps)
    assert epochs[0] != epochs[1] and epochs[0] == step_order(groups, 2, 7, 0) != step_order(groups, 2, 8, 0)


# ---------------------------------------------------------------------------------------------- gradients


def gradients(pipe, samples, batch_size) -> list[torch.Tensor]:
    pipe.transformer.zero_grad()
    accumulate_gradients(pipe, samples, batch_size, "shifted", 0.5, torch.Generator().manual_seed(3))
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
    pipe, samples = adapted_pipe(), small_set(3)
    plain = gradients(pipe, samples, 3)
    calls, block = [], pipe.transformer.transformer_blocks[0]
    handle = block.attn.register_forward_hook(lambda *_: calls.append(1))
    blocks = checkpoint_blocks(pipe.transformer)
    again = gradients(pipe, samples, 3)
    assert len(calls) == 2, "a block that is checkpointed is computed twice"
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    handle.remove()
    for block in blocks:
        del block.forward
    fresh = small_pipe()
    finetune(fresh, samples, steps=1, checkpointing=True, **QUICK)
    assert not any("forward" in vars(m) for m in fresh.transformer.modules())


def test_only_adapters_move_and_the_base_may_be_bfloat16():
    pipe = small_pipe(dtype=torch.bfloat16)
    before = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    finetune(pipe, small_set(dtype=torch.bfloat16), steps=3, **QUICK)
    after = pipe.transformer.state_dict()
    assert all(torch.equal(after[k], v) and after[k].dtype == torch.bfloat16 for k, v in before.items())
    assert all(layer.lora_B.weight.any() for layer in adapters(pipe.transformer).values())
    assert {v.dtype for v in lora_state(pipe.transformer).values()} == {torch.float32}


def test_it_learns():
    """One sample, over and over: the loss falls by a third at least."""
    pipe = small_pipe()
    log = finetune(pipe, small_set(1), steps=150, lr=2e-2, rank=0, batch_size=1, accumulate=4, caption_dropout=0.0,
                   progress=False)  # fmt: skip
    first, last = (sum(r.loss for r in part) / len(part) for part in (log[:20], log[-20:]))
    assert last < 0.67 * first, (first, last)


def test_full_finetuning_moves_all_weights_and_is_saved_as_released(tmp_path):
    pipe = QwenImagePipeline.from_pretrained(TINY, "cpu", torch.bfloat16, without=("text_encoder", "vae"))
    before = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    g = torch.Generator().manual_seed(0)
    half = [torch.randn(*shape, generator=g).bfloat16() for shape in ((1, 16, 1, 8, 8), (1, 5, 128), (1, 2, 128))]
    finetune(pipe, [Sample("a", half[0], (half[0],), *half[1:])], tmp_path, steps=2, rank=None, lr=1e-2, progress=False)
    folder = tmp_path / "transformer"
    saved, trained = load_file(folder / "diffusion_pytorch_model.safetensors"), pipe.transformer.state_dict()
    assert equal(saved, trained) and {v.dtype for v in saved.values()} == {torch.bfloat16}
    unmoved = sum(torch.equal(saved[k], before[k]) for k in before)
    assert unmoved < len(before) / 4  # text layers of the last block reach nothing
    released = json.loads((TINY / "transformer" / "config.json").read_text())
    assert {k: v for k, v in json.loads((folder / "config.json").read_text()).items()} == {
        k: v for k, v in released.items() if k != "_diffusers_version"
    }


# ---------------------------------------------------------------------------------------------- runs


def test_the_log_has_a_row_for_every_sample(tmp_path):
    log = finetune(small_pipe(), small_set(5), tmp_path, steps=7, **QUICK)
    assert len(log) == 5 + 5 + 2 and [r.step for r in log] == sorted(r.step for r in log) and log[-1].step == 6
    assert all(0 <= r.sigma <= 1 and math.isfinite(r.loss) for r in log)
    with open(tmp_path / LOG) as file:
        rows = [Row(int(step), float(sigma), float(loss)) for step, sigma, loss in list(csv.reader(file))[1:]]
    assert rows == log
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([CHECKPOINT, LOG, LORA])


def test_a_seed_gives_the_same_run_whatever_else_draws_numbers():
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(states))
        pipe = small_pipe()
        finetune(pipe, small_set(), steps=3, seed=seed, **QUICK)
        states.append(lora_state(pipe.transformer))
    assert equal(states[0], states[1]) and not equal(states[0], states[2])


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


KILLER = """
import os, random, signal, sys, time, json
import torch
torch.set_num_threads(1)
from pathlib import Path
from safetensors import safe_open
sys.path.insert(0, sys.argv[1])
from test_finetune import QUICK, equal, small_pipe, small_set
from minqwen.finetune import CHECKPOINT, finetune
from minqwen.lora import lora_state

folder, kills, chance = Path(sys.argv[2]), int(sys.argv[3]), random.Random(int(sys.argv[4]))
options = QUICK | {"steps": 16, "save_every": 1}

# What is slow to start is started once, so that most kills fall into the run and not before it.
pipe, samples = small_pipe(), small_set(5)
torch.optim.AdamW(pipe.transformer.parameters())

def child(out):
    if (pid := os.fork()) == 0:
        finetune(pipe, samples, out, **options)
        os._exit(0)
    return pid

def rows_of(out):
    return (out / "log.csv").read_bytes().count(b"\\n") if (out / "log.csv").exists() else 0

start = time.time()
os.waitpid(child(folder / "whole"), 0)
length = time.time() - start
state = lambda out: {str(k): v for k, v in enumerate(torch.load(out / CHECKPOINT, weights_only=True)["weights"])}
whole, landed, at, runs, finished = state(folder / "whole"), 0, set(), 0, 0
log = (folder / "whole" / "log.csv").read_bytes()

def lora(out):  # tensors and metadata: safetensors writes the metadata in any order
    with safe_open(out / "lora.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()

while landed < kills or not finished:
    out = folder / f"run{runs}"
    pid = child(out)
    if landed < kills:
        time.sleep(chance.uniform(0, length))
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        landed += 1
        at.add(rows_of(out))
    else:
        assert status == 0 and equal(state(out), whole), runs
        (tensors, said), (wanted, words) = lora(out), lora(folder / "whole")
        assert (out / "log.csv").read_bytes() == log and equal(tensors, wanted) and said == words, runs
        runs, finished = runs + 1, finished + 1
print(json.dumps({"landed": landed, "steps": sorted(at), "finished": finished}))
"""


def test_killed_at_fifty_random_moments_it_ends_in_the_same_bits(tmp_path, rng):
    paths = [str(ROOT), str(ROOT / "tests")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", KILLER, ROOT / "tests", tmp_path, str(KILLS), str(rng.randrange(10**6))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["landed"] == KILLS and said["finished"] >= 1
    assert len(said["steps"]) >= 5, "the kills fell on too few different moments to mean anything"


def test_a_run_with_other_settings_is_not_gone_on_with(tmp_path):
    finetune(small_pipe(), small_set(), tmp_path, steps=2, **QUICK)
    with pytest.raises(ValueError, match=r"other settings \(lr 0.01 there, 0.02 now\)"):
        finetune(small_pipe(), small_set(), tmp_path, steps=2, **QUICK | {"lr": 0.02})
    with pytest.raises(ValueError, match="samples 6 there, 4 now"):
        finetune(small_pipe(), small_set(4), tmp_path, steps=2, **QUICK)


def test_borders(tmp_path):
    with pytest.raises(ValueError, match="the dataset is empty"):
        finetune(small_pipe(), [], steps=1)
    with pytest.raises(ValueError, match="some samples have a control picture and some have none"):
        finetune(small_pipe(), small_set(2) + small_set(1, control=None), steps=1)
    with pytest.raises(ValueError, match="timestep_sampling 'none'"):
        finetune(small_pipe(), small_set(), steps=1, timestep_sampling="none")
    with pytest.raises(ValueError, match="must be at least 1"):
        finetune(small_pipe(), small_set(), steps=0)
    pipe = small_pipe()
    finetune(pipe, small_set(), steps=1, **QUICK)
    with pytest.raises(ValueError, match="adapters already"):
        finetune(pipe, small_set(), steps=1, **QUICK)


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(tmp_path):
    good, bad = small_set(3), small_set(1, seed=9)[0]
    bad = bad._replace(name="bad", latents=bad.latents * math.nan)
    with pytest.raises(FloatingPointError, match=r"step \d: the loss of \['bad'\] is not finite; try a lower lr"):
        finetune(small_pipe(), [*good, bad], tmp_path, steps=30, save_every=1, **QUICK | {"batch_size": 1})
    if (tmp_path / CHECKPOINT).exists():
        state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
        assert all(w.isfinite().all() for w in state["weights"])


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


def test_training_on_the_cache_equals_training_on_fresh_embeddings(pairs):
    logs, states = [], []
    for cached in (True, False):
        pipe = QwenImagePipeline.from_pretrained(TINY, "cpu", torch.float32)
        folders = pairs / "images", pairs / "control"
        dataset = Precomputed.open(pairs / "cache") if cached else precompute(pipe, *folders, progress=False)
        logs.append(finetune(pipe, dataset, steps=3, batch_size=4, progress=False))
        states.append(lora_state(pipe.transformer))
    assert logs[0] == logs[1] and equal(*states)


def test_the_command_trains_saves_previews_and_goes_on(pairs, tmp_path, capsys):
    arguments = [pairs / "cache", "--out", tmp_path / "out", "--model", TINY, "--device", "cpu", "--steps", 4,
                 "--batch-size", 3, "--lr", "1e-3", "--save-every", 2, "--targets", "to_q", "add_v_proj",
                 "--preview-image", pairs / "control" / "0.png", "--preview-prompt", "mirror the picture",
                 "--quiet"]  # fmt: skip
    main([str(a) for a in arguments])
    assert "4 steps in" in capsys.readouterr().out
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == [CHECKPOINT, LOG, LORA, *(f"preview_{k:06}.png" for k in (0, 2, 4))]
    assert Image.open(tmp_path / "out" / "preview_000004.png").size == (64, 64)
    report = load_lora(QwenImagePipeline.from_pretrained(TINY, "cpu").transformer, tmp_path / "out" / LORA)
    assert len(report.matched) == 12 and not report.unmatched
    with pytest.raises(SystemExit, match="finetune: .* other settings"):
        main([str(a) for a in arguments] + ["--seed", "3"])
    with pytest.raises(SystemExit, match="holds no finished cache"):
        main([str(tmp_path), "--out", str(tmp_path / "o")])


def test_help_says_what_the_command_does(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert "python -m minqwen.finetune" in said and "--caption-dropout" in said and "logit-normal" in said


def test_the_preview_does_not_touch_the_run(pairs, tmp_path):
    states = []
    for shown in (True, False):
        pipe = QwenImagePipeline.from_pretrained(TINY, "cpu")
        preview = picture_preview(pipe, tmp_path, "a red star on a white background", num_inference_steps=2)
        dataset = Precomputed.open(pairs / "cache")
        finetune(pipe, dataset, steps=2, save_every=1, preview=preview if shown else None, progress=False)
        states.append(lora_state(pipe.transformer))
    assert equal(*states) and (tmp_path / "preview_000002.png").exists()


def test_a_trained_lora_paints_the_same_picture_in_diffusers(pairs, tmp_path, monkeypatch):
    import numpy as np
    from reference_pipelines import edit_pipeline

    pipe = QwenImagePipeline.from_pretrained(TINY, "cpu", torch.float32)
    targets = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "to_add_out", "net.0.proj", "net.2", "img_mod.1")
    dataset = Precomputed.open(pairs / "cache")
    finetune(pipe, dataset, tmp_path, steps=30, lr=1e-2, batch_size=6, targets=targets, progress=False)
    reference = edit_pipeline(TINY, pipe.area, monkeypatch)
    edit = sample_edit(np.random.default_rng(11), "mirror")
    noise = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(0))
    options = {"num_inference_steps": 8, "true_cfg_scale": 2.0, "negative_prompt": " "}
    paint = lambda: np.asarray(reference(edit.source, edit.instruction, latents=noise, **options).images[0], int)  # noqa: E731
    plain = paint()
    reference.load_lora_weights(tmp_path, weight_name=LORA)
    theirs = paint()
    ours = np.asarray(pipe.edit(edit.source, edit.instruction, latents=noise, progress=False, **options), int)
    assert np.abs(ours - theirs).max() <= 1 and np.abs(theirs - plain).max() > 20

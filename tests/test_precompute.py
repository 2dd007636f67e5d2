"""precompute.py: the same numbers as fresh ones, nothing stale, nothing twice, whole after any interruption."""

import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from minqwen import precompute as library
from minqwen.images import pack_latents
from minqwen.pipeline import QwenImagePipeline
from minqwen.precompute import EMPTY, Precomputed, checksum, find_sources, fingerprint, main, precompute
from minqwen.prompt import EDIT_PLUS
from minqwen.world import draw as draw_scene
from minqwen.world import sample_edit, sample_scene

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "data" / "tiny"
KILLS = 50


@pytest.fixture(scope="module")
def shared():
    return QwenImagePipeline.from_pretrained(TINY, device="cpu", dtype=torch.float32, without="transformer")


@pytest.fixture
def pipe(shared, monkeypatch):
    """The pipeline; it counts what it encodes and its attributes may be changed."""
    fresh = QwenImagePipeline(None, shared.vae, shared.text_encoder, shared.tokenizer, shared.schedule,
                              shared.image_settings, shared.edit_template, shared.area)  # fmt: skip
    fresh.prompts = []
    plain = fresh.encode_prompt
    fresh.encode_prompt = lambda prompt, images=None: fresh.prompts.append(prompt) or plain(prompt, images)
    return fresh


NAMES = ["cat", "cat.v1.2", "猫 咪", "a..b", "x" * 120]


@pytest.fixture
def data(tmp_path, rng):
    """Five samples, whose names and suffixes are not the plainest."""
    (tmp_path / "images").mkdir()
    (tmp_path / "control").mkdir()
    numbers = np.random.default_rng(rng.randrange(10**6))
    for name, suffix, other in zip(
        NAMES, (".png", ".JPG", ".jpeg", ".WebP", ".PNG"), (".JPEG", ".png", ".webp", ".png", ".jpg"), strict=True
    ):
        edit = sample_edit(numbers, "recolour")  # of some kinds a picture may be empty, and the same when it is turned
        size = rng.choice([(64, 64), (100, 60), (40, 90)])
        edit.target.resize(size).save(tmp_path / "images" / f"{name}{suffix}")
        edit.source.resize(size).save(tmp_path / "control" / f"{name}{other}")
        (tmp_path / "images" / f"{name}.txt").write_text(f"{edit.instruction}\n", encoding="utf-8")
    return tmp_path


def run(pipe, data, cache="cache", control="control", **options) -> Precomputed:
    control = control and data / control
    return precompute(pipe, data / "images", control, cache and data / cache, progress=False, **options)


def equal(a, b) -> bool:
    """Bit for bit, shapes and dtypes too."""
    one, two = ([s.latents, *s.control, s.embeds, s.empty] for s in (a, b))
    same = all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(one, two, strict=True))
    return same and a.name == b.name and len(a.control) == len(b.control)


def target(data, name) -> Path:
    return next(path for path in (data / "images").iterdir() if path.stem == name and path.suffix != ".txt")


# -------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_samples_equal_fresh_ones_bit_for_bit(data, dtype):
    pipe = QwenImagePipeline.from_pretrained(TINY, device="cpu", dtype=dtype)
    kept, memory = run(pipe, data), run(pipe, data, cache=None)
    assert kept.names == sorted(NAMES) and len(kept) == len(memory) == 5
    for name, stored, held in zip(kept.names, kept, memory, strict=True):
        assert equal(stored, held) and stored.name == name and stored.latents.dtype == dtype
        image = Image.open(target(data, name))
        (wanted,), _ = pipe.resize_references([library.load_image(image)])
        assert torch.equal(stored.latents, pipe.encode_image(wanted))
        control = next((data / "control").glob(f"{name}.[pjwJ]*"))
        (seen,), _ = pipe.resize_references([library.load_image(control)])
        caption = (data / "images" / f"{name}.txt").read_text(encoding="utf-8").strip()
        assert torch.equal(stored.control[0], pipe.encode_image(seen))
        assert torch.equal(stored.embeds, pipe.encode_prompt(caption, seen)[0])
        assert torch.equal(stored.empty, pipe.encode_prompt(EMPTY, seen)[0])


def test_sizes_are_those_of_edit(pipe, data, monkeypatch):
    """What `edit` hands to its encoders for the same control picture and caption."""
    seen = {}
    whole = QwenImagePipeline.from_pretrained(TINY, device="cpu", dtype=torch.float32)
    real = whole.velocity
    for template in (whole.edit_template, EDIT_PLUS):
        for area in (None, 48 * 80):
            whole.edit_template = pipe.edit_template = template
            monkeypatch.setattr("minqwen.pipeline.CONDITION_AREA", 32 * 32)
            monkeypatch.setattr(whole, "velocity", lambda *a: seen.update(prompts=a[0], refs=a[1]) or real(*a))
            for sample, source in zip(run(pipe, data, None, area=area),
                                      find_sources(data / "images", data / "control"), strict=True):  # fmt: skip
                whole.edit(source.pictures[1], source.caption, area=area, num_inference_steps=1, progress=False)
                assert torch.equal(sample.embeds, seen["prompts"][0][0])
                assert torch.equal(sample.empty, seen["prompts"][1][0])
                assert torch.equal(sample.control[0], seen["refs"][0])


def test_training_on_the_cache_gives_the_same_losses(data):
    """Three steps of AdamW on all weights of the transformer, once on fresh tensors, once on cached ones."""
    pipe = QwenImagePipeline.from_pretrained(TINY, device="cpu", dtype=torch.float32)
    fresh, losses = run(pipe, data, cache=None), []
    run(pipe, data)
    for samples in (list(fresh), list(Precomputed.open(data / "cache"))):
        model = QwenImagePipeline.from_pretrained(TINY, device="cpu", dtype=torch.float32).transformer
        optimizer, generator = torch.optim.AdamW(model.parameters(), 1e-4), torch.Generator().manual_seed(0)
        losses.append([])
        for sample in samples[:3]:
            sigma, clean = torch.rand(1, generator=generator), pack_latents(sample.latents)
            noise = torch.randn(clean.shape, generator=generator)
            tokens = [(1 - sigma) * clean + sigma * noise, *map(pack_latents, sample.control)]
            shapes = [(1, *(side // 2 for side in z.shape[-2:])) for z in (sample.latents, *sample.control)]
            velocity = model(torch.cat(tokens, 1), sample.embeds, None, sigma, [shapes])[:, : clean.shape[1]]
            loss = (velocity - (noise - clean)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == losses[1] and len(set(losses[0])) == 3


def test_the_empty_prompt_depends_on_the_picture_in_an_edit_only(pipe, data):
    edits, drawings = run(pipe, data, None), run(pipe, data, None, control=None)
    assert not torch.equal(edits[0].empty[:, -6:], edits[1].empty[:, -6:])
    assert torch.equal(drawings[0].empty, drawings[1].empty) and drawings[0].empty.shape[1] == 6
    assert drawings[0].control == ()


def test_a_checkpoint_that_only_draws(pipe, data):
    pipe.edit_template = None
    made = run(pipe, data, control=None)
    assert len(made) == 5 and equal(made[2], run(pipe, data, None, control=None)[2])
    with pytest.raises(ValueError, match="only draws: leave control_dir out"):
        run(pipe, data)


def test_the_file_says_what_it_is(pipe, data):
    kept = run(pipe, data, area=64 * 64)
    with safe_open(kept.kept[0], framework="pt") as file:
        said = file.metadata()
    assert sorted(said) == sorted("format model template area dtype key name caption latents_size control_size".split())
    assert said["model"] == fingerprint(pipe) and said["area"] == "4096" and said["name"] == kept.names[0]
    width, height = (int(side) for side in said["latents_size"].split("x"))
    assert kept[0].latents.shape == (1, 16, 1, height // 8, width // 8)
    assert said["template"].startswith("<|im_start|>system") and said["dtype"] == "torch.float32"


# ----------------------------------------------------------------------------------------------- again, and again


def test_a_second_run_computes_nothing_and_the_cache_opens_without_a_model(pipe, data):
    first = run(pipe, data)
    assert (first.computed, first.reused, len(pipe.prompts)) == (5, 0, 10)
    second = run(pipe, data)
    assert (second.computed, second.reused, len(pipe.prompts)) == (0, 5, 10)
    opened = Precomputed.open(data / "cache")
    assert opened.names == first.names and all(equal(a, b) for a, b in zip(opened, first, strict=True))


def test_only_what_changed_is_computed_again(pipe, data):
    first = list(run(pipe, data))
    (data / "images" / "cat.txt").write_text("make the star green")
    changed = run(pipe, data)
    assert (changed.computed, pipe.prompts[-2:]) == (1, ["make the star green", EMPTY])
    Image.open(target(data, "cat.v1.2")).rotate(90).save(target(data, "cat.v1.2"))
    changed = run(pipe, data)
    assert changed.computed == 1
    by_name = dict(zip(changed.names, changed, strict=True))
    for sample in first:
        assert equal(sample, by_name[sample.name]) == (sample.name not in ("cat", "cat.v1.2"))
    Image.open(data / "control" / "cat.JPEG").rotate(90).save(data / "control" / "cat.JPEG")
    assert run(pipe, data).computed == 1
    fresh = run(pipe, data, None)
    assert all(equal(a, b) for a, b in zip(run(pipe, data), fresh, strict=True))


def test_white_space_around_a_caption_and_the_samples_name_change_nothing(pipe, data):
    run(pipe, data)
    caption = data / "images" / "cat.txt"
    caption.write_text("\ufeff \n" + caption.read_text(encoding="utf-8").strip() + "\r\n\n", encoding="utf-8")
    assert run(pipe, data).computed == 0
    for path in [*data.glob("*/cat.*")]:
        if path.stem == "cat":
            path.rename(path.with_name("dog" + path.suffix))
    renamed = run(pipe, data)
    assert renamed.computed == 0 and renamed[renamed.names.index("dog")].name == "dog"


def another_model(pipe, data):
    pipe.text_encoder = QwenImagePipeline.from_pretrained(TINY, "cpu", torch.float32, ("transformer", "vae"))
    pipe.text_encoder = pipe.text_encoder.text_encoder
    with torch.no_grad():
        pipe.text_encoder.model.layers[1].mlp.up_proj.weight[3, 5] += 2**-10


def another_scale(pipe, data):
    pipe.vae = QwenImagePipeline.from_pretrained(TINY, "cpu", torch.float32, ("transformer", "text_encoder")).vae
    pipe.vae.latents_mean = (*pipe.vae.latents_mean[:-1], 0.5)


def another_template(pipe, data):
    pipe.edit_template = EDIT_PLUS


def another_dtype(pipe, data):
    other = QwenImagePipeline.from_pretrained(TINY, "cpu", torch.bfloat16, without="transformer")
    pipe.vae, pipe.text_encoder = other.vae, other.text_encoder


@pytest.mark.parametrize("change", [another_model, another_scale, another_template, another_dtype])
def test_another_model_or_template_or_dtype_is_computed_anew_and_the_way_back_is_free(pipe, data, change):
    first = list(run(pipe, data))
    before = pipe.vae, pipe.text_encoder, pipe.edit_template
    change(pipe, data)
    changed = run(pipe, data)
    assert changed.computed == 5
    assert all(equal(a, b) for a, b in zip(changed, run(pipe, data, None), strict=True))
    pipe.vae, pipe.text_encoder, pipe.edit_template = before
    back = run(pipe, data)
    assert back.computed == 0 and all(equal(a, b) for a, b in zip(first, back, strict=True))


def test_another_size_and_another_task_are_computed_anew(pipe, data):
    run(pipe, data)
    assert run(pipe, data, area=96 * 96).computed == 5
    assert run(pipe, data, control=None).computed == 5
    assert run(pipe, data).computed == 0


def test_another_decoder_is_not_computed_anew(pipe, data):
    before = fingerprint(pipe)
    pipe.vae = QwenImagePipeline.from_pretrained(TINY, "cpu", torch.float32, ("transformer", "text_encoder")).vae
    with torch.no_grad():
        pipe.vae.decoder.conv_out.weight += 1
    assert fingerprint(pipe) == before


def test_files_of_samples_that_are_gone_stay_until_pruned(pipe, data):
    run(pipe, data)
    for path in [target(data, "cat"), data / "images" / "cat.txt", data / "control" / "cat.JPEG"]:
        path.unlink()
    fewer = run(pipe, data)
    assert len(fewer) == 4 and "cat" not in Precomputed.open(data / "cache").names
    assert len(list((data / "cache").glob("*.safetensors"))) == 5
    run(pipe, data, prune=True)
    assert sorted((data / "cache").glob("*.safetensors")) == sorted(fewer.kept)


def test_equal_samples_are_computed_once(pipe, data):
    for path in [*data.glob("*/cat.*")]:
        if path.stem == "cat":
            shutil.copy(path, path.with_name("twin" + path.suffix))
    made = run(pipe, data)
    assert (len(made), made.computed, len(pipe.prompts)) == (6, 5, 10)
    assert made[made.names.index("twin")].name == "twin"


def test_a_damaged_file_is_computed_again(pipe, data):
    kept = run(pipe, data)
    want = list(run(pipe, data, None))  # not the cached ones, which are mapped from the files
    kept.kept[0].write_bytes(kept.kept[0].read_bytes()[:-1])
    kept.kept[1].write_bytes(b"")
    shutil.copy(kept.kept[3], kept.kept[2])
    kept.kept[4].unlink()
    again = run(pipe, data)
    assert again.computed == 4 and all(equal(a, b) for a, b in zip(want, again, strict=True))


@pytest.mark.parametrize("shape", [(), (3,), (7, 5), (1, 1), (64, 33, 3), (2048, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_checksum_feels_every_bit_and_every_exchange(rng, shape, dtype):
    tensor = (100 * torch.randn(shape)).to(dtype)
    before, flat = checksum(tensor), tensor.clone().reshape(-1)
    bits = flat.view(torch.uint8)
    bits[rng.randrange(len(bits))] ^= 1 << rng.randrange(8)
    assert checksum(flat.view(shape)) != before
    if len(flat) > 1:
        i, j = rng.sample(range(len(flat)), 2)
        swapped = tensor.clone().reshape(-1)
        swapped[[i, j]] = swapped[[j, i]]
        assert (checksum(swapped.view(shape)) == before) == torch.equal(swapped, tensor.reshape(-1))
    assert checksum(torch.stack([tensor, tensor])[1]) == before  # wherever it lies in memory


# ------------------------------------------------------------------------------------------------ wrong data


def test_everything_that_is_wrong_is_named_at_once_before_any_work(pipe, data):
    shutil.copy(target(data, "a..b"), data / "images" / "a..b.png")
    shutil.copy(data / "control" / "a..b.png", data / "control" / "a..b.jpeg")
    target(data, "猫 咪").write_bytes(target(data, "猫 咪").read_bytes()[:200])
    (data / "images" / "cat.txt").unlink()
    (data / "images" / "cat.v1.2.txt").write_bytes(b"caf\xe9")
    (data / "control" / "cat.v1.2.png").unlink()
    (data / "control" / "orphan.png").write_bytes(target(data, "cat").read_bytes())
    Image.new("RGB", (3000, 10)).save(target(data, "x" * 120))
    with pytest.raises(ValueError) as caught:
        run(pipe, data)
    said = str(caught.value)
    for words in (
        "8 problem(s)",
        "a..b.png: has the same name as a..b.WebP",
        "a..b.png: has the same name as a..b.jpeg",
        "猫 咪.jpeg: cannot be read as a picture",
        "cat.png: no caption cat.txt",
        "cat.v1.2.txt: cannot be read as UTF-8",
        "cat.v1.2.JPG: no control picture cat.v1.2 in",
        "orphan.png: a control for no target",
        "crop first",
    ):
        assert words in said, words
    assert not pipe.prompts and not (data / "cache").exists()


def test_an_empty_folder_a_missing_folder_and_a_reserved_token(pipe, data):
    (data / "nothing").mkdir()
    with pytest.raises(ValueError, match="no pictures"):
        precompute(pipe, data / "nothing")
    with pytest.raises(FileNotFoundError, match="no such folder: .*gone"):
        precompute(pipe, data / "gone")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        precompute(pipe, data / "images", data / "gone")
    (data / "images" / "cat.txt").write_text("a <|image_pad|>")
    with pytest.raises(ValueError, match="stands for a picture"):
        run(pipe, data)


def test_other_files_are_left_alone_and_lonely_captions_are_named(pipe, data):
    (data / "images" / "._cat.png").write_bytes(b"what a Mac leaves behind")
    (data / "images" / "notes.md").write_text("notes")
    (data / "images" / "sub.png").mkdir()
    (data / "images" / "lost.txt").write_text("a caption")
    with pytest.warns(UserWarning, match="captions without a picture.*lost.txt"):
        assert len(run(pipe, data)) == 5


def test_a_picture_changed_meanwhile_is_refused(pipe, data, monkeypatch):
    plain = library.find_sources

    def find_then_change(*folders):
        found = plain(*folders)
        draw_scene(sample_scene(np.random.default_rng(0))).save(target(data, "cat"))
        return found

    monkeypatch.setattr(library, "find_sources", find_then_change)
    with pytest.raises(ValueError, match="cat.png was changed while"):
        run(pipe, data)
    monkeypatch.undo()
    assert all(equal(a, b) for a, b in zip(run(pipe, data), run(pipe, data, None), strict=True))


def test_a_pipeline_without_what_is_needed(pipe, data):
    pipe.vae = None
    with pytest.raises(ValueError, match="only the transformer may be left out"):
        run(pipe, data)


def test_parts_can_be_left_out_and_are_named_when_missed(pipe):
    assert pipe.transformer is None and pipe.dtype == torch.float32 and pipe.device.type == "cpu"
    with pytest.raises(ValueError, match="without its transformer"):
        pipe.generate("a star", progress=False)
    with pytest.raises(ValueError, match="only transformer, vae, text_encoder can be left out"):
        QwenImagePipeline.from_pretrained(TINY, without="unet")


def test_the_transformers_files_are_not_even_looked_for(tmp_path, data):
    shutil.copytree(TINY, tmp_path / "small", ignore=shutil.ignore_patterns("transformer"))
    pipe = QwenImagePipeline.from_pretrained(tmp_path / "small", device="cpu", without="transformer")
    assert len(run(pipe, data, None)) == 5


# ------------------------------------------------------------------------------------------------ interruptions

# One process that imports once, and forks: a child precomputes and is killed, or ends itself at a system call.
KILLER = """
import hashlib, json, os, random, shutil, signal, sys, time
from pathlib import Path
import torch
from safetensors import safe_open
torch.set_num_threads(1)
from minqwen import precompute as library
from minqwen.pipeline import QwenImagePipeline

data, tiny, kills, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
random.seed(seed)
pipe = QwenImagePipeline.from_pretrained(tiny, "cpu", torch.float32, without="transformer")
calls = []
encode = pipe.encode_image
pipe.encode_image = lambda image: calls.append(1) or encode(image)

def work(cache):
    return library.precompute(pipe, data / "images", data / "control", cache, progress=False)

def contents(cache):
    "Bytes, but of safetensors their tensors and metadata: the order in which it writes metadata is not fixed."
    found = {path.name: path.read_bytes() for path in sorted(cache.iterdir()) if path.name != ".lock"}
    for name in [name for name in found if name.endswith(".safetensors")]:
        with safe_open(cache / name, framework="np") as file:
            tensors = {key: hashlib.sha256(file.get_tensor(key).tobytes()).hexdigest() for key in file.keys()}
            found[name] = len(found[name]), tensors, file.metadata()
    return found

def forked(cache, stop=None):
    child = os.fork()
    if child == 0:
        if stop is not None:
            stop()
        work(cache)
        os._exit(0)
    return child

def finish(cache):
    "The run after an interruption: what is there already must stay as it is, and be computed no more."
    whole = {path: path.stat().st_mtime_ns for path in cache.glob("*.safetensors")} if cache.exists() else {}
    calls.clear()
    done = work(cache)
    assert done.reused == len(whole) and done.computed == len(want) - 1 - len(whole), (done.reused, len(whole))
    assert len(calls) == 2 * done.computed
    assert all(path.stat().st_mtime_ns == when for path, when in whole.items())
    assert contents(cache) == want, (sorted(contents(cache)), sorted(want))
    return len(whole)

started = time.perf_counter()
work(data / "straight")
want, span = contents(data / "straight"), time.perf_counter() - started
found, landed, early = [], 0, 0
for n in range(kills):
    cache = data / "killed"
    shutil.rmtree(cache, ignore_errors=True)
    for _ in range(random.choice([1, 1, 3])):
        child = forked(cache)
        time.sleep(random.uniform(0, 1.05 * span))
        os.kill(child, signal.SIGKILL)
        landed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    found.append(finish(cache))

points = 0
for name in ("fsync", "replace", "unlink"):
    for before in (True, False):
        for nth in range(99):
            def stop():
                plain, left = getattr(os, name), [nth]
                def ends(*args, **kwargs):
                    left[0] -= 1
                    if left[0] < 0 and before:
                        os._exit(9)
                    plain(*args, **kwargs)
                    if left[0] < 0:
                        os._exit(9)
                setattr(os, name, ends)
            cache = data / "ended"
            shutil.rmtree(cache, ignore_errors=True)
            if name == "unlink":
                work(cache)
                next(cache.glob("*.safetensors")).unlink()
                (cache / "left.tmp").write_bytes(b"half")
            ended = os.waitstatus_to_exitcode(os.waitpid(forked(cache, stop), 0)[1]) == 9
            if not ended:
                break
            points += 1
            finish(cache)

cache = data / "together"
children = [forked(cache) for _ in range(3)]
assert all(os.waitpid(child, 0)[1] == 0 for child in children)
assert contents(cache) == want
print(json.dumps({"found": found, "landed": landed, "points": points, "samples": len(want) - 1}))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_moment_a_run_resumes_to_the_uninterrupted_result(data, rng):
    """50 caches, each left by SIGKILL at one to three random moments; then an end at every call that changes a file."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-c", KILLER, data, TINY, str(KILLS), str(rng.randrange(10**6))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert len(said["found"]) == KILLS <= said["landed"] + KILLS // 2
    assert len(set(said["found"])) >= 4, "the kills fell on too few different moments to mean anything"
    assert said["points"] >= 4 * (said["samples"] + 1)  # before and after each fsync and each replace


def test_an_unfinished_cache_does_not_open(pipe, data):
    run(pipe, data)
    (data / "images" / "cat.txt").write_text("another caption")
    broken = pipe.encode_image

    def interrupted(image):
        raise KeyboardInterrupt

    pipe.encode_image = interrupted
    with pytest.raises(KeyboardInterrupt):
        run(pipe, data)
    with pytest.raises(FileNotFoundError, match="no finished cache"):
        Precomputed.open(data / "cache")
    pipe.encode_image = broken
    assert run(pipe, data).computed == 1 and len(Precomputed.open(data / "cache")) == 5
    with pytest.raises(FileNotFoundError, match="no finished cache"):
        Precomputed.open(data / "elsewhere")


# ------------------------------------------------------------------------------------------------- the command


def command(*arguments) -> str:
    said = io.StringIO()
    with redirect_stdout(said):
        main([str(argument) for argument in arguments])
    return said.getvalue()


def test_the_command_says_what_it_did(data, capsys):
    arguments = data / "images", "--control", data / "control", "--cache", data / "cache", "--model", TINY
    arguments = (*arguments, "--device", "cpu")
    said = command(*arguments)
    assert "5 samples" in said and "5 computed, 0 reused" in said and " MB, " in said and "more files" not in said
    assert "samples/s" in capsys.readouterr().err
    assert "0 computed, 5 reused" in command(*arguments, "--quiet") and not capsys.readouterr().err
    assert "5 more files there" in command(*arguments, "--quiet", "--area", 96 * 96)
    assert "more files" not in command(*arguments, "--quiet", "--prune")
    assert "5 computed" in command(*arguments, "--quiet", "--dtype", "bfloat16")
    assert Precomputed.open(data / "cache")[0].latents.dtype == torch.bfloat16


def test_the_command_looks_at_the_data_before_it_loads_a_model(data):
    (data / "images" / "cat.txt").unlink()
    with pytest.raises(SystemExit, match="no caption cat.txt"):
        command(data / "images", "--cache", data / "cache", "--model", data / "no model")
    with pytest.raises(SystemExit, match="no such folder"):
        command(data / "gone", "--cache", data / "cache")


def test_help_runs_as_a_module():
    command = [sys.executable, "-m", "minqwen.precompute", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--control DIR" in done.stdout and "goes on" in done.stdout

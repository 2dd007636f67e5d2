"""precompute.py: the same numbers as fresh ones, nothing stale, nothing twice, whole after any interruption."""

import copy
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from unicodedata import normalize

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minqwen import precompute as library
from minqwen.files import open_weights
from minqwen.images import pack_latents
from minqwen.pipeline import QwenImagePipeline
from minqwen.precompute import EMPTY, INDEX, Precomputed, Sample, fingerprint, main, precompute
from minqwen.prompt import EDIT, EDIT_PLUS
from minqwen.run import look_at
from minqwen.vision import smart_resize
from minqwen.world import sample_edit

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "data" / "tiny"
NAMES = ["cat", "cat.v1.2", "猫 咪", "a..b", "x" * 120]
SIZES = [(64, 64), (100, 60), (40, 90), (64, 64), (60, 100)]
SUFFIXES = [".png", ".JPG", ".jpeg", ".WebP", ".PNG"]


@pytest.fixture(scope="module")
def whole():
    return QwenImagePipeline.from_pretrained(TINY, device="cpu", dtype=torch.float32)


@pytest.fixture
def pipe(whole):
    """Without a transformer, at a small working size; it counts what it encodes, and its attributes may be changed."""
    return small(whole)


def small(whole, transformer=None):
    fresh = QwenImagePipeline(transformer, whole.vae, whole.text_encoder, whole.tokenizer, whole.schedule,
                              whole.image_settings, whole.edit_template, area=40 * 40)  # fmt: skip
    fresh.prompts = []
    plain = fresh.encode_prompt
    fresh.encode_prompt = lambda prompt, images=None: fresh.prompts.append(prompt) or plain(prompt, images)
    return fresh


@pytest.fixture
def data(tmp_path):
    """Five samples, whose names and suffixes are not the plainest; `second` holds another control of each."""
    for part in ("images", "control", "second"):
        (tmp_path / part).mkdir()
    numbers = np.random.default_rng(8)
    for k, name in enumerate(NAMES):
        edit, other = sample_edit(numbers, "replace"), sample_edit(numbers, "add")
        pictures = {"images": edit.target, "control": edit.source, "second": other.target}
        for n, (part, picture) in enumerate(pictures.items(), k):
            picture.resize(SIZES[n % 5]).save(tmp_path / part / f"{name}{SUFFIXES[n % 5]}")
        (tmp_path / "images" / f"{name}.txt").write_text(f"{edit.instruction}\n", encoding="utf-8")
    return tmp_path


def run(pipe, data, cache="cache", control="control", **options) -> Precomputed:
    """control: a folder's name, several, or None."""
    folders = [data / part for part in control] if isinstance(control, list) else control and data / control
    return precompute(pipe, data / "images", folders, cache and data / cache, progress=False, **options)


def equal(a, b) -> bool:
    """Bit for bit, shapes and dtypes too."""
    if a.name != b.name or len(a.control) != len(b.control):
        return False
    one, two = ([s.latents, *s.control, s.embeds, s.empty] for s in (a, b))
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(one, two, strict=True))


def all_equal(some, others) -> bool:
    return all(equal(a, b) for a, b in zip(some, others, strict=True))


def picture_of(data, name, part="images") -> Path:
    return next(path for path in (data / part).iterdir() if path.stem == name and path.suffix != ".txt")


def change(path: Path) -> None:
    """Another picture of the same size, whatever was there."""
    ImageOps.invert(Image.open(path).convert("RGB")).save(path)


# -------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_samples_equal_fresh_ones_bit_for_bit(whole, data, dtype):
    pipe = small(whole)
    pipe.vae, pipe.text_encoder = (copy.deepcopy(part).to(dtype) for part in (whole.vae, whole.text_encoder))
    kept, memory = run(pipe, data), run(pipe, data, cache=None)
    assert kept.names == sorted(NAMES) and len(kept) == len(memory) == 5
    for name, stored, held in zip(kept.names, kept, memory, strict=True):
        assert equal(stored, held) and stored.name == name and stored.latents.dtype == dtype
        (target,), _ = pipe.resize_references([library.load_image(picture_of(data, name))])
        assert torch.equal(stored.latents, pipe.encode_image(target))
        (control,), _ = pipe.resize_references([library.load_image(picture_of(data, name, "control"))])
        assert torch.equal(stored.control[0], pipe.encode_image(control))
        caption = (data / "images" / f"{name}.txt").read_text(encoding="utf-8").strip()
        assert torch.equal(stored.embeds, pipe.encode_prompt(caption, control)[0])
        assert torch.equal(stored.empty, pipe.encode_prompt(EMPTY, control)[0])


class Stop(Exception):
    pass


def encodings_of_edit(pipe, pictures, caption, area=None):
    """What `edit` hands to its transformer: embeddings of both prompts, latents of the pictures."""
    handed = {}

    def velocity(prompts, references, *_):
        handed.update(embeds=prompts[0][0], empty=prompts[1][0], control=references)
        raise Stop

    pipe.velocity = velocity
    with pytest.raises(Stop):
        pipe.edit(pictures, caption, area=area, progress=False)
    return handed


@pytest.mark.slow
@pytest.mark.parametrize("area", [None, 48 * 80])
@pytest.mark.parametrize("template", [EDIT, EDIT_PLUS, "two"])
def test_what_edit_would_encode(whole, data, monkeypatch, template, area):
    """The same control pictures and caption; Edit-2509's smaller copies for the text encoder included."""
    monkeypatch.setattr("minqwen.pipeline.CONDITION_AREA", 32 * 32)
    pipe = small(whole, whole.transformer)
    pipe.edit_template, control = (EDIT_PLUS, ["second", "control"]) if template == "two" else (template, ["control"])
    for name in NAMES[2:]:
        for part in ("images", "control", "second"):
            picture_of(data, name, part).unlink()
        (data / "images" / f"{name}.txt").unlink()
    for i, sample in enumerate(run(pipe, data, None, control, area=area)):
        name = sorted(NAMES[:2])[i]
        caption = (data / "images" / f"{name}.txt").read_text(encoding="utf-8").strip()
        edit = encodings_of_edit(pipe, [picture_of(data, name, part) for part in control], caption, area)
        assert torch.equal(sample.embeds, edit["embeds"]) and torch.equal(sample.empty, edit["empty"])
        assert len(sample.control) == len(control)
        assert all(torch.equal(a, b) for a, b in zip(sample.control, edit["control"], strict=True))


@pytest.mark.slow
def test_several_control_pictures_come_back_from_the_disk_in_their_order(pipe, data):
    pipe.edit_template = EDIT_PLUS
    two = ["control", "second"]
    kept, memory = run(pipe, data, control=two), run(pipe, data, None, control=two)
    assert kept.computed == 5 and all_equal(kept, memory) and all_equal(Precomputed.open(data / "cache"), memory)
    assert sorted(load_file(kept.kept[0])) == ["control", "control_2", "embeds", "empty", "latents"]
    assert run(pipe, data, control=two).computed == 0
    assert run(pipe, data, control=two[::-1]).computed == 5  # another Picture 1
    assert run(pipe, data, control=two[:1]).computed == 5


def test_a_dozen_control_pictures_keep_their_order(tmp_path):
    """As names, control_10 comes before control_2."""
    control = tuple(torch.full((n,), n) for n in range(1, 13))
    many = Sample("many", torch.zeros(1), control, torch.ones(1), torch.zeros(2))
    library._write_sample(tmp_path / "many.safetensors", many, {})
    again = Precomputed(["many"], [tmp_path / "many.safetensors"])
    assert equal(again[0], many)


@contextmanager
def header_alone(path):
    """A safetensors file that gives no numbers."""
    with open_weights(path) as file:
        yield SimpleNamespace(keys=file.keys, get_slice=file.get_slice, metadata=file.metadata)


@pytest.mark.slow
def test_shapes_are_read_from_the_header_alone(pipe, data, monkeypatch):
    pipe.edit_template = EDIT_PLUS
    for control in (None, ["control", "second"]):
        memory, kept = run(pipe, data, None, control), run(pipe, data, control=control)
        widths = {"joint_attention_dim": memory[0].embeds.shape[-1]}
        sizes = [tuple(z.shape for z in (s.latents, *s.control)) for s in memory]
        with monkeypatch.context() as patch:
            patch.setattr("minqwen.run.open_weights", header_alone)
            groups, _ = look_at(kept, widths)
        assert groups == look_at(memory, widths)[0] and len(groups) == len(set(sizes)) > 1
        assert all(len({sizes[i] for i in group}) == 1 for group in groups)


@pytest.mark.slow
def test_training_on_the_cache_gives_the_same_losses(whole, pipe, data):
    """Two steps of AdamW on all weights of the transformer, once on fresh tensors, once on cached ones."""
    fresh, losses = run(pipe, data, cache=None), []
    run(pipe, data)
    for samples in (fresh, Precomputed.open(data / "cache")):
        model, generator = copy.deepcopy(whole.transformer), torch.Generator().manual_seed(0)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
        losses.append([])
        for sample in (samples[0], samples[1]):
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
    assert losses[0] == losses[1] and len(set(losses[0])) == 2


@pytest.mark.slow
def test_the_empty_prompt_depends_on_the_picture_in_an_edit_only(pipe, data):
    edits, drawings = run(pipe, data, None), run(pipe, data, None, control=None)
    assert not torch.equal(edits[0].empty[:, -6:], edits[1].empty[:, -6:])
    assert torch.equal(drawings[0].empty, drawings[1].empty) and drawings[0].empty.shape[1] == 6
    assert drawings[0].control == ()


def test_a_checkpoint_that_only_draws(pipe, data):
    pipe.edit_template = None
    made = run(pipe, data, control=None)
    assert len(made) == 5 and all_equal(made, run(pipe, data, None, control=None))
    with pytest.raises(ValueError, match="only draws; open an Edit checkpoint"):
        run(pipe, data)


def test_a_checkpoint_that_edits_one_picture_refuses_two_before_any_work(pipe, data, monkeypatch):
    with pytest.raises(ValueError, match="edits one picture, got 2; several need Edit-2509 or -2511"):
        run(pipe, data, control=["control", "second"])
    assert not pipe.prompts and not (data / "cache").exists()
    opened, plain = [], QwenImagePipeline.from_pretrained
    watched = lambda *args: opened.append(args[3]) or plain(*args)  # noqa: E731
    monkeypatch.setattr(QwenImagePipeline, "from_pretrained", watched)
    with pytest.raises(SystemExit, match="precompute: this checkpoint edits one picture, got 2"):
        command(data / "images", "--control", data / "control", data / "second", "--cache", data / "c", "--model", TINY)
    assert opened == [("transformer", "vae", "text_encoder")]  # nothing that takes minutes to load


@pytest.mark.slow
def test_the_file_says_what_it_is(pipe, data):
    kept = run(pipe, data, area=96 * 96)
    with safe_open(kept.kept[0], framework="pt") as file:
        metadata = file.metadata()
    assert sorted(metadata) == sorted("format model template area dtype pictures caption key name".split())
    assert metadata["model"] == fingerprint(pipe) and metadata["area"] == "9216" and metadata["name"] == kept.names[0]
    assert metadata["template"].startswith("<|im_start|>system") and metadata["dtype"] == "torch.float32"
    key = {name: value for name, value in metadata.items() if name not in ("key", "name")}
    assert library.cache_key(key) == metadata["key"] == kept.kept[0].stem  # whoever has the file can check its name


def test_a_cache_of_an_earlier_format_opens(data):
    tensors = {name: torch.rand(1, 16, 1, 2, 2) for name in ("latents", "control", "embeds", "empty")}
    save_file(tensors, data / "abc.safetensors")
    (data / INDEX).write_text(json.dumps({"format": "1", "samples": [["cat", "abc.safetensors"]]}))
    opened = Precomputed.open(data)
    want = Sample("cat", tensors["latents"], (tensors["control"],), tensors["embeds"], tensors["empty"])
    assert equal(opened[0], want)


# ----------------------------------------------------------------------------------------------- again, and again


@pytest.mark.slow
def test_a_second_run_computes_nothing_and_the_cache_opens_without_a_model(pipe, data):
    first = run(pipe, data)
    assert (first.computed, first.reused, len(pipe.prompts)) == (5, 0, 10)
    second = run(pipe, data)
    assert (second.computed, second.reused, len(pipe.prompts)) == (0, 5, 10)
    opened = Precomputed.open(data / "cache")
    assert opened.names == first.names and all_equal(opened, first)


@pytest.mark.slow
def test_only_what_changed_is_computed_again(pipe, data):
    first = list(run(pipe, data))
    (data / "images" / "cat.txt").write_text("words that no scene has")
    changed = run(pipe, data)
    assert (changed.computed, pipe.prompts[-2:]) == (1, ["words that no scene has", EMPTY])
    change(picture_of(data, "cat.v1.2"))
    changed = run(pipe, data)
    assert changed.computed == 1
    for before, after in zip(first, changed, strict=True):
        assert equal(before, after) == (before.name not in ("cat", "cat.v1.2"))
    change(picture_of(data, "cat", "control"))
    changed = run(pipe, data)
    assert changed.computed == 1 and all_equal(changed, run(pipe, data, None))


@pytest.mark.slow
def test_white_space_around_a_caption_and_the_samples_name_change_nothing(pipe, data):
    run(pipe, data)
    caption = data / "images" / "cat.txt"
    caption.write_text("\ufeff \n" + caption.read_text(encoding="utf-8").strip() + "\r\n\n", encoding="utf-8")
    assert run(pipe, data).computed == 0
    rename(data, "cat", "dog")
    renamed = run(pipe, data)
    assert renamed.computed == 0 and renamed[renamed.names.index("dog")].name == "dog"


def rename(data, old, new, move=Path.rename):
    for path in [*data.glob("*/*")]:
        if path.stem == old:
            move(path, path.with_name(new + path.suffix))


def another_model(pipe):
    pipe.text_encoder = copy.deepcopy(pipe.text_encoder)
    with torch.no_grad():
        pipe.text_encoder.model.layers[1].mlp.up_proj.weight[3, 5] += 2**-10


def another_scale(pipe):
    pipe.vae = copy.deepcopy(pipe.vae)
    pipe.vae.latents_mean = (*pipe.vae.latents_mean[:-1], 0.5)


def another_template(pipe):
    pipe.edit_template = EDIT_PLUS


def another_dtype(pipe):
    pipe.vae, pipe.text_encoder = (copy.deepcopy(part).bfloat16() for part in (pipe.vae, pipe.text_encoder))


@pytest.mark.slow
@pytest.mark.parametrize("other", [another_model, another_scale, another_template, another_dtype])
def test_another_model_or_template_or_dtype_is_computed_anew_and_the_way_back_is_free(pipe, data, other):
    first = list(run(pipe, data))
    before = pipe.vae, pipe.text_encoder, pipe.edit_template
    other(pipe)
    changed = run(pipe, data)
    assert changed.computed == 5 and all_equal(changed, run(pipe, data, None))
    pipe.vae, pipe.text_encoder, pipe.edit_template = before
    back = run(pipe, data)
    assert back.computed == 0 and all_equal(first, back)


@pytest.mark.slow
def test_another_size_and_another_task_are_computed_anew(pipe, data):
    run(pipe, data)
    assert run(pipe, data, area=96 * 96).computed == 5
    assert run(pipe, data, control=None).computed == 5
    assert run(pipe, data).computed == 0


@pytest.mark.slow
def test_a_fingerprint_feels_every_encoder_and_nothing_else(whole):
    pipe, before = small(whole), fingerprint(whole)
    pipe.vae, pipe.text_encoder = copy.deepcopy(whole.vae), copy.deepcopy(whole.text_encoder)
    assert fingerprint(pipe) == before  # wherever it lies in memory
    weights = [w for part in (pipe.vae.encoder, pipe.vae.quant_conv, pipe.text_encoder) for w in part.parameters()]
    for weight in weights[::7]:
        bits = weight.data.view(-1).view(torch.int32)
        bits[-1] ^= 1  # the last bit of the last number
        assert fingerprint(pipe) != before
        bits[-1] ^= 1
    rows = weights[-1].data.view(-1)
    rows[[0, 1]] = rows[[1, 0]] + torch.tensor([0.0, 1.0])
    assert fingerprint(pipe) != before
    rows[[0, 1]] = rows[[1, 0]] - torch.tensor([1.0, 0.0])
    with torch.no_grad():
        pipe.vae.decoder.conv_out.weight += 1
    pipe.transformer = None
    assert fingerprint(pipe) == before
    pipe.image_settings = pipe.image_settings | {"min_pixels": 1}
    assert fingerprint(pipe) != before


@pytest.mark.slow
def test_files_of_samples_that_are_gone_stay_until_pruned(pipe, data):
    run(pipe, data)
    rename(data, "cat", "", lambda path, _: path.unlink())
    fewer = run(pipe, data)
    assert len(fewer) == 4 and "cat" not in Precomputed.open(data / "cache").names
    assert len(list((data / "cache").glob("*.safetensors"))) == 5
    run(pipe, data, prune=True)
    assert sorted((data / "cache").glob("*.safetensors")) == sorted(fewer.kept)


@pytest.mark.slow
def test_equal_samples_are_computed_once(pipe, data):
    rename(data, "cat", "twin", shutil.copy)
    made = run(pipe, data)
    assert (len(made), made.computed, len(pipe.prompts)) == (6, 5, 10)
    assert made[made.names.index("twin")].name == "twin"


@pytest.mark.slow
def test_a_damaged_file_is_computed_again(pipe, data):
    kept = run(pipe, data)
    want = list(run(pipe, data, None))  # not the cached ones, which are mapped from the files
    kept.kept[0].write_bytes(kept.kept[0].read_bytes()[:-1])
    kept.kept[1].write_bytes(b"")
    shutil.copy(kept.kept[3], kept.kept[2])
    kept.kept[4].unlink()
    again = run(pipe, data)
    assert again.computed == 4 and all_equal(want, again)


# ------------------------------------------------------------------------------------------------ wrong data


def test_everything_that_is_wrong_is_named_at_once_before_any_work(pipe, data):
    pipe.edit_template = EDIT_PLUS
    shutil.copy(picture_of(data, "a..b"), data / "images" / "a..b.png")
    shutil.copy(picture_of(data, "a..b", "control"), data / "control" / "a..b.jpeg")
    broken = picture_of(data, "猫 咪")
    broken.write_bytes(broken.read_bytes()[:-200])
    (data / "images" / "cat.txt").unlink()
    (data / "images" / "cat.v1.2.txt").write_bytes(b"caf\xe9")
    picture_of(data, "cat.v1.2", "control").unlink()
    picture_of(data, "猫 咪", "second").unlink()
    shutil.copy(picture_of(data, "cat"), data / "control" / "orphan.png")
    Image.new("RGB", (3000, 10)).save(picture_of(data, "x" * 120))
    picture_of(data, "cat", "second").rename(data / "second" / "dog.png")
    with pytest.raises(ValueError) as caught:
        run(pipe, data, control=["control", "second"])
    complaint = str(caught.value)
    for words in (
        "11 problem(s)",
        "a..b.png: has the same name as a..b.WebP",
        "a..b.jpeg",
        "猫 咪.jpeg: cannot read as a picture: image file is truncated",
        "cat.png: no caption cat.txt",
        "cat.v1.2.txt: says nothing, or is no text in UTF-8",
        f"cat.v1.2.JPG: no control picture cat.v1.2 in {data / 'control'}",
        f"猫 咪.jpeg: no control picture 猫 咪 in {data / 'second'}",
        f"cat.png: no control picture cat in {data / 'second'}",
        "orphan.png: a control for no target",
        "dog.png: a control for no target",
        "xxx.PNG: 3000x10 pixels: one side is over 200 times the other at work, crop first",
    ):
        assert words in complaint, words
    assert complaint.splitlines()[1:] == sorted(complaint.splitlines()[1:])  # what concerns a file stands together
    assert not pipe.prompts and not (data / "cache").exists()


def test_an_empty_folder_a_missing_folder_and_a_reserved_token(pipe, data):
    (data / "nothing").mkdir()
    with pytest.raises(ValueError, match="no pictures"):
        precompute(pipe, data / "nothing")
    with pytest.raises(FileNotFoundError, match="No such file or directory: .*gone"):
        precompute(pipe, data / "gone")
    with pytest.raises(FileNotFoundError, match="gone"):
        precompute(pipe, data / "images", data / "gone")
    (data / "images" / "cat.txt").write_text("a <|image_pad|>")
    with pytest.raises(ValueError, match="cat.txt: holds .*stands for a picture"):
        run(pipe, data)


def test_other_files_are_left_alone_and_what_might_have_counted_is_said(data, capsys):
    images = data / "images"
    (images / "._cat.png").write_bytes(b"what a Mac leaves behind")
    (images / "notes.md").write_text("notes")
    (images / "lost.txt").write_text("a caption")
    (images / "sub.png").mkdir()
    Image.new("RGB", (8, 8)).save(images / "more.bmp")
    assert len(library.find_sources(images, data / "control")) == 5
    why = "neither .png .jpg .jpeg .webp nor .txt"
    names = f"'more.bmp' ({why}), 'notes.md' ({why}), 'sub.png' (a folder), 'lost.txt' (no picture has this name)"
    assert capsys.readouterr().err == f"left out: {names}\n"
    for name in ("a.GIF", "b.heic", "c\nd.tif"):
        (images / name).write_bytes(b"any")
    assert len(library.find_sources(images)) == 5
    said = capsys.readouterr().err
    assert said.startswith(f"left out: 'a.GIF' ({why}), 'b.heic' ({why}), 'c\\nd.tif' ({why})")
    assert said.endswith(f"'notes.md' ({why}), and 2 more\n") and said.count("\n") == 1


def test_links_to_nothing_are_left_out_and_a_folder_of_controls_is_not(data, capsys):
    images = data / "images"
    (data / "control").rename(images / "control")
    try:
        (images / "gone.png").symlink_to(data / "nowhere.png")
    except OSError:
        pytest.skip("no links on this system")
    assert len(library.find_sources(images, images / "control")) == 5
    assert capsys.readouterr().err == "left out: 'gone.png' (a dead link)\n"


def test_a_control_picture_of_another_suffix_is_named(data):
    Image.open(picture := picture_of(data, "cat", "control")).save(data / "control" / "cat.bmp")
    picture.unlink()
    wanted = f"no control picture cat in {data / 'control'} (cat.bmp is left out: neither .png .jpg"
    with pytest.raises(ValueError) as caught:
        library.find_sources(data / "images", data / "control")
    assert wanted in str(caught.value)


@pytest.mark.parametrize(("target", "caption", "control"), [("NFC", "NFD", "NFC"), ("NFD", "NFC", "NFC"),
                                                            ("NFC", "NFC", "NFD")])  # fmt: skip
@pytest.mark.parametrize("name", ["café", "각하", "ガラス", "Å.v1"])
def test_accents_may_be_composed_or_taken_apart(tmp_path, name, target, caption, control):
    (tmp_path / "control").mkdir()
    paths = [tmp_path / f"{normalize(target, name)}.png", tmp_path / "control" / f"{normalize(control, name)}.png"]
    for path in paths:
        Image.new("RGB", (32, 32)).save(path)
    (tmp_path / f"{normalize(caption, name)}.txt").write_text("a caption")
    (source,) = library.find_sources(tmp_path, tmp_path / "control")
    assert source.name == normalize("NFC", name) and list(source.pictures) == paths


def test_two_forms_of_one_name_are_one_name(tmp_path):
    for form in ("NFC", "NFD"):
        Image.new("RGB", (32, 32)).save(tmp_path / f"{normalize(form, 'café')}.png")
    if len(list(tmp_path.iterdir())) == 1:
        pytest.skip("this file system knows one form")
    (tmp_path / "café.txt").write_text("a caption")
    with pytest.raises(ValueError, match="has the same name as"):
        library.find_sources(tmp_path)


@pytest.mark.parametrize("suffix", [".png", ".txt", ".JPG"])
def test_names_that_are_no_utf_8_are_named_before_any_work(data, suffix):
    try:
        (data / "images" / os.fsdecode(b"caf\xe9" + suffix.encode())).write_bytes(b"")
    except (OSError, UnicodeError):
        pytest.skip("this file system takes no such names")
    with pytest.raises(ValueError, match=rf"caf.udce9{suffix}': its name is no UTF-8: rename it") as caught:
        library.find_sources(data / "images")
    str(caught.value).encode()  # and any console can print it


NOTHING = [b"", b"\xef\xbb\xbf", b" \t\r\n\n", bytes(64), "\u200b\u3000".encode(), b"a cat\0", b"a\0 \0c\0a\0t\0"]


@pytest.mark.parametrize("words", NOTHING)
def test_captions_that_say_nothing_are_named(data, words):
    (data / "images" / "cat.txt").write_bytes(words)
    with pytest.raises(ValueError, match=r"cat\.txt: says nothing, or is no text in UTF-8: write a caption"):
        library.find_sources(data / "images")


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1", "gbk", "shift-jis"])
def test_captions_in_other_encodings_are_named(data, encoding):
    words = {"gbk": "画一只猫", "shift-jis": "猫です"}.get(encoding, "un café")
    (data / "images" / "cat.txt").write_bytes(words.encode(encoding))
    with pytest.raises(ValueError, match=r"cat\.txt: "):
        library.find_sources(data / "images")


@pytest.mark.parametrize("words", ["a", "猫", "🐈", "a\tcat\n on\n a mat", " é "])
def test_captions_that_say_little_are_captions(data, words):
    (data / "images" / "cat.txt").write_bytes(words.encode())
    sources = {source.name: source.caption for source in library.find_sources(data / "images")}
    assert sources["cat"] == words.strip()


@pytest.mark.parametrize("size", [(5, 930), (930, 5), (10, 1990), (6000, 31)])
def test_pictures_that_are_too_long_at_work_are_named_with_their_size(data, size):
    """Within 200 as they are given; rounded to multiples of 32 they are beyond, and no text encoder looks at them."""
    Image.new("RGB", size).save(picture_of(data, "cat", "control"))
    folders = data / "images", data / "control"
    with pytest.raises(ValueError, match=rf"cat\.\w+: {size[0]}x{size[1]} pixels: .*crop first"):
        library.find_sources(*folders, area=1024 * 1024, template=EDIT)
    assert library.find_sources(*folders, area=1024 * 1024, template=EDIT_PLUS)  # looks at smaller copies
    assert library.find_sources(*folders, area=64 * 64, template=EDIT)


@pytest.mark.parametrize("part", ["images", "control"])
@pytest.mark.parametrize("template", [EDIT, EDIT_PLUS])
def test_pictures_over_200_times_as_long_as_wide_are_named_with_their_size(data, part, template):
    Image.new("RGB", (5, 1001)).save(picture_of(data, "cat", part))
    with pytest.raises(ValueError, match=r"1 problem.*\n.*cat\.\w+: 5x1001 pixels: .*crop first"):
        library.find_sources(data / "images", data / "control", 64 * 64, template)


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [3, 40, 150, 163, 164, 186, 199])
def test_what_is_refused_for_its_length_is_what_the_text_encoder_refuses(pipe, ratio, tmp_path):
    area = 256 * 256
    Image.new("RGB", (10, 10 * ratio)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a caption")
    try:
        library.find_sources(tmp_path, tmp_path, area, EDIT)
        named = False
    except ValueError:
        named = True
    (image,), _ = pipe.resize_references([library.load_image(tmp_path / "a.png")], area)
    try:
        smart_resize(image.height, image.width)
        refused = False
    except ValueError:
        refused = True
    assert named == refused


@pytest.mark.parametrize("area", [0, -1, float("nan")])
def test_an_area_that_is_none_is_refused_before_any_work(pipe, data, area):
    with pytest.raises(ValueError, match="area must be a number"):
        run(pipe, data, area=area)
    assert not pipe.prompts


@pytest.mark.slow
def test_a_picture_changed_meanwhile_is_refused(pipe, data, monkeypatch):
    plain = library.find_sources

    def find_then_change(*folders):
        found = plain(*folders)
        change(picture_of(data, "cat"))
        return found

    monkeypatch.setattr(library, "find_sources", find_then_change)
    with pytest.raises(ValueError, match="cat.png was changed while"):
        run(pipe, data)
    monkeypatch.undo()
    assert all_equal(run(pipe, data), run(pipe, data, None))


def test_a_pipeline_without_what_is_needed(pipe, data):
    pipe.vae = None
    with pytest.raises(ValueError, match="only the transformer may be left out"):
        run(pipe, data)


def test_parts_can_be_left_out_and_are_named_when_missed():
    pipe = QwenImagePipeline.from_pretrained(TINY, device="cpu", dtype=torch.float32, without="transformer")
    assert pipe.transformer is None and pipe.dtype == torch.float32 and pipe.device.type == "cpu"
    with pytest.raises(ValueError, match="without its transformer"):
        pipe.generate("a cat", progress=False)
    with pytest.raises(ValueError, match="only transformer, vae, text_encoder can be left out"):
        QwenImagePipeline.from_pretrained(TINY, without="unet")


@pytest.mark.slow
def test_the_transformers_files_are_not_even_looked_for(tmp_path, data):
    shutil.copytree(TINY, tmp_path / "small", ignore=shutil.ignore_patterns("transformer"))
    pipe = QwenImagePipeline.from_pretrained(tmp_path / "small", device="cpu", without="transformer")
    assert len(run(pipe, data, None, area=32 * 32)) == 5


# ------------------------------------------------------------------------------------------------ interruptions


@pytest.fixture
def quick(pipe, data, monkeypatch):
    """Two samples, and a made-up encoder: what is tried here are the files. Returns its list of calls."""
    for name in NAMES[2:]:
        rename(data, name, "", lambda path, _: path.unlink())
    calls = []

    def encode(pipe, source, area):
        calls.append(source.name)
        value = torch.full((1, 16, 1, 2, 2), float(len(source.caption)))
        return Sample(source.name, value, (value + 1,), value + 2, value + 3)

    monkeypatch.setattr(library, "encode_sample", encode)
    return calls


def contents(cache: Path) -> dict:
    """Tensors and metadata of each file, not its bytes: the order in which safetensors writes metadata is not fixed."""
    found = {}
    for path in sorted(cache.iterdir()):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="np") as file:
                tensors = {name: file.get_tensor(name).tobytes() for name in file.keys()}
                found[path.name] = tensors, file.metadata()
        elif path.name != ".lock":
            found[path.name] = path.read_bytes()
    return found


def finish(pipe, data, cache, calls) -> dict:
    """The run after an interruption: what is there already stays as it is, and is computed no more."""
    there = {path: path.stat().st_mtime_ns for path in (data / cache).glob("*.safetensors")}
    calls.clear()
    done = run(pipe, data, cache)
    assert done.reused == len(there) and done.computed == len(calls) == 2 - len(there)
    assert all(path.stat().st_mtime_ns == when for path, when in there.items())
    return contents(data / cache)


class Killed(BaseException):
    """Nothing catches it, and no file changes after it."""


def kill_at(patch, name: str, nth: int, before: bool) -> None:
    """Let the process die before or after the nth call of fsync, replace or unlink."""
    state = {"dead": False, "calls": 0}

    def dying(own, plain):
        def call(first, *args, **options):
            if isinstance(first, Path) and first.name == ".lock":
                return plain(first, *args, **options)  # the system takes the lock off
            state["calls"] += own == name
            last = own == name and state["calls"] == nth
            if state["dead"] or (last and before):
                state["dead"] = True
                raise Killed
            try:
                return plain(first, *args, **options)
            finally:
                if last:
                    state["dead"] = True
                    raise Killed

        return call

    patch.setattr(os, "fsync", dying("fsync", os.fsync))
    patch.setattr(os, "replace", dying("replace", os.replace))
    patch.setattr(Path, "unlink", dying("unlink", Path.unlink))


@pytest.mark.slow
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("name", ["fsync", "replace", "unlink"])
def test_ended_at_any_call_that_changes_a_file_a_run_resumes_to_the_uninterrupted_result(
    pipe, data, quick, monkeypatch, name, before
):
    run(pipe, data, "straight")
    want, points = contents(data / "straight"), 0
    for nth in range(1, 99):
        cache = f"{nth}"
        if name == "unlink":  # an index and a killed run's leavings to be taken away
            run(pipe, data, cache)
            next((data / cache).glob("*.safetensors")).unlink()
            (data / cache / ".half.part").write_bytes(b"half")
        with monkeypatch.context() as patch:
            kill_at(patch, name, nth, before)
            try:
                run(pipe, data, cache)
                break
            except Killed:
                points += 1
        assert finish(pipe, data, cache, quick) == want
    assert points >= 3  # two samples and the index


@pytest.mark.slow
def test_two_runs_on_one_folder_take_turns(pipe, data, quick, capsys):
    (data / "cache").mkdir()
    done = []
    with FileLock(data / "cache" / ".lock"):
        other = threading.Thread(target=lambda: done.append(run(pipe, data)))
        other.start()
        said, until = "", time.monotonic() + 60
        while "another run works on" not in said and time.monotonic() < until:
            time.sleep(0.01)
            said += capsys.readouterr().out
        assert "waiting for it" in said and not quick
    other.join()
    assert done[0].computed == 2 and run(pipe, data).computed == 0


# One process that imports once, and forks: each child kills itself at another moment; then three work at once.
KILLER = """
import os, signal, sys, time
from pathlib import Path
from types import SimpleNamespace
import torch
from minqwen import precompute as library
from minqwen.pipeline import QwenImagePipeline

torch.set_num_threads(1)
data = Path(sys.argv[1])
pipe = QwenImagePipeline.from_pretrained(sys.argv[2], "cpu", torch.float32, without="transformer")
pipe.area = 32 * 32
save, replace = library.save_weights, os.replace

def work(cache):
    return library.precompute(pipe, data / "images", data / "control", data / cache, progress=False)

def forked(cache, fault=lambda: None):
    child = os.fork()
    if child == 0:
        fault()
        work(cache)
        os._exit(0)
    return child

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)

def half_a_file():
    def half(tensors, path, metadata):
        save(tensors, path, metadata)
        Path(path).write_bytes(Path(path).read_bytes()[:500])
        die()
    library.save_weights = half

def before_a_name(nth):
    left = [nth]
    def rename(*paths):
        left[0] -= 1
        die() if left[0] < 0 else replace(*paths)
    os.replace = rename

def tensors(sample):
    return [sample.latents, *sample.control, sample.embeds, sample.empty]

want = list(work("straight"))
for n, fault in enumerate([half_a_file, lambda: before_a_name(1), lambda: before_a_name(len(want))]):
    assert os.waitpid(forked(f"killed{n}", fault), 0)[1] == signal.SIGKILL
    there = len(list((data / f"killed{n}").glob("*.safetensors")))
    assert there == [0, 1, len(want)][n] and not (data / f"killed{n}" / library.INDEX).exists()
    assert any((data / f"killed{n}").glob(".*.part"))
    done = work(f"killed{n}")
    assert done.reused == there and not any((data / f"killed{n}").glob(".*.part"))
    for a, b in zip(done, want, strict=True):
        assert a.name == b.name and all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))
assert all(os.waitpid(child, 0)[1] == 0 for child in [forked("together") for _ in range(3)])
assert work("together").reused == len(want)
print("whole")
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_that_is_killed_resumes_and_three_at_once_take_turns(data):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run([sys.executable, "-c", KILLER, data, TINY], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "whole", done.stderr[-3000:]


@pytest.mark.slow
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
    out = io.StringIO()
    with redirect_stdout(out):
        main([str(argument) for argument in arguments])
    return out.getvalue()


@pytest.mark.slow
def test_the_command_says_what_it_did(data, capsys):
    arguments = data / "images", "--control", data / "control", "--cache", data / "cache", "--model", TINY
    arguments = (*arguments, "--device", "cpu")
    out = command(*arguments, "--area", 32 * 32)
    assert "5 samples" in out and "5 computed, 0 reused" in out and "more files" not in out
    assert "samples/s" in capsys.readouterr().err
    assert "0 computed, 5 reused" in command(*arguments, "--quiet", "--area", 32 * 32) and not capsys.readouterr().err
    out = command(*arguments, "--quiet", "--dtype", "bfloat16", "--area", 32 * 32)
    assert "5 computed" in out and "5 more files there" in out
    assert Precomputed.open(data / "cache")[0].latents.dtype == torch.bfloat16
    assert "more files" not in command(*arguments, "--quiet", "--prune", "--area", 32 * 32)


def test_the_command_looks_at_the_data_before_it_loads_a_model(data, monkeypatch):
    (data / "images" / "cat.txt").unlink()
    opened, plain = [], QwenImagePipeline.from_pretrained
    watched = lambda *args: opened.append(args[3]) or plain(*args)  # noqa: E731
    monkeypatch.setattr(QwenImagePipeline, "from_pretrained", watched)
    with pytest.raises(SystemExit, match="no caption cat.txt"):
        command(data / "images", "--cache", data / "cache", "--model", TINY)
    with pytest.raises(SystemExit, match="No such file or directory: .*gone"):
        command(data / "gone", "--cache", data / "cache", "--model", TINY)
    assert opened == [("transformer", "vae", "text_encoder")] * 2


WRONG = [
    ("--area", "0", "from 1024 to"), ("--area", "-5", "from 1024 to"), ("--area", "1023", "from 1024 to"),
    ("--area", "1e6", "a whole number"), ("--area", "nan", "a whole number"), ("--dtype", "float16", "invalid choice"),
    ("--device", "cuda:99", "there is no"), ("--device", "tpu", "there is no"),
]  # fmt: skip


@pytest.mark.parametrize(("option", "value", "words"), WRONG)
def test_a_wrong_option_is_one_line(data, capsys, option, value, words):
    with pytest.raises(SystemExit) as ended:
        command(data / "images", "--cache", data / "cache", "--model", TINY, f"{option}={value}")
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1
    assert said.startswith(f"precompute: argument {option}: ") and words in said


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_console_that_lacks_the_letters_of_a_name_costs_nothing(tmp_path, encoding):
    images = tmp_path / "图像"
    (images / "文件夹").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(images / "猫.png")
    (images / "猫.txt").write_text("a cat")
    words = [images, "--cache", tmp_path / "缓存", "--model", TINY, "--device", "cpu"]
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "minqwen.precompute", *words], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"1 samples of about 96x96 pixels in" in done.stdout
    assert b"left out: " in done.stderr and b"Traceback" not in done.stderr


def test_an_interrupted_command_says_how_to_go_on(data, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(library, "encode_sample", interrupted)
    with pytest.raises(SystemExit) as ended:
        command(data / "images", "--cache", data / "cache", "--model", TINY, "--device", "cpu", "--quiet")
    assert ended.value.code == 1
    assert capsys.readouterr().err == "precompute: interrupted; run it again to go on\n"


def test_help_runs_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["precompute", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(library.__file__, run_name="__main__")
    assert ended.value.code == 0
    assert "--control DIR [DIR ...]" in (out := capsys.readouterr().out) and "goes on" in out


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", '{"samples": 3}', '{"samples": [["a"]]}', "{}", '{"samples": [["a", "../a.safetensors"]]}',
     '{"samples": [["a", null]]}'],
)  # fmt: skip
def test_a_damaged_index_is_named(tmp_path, content):
    (tmp_path / INDEX).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=INDEX):
        Precomputed.open(tmp_path)

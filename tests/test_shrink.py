"""shrink.py: the folder opens and paints; killed anywhere and run again it ends in the same bytes."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hub import ask_only, serving
from huggingface_hub import hf_hub_download
from PIL import Image
from safetensors.torch import load_file, save_file

from minqwen import shrink as library
from minqwen.checkpoint import Checkpoint
from minqwen.finetune import finetune, flow_loss, make_batch
from minqwen.lora import adapters, add_lora, load_lora, merge_lora
from minqwen.pipeline import QwenImagePipeline
from minqwen.precompute import Sample
from minqwen.quantize import FORMAT, QuantizedLinear, quantize_blocks
from minqwen.shrink import main, shrink
from minqwen.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "data" / "tiny"
LORA = TINY / "edit_plus_lora.safetensors"
pytestmark = pytest.mark.slow  # all of them together, for the folder that they share


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """The tiny checkpoint at 4 bits."""
    out = tmp_path_factory.mktemp("shrunk") / "small"
    shrink(TINY, out, progress=False)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights(folder: Path, component: str) -> dict[str, torch.Tensor]:
    return {name: t for path in (folder / component).glob("*.safetensors") for name, t in load_file(path).items()}


def edited(pipe) -> np.ndarray:
    options = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "progress": False}
    scene = Image.open(ROOT / "data/pictures/scene.png")
    return np.asarray(pipe.edit(scene, "replace the cat with a fox", **options), int)


def test_it_opens_as_the_same_model_quantized_in_memory(small):
    pipe, plain = (QwenImagePipeline.from_pretrained(folder, device="cpu") for folder in (small, TINY))
    for part in (plain.transformer, plain.text_encoder):
        quantize_blocks(part, 4)
    assert (edited(pipe) == edited(plain)).all()
    for way in ("turns", "stream"):
        away = QwenImagePipeline.from_pretrained(small, device="cpu", memory=way)
        assert abs(edited(away) - edited(pipe)).max() <= 1


def test_what_is_not_quantized_stays_as_it_was(small):
    for component in ("transformer", "text_encoder", "vae"):
        before, after = weights(TINY, component), weights(small, component)
        assert before.keys() <= after.keys()
        kept = [name for name in before if before[name].dtype == after[name].dtype]
        assert kept and all(torch.equal(before[name], after[name]) for name in kept)
        scales = [name for name in after if name not in before]
        assert len(before) - len(kept) == sum(name.endswith(".weight_scale") for name in scales)
    names = ("tokenizer/vocab.json", "scheduler/scheduler_config.json", "processor/preprocessor_config.json")
    assert all((small / name).read_bytes() == (TINY / name).read_bytes() for name in names)
    index = json.loads((small / "model_index.json").read_text(encoding="utf-8"))
    assert index.pop("_shrunk")["bits"] == 4
    assert index == json.loads((TINY / "model_index.json").read_text(encoding="utf-8"))


def test_cut_off_anywhere_it_ends_in_the_same_bytes(small, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def dying(function):
        def call(*args, **options):
            writes.append(1)
            if len(writes) == run:
                raise Killed
            return function(*args, **options)

        return call

    monkeypatch.setattr(library, "save_file", dying(library.save_file))
    monkeypatch.setattr(library, "write_json", dying(library.write_json))
    out = tmp_path / "small"
    run, whole = 0, out / "model_index.json"
    while not whole.exists():
        run, writes = run + 1, []  # the first run dies at its first file, the second at its second, and so on
        with suppress(Killed):
            shrink(TINY, out, progress=False)
    assert run > 5
    assert {k: v for k, v in contents(out).items() if ".part" not in k} == contents(small)
    before = contents(out)
    monkeypatch.undo()
    shrink(str(TINY) + "/", out, progress=False)  # and once more: nothing to do
    assert contents(out) == before
    (out / "transformer/diffusion_pytorch_model-00002-of-00007.safetensors").unlink()
    shrink(TINY, out, progress=False)  # a file that was lost comes again
    assert contents(out) == before


def test_from_the_hub_it_is_the_same_and_reads_each_byte_once(small, tmp_path, monkeypatch, capsys):
    with serving(TINY) as hub:
        ask_only(hub, tmp_path / "cache", monkeypatch)
        shrink("owner/name", tmp_path / "small", progress=False)
    ours, theirs = contents(tmp_path / "small"), contents(small)
    assert ours.keys() == theirs.keys()
    assert ours == theirs
    assert "owner/name: reads 20.3MB, writes 13.6MB to" in capsys.readouterr().out
    sizes = sum(path.stat().st_size for path in TINY.glob("*/*.safetensors"))
    assert hub.sent_weights() < 1.05 * sizes


def test_without_a_network_the_cache_need_not_hold_what_is_optional(tmp_path, monkeypatch):
    names = [f"{folder}/{name}" for folder, names in library.SMALL_FILES.items() for name in names]
    needed = {name for name in names if Path(name).name not in library.OPTIONAL}
    with serving(TINY) as hub:
        ask_only(hub, tmp_path / "cache", monkeypatch)
        for name in needed:
            hf_hub_download("owner/name", name)
    library.write_small_files(Checkpoint("owner/name"), tmp_path)
    written = {name for name in names if (tmp_path / name).exists()}
    assert written == needed and all((tmp_path / n).read_bytes() == (TINY / n).read_bytes() for n in needed)
    load_tokenizer(tmp_path / "tokenizer")
    (next(tmp_path.glob("cache/*/snapshots/*")) / "tokenizer" / "merges.txt").unlink()
    with pytest.raises(ConnectionError, match="tokenizer/merges.txt of owner/name.*name a folder"):
        library.write_small_files(Checkpoint("owner/name"), tmp_path)


def test_a_lora_is_merged_first(tmp_path):
    shrink(TINY, tmp_path / "small", 8, LORA, 0.5, progress=False)
    pipe, plain = (QwenImagePipeline.from_pretrained(f, "cpu", torch.bfloat16) for f in (tmp_path / "small", TINY))
    load_lora(plain.transformer, LORA, 0.5)
    merge_lora(plain.transformer)
    quantize_blocks(plain.transformer, 8)
    ours, theirs = pipe.transformer.state_dict(), plain.transformer.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_adapter_trains_on_four_bits_as_on_the_unpacked_weights(small):
    gradients = []
    for unpack in (False, True):
        pipe = QwenImagePipeline.from_pretrained(small, device="cpu", without="vae")
        embeds, _ = pipe.encode_prompt("replace the cat with a fox")
        latents = torch.randn(1, 16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        if unpack:
            for name, layer in list(pipe.transformer.named_modules()):
                if isinstance(layer, QuantizedLinear):
                    plain = torch.nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
                    plain.weight.data = layer.unpacked()
                    plain.bias.data = layer.bias
                    pipe.transformer.set_submodule(name, plain)
        chance = torch.Generator().manual_seed(1)
        parameters = add_lora(pipe.transformer, 2, targets=("to_q", "img_mod.1"), generator=chance)
        for layer in adapters(pipe.transformer).values():
            layer.lora_B.weight.data.fill_(0.1)
        batch = make_batch([Sample("", latents, (), embeds, embeds)])
        noise = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(2))
        flow_loss(pipe.transformer, batch, torch.tensor([0.7]), noise).sum().backward()
        gradients.append([p.grad for p in parameters])
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_its_own_weights_are_not_trained(small):
    pipe = QwenImagePipeline.from_pretrained(small, device="cpu", without=("vae", "text_encoder"))
    sample = Sample("", torch.zeros(1, 16, 1, 8, 8), (), torch.zeros(1, 3, 128), torch.zeros(1, 3, 128))
    with pytest.raises(ValueError, match="give a rank, for adapters on them"):
        finetune(pipe, [sample], steps=1, rank=0, progress=False)


# ------------------------------------------------------------------------------------------------ what is refused


def test_a_run_that_waited_for_another_looks_again(small, tmp_path, monkeypatch, capsys):
    """What the other one made is whole, and is not begun anew."""
    out = tmp_path / "small"

    def slow(folder):
        shutil.copytree(small, folder, dirs_exist_ok=True)  # the other run ends while this one waits
        return nullcontext()

    monkeypatch.setattr(library, "locked", slow)
    monkeypatch.setattr(library, "write_json", lambda *_: pytest.fail("it was begun anew"))
    shrink(TINY, out, progress=False)
    assert "is whole already" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds something else"):
        shrink(TINY, tmp_path / "other", bits=8, progress=False)


def test_another_request_for_the_same_folder_is_refused(small, tmp_path):
    with pytest.raises(ValueError, match="holds something else .bits 4.: name another folder"):
        shrink(TINY, small, 8, progress=False)
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="is not empty: name another folder"):
        shrink(TINY, tmp_path, progress=False)
    with pytest.raises(ValueError, match="holds something else"):
        shrink(TINY, TINY, progress=False)


def test_what_was_refused_leaves_nothing_behind(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        shrink(TINY, tmp_path / "small", lora=tmp_path / "gone.safetensors", progress=False)
    assert not (tmp_path / "small").exists()


def test_another_source_of_the_same_name_is_another(tmp_path, monkeypatch):
    for name in ("a", "b"):
        shutil.copytree(TINY, tmp_path / name / "here")
    other = tmp_path / "b/here/transformer/diffusion_pytorch_model.safetensors"
    tensors = {name: tensor * 2 for name, tensor in load_file(other).items()}
    save_file(tensors, other)
    monkeypatch.chdir(tmp_path / "a")
    shrink("here", tmp_path / "small", progress=False)
    monkeypatch.chdir(tmp_path / "b")
    with pytest.raises(ValueError, match="holds something else .of "):
        shrink("here", tmp_path / "small", progress=False)


def test_what_is_shrunk_already_is_refused(small, tmp_path):
    with pytest.raises(ValueError, match="is shrunk already: transformer/ holds"):
        shrink(small, tmp_path / "smaller", progress=False)


def test_a_folder_of_another_version_is_refused(small, tmp_path):
    shutil.copytree(small, tmp_path / "newer")
    index = json.loads((small / "model_index.json").read_text(encoding="utf-8"))
    index["_shrunk"]["format"] = FORMAT + 1
    (tmp_path / "newer/model_index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ValueError, match=f"format {FORMAT + 1}.*this minqwen reads format {FORMAT}"):
        QwenImagePipeline.from_pretrained(tmp_path / "newer", device="cpu")


def test_a_half_written_folder_is_refused(small, tmp_path):
    shutil.copytree(small, tmp_path / "half")
    (tmp_path / "half/model_index.json").rename(tmp_path / "half/unfinished.json")
    with pytest.raises(FileNotFoundError, match="has no model_index.json: python -m minqwen.shrink left it unfinished"):
        QwenImagePipeline.from_pretrained(tmp_path / "half", device="cpu")


def test_a_damaged_block_is_named(small, tmp_path):
    shutil.copytree(small, tmp_path / "out")
    index = json.loads((small / "model_index.json").read_text(encoding="utf-8"))
    (tmp_path / "out/model_index.json").unlink()
    (tmp_path / "out/unfinished.json").write_text(json.dumps(index["_shrunk"]), encoding="utf-8")
    block = tmp_path / "out/transformer/diffusion_pytorch_model-00003-of-00007.safetensors"
    block.write_bytes(block.read_bytes()[:1000])
    with pytest.raises(ValueError, match="00003-of-00007.safetensors is damaged .*: fetch it, or make it, again"):
        shrink(TINY, tmp_path / "out", progress=False)


@pytest.mark.parametrize("content", ["", "[]", '{"_shrunk": null}', '{"_shrunk": [1]}', '{"_shrunk": "x"}'])
def test_a_damaged_index_of_the_folder_is_named(tmp_path, content):
    (tmp_path / "model_index.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="model_index.json"):
        shrink(TINY, tmp_path, progress=False)


@pytest.mark.parametrize("content", ["", "{}", '{"weight_map": null}', '{"weight_map": {"a": 3}}'])
def test_a_damaged_index_of_weights_is_named(small, tmp_path, content):
    folder = shutil.copytree(small, tmp_path / "small")
    index = next(folder.glob("transformer/*.index.json"))
    index.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=index.name):
        shrink(TINY, folder, progress=False)


def test_a_lora_that_fits_nothing_is_named(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="other.safetensors: is it for another model"):
        shrink(TINY, tmp_path / "small", lora=tmp_path / "other.safetensors", progress=False)


def test_a_console_that_lacks_the_folders_letters(small, tmp_path):
    folder = shutil.copytree(small, tmp_path / "缓存")
    words = [sys.executable, "-m", "minqwen.shrink", TINY, folder]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | {"PYTHONIOENCODING": "cp1252"}, capture_output=True)
    assert done.returncode == 0 and b"?? is whole already" in done.stdout


def test_a_full_disk_is_found_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(library.shutil, "disk_usage", lambda path: type("", (), {"free": 10**6})())
    with pytest.raises(OSError, match=r"writes \d.*MB to .*, where 1.00MB are free"):
        shrink(TINY, tmp_path / "small", progress=False)
    assert not list((tmp_path / "small").rglob("*.safetensors"))


def test_a_lora_for_another_width_is_refused(tmp_path):
    layer, file = "transformer_blocks.0.attn.to_q", tmp_path / "other.safetensors"
    save_file({f"{layer}.lora_A.weight": torch.zeros(2, 64), f"{layer}.lora_B.weight": torch.zeros(64, 2)}, file)
    with pytest.raises(ValueError, match="to_q"):
        shrink(TINY, tmp_path / "small", lora=file, progress=False)


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["nowhere", "out"], 1, "nowhere is neither a folder nor a hub repository"),
        ([str(TINY), "out", "--bits", "5"], 2, "argument --bits: invalid choice: 5"),
        ([str(TINY), "out", "--lora", "gone.safetensors"], 1, "gone.safetensors"),
        ([str(TINY), "out", "--lora-scale", "0.5"], 2, "--lora-scale without --lora"),
        ([str(TINY), "odd\udcff"], 1, "is no text in UTF-8"),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(tmp_path, monkeypatch, capsys, arguments, status, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(arguments)
    text = capsys.readouterr().err + (end.value.code if isinstance(end.value.code, str) else "")
    assert said in text and text.strip().count("\n") == 0
    assert (end.value.code if isinstance(end.value.code, int) else 1) == status


def test_the_checkpoint_knows_its_bytes():
    sizes = Checkpoint(TINY).stored_bytes("transformer")
    assert sum(sizes.values()) == sum(2 * np.prod(shape) for shape in Checkpoint(TINY).shapes("transformer").values())

"""checkpoint.py: folders and a hub in the released layout, strictly; nothing damaged, pickled or outside is opened.

The hub is a small server on this machine, which counts the bytes that it sends.
"""

import json
import re
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLQwenImage as ReferenceVAE
from diffusers import QwenImageTransformer2DModel as Reference
from hub import Hub
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from reference import TOLERANCE, difference, randomise_
from safetensors.torch import load_file, save_file

from minqwen.checkpoint import Checkpoint
from minqwen.transformer import QwenImageTransformer2DModel
from minqwen.vae import AutoencoderKLQwenImage

CONFIG = {
    "in_channels": 8,
    "out_channels": 2,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "axes_dims_rope": (4, 6, 6),
}
VAE = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [True]}
VAE |= {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
STEM = "diffusion_pytorch_model.safetensors"
BLOCK = "transformer_blocks.0."


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, Reference, ReferenceVAE]:
    """A folder that the reference wrote: a transformer in several shards and a VAE in one file."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("released")
    transformer, vae = randomise_(Reference(**CONFIG)), randomise_(ReferenceVAE(**VAE))
    transformer.save_pretrained(folder / "transformer", max_shard_size="150KB")
    vae.save_pretrained(folder / "vae")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "QwenImagePipeline"}))
    return folder, transformer, vae


@pytest.fixture
def sharded(written, tmp_path) -> Path:
    """A copy of the transformer in shards, to be damaged."""
    return copied(written[0] / "transformer", tmp_path / "copy" / "transformer")


@pytest.fixture
def single(written, tmp_path) -> Path:
    """The transformer in one file, to be damaged."""
    written[1].save_pretrained(tmp_path / "single" / "transformer")
    return tmp_path / "single" / "transformer"


def copied(source: Path, target: Path) -> Path:
    target.mkdir(parents=True)
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def load(folder: Path, **kwargs):
    return Checkpoint(folder.parent).load(QwenImageTransformer2DModel, folder.name, **kwargs)


def edit_index(folder: Path, change) -> None:
    path = folder / f"{STEM}.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def edit_header(path: Path, change) -> None:
    """Change the header of a safetensors file; its data stay as they are."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def edit_tensors(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def inputs() -> dict:
    return {
        "hidden_states": torch.randn(1, 12, 8),
        "encoder_hidden_states": torch.randn(1, 5, 24),
        "timestep": torch.rand(1),
        "img_shapes": [[(1, 3, 4)]],
    }


def assert_same_weights(module: torch.nn.Module, reference: torch.nn.Module, dtype: torch.dtype = torch.float32):
    ours, theirs = module.state_dict(), reference.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(ours[name].dtype == dtype and torch.equal(ours[name], theirs[name].to(dtype)) for name in theirs)


# Folders that are as they should be


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["sharded", "single"])
def test_opens_what_the_reference_wrote(written, request, layout, dtype):
    folder = request.getfixturevalue(layout)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (layout == "sharded")
    module = load(folder, dtype=dtype)
    assert_same_weights(module, written[1], dtype)
    assert not module.training and not any(p.is_meta for p in module.parameters())
    given = inputs()
    reference = Reference.from_pretrained(folder, torch_dtype=dtype)
    cast = {k: v.to(dtype) if torch.is_tensor(v) and k != "timestep" else v for k, v in given.items()}
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(module(**cast), reference(**cast).sample, atol=tolerance, rtol=tolerance)


@torch.no_grad()
def test_opens_the_vae(written):
    vae = Checkpoint(written[0]).load(AutoencoderKLQwenImage, "vae")
    image = torch.rand(1, 3, 1, 16, 24)
    assert difference(vae.encode(image).mode(), written[2].encode(image).latent_dist.mode()) <= TOLERANCE


def test_weights_stored_in_bf16_open_in_both(written, tmp_path):
    reference = Reference(**CONFIG).bfloat16()
    reference.save_pretrained(tmp_path / "transformer")
    for dtype in (torch.bfloat16, torch.float32):
        assert_same_weights(load(tmp_path / "transformer", dtype=dtype), reference, dtype)


@pytest.mark.parametrize("layout", ["sharded", "single"])
def test_one_prefix_is_read_alone(written, request, layout):
    folder = request.getfixturevalue(layout)
    if layout == "sharded":  # shards without the block are not even opened
        weight_map = json.loads((folder / f"{STEM}.index.json").read_text())["weight_map"]
        for unused in set(weight_map.values()) - {f for name, f in weight_map.items() if name.startswith(BLOCK)}:
            (folder / unused).unlink()
    expected = {name: t for name, t in written[1].state_dict().items() if name.startswith(BLOCK)}
    found = Checkpoint(folder.parent).tensors("transformer", BLOCK)
    assert found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in expected)


def test_a_prefix_that_no_tensor_has(sharded):
    with pytest.raises(KeyError, match="transformer_blocks.99."):
        Checkpoint(sharded.parent).tensors("transformer", "transformer_blocks.99.")


def test_one_file_of_any_name_will_do(single, written):
    (single / STEM).rename(single / "qwen.safetensors")
    assert_same_weights(load(single), written[1])


# What is missing


def test_a_component_that_is_missing(written):
    with pytest.raises(FileNotFoundError, match="text_encoder/config.json"):
        Checkpoint(written[0]).load(QwenImageTransformer2DModel, "text_encoder")
    with pytest.raises(FileNotFoundError, match="no safetensors weights in text_encoder/"):
        Checkpoint(written[0]).tensors("text_encoder")
    with pytest.raises(FileNotFoundError, match="no tokenizer/ with any of vocab.json, merges.txt"):
        Checkpoint(written[0]).folder_of("tokenizer", ("vocab.json", "merges.txt"))


def test_a_shard_that_is_missing(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        load(sharded)


def test_a_tensor_that_is_missing(single, sharded):
    edit_tensors(single / STEM, lambda tensors: tensors.pop("proj_out.bias"))
    with pytest.raises(ValueError, match="(?s)Missing.*proj_out.bias"):
        load(single)
    shard = json.loads((sharded / f"{STEM}.index.json").read_text())["weight_map"]["proj_out.bias"]
    edit_tensors(sharded / shard, lambda tensors: tensors.pop("proj_out.bias"))
    with pytest.raises(ValueError, match=rf"{shard}.*does not match its index.*proj_out.bias"):
        load(sharded)


def test_all_that_does_not_fit_is_listed_at_once(single):
    def change(tensors):
        tensors["surprise.weight"] = torch.zeros(2)
        tensors["proj_out.weight"] = torch.zeros(3, 5)
        del tensors["txt_norm.weight"]

    edit_tensors(single / STEM, change)
    with pytest.raises(ValueError) as error:
        load(single)
    for part in ("txt_norm.weight", "surprise.weight", "proj_out.weight", "[3, 5]", "[8, 32]"):
        assert part in str(error.value)


def test_a_config_that_does_not_belong_to_the_weights(single):
    config = json.loads((single / "config.json").read_text())
    (single / "config.json").write_text(json.dumps(config | {"num_layers": 2}))
    with pytest.raises(ValueError, match=r"Unexpected.*transformer_blocks.2."):
        load(single)


# What is damaged or hostile


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_truncated_file_is_refused(single, kept):
    (single / STEM).write_bytes((single / STEM).read_bytes()[:kept])
    with pytest.raises(ValueError, match=f"{STEM} is damaged"):
        load(single)


def test_a_tampered_header_is_refused(single):
    pristine = (single / STEM).read_bytes()

    def refused(change):
        (single / STEM).write_bytes(pristine)
        edit_header(single / STEM, change)
        with pytest.raises(ValueError, match=f"{STEM} is damaged"):
            load(single)

    refused(lambda header: header["proj_out.bias"].update(shape=[9]))
    refused(lambda header: header["proj_out.bias"].update(shape=[-8]))
    refused(lambda header: header["proj_out.bias"].update(dtype="F99"))
    refused(lambda header: header["proj_out.bias"].update(data_offsets=[0, 10**12]))
    refused(lambda header: header["proj_out.bias"].pop("data_offsets"))
    for start in (b"\xff" * 8, (20).to_bytes(8, "little") + b"x" * 20):
        (single / STEM).write_bytes(start + pristine[28:])
        with pytest.raises(ValueError, match=f"{STEM} is damaged"):
            load(single)


@pytest.mark.parametrize(
    "target", ["../x.safetensors", "/elsewhere/x.safetensors", "sub/x.safetensors", "x.bin", "..", 5, []]
)
def test_an_index_that_points_elsewhere_is_refused(sharded, single, target):
    for folder in (sharded.parent, sharded / "sub"):
        folder.mkdir(exist_ok=True)
        (folder / "x.safetensors").write_bytes((single / STEM).read_bytes())
    edit_index(sharded, lambda weight_map: weight_map.update({"proj_out.bias": target}))
    with pytest.raises(ValueError, match=re.escape(f"points to {target!r}")):
        load(sharded)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": []}', '{"weight_map": {', "[]"])
def test_an_index_without_a_map_is_refused(sharded, index):
    (sharded / f"{STEM}.index.json").write_text(index)
    with pytest.raises(ValueError, match="transformer"):
        load(sharded)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_never_opened(single, name):
    (single / STEM).unlink()
    (single / name).write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    with pytest.raises(FileNotFoundError, match=f"{name}.* pickled and never opened"):
        load(single)


@pytest.mark.parametrize("text", [b"{", b"[1]", b"\xff\xfe", b""])
def test_a_config_that_is_no_json_object(single, text):
    (single / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match="config.json.*JSON"):
        load(single)


def test_a_source_that_is_neither_folder_nor_repository(single):
    for source in (single / STEM, "nowhere", "./nowhere", "/no/where", "a/b/c", "a/b.safetensors", ""):
        with pytest.raises(FileNotFoundError, match="neither a folder nor a hub repository"):
            Checkpoint(source)


# The hub


@pytest.fixture
def hub(written, tmp_path, monkeypatch):
    server = Hub(written[0])
    thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.01), daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the waits between attempts
    close_session()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()
    close_session()


def test_one_prefix_comes_from_the_hub_by_byte_ranges(hub, written, capsys):
    expected = {name: t for name, t in written[1].state_dict().items() if name.startswith(BLOCK)}
    found = Checkpoint("owner/name").tensors("transformer", BLOCK)
    assert found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in expected)
    size = sum(t.nbytes for t in expected.values())
    whole = sum(path.stat().st_size for path in (written[0] / "transformer").glob("*.safetensors"))
    sent = hub.sent(".safetensors") - hub.sent(".index.json")
    assert size < sent < size + 12_000 < whole
    assert f"{BLOCK}*: {len(expected)} tensors, {size / 1e6:.2f} MB from owner/name" in capsys.readouterr().out


def test_the_amount_is_said_before_the_first_tensor_comes(hub, capsys):
    hub.fault = "another range"  # headers come right, tensors do not
    with pytest.raises(ConnectionError):
        Checkpoint("owner/name").tensors("transformer", BLOCK)
    assert "MB from owner/name" in capsys.readouterr().out


def test_names_and_shapes_come_from_the_headers_alone(hub, written):
    expected = {name: tuple(t.shape) for name, t in written[1].state_dict().items()}
    assert Checkpoint("owner/name").shapes("transformer") == Checkpoint(written[0]).shapes("transformer") == expected
    files = (written[0] / "transformer").glob("*.safetensors")
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in files)
    assert hub.sent(".safetensors") - hub.sent(".index.json") == headers
    theirs = written[2].state_dict()
    assert Checkpoint(written[0]).shapes("vae") == {name: tuple(t.shape) for name, t in theirs.items()}


def test_a_damaged_header_on_this_disk_is_named(single):
    path = single / STEM
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged"):
        Checkpoint(single.parent).shapes("transformer")


def test_a_prefix_of_a_single_file_comes_by_byte_ranges(hub, written):
    found = Checkpoint("owner/name").tensors("vae", "decoder.conv_out.")
    theirs = written[2].state_dict()
    assert found and all(torch.equal(found[name], theirs[name]) for name in found)
    assert hub.sent(STEM) < (written[0] / "vae" / STEM).stat().st_size / 2


def test_a_whole_component_equals_the_folder(hub, written, capsys):
    assert_same_weights(Checkpoint("owner/name").load(QwenImageTransformer2DModel, "transformer"), written[1])
    files = sorted((written[0] / "transformer").glob("*.safetensors"))
    megabytes = sum(path.stat().st_size for path in files) / 1e6
    assert f"transformer: {megabytes:.2f} MB in {len(files)} files from owner/name" in capsys.readouterr().out


@pytest.mark.parametrize("component", ["transformer", "vae"])
def test_what_was_downloaded_is_read_without_the_hub(hub, written, capsys, component):
    before = Checkpoint("owner/name").tensors(component)
    capsys.readouterr()
    sent = hub.sent(".safetensors") - hub.sent(".index.json")
    prefix = next(iter(before))[:12]
    assert Checkpoint("owner/name").tensors(component, prefix)[next(iter(before))].equal(before[next(iter(before))])
    assert hub.sent(".safetensors") - hub.sent(".index.json") == sent
    hub.shutdown()
    hub.server_close()
    close_session()
    after = Checkpoint("owner/name").tensors(component)
    assert after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in before)
    assert capsys.readouterr().out == ""


def test_a_hub_that_ignores_ranges(hub):
    hub.fault = "no ranges"
    with pytest.raises(ConnectionError, match="HTTP 200 .* does not serve byte ranges"):
        Checkpoint("owner/name").tensors("transformer", BLOCK)


def test_a_hub_that_answers_with_another_range(hub):
    hub.fault = "another range"
    with pytest.raises(ConnectionError, match="to a request for bytes="):
        Checkpoint("owner/name").tensors("transformer", BLOCK)


def test_a_hub_that_stays_busy(hub):
    hub.fault = "busy"
    with pytest.raises(ConnectionError, match="HTTP 503"):
        Checkpoint("owner/name").tensors("transformer", BLOCK)


def test_a_hub_that_cannot_be_reached(hub):
    hub.shutdown()
    hub.server_close()
    with pytest.raises(ConnectionError, match="cannot reach the hub for transformer/config.json of owner/name"):
        Checkpoint("owner/name").load(QwenImageTransformer2DModel, "transformer")
    with pytest.raises(ConnectionError, match=f"cannot read http://.*{STEM}"):
        Checkpoint("owner/name")._fetch(f"transformer/{STEM}", 0, 8)


def test_what_the_hub_does_not_have(hub):
    with pytest.raises(FileNotFoundError, match="owner/other on the hub"):
        Checkpoint("owner/other").config("model_index.json")
    with pytest.raises(FileNotFoundError, match="owner/name has no text_encoder/config.json"):
        Checkpoint("owner/name").load(QwenImageTransformer2DModel, "text_encoder")
    with pytest.raises(FileNotFoundError, match="owner/name has no safetensors weights in text_encoder/"):
        Checkpoint("owner/name").tensors("text_encoder", "model.")
    with pytest.raises(FileNotFoundError, match="bad name/x on the hub"):
        Checkpoint("bad name/x").config("model_index.json")


@pytest.mark.parametrize("prefix", ["", BLOCK])
def test_an_answer_that_breaks_off_never_becomes_numbers(hub, prefix):
    checkpoint = Checkpoint("owner/name")
    checkpoint.weight_map("transformer")  # the index comes whole, the weights do not
    hub.fault = "cut off"
    with pytest.raises((ConnectionError, OSError), match="broke off|cannot read http"):
        checkpoint.tensors("transformer", prefix)
    hub.fault = None  # and what came of it does no harm later
    assert checkpoint.tensors("transformer", prefix)


def test_a_download_that_breaks_off_is_no_file(hub, written):
    name = min(json.loads((written[0] / f"transformer/{STEM}.index.json").read_text())["weight_map"].values())
    hub.fault = "cut off"
    with pytest.raises((ConnectionError, OSError)):
        Checkpoint("owner/name").file(f"transformer/{name}")
    hub.fault = None
    found = Checkpoint("owner/name").file(f"transformer/{name}")
    assert found.read_bytes() == (written[0] / "transformer" / name).read_bytes()


def test_damaged_files_on_the_hub_are_refused(hub, sharded):
    hub.folder = sharded.parent
    weight_map = json.loads((sharded / f"{STEM}.index.json").read_text())["weight_map"]
    name = next(n for n in weight_map if n.startswith(BLOCK))
    shard = sharded / weight_map[name]
    pristine = shard.read_bytes()

    def refused(change, message):
        shard.write_bytes(pristine)
        edit_header(shard, change)
        with pytest.raises(ValueError, match=message):
            Checkpoint("owner/name").tensors("transformer", BLOCK)

    refused(lambda header: header.pop(name), f"does not match its index.*{name}")
    refused(lambda header: header[name].update(shape=[3]), f"{name}: .* bytes do not make")
    refused(lambda header: header[name].update(shape=[-1, -1]), "header is damaged")
    refused(lambda header: header[name].update(dtype="I3"), f"{name} is stored as I3")
    refused(lambda header: header[name].update(data_offsets=[8, 4]), "header is damaged")
    refused(lambda header: header[name].pop("dtype"), "header is damaged")
    shard.write_bytes(b"<html>Sign in to go on</html>" * 40)
    with pytest.raises(ValueError, match="not a safetensors file"):
        Checkpoint("owner/name").tensors("transformer", BLOCK)

"""checkpoint.py: folders in the released layout, strictly; nothing damaged, pickled or outside is opened; whole files.

test_hub.py has the same of a repository on the hub.
"""

import json
import os
import re
import threading
import weakref
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLQwenImage as ReferenceVAE
from diffusers import QwenImageTransformer2DModel as Reference
from reference import TOLERANCE, difference, randomise_
from released import BLOCK, CONFIG, STEM, edit_header, edit_index, same
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from minqwen.checkpoint import Checkpoint, choose_device
from minqwen.files import whole_file
from minqwen.transformer import QwenImageTransformer2DModel
from minqwen.vae import AutoencoderKLQwenImage

VAE = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [True]}
VAE |= {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}


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


def edit_tensors(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def in_dtype(module: torch.nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: tensor.to(dtype) for name, tensor in module.state_dict().items()}


def inputs() -> dict:
    return {
        "hidden_states": torch.randn(1, 12, 8),
        "encoder_hidden_states": torch.randn(1, 5, 24),
        "timestep": torch.rand(1),
        "img_shapes": [[(1, 3, 4)]],
    }


# Folders that are as they should be


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["sharded", "single"])
def test_opens_what_the_reference_wrote(written, request, layout, dtype):
    folder = request.getfixturevalue(layout)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (layout == "sharded")
    module = load(folder, dtype=dtype)
    assert same(module.state_dict(), in_dtype(written[1], dtype))
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
        assert same(load(tmp_path / "transformer", dtype=dtype).state_dict(), in_dtype(reference, dtype))
    assert same(load(tmp_path / "transformer", dtype=None).state_dict(), reference.state_dict())


@pytest.mark.parametrize("layout", ["sharded", "single"])
def test_one_prefix_is_read_alone(written, request, layout):
    folder = request.getfixturevalue(layout)
    if layout == "sharded":  # shards without the block are not even opened
        weight_map = json.loads((folder / f"{STEM}.index.json").read_text())["weight_map"]
        for unused in set(weight_map.values()) - {f for name, f in weight_map.items() if name.startswith(BLOCK)}:
            (folder / unused).unlink()
    expected = {name: t for name, t in written[1].state_dict().items() if name.startswith(BLOCK)}
    assert same(Checkpoint(folder.parent).tensors("transformer", BLOCK), expected)


def test_a_prefix_that_no_tensor_has(sharded):
    with pytest.raises(KeyError, match="transformer_blocks.99."):
        Checkpoint(sharded.parent).tensors("transformer", "transformer_blocks.99.")


def test_one_file_of_any_name_will_do(single, written):
    (single / STEM).rename(single / "qwen.safetensors")
    assert same(load(single).state_dict(), written[1].state_dict())


def test_hidden_files_of_another_system_do_not_count(single, written):
    (single / STEM).rename(single / "qwen.safetensors")
    (single / "._qwen.safetensors").write_bytes(b"\0\5\26\7" + bytes(100))
    assert same(load(single).state_dict(), written[1].state_dict())


def test_a_tensor_that_two_files_hold_is_refused(sharded):
    (sharded / f"{STEM}.index.json").unlink()
    first = min(sharded.glob("*.safetensors"))
    (sharded / "other.safetensors").write_bytes(first.read_bytes())
    both = f"transformer/other.safetensors and transformer/{first.name} .*both hold .*: take one file away"
    with pytest.raises(ValueError, match=both):
        load(sharded)
    first.unlink()
    assert load(sharded)


def test_names_and_shapes_come_from_the_headers(written):
    for component, reference in (("transformer", written[1]), ("vae", written[2])):
        expected = {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()}
        assert Checkpoint(written[0]).shapes(component) == expected


# Block by block, and in parts


@pytest.mark.parametrize("layout", ["sharded", "single"])
def test_blocks_are_all_tensors_one_block_at_a_time(written, request, layout, monkeypatch):
    folder, found, earlier, alive = request.getfixturevalue(layout), {}, [], []
    read = Checkpoint.read

    def watched(self, *args, **kwargs):
        alive.append(sum(tensor() is not None for tensor in earlier))
        return read(self, *args, **kwargs)

    monkeypatch.setattr(Checkpoint, "read", watched)
    for prefix, tensors in Checkpoint(folder.parent).blocks("transformer"):
        assert tensors and all(name.startswith(prefix) for name in tensors)
        found |= {name: tensor.clone() for name, tensor in tensors.items()}
        earlier += [weakref.ref(tensor) for tensor in tensors.values()]
        del tensors
    assert same(found, written[1].state_dict())
    assert alive == [0] * 4, "a block was held while the next one was read"


def test_blocks_come_in_the_order_of_their_numbers(tmp_path):
    names = [f"{stack}.{k}.weight" for stack in ("model.layers", "visual.blocks") for k in range(11, -1, -1)]
    names += ["model.norm.weight", "visual.merger.mlp.0.weight"]
    (tmp_path / "text_encoder").mkdir()
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "text_encoder" / "model.safetensors")
    blocks = list(Checkpoint(tmp_path).blocks("text_encoder"))
    assert blocks[0][0] == "" and set(blocks[0][1]) == {"model.norm.weight", "visual.merger.mlp.0.weight"}
    for stack in ("model.layers", "visual.blocks"):
        assert [p for p, _ in blocks if p.startswith(stack)] == [f"{stack}.{k}." for k in range(12)]


def test_parts_land_where_and_as_they_are_asked_for(single, written):
    device = {"": "meta", "transformer_blocks.": "cpu", "transformer_blocks.1.": "meta"}
    dtype = {"": None, "transformer_blocks.": torch.bfloat16, "transformer_blocks.0.attn.": torch.float64}
    module = load(single, device=device, dtype=dtype)
    for name, tensor in written[1].state_dict().items():
        found = module.state_dict()[name]
        here = name.startswith(("transformer_blocks.0.", "transformer_blocks.2."))
        wanted = torch.bfloat16 if name.startswith("transformer_blocks.") else torch.float32
        wanted = torch.float64 if name.startswith("transformer_blocks.0.attn.") else wanted
        assert (found.device.type, found.dtype) == ("cpu" if here else "meta", wanted), name
        assert not here or torch.equal(found, tensor.to(wanted))


def test_a_part_without_a_device_is_named(single):
    with pytest.raises(ValueError, match=r"\['transformer_blocks.'\] name no device or dtype for .*add the prefix ''"):
        load(single, device={"transformer_blocks.": "cpu"})


# What is missing


def test_a_component_that_is_missing(written):
    with pytest.raises(FileNotFoundError, match="text_encoder/config.json"):
        Checkpoint(written[0]).load(QwenImageTransformer2DModel, "text_encoder")
    with pytest.raises(FileNotFoundError, match="no safetensors weights in text_encoder/"):
        Checkpoint(written[0]).tensors("text_encoder")
    assert Checkpoint(written[0]).within("tokenizer").file("vocab.json", "merges.txt") is None
    assert Checkpoint(written[0]).within("vae").file("a.json", "config.json") == written[0] / "vae" / "config.json"


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
    for read in (load, lambda folder: Checkpoint(folder.parent).shapes("transformer")):
        with pytest.raises(ValueError, match=f"{STEM} is damaged"):
            read(single)


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
    with pytest.raises(FileNotFoundError, match=f"{name}.* pickled weights are never opened"):
        load(single)


@pytest.mark.parametrize("text", [b"{", b"[1]", b"\xff\xfe", b""])
def test_a_config_that_is_no_json_object(single, text):
    (single / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match="config.json.*JSON"):
        load(single)


@pytest.mark.parametrize("change", [{"num_layers": "two"}, {"axes_dims_rope": 5}, {"attention_head_dim": None}])
def test_a_config_whose_values_cannot_be_used_is_named(single, change):
    config = json.loads((single / "config.json").read_text())
    (single / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=re.escape(f"{single}/config.json: ")):
        load(single)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool])
def test_whole_numbers_without_scales_are_refused(single, dtype):
    edit_tensors(
        single / STEM, lambda tensors: tensors.update({"proj_out.weight": tensors["proj_out.weight"].to(dtype)})
    )
    with pytest.raises(ValueError, match="proj_out.weight"):
        load(single)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:3", "gpu", 5])
def test_a_device_that_is_not_there(device):
    with pytest.raises(ValueError, match=f"there is no device '{device}' here: expected .*cpu"):
        choose_device(device)
    assert choose_device("cpu") == torch.device("cpu") and choose_device()


def test_a_source_that_is_neither_folder_nor_repository(single):
    sources = (single / STEM, "nowhere", "./nowhere", "/no/where", "~/where", "a/b/c", "a/b.safetensors", "a b/c", "")
    for source in sources:
        with pytest.raises(FileNotFoundError, match="neither a folder nor a hub repository"):
            Checkpoint(source)


# Files are written all or nothing


@pytest.fixture
def file(tmp_path) -> Path:
    (tmp_path / "file.bin").write_bytes(b"old")
    return tmp_path / "file.bin"


def test_a_file_is_replaced_when_it_is_whole(file):
    with whole_file(str(file)) as half:
        half.write_bytes(b"new")
        assert file.read_bytes() == b"old"
        assert half.parent == file.parent and half.name.startswith(".file.bin.") and half.suffix == ".part"
    assert file.read_bytes() == b"new" and os.listdir(file.parent) == ["file.bin"]


def test_a_long_name_can_be_written(tmp_path):
    name = "ü" * 120 + ".safetensors"  # of the 255 bytes that a name may have
    with whole_file(tmp_path / name) as half:
        half.write_bytes(b"new")
    assert os.listdir(tmp_path) == [name]


def test_a_writer_that_dies_leaves_a_hidden_part(file):
    dies = whole_file(file)
    dies.__enter__().write_bytes(b"half")
    assert file.read_bytes() == b"old"
    (left,) = set(os.listdir(file.parent)) - {"file.bin"}
    assert left.startswith(".") and left.endswith(".part")
    with whole_file(file) as half:  # which is in nobody's way
        half.write_bytes(b"new")
    assert file.read_bytes() == b"new"


FULL = "No space left on device"


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, FULL),
        SafetensorError(f"Error while serializing: I/O error: {FULL} (os error 28)"),
        RuntimeError(f"[enforce fail at inline_container.cc:672] . {FULL}"),  # torch.save
    ],
)
def test_a_full_disk_keeps_the_old_file_and_names_it(file, error):
    with pytest.raises(OSError, match=f"^cannot write {re.escape(str(file))}: .*{FULL}"), whole_file(file) as half:
        half.write_bytes(b"ha")
        raise error
    assert file.read_bytes() == b"old" and os.listdir(file.parent) == ["file.bin"]


@pytest.mark.parametrize("error", [TypeError, RuntimeError, KeyboardInterrupt])
def test_other_errors_pass_as_they_are(file, error):
    with pytest.raises(error, match="^our own$"), whole_file(file) as half:
        half.write_bytes(b"ha")
        raise error("our own")
    assert file.read_bytes() == b"old" and os.listdir(file.parent) == ["file.bin"]


@pytest.mark.parametrize("held_for", [2, 99])
def test_a_file_that_a_reader_holds_open_on_windows(file, held_for, monkeypatch):
    """Simulated: there os.replace fails while another program has the target open."""
    replace, attempts, waits = os.replace, [], []

    def replace_on_windows(source, target):
        attempts.append(target)
        if len(attempts) <= held_for:
            raise PermissionError(13, "The process cannot access the file because it is being used by another process")
        replace(source, target)

    monkeypatch.setattr("os.replace", replace_on_windows)
    monkeypatch.setattr("time.sleep", waits.append)
    if held_for == 2:
        with whole_file(file) as half:
            half.write_bytes(b"new")
        assert file.read_bytes() == b"new" and len(attempts) == 3
        return
    with pytest.raises(OSError, match=f"^cannot write {re.escape(str(file))}: .*used by another process"):
        with whole_file(file) as half:
            half.write_bytes(b"new")
    assert file.read_bytes() == b"old" and os.listdir(file.parent) == ["file.bin"] and 1 < sum(waits) < 5


def test_a_folder_that_is_not_there_is_named(tmp_path):
    path = tmp_path / "no" / "file.bin"
    with pytest.raises(OSError, match=f"^cannot write {re.escape(str(path))}: "), whole_file(path) as half:
        half.write_bytes(b"new")


def test_writers_of_one_file_do_not_mix_their_bytes(file):
    together = threading.Barrier(4)

    def write(letter: bytes) -> None:
        together.wait()
        for _ in range(20):
            with whole_file(file) as half, open(half, "wb") as out:
                for _ in range(4):
                    out.write(letter * 5000)
                    out.flush()

    writers = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b", b"c")]
    for writer in writers:
        writer.start()
    together.wait()
    while any(writer.is_alive() for writer in writers):
        data = file.read_bytes()
        assert data == b"old" or (len(data) == 20000 and len(set(data)) == 1)
    assert os.listdir(file.parent) == ["file.bin"]

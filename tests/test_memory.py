"""memory.py: by turns and streamed, every number is the resident one's; and no more is there than was said."""

import json
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from reference import small_transformer_config
from safetensors.torch import save_file
from test_released_size import CONFIGS, RELEASED

from minqwen import plans as which
from minqwen.checkpoint import Checkpoint
from minqwen.files import whole_file
from minqwen.finetune import finetune
from minqwen.lora import adapters, add_lora, merge_lora
from minqwen.memory import Shell, StreamedBlocks, Turns
from minqwen.pipeline import PARTS, QwenImagePipeline
from minqwen.plans import Plan, choose, in_bytes, plans
from minqwen.quantize import quantize_blocks
from minqwen.transformer import QwenImageTransformer2DModel

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "data" / "tiny"
BY_TURNS = ["turns", "stream"]


def opened(way, folder=TINY, **options) -> QwenImagePipeline:
    return QwenImagePipeline.from_pretrained(folder, device="cpu", memory=way, **options)


def edited(pipe, **options) -> np.ndarray:
    given = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "progress": False} | options
    scene = Image.open(ROOT / "data/pictures/scene.png")
    return np.asarray(pipe.edit(scene, "replace the cat with a fox", **given), int)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_streamed_is_the_picture_of_turns_bit_for_bit_and_the_resident_one(dtype, scale):
    """A table is computed for all levels at once, and its sums may be ordered otherwise: up to one level of 255."""
    pipes = [opened(way, dtype=dtype) for way in ("resident", "turns", "stream")]
    plain, turns, stream = (edited(pipe, true_cfg_scale=scale) for pipe in pipes)
    assert (turns == stream).all() and abs(turns - plain).max() <= 1
    assert all((pipe.device, pipe.dtype) == (pipes[0].device, dtype) for pipe in pipes)


@pytest.fixture
def folder(rng, tmp_path) -> Path:
    """A small random transformer with zero_cond_t, as a checkpoint of one part."""
    config = small_transformer_config(rng) | {"zero_cond_t": rng.random() < 0.7}
    model = QwenImageTransformer2DModel(**config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    write(model, tmp_path)
    return tmp_path


def write(model, folder: Path) -> None:
    (folder / "transformer").mkdir(exist_ok=True)
    (folder / "transformer/config.json").write_text(json.dumps(model.config), encoding="utf-8")
    with whole_file(folder / "transformer/model.safetensors") as path:  # never over a file that is mapped
        save_file(model.state_dict(), path)


def shell(folder: Path, streams: bool, dtype: torch.dtype = torch.float32) -> Shell:
    made = Shell(Checkpoint(folder), QwenImageTransformer2DModel, "transformer", "cpu", dtype)
    made.arrange(streams)
    return made


def inputs(model, sigma: float) -> tuple:
    config = model.config
    img, txt = torch.randn(1, 10, config["in_channels"]), torch.randn(1, 3, config["joint_attention_dim"])
    dtype = model.img_in.weight.dtype
    return img.to(dtype), txt.to(dtype), None, torch.tensor([sigma]), [[(1, 2, 3), (1, 2, 2)]]


@pytest.mark.slow
@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("bits", [None, 4])
@torch.no_grad()
def test_the_table_says_what_the_layers_say(folder, streams, bits):
    """In float64: in float32 a random network magnifies what a sum of several rows rounds otherwise than one of one."""
    plain = Checkpoint(folder).load(QwenImageTransformer2DModel, "transformer")
    if bits:
        quantize_blocks(plain, bits)
        write(plain, folder)
    away, plain = shell(folder, streams, torch.float64), plain.double()
    model, sigmas = away.open(), torch.tensor([0.9, 0.4, 0.1])
    table = away.modulations(sigmas)
    assert all(block.img_mod[1].weight.is_meta for block in away.module.transformer_blocks._modules.values())
    for sigma in sigmas.tolist():
        asked = inputs(plain, sigma)
        theirs, ours = plain(*asked), model(*asked, modulations=table[sigma])
        assert (ours - theirs).abs().max() <= 1e-12 * theirs.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("streams", [False, True])
def test_what_the_last_block_would_say_to_the_text_is_never_read(folder, monkeypatch, streams):
    """Its queries, their way out and its MLP; and the velocity is the same to the bit."""
    away, read = shell(folder, streams), []
    fetch = away.fetch
    monkeypatch.setattr(away, "fetch", lambda name: read.append(name) or fetch(name))
    if streams:
        away.module.transformer_blocks.fetch_one = away.fetch
    model, plain = away.open(), Checkpoint(folder).load(QwenImageTransformer2DModel, "transformer")
    sigma = torch.tensor([0.5]).item()
    table, asked = away.modulations(torch.tensor([sigma])), inputs(plain, sigma)
    want = plain(*asked, modulations=table[sigma])
    assert torch.equal(model(*asked, modulations=table[sigma]), want)
    last = f"transformer_blocks.{len(plain.transformer_blocks) - 1}."
    unread = {name.removeprefix(last) for name in set(away.stored) - set(read)}
    dead = ("attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
    assert unread == {f"{layer}.{part}" for layer in dead for part in ("weight", "bias")}


@torch.no_grad()
def test_streaming_holds_two_blocks_at_most(folder):
    away = shell(folder, streams=True)
    model = away.open()
    blocks, alive, most = model.transformer_blocks, [], []
    fetch = blocks.fetch_one

    def watched(name):
        tensor = fetch(name).clone()
        alive.append((name.split(".")[1], weakref.ref(tensor)))
        most.append(len({number for number, each in alive if each() is not None}))
        return tensor

    blocks.fetch_one = watched
    table = away.modulations(torch.tensor([0.5]))
    for _ in range(2):
        model(*inputs(model, 0.5), modulations=table[0.5])
    assert max(most) <= 2 and len(alive) == 2 * sum(len(names) for names in blocks.names)
    assert all(p.is_meta for p in blocks.parameters()) and not any(each() is not None for _, each in alive)


@pytest.mark.slow
@pytest.mark.parametrize("way", BY_TURNS)
def test_the_transformer_is_never_there_with_another_part(way, monkeypatch):
    pipe, seen = opened(way), []
    take = Turns.__getitem__

    def watched(turns, name):
        part = take(turns, name)
        there = {name for name, s in turns.shells.items() if any(not p.is_meta for p in s.module.parameters())}
        seen.append(frozenset(there))
        return part

    monkeypatch.setattr(Turns, "__getitem__", watched)
    edited(pipe)
    assert frozenset(["transformer"]) in seen and {"vae"} in seen
    assert not [there for there in seen if "transformer" in there and len(there) > 1]


@pytest.mark.slow
@pytest.mark.parametrize("way", BY_TURNS)
def test_adapters_stay_and_the_table_knows_them(way):
    targets = ("to_q", "img_mod.1", "txt_mod.1", "img_mlp.net.2")
    pictures = []
    for pipe in (opened("resident"), opened(way)):
        before = edited(pipe)
        add_lora(pipe.transformer, 2, targets=targets, generator=torch.Generator().manual_seed(1))
        for number, layer in enumerate(adapters(pipe.transformer).values()):
            chance = torch.Generator().manual_seed(number)
            layer.lora_B.weight.data = torch.randn(layer.lora_B.weight.shape, generator=chance) * 0.3
        pictures.append(edited(pipe))
        assert abs(pictures[-1] - before).max() > 20 and (edited(pipe) == pictures[-1]).all()
        scales = {layer: layer.scale for layer in adapters(pipe.transformer).values()}
        for layer in scales:
            layer.scale = 0.0
        assert (edited(pipe) == before).all()
        for layer, scale in scales.items():
            layer.scale = scale
    assert abs(pictures[0] - pictures[1]).max() <= 1


def test_walking_away_in_the_middle_leaves_no_block_behind(folder):
    away = shell(folder, streams=True)
    blocks = away.open().transformer_blocks
    for block in blocks:
        assert not block.attn.to_q.weight.is_meta
        break
    del block
    assert all(p.is_meta for p in blocks.parameters())


# ------------------------------------------------------------------------------------------------ what fits


@pytest.fixture
def released(monkeypatch) -> dict[str, Shell]:
    """The shells of the released model, of names and shapes alone."""

    class Meta(Checkpoint):
        def __init__(self):
            self.source = "released"

        def config(self, name):
            return CONFIGS[name.split("/")[0]]

        def weight_map(self, component):
            return dict.fromkeys(RELEASED[component], "nowhere.safetensors")

        def tensors(self, component, prefix=""):
            like = {"dtype": torch.bfloat16, "device": "meta"}
            return {name: torch.empty(shape, **like) for name, shape in RELEASED[component].items()}

    return {name: Shell(Meta(), part, name, "cpu", torch.bfloat16) for name, part in PARTS.items()}


@pytest.mark.slow
def test_what_the_released_model_needs(released):
    resident, turns, stream = plans(released, 1024 * 1024)
    living = turns.peak - 2 * 13_600_000_000
    assert resident.peak > 57.6e9 and 27e9 < turns.peak < 30e9 and stream.peak < 9e9
    assert 0 < living < 3e9 and 54e9 < stream.fetched < 55e9  # for each of two prompts


PLANS = [Plan("resident", 100 << 30, 0, 0), Plan("turns", 20 << 30, 0, 0), Plan("stream", 5 << 30, 1, 0)]


@pytest.mark.parametrize(
    ("asked", "free", "way"),
    [
        ("resident", 0, "resident"), ("stream", 2**60, "stream"), ("turns", 0, "turns"), (30, 0, "turns"),
        (6.5, 2**60, "stream"), ("auto", 2**60, "resident"), ("auto", 23 << 30, "turns"), ("auto", 10 << 30, "stream"),
    ],
)  # fmt: skip
def test_the_first_way_that_fits_is_taken(monkeypatch, asked, free, way):
    monkeypatch.setattr(which, "free_memory", lambda device: free)
    assert choose(PLANS, asked, torch.device("cpu")).way == way


@pytest.mark.parametrize("asked", ["sparse", 0, -1, None, True, float("nan")])
def test_another_word_is_named(asked):
    with pytest.raises(ValueError, match="memory=.*expected auto, resident, turns, stream, or a number of GiB"):
        choose(PLANS, asked, torch.device("cpu"))


def test_too_little_memory_is_named(monkeypatch):
    with pytest.raises(ValueError, match="4.0 GiB are too little; this checkpoint needs about 5.0 GiB, streamed"):
        choose(PLANS, 4, torch.device("cpu"))


@pytest.mark.slow
def test_a_line_says_what_was_chosen(capsys):
    opened("turns")
    assert "memory: turns, about" in capsys.readouterr().out
    opened("auto")
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_parts_that_come_and_go_are_not_trained_but_can_be_replaced():
    pipe = opened("stream", without="vae")
    with pytest.raises(ValueError, match='memory="resident"'):
        finetune(pipe, [], steps=1)
    assert isinstance(pipe.text_encoder.model.layers, StreamedBlocks) and pipe.vae is None
    with pytest.raises(AttributeError, match="has no 'encoder'"):
        pipe.encoder  # noqa: B018
    resident = opened("resident")
    pipe.vae = resident.vae
    before = edited(pipe)
    assert pipe.turns.opened == {"transformer"}
    pipe.transformer = resident.transformer
    pipe.transformer.proj_out.weight.data *= 0.5
    assert (edited(pipe) == edited(resident)).all() and abs(edited(pipe) - before).max() > 20


@pytest.mark.slow
@pytest.mark.parametrize("way", BY_TURNS)
def test_what_would_be_forgotten_is_refused(way):
    model = opened(way).transformer
    add_lora(model, 2)
    for change in (merge_lora, lambda model: quantize_blocks(model, 8)):
        with pytest.raises(ValueError, match='open the pipeline with memory="resident" to change them'):
            change(model)


@pytest.mark.slow
def test_adapters_on_weights_that_are_away_are_refused():
    pipe = opened("turns")
    model = pipe.transformer
    pipe.encode_prompt("a cat")
    with pytest.raises(ValueError, match="weights are away"):
        add_lora(model, 2)


@pytest.mark.slow
@pytest.mark.parametrize("way", BY_TURNS)
def test_a_level_that_nobody_announced_is_computed(way):
    latents, velocities = torch.randn(1, 16, 64), []
    for pipe in (opened("resident"), opened(way)):
        prompt = pipe.encode_prompt("a small cat")
        velocities.append(pipe.velocity([prompt], [], 64, 64, 1.0)(latents, 0.7))
    assert (velocities[0] - velocities[1]).abs().max() <= 1e-5 * velocities[0].abs().max()


@pytest.mark.slow
def test_a_gradient_goes_through_a_part_that_an_edit_opened():
    pipe = opened("turns")
    edited(pipe)
    latents = torch.zeros(1, 16, 1, 2, 2, requires_grad=True)
    pipe.vae.decode(latents).sum().backward()
    assert latents.grad.abs().sum() > 0


@pytest.mark.slow
def test_without_a_transformer_nothing_is_painted():
    with pytest.raises(ValueError, match="opened without its transformer"):
        edited(opened("turns", without="transformer"))


def test_sizes_are_said_in_the_usual_units():
    assert (in_bytes(3.25 * 2**30), in_bytes(18.4 * 2**20)) == ("3.2 GiB", "18 MiB")


def test_what_is_free_is_less_than_what_there_is():
    assert 2**28 < which.free_memory(torch.device("cpu")) < 2**44


@pytest.mark.parametrize(("faster", "large", "chosen"), [("float32", 0, "float32"), ("bfloat16", 0, "bfloat16"),
                                                         ("bfloat16", 2**32, "float32")])  # fmt: skip
def test_a_large_model_computes_in_the_dtype_in_which_the_cpu_is_faster(monkeypatch, faster, large, chosen):
    """Which one that is depends on the machine; so its clock is replaced."""
    seconds = iter([1.0, 2.0] if faster == "float32" else [2.0, 1.0])
    monkeypatch.setattr(which, "clocked", lambda work: work() is not None and next(seconds))
    monkeypatch.setattr(which, "LARGE", large)
    dtype = which.default_dtype(torch.device("cpu"), Checkpoint(TINY), PARTS)
    assert dtype == getattr(torch, chosen)
    assert which.default_dtype(torch.device("cpu"), Checkpoint(TINY), ["vae"]) == torch.float32
    assert which.default_dtype(torch.device("mps"), Checkpoint(TINY), PARTS) == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_every_way_paints_the_same_picture():
    pictures = []
    for way in ("resident", "turns", "stream"):
        pipe = QwenImagePipeline.from_pretrained(TINY, "cuda", torch.float32, memory=way)
        noise = torch.Generator().manual_seed(0)
        pictures.append(pipe.edit(Image.new("RGB", (64, 64), "teal"), "x", num_inference_steps=4, generator=noise))
    resident, turns, stream = (np.asarray(picture, int) for picture in pictures)
    assert np.array_equal(turns, stream) and abs(turns - resident).max() <= 1

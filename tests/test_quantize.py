"""quantize.py: codes unpack to the nearest weights, the same everywhere; layers, gradients and edits follow."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from minqwen.checkpoint import Checkpoint
from minqwen.files import whole_file
from minqwen.lora import add_lora, merge_lora
from minqwen.pipeline import QwenImagePipeline
from minqwen.quantize import GROUP, QuantizedLinear, bits_of, quantize, quantize_blocks, slices
from minqwen.transformer import QwenImageTransformer2DModel

TINY = Path(__file__).resolve().parents[1] / "data" / "tiny"
ERRORS = {8: 0.012, 4: 0.095, 3: 0.19}  # relative, of normally distributed weights


def layer(rng, in_features=None, bias=True, outliers=False) -> nn.Linear:
    """A layer of random sizes; with outliers, one weight in 500 is twenty times as large."""
    made = nn.Linear(in_features or rng.choice([64, 128, 160, 192, 3420]), rng.randint(1, 40), bias)
    nn.init.normal_(made.weight, std=0.02)
    if outliers:
        made.weight.data[torch.rand(made.weight.shape) < 0.002] *= 20
    return made


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("bits", ERRORS)
def test_weights_come_back_as_near_as_the_bits_allow(rng, bits):
    linear = layer(rng, in_features=1024)
    error = relative(quantize(linear, bits).unpacked(), linear.weight)
    assert ERRORS[bits] / 3 < error < ERRORS[bits]


@pytest.mark.parametrize("bits", [8, 4])
def test_no_weight_is_further_away_than_its_step(rng, bits):
    """At 8 bits half a step, since nothing is cut off; at 4 bits the few at the ends are up to two steps away."""
    linear = layer(rng)
    quantized = quantize(linear, bits)
    step, most = quantized.weight_scale.float().t(), 0.501
    if bits == 4:
        step, most = step.repeat_interleave(GROUP, dim=1)[:, : linear.in_features], 2.0
    assert ((quantized.unpacked() - linear.weight).abs() <= most * step).all()


def range_covering(weight: torch.Tensor, top: int) -> torch.Tensor:
    """The usual way, to compare with: from each group's least to its largest weight."""
    w = weight.unflatten(1, (-1, GROUP))
    low, high = w.aminmax(dim=-1, keepdim=True)
    scale = (high - low) / top
    return (low + scale * ((w - low) / scale).round()).flatten(1)


@pytest.mark.parametrize(("bits", "share"), [(4, 0.97), (3, 0.92)])
@pytest.mark.parametrize("outliers", [False, True])
def test_fitting_is_nearer_than_covering_the_range(rng, bits, share, outliers):
    linear = layer(rng, in_features=3072, outliers=outliers)
    covering = relative(range_covering(linear.weight.detach(), 2**bits - 1), linear.weight)
    assert relative(quantize(linear, bits).unpacked(), linear.weight) < share * covering


def test_weights_on_a_grid_of_sixteen_come_back_exactly(rng):
    scale, offset = torch.rand(5, 4).bfloat16() + 0.5, torch.randn(5, 4).bfloat16()
    codes = torch.randint(0, 16, (5, 4, GROUP))
    codes[..., :2] = torch.tensor([0, 15])
    weight = (codes * scale.float()[..., None] + offset.float()[..., None]).flatten(1)
    linear = nn.Linear(4 * GROUP, 5)
    linear.weight.data = weight
    assert torch.equal(quantize(linear, 4).unpacked(), weight)


@pytest.mark.parametrize("bits", ERRORS)
@pytest.mark.parametrize("value", [0.0, 1.5, -3.0])
def test_weights_that_are_all_alike_come_back(rng, bits, value):
    linear = layer(rng)
    linear.weight.data.fill_(value)
    assert relative(quantize(linear, bits).unpacked() + 1e-9, linear.weight + 1e-9) < 0.01


@pytest.mark.parametrize("bits", ERRORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_is_that_of_the_unpacked_weights_bit_for_bit(rng, bits, dtype):
    linear = layer(rng, bias=rng.random() < 0.5)
    quantized = quantize(linear, bits)
    x = torch.randn(2, 3, linear.in_features).to(dtype)
    bias = None if linear.bias is None else linear.bias.to(dtype)
    assert torch.equal(quantized(x), F.linear(x, quantized.unpacked(dtype), bias))
    assert torch.equal(quantized.unpacked(dtype), quantized.unpacked().to(dtype))


@pytest.mark.parametrize("bits", ERRORS)
def test_gradients_of_the_input_are_those_of_the_unpacked_weights(rng, bits):
    first, second = (quantize(layer(rng, in_features=sizes), bits) for sizes in (64, 192))
    x = torch.randn(4, 64, requires_grad=True)
    widen = torch.randn(first.out_features, 192)
    out = second(first(x) @ widen)
    plain = F.linear(F.linear(x, first.unpacked(), first.bias) @ widen, second.unpacked(), second.bias)
    gradient = torch.randn(out.shape)
    ours, theirs = (torch.autograd.grad(y, x, gradient)[0] for y in (out, plain))
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_inference_before_training_does_not_harm_it(rng):
    quantized = quantize(layer(rng, in_features=6400), 4)
    x = torch.randn(1, 6400, requires_grad=True)
    with torch.inference_mode():
        expected = quantized(x)
    out = quantized(x)
    out.sum().backward()
    assert torch.equal(out, expected) and torch.allclose(x.grad[0], quantized.unpacked().sum(0), atol=1e-5)


def test_unpacking_in_parts_changes_nothing(rng, monkeypatch):
    quantized = quantize(layer(rng, in_features=192), 4)
    whole = quantized.unpacked()
    monkeypatch.setattr("minqwen.quantize.CHUNK", 1)
    assert len(slices(whole)) == len(whole) and torch.equal(quantized.unpacked(), whole)


def test_four_bits_and_what_they_need_take_four_and_a_half(rng):
    quantized = quantize(nn.Linear(1024, 64, bias=False), 4)
    assert 8 * sum(b.numel() * b.element_size() for b in quantized.buffers()) == 4.5 * 1024 * 64


@pytest.mark.parametrize("bits", [8, 4])
def test_another_dtype_leaves_codes_and_scales_as_they_are(rng, bits):
    model = nn.Sequential(quantize(layer(rng, in_features=128), bits), nn.Linear(3, 3))
    before = model[0].unpacked()
    add_lora(model, 2, targets=("0",))
    model.to(torch.bfloat16).half()
    assert torch.equal(model[0].base[0].unpacked(), before) and model[1].weight.dtype == torch.float16
    assert model[0].bias is None or model[0].bias.dtype == torch.float16


def test_adapters_come_after_quantizing(rng):
    model = nn.ModuleDict({"transformer_blocks": nn.Sequential(layer(rng), layer(rng))})
    add_lora(model, 2, targets=("0",))
    with pytest.raises(ValueError, match="merge_lora adds them into the weights, then quantize"):
        quantize_blocks(model, 4)
    merge_lora(model)
    quantize_blocks(model, 4)
    add_lora(model, 2, targets=("1",))
    with pytest.raises(ValueError, match="merge first, then quantize"):
        merge_lora(model)


def test_bad_bits_and_bad_weights_are_named(rng):
    with pytest.raises(ValueError, match="5 bits: linear layers come in 8, 4, 3"):
        quantize(layer(rng), 5)
    broken = layer(rng)
    broken.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        quantize(broken, 4)


# ------------------------------------------------------------------------------------------------ whole models


def test_which_layers_of_the_released_models_get_fewer_bits():
    with torch.device("meta"):
        model = QwenImageTransformer2DModel(num_layers=1)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    given = {name: bits_of(name, 4) for name in names}
    assert [name for name, bits in given.items() if bits is None] == [
        "time_text_embed.timestep_embedder.linear_1", "time_text_embed.timestep_embedder.linear_2", "img_in", "txt_in",
        "norm_out.linear", "proj_out",
    ]  # fmt: skip
    assert [name for name, bits in given.items() if bits == 8] == [
        "transformer_blocks.0.img_mod.1", "transformer_blocks.0.txt_mod.1",
    ]  # fmt: skip
    assert list(given.values()).count(4) == 12


@pytest.mark.slow
def test_a_quantized_checkpoint_opens_as_what_was_saved(tmp_path):
    model = Checkpoint(TINY).load(QwenImageTransformer2DModel, "transformer")
    quantize_blocks(model, 4)
    (tmp_path / "transformer").mkdir()
    config = (TINY / "transformer" / "config.json").read_text(encoding="utf-8")
    (tmp_path / "transformer" / "config.json").write_text(config, encoding="utf-8")
    save_file(model.state_dict(), tmp_path / "transformer" / "model.safetensors")
    again = Checkpoint(tmp_path).load(QwenImageTransformer2DModel, "transformer", dtype=torch.bfloat16)
    kinds = [type(module) for module in model.modules()]
    assert kinds == [type(module) for module in again.modules()] and kinds.count(QuantizedLinear) == 6 * 14
    ours, theirs = again.state_dict(), model.state_dict()
    for name, tensor in theirs.items():
        kept = name.endswith(("_scale", "_offset")) or not tensor.is_floating_point()
        assert torch.equal(ours[name], tensor if kept else tensor.bfloat16())
    del theirs["transformer_blocks.0.attn.to_q.weight"]
    with whole_file(tmp_path / "transformer" / "model.safetensors") as path:  # the file is mapped, and stays as it is
        save_file(theirs, path)
    with pytest.raises(ValueError, match="to_q.weight"):
        Checkpoint(tmp_path).load(QwenImageTransformer2DModel, "transformer")


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "largest"), [(8, 0.02), (4, 0.15)])
def test_the_velocity_stays_near(bits, largest):
    pipe = QwenImagePipeline.from_pretrained(TINY, device="cpu")
    model = copy.deepcopy(pipe.transformer)
    quantize_blocks(model, bits)
    inputs = torch.randn(1, 16, 64), *pipe.encode_prompt("a small cat"), torch.tensor([0.7]), [[(1, 4, 4)]]
    with torch.no_grad():
        assert relative(model(*inputs), pipe.transformer(*inputs)) < largest


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bits", [8, 4, 3])
def test_a_gpu_unpacks_the_numbers_of_the_cpu(bits):
    layer = quantize(nn.Linear(300, 70), bits)
    here = layer.unpacked()
    assert torch.equal(layer.cuda().unpacked().cpu(), here)

"""lora.py: adapters equal peft's, files go to diffusers and back, every layout is read at its own scale."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import QwenImageTransformer2DModel as Reference
from diffusers.loaders.lora_pipeline import QwenImageLoraLoaderMixin
from peft import LoraConfig, get_peft_model
from reference import TOLERANCE, copy_weights, difference, random_inputs, randomise_, small_transformer_config
from reference_pipelines import drawing_pipeline, edit_pipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minqwen.lora import adapters, add_lora, load_lora, lora_state, merge_lora, save_lora
from minqwen.pipeline import QwenImagePipeline
from minqwen.transformer import QwenImageTransformer2DModel
from minqwen.world import sample_edit

TINY = Path(__file__).resolve().parents[1] / "data" / "tiny"
SHAPES = [(1, 3, 4), (1, 2, 5)]
EVERY_LINEAR = (
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
    "img_mod.1", "txt_mod.1", "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2",
    "img_in", "txt_in", "proj_out", "norm_out.linear", "linear_1", "linear_2",
)  # fmt: skip


@pytest.fixture
def pair(rng):
    """The reference's transformer and ours, of one small random config with the same weights, and inputs."""
    config = small_transformer_config(rng)
    reference = randomise_(Reference(**config))
    inputs = random_inputs(rng, config, SHAPES, batch=2)
    return reference, copy_weights(reference, QwenImageTransformer2DModel(**config)), inputs


def random_adapters(model, rng, targets=EVERY_LINEAR, rank=None, **options):
    add_lora(model, rank or rng.randint(1, 5), targets=targets, **options)
    for layer in adapters(model).values():
        torch.nn.init.normal_(layer.lora_A.weight, std=layer.in_features**-0.5)
        torch.nn.init.normal_(layer.lora_B.weight, std=0.2)
    return model


def out(model, inputs, **options):
    with torch.no_grad():
        return model(**inputs, **options)


def theirs(reference, inputs):
    return out(reference, inputs, return_dict=False)[0]


def fresh(model, reference):
    """Another model of ours with the reference's weights."""
    copy = type(model)(**{k: v for k, v in reference.config.items() if not k.startswith("_")})
    return copy_weights(reference, copy)


def test_fresh_adapters_change_nothing_and_only_they_train(pair, rng):
    _, model, inputs = pair
    before, names = out(model, inputs), set(model.state_dict())
    trainable = add_lora(model, rank=rng.randint(1, 4), generator=torch.Generator().manual_seed(1))
    assert difference(out(model, inputs), before) <= 1e-6  # odd sizes: the order of sums is not fixed
    assert set(model.state_dict()) - names == set(lora_state(model)) and names < set(model.state_dict())
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in trainable}
    assert len(adapters(model)) == 4 * len(model.transformer_blocks)
    model(**inputs).square().mean().backward()
    assert all(layer.lora_B.weight.grad.abs().sum() > 0 for layer in adapters(model).values())
    assert all(layer.lora_A.weight.grad.abs().sum() == 0 for layer in adapters(model).values())  # B is zero


def test_a_seed_draws_the_same_adapters(pair):
    reference, model, _ = pair
    other = fresh(model, reference)
    for each in (model, other):
        add_lora(each, 3, generator=torch.Generator().manual_seed(5))
    assert all(torch.equal(a, b) for a, b in zip(lora_state(model).values(), lora_state(other).values(), strict=True))


def test_peft_computes_the_same_and_its_file_is_read(pair, rng, tmp_path):
    reference, model, inputs = pair
    rank, alpha = rng.randint(1, 4), rng.choice([1, 3, 8])
    linears = sorted(name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    lora = get_peft_model(reference, LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(EVERY_LINEAR)))
    for name, p in lora.named_parameters():
        p.data = 0.4 * torch.randn_like(p) / p.shape[1] ** 0.5 if "lora_" in name else p.data
    lora.save_pretrained(tmp_path)  # base_model.model.*, adapter_config.json beside it
    report = load_lora(model, tmp_path / "adapter_model.safetensors")
    assert set(report.matched.values()) == {alpha / rank} and not report.unmatched
    assert sorted(report.matched) == linears
    assert difference(out(model, inputs), theirs(lora, inputs)) <= TOLERANCE


def test_rank_stabilised_and_patterned_peft_files_are_read(pair, tmp_path):
    reference, model, inputs = pair
    options = {"rank_pattern": {"to_k": 3}, "alpha_pattern": {"attn.to_v": 5}, "use_rslora": True}
    config = LoraConfig(r=2, lora_alpha=7, target_modules=["to_q", "to_k", "to_v"], **options)
    lora = get_peft_model(reference, config)
    for name, p in lora.named_parameters():
        p.data = 0.4 * torch.randn_like(p) / p.shape[1] ** 0.5 if "lora_" in name else p.data
    lora.save_pretrained(tmp_path)
    load_lora(model, tmp_path / "adapter_model.safetensors")
    assert difference(out(model, inputs), theirs(lora, inputs)) <= TOLERANCE


def test_what_is_saved_loads_in_diffusers_and_back_here(pair, rng, tmp_path):
    reference, model, inputs = pair
    random_adapters(model, rng, alpha=rng.choice([None, 2, 8]))
    a_name = list(adapters(model))[0]
    adapters(model)[a_name].scale *= 2  # scales may differ from layer to layer
    want, path = out(model, inputs), tmp_path / "lora.safetensors"
    save_lora(model, path, base_model="data/tiny")
    with safe_open(path, "pt") as file:
        assert file.metadata()["base_model"] == "data/tiny"
    again = fresh(model, reference)
    report = load_lora(again, path)
    rounding = TOLERANCE * max(1, float(want.abs().max()))  # twice a scale, numbers may be large
    assert difference(out(again, inputs), want) <= rounding and set(report.matched) == set(adapters(model))
    reference_loads(reference, path)
    assert difference(want, theirs(reference, inputs)) <= rounding
    assert [p.name for p in tmp_path.iterdir()] == ["lora.safetensors"]


def reference_loads(reference, path):
    """As QwenImagePipeline.load_lora_weights does, without a pipeline."""
    tensors, metadata = QwenImageLoraLoaderMixin.lora_state_dict(path, return_lora_metadata=True)
    reference.load_lora_adapter(tensors, metadata=metadata)


# --------------------------------------------------------------------------------------------------- layouts

A, B = "lora_A", "lora_B"


def flat(name):
    return "lora_unet_" + name.replace(".", "_")


LAYOUTS = {  # layout -> (name of a layer -> stem of its keys), down, up, alpha tensor; None: no such tensor
    "diffusers": (lambda n: f"transformer.{n}", "lora_A", "lora_B", None),
    "ai-toolkit": (lambda n: f"diffusion_model.{n}", "lora_A", "lora_B", None),
    "ComfyUI": (lambda n: f"model.diffusion_model.{n}", "lora_A", "lora_B", None),
    "lightx2v": (lambda n: n, "lora_down", "lora_up", 8.0),
    "kohya": (flat, "lora_down", "lora_up", 1.0),
    "DiffSynth": (lambda n: n, "lora_A.default", "lora_B.default", None),
    "PEFT": (lambda n: f"base_model.model.{n}", "lora_A", "lora_B", None),
}


def in_layout(model, layout):
    stem, down, up, alpha = LAYOUTS[layout]
    tensors = {}
    for name, layer in adapters(model).items():
        tensors[f"{stem(name)}.{down}.weight"] = layer.lora_A.weight.detach().clone()
        tensors[f"{stem(name)}.{up}.weight"] = layer.lora_B.weight.detach().clone()
        if alpha:
            tensors[f"{stem(name)}.alpha"] = torch.tensor(alpha)
    return tensors


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_at_its_scale(pair, rng, tmp_path, layout):
    reference, model, inputs = pair
    rank, alpha = 4, LAYOUTS[layout][3]
    random_adapters(model, rng, rank=rank, targets=EVERY_LINEAR if layout != "kohya" else EVERY_LINEAR[:14])
    tensors, path = in_layout(model, layout), tmp_path / f"{layout}.safetensors"
    save_file(tensors, path)
    for layer in adapters(model).values():
        layer.scale = alpha / rank if alpha else 1.0  # what the arithmetic says
    by_arithmetic = out(model, inputs)
    ours = fresh(model, reference)
    report = load_lora(ours, path)
    assert not report.unmatched and set(report.matched.values()) == {alpha / rank if alpha else 1.0}
    assert difference(out(ours, inputs), by_arithmetic) <= TOLERANCE
    if layout not in ("PEFT", "ComfyUI"):  # which diffusers does not read
        reference_loads(reference, path)
        assert difference(by_arithmetic, theirs(reference, inputs)) <= TOLERANCE


def test_scale_multiplies_the_files_own(pair, rng):
    reference, model, inputs = pair
    random_adapters(model, rng, rank=4)
    other = fresh(model, reference)
    assert set(load_lora(other, in_layout(model, "lightx2v"), scale=0.5).matched.values()) == {1.0}
    assert str(load_lora(fresh(model, reference), in_layout(model, "lightx2v"))).endswith("at scale 2")


def test_merging_adds_in_float32(pair, rng):
    reference, model, inputs = pair
    random_adapters(model, rng, alpha=3)
    want, names = out(model, inputs), set(reference.state_dict())
    merge_lora(model)
    assert set(model.state_dict()) == names and not adapters(model)
    assert difference(out(model, inputs), want) <= TOLERANCE


def test_a_bfloat16_layer_is_merged_with_one_rounding(pair, rng):
    reference, model, _ = pair
    model = random_adapters(model.bfloat16(), rng)
    assert all(p.dtype == torch.float32 for p in lora_state(model).values())
    name, layer = list(adapters(model).items())[0]
    want = (layer.weight.float() + layer.scale * layer.lora_B.weight @ layer.lora_A.weight).bfloat16()
    merge_lora(model)
    assert torch.equal(model.get_submodule(name).weight, want)


# --------------------------------------------------------------------------------------------------- pictures


@pytest.mark.slow
@pytest.mark.parametrize("edit", [False, True], ids=["draw", "edit"])
def test_a_lora_paints_the_same_picture_in_diffusers(rng, tmp_path, monkeypatch, edit):
    pipe = QwenImagePipeline.from_pretrained(TINY, device="cpu", dtype=torch.float32)
    random_adapters(pipe.transformer, rng, targets=EVERY_LINEAR[:4], rank=4, alpha=2)
    save_lora(pipe.transformer, tmp_path / "pytorch_lora_weights.safetensors")
    options = {"num_inference_steps": 4, "true_cfg_scale": 2.0, "latents": torch.randn(1, 36, 64)}
    task = sample_edit(np.random.default_rng(rng.randrange(10**6)))
    reference = edit_pipeline(TINY, 96 * 96, monkeypatch) if edit else drawing_pipeline(TINY)
    reference.load_lora_weights(tmp_path)
    if edit:
        want = reference(task.source, task.instruction, negative_prompt=" ", **options).images[0]
        got = pipe.edit(task.source, task.instruction, progress=False, **options)
    else:
        options |= {"width": 96, "height": 96}
        want = reference("a cat at the top left", negative_prompt=" ", **options).images[0]
        got = pipe.generate("a cat at the top left", progress=False, **options)
    assert int(np.abs(np.asarray(got, int) - np.asarray(want, int)).max()) <= 1


# ----------------------------------------------------------------------------------------------------- errors


Q = "transformer_blocks.0.attn.to_q"


@pytest.mark.slow
@pytest.mark.parametrize(
    "patterns",
    [
        {"alpha_pattern": {"to_.": 5}},
        {"alpha_pattern": {"to_q|to_k": 5, "to_v": 2}, "use_rslora": True},
        {"alpha_pattern": {r"transformer_blocks\.0\..*": 3, "^transformer_blocks.1.*": 4}},
        {"rank_pattern": {"blocks.[1-9].attn.to_k": 3}, "alpha_pattern": {"o_q": 9, "attn": 9}},
    ],
)
def test_patterns_are_regular_expressions_as_in_peft(pair, tmp_path, patterns):
    reference, model, _ = pair
    options = {"r": 2, "lora_alpha": 7, "target_modules": ["to_q", "to_k", "to_v"]} | patterns
    lora = get_peft_model(reference, LoraConfig(**options))
    lora.save_pretrained(tmp_path)
    scales = {name: m.scaling["default"] for name, m in lora.named_modules() if hasattr(m, "scaling")}
    report = load_lora(model, tmp_path / "adapter_model.safetensors")
    assert {f"base_model.model.{name}": scale for name, scale in report.matched.items()} == pytest.approx(scales)


@pytest.mark.parametrize("place", ["adapter_config.json", "a.safetensors"])
@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "null", '{"r": 2}', '{"r": 2, "lora_alpha": null}', '{"r": 2, "lora_alpha": "8"}',
        '{"r": 2, "lora_alpha": NaN}', '{"r": 3, "lora_alpha": 8}', '{"lora_alpha": 8, "rank_pattern": {"to_q": 9}}',
        '{"lora_alpha": 8, "alpha_pattern": {"to_q": null}}', '{"lora_alpha": 8, "alpha_pattern": {"(": 1}}',
        '{"lora_alpha": 8, "alpha_pattern": ["to_q"]}', '{"lora_alpha": 8, "use_rslora": "no"}',
        '{"lora_alpha": 8, "peft_type": "ADALORA"}',
    ],
)  # fmt: skip
def test_settings_that_say_no_scale_name_their_file(pair, tmp_path, text, place):
    _, model, _ = pair
    path, width = tmp_path / "a.safetensors", model.get_submodule(Q).in_features
    tensors = {f"{Q}.lora_A.weight": torch.ones(2, width), f"{Q}.lora_B.weight": torch.ones(width, 2)}
    save_file(tensors, path, metadata=None if place != path.name else {"lora_adapter_metadata": text})
    if place != path.name:
        (tmp_path / place).write_text(text)
    with pytest.raises(ValueError, match=place):
        load_lora(model, path)
    assert not adapters(model)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a, b: {f"{Q}.lora_A.weight": a / 0}, f"{Q}: down .*not finite"),
        (lambda a, b: {f"{Q}.lora_B.weight": (b * float("nan")).bfloat16()}, f"{Q}: up .*not finite"),
        (lambda a, b: {f"{Q}.alpha": torch.tensor(float("inf"))}, f"{Q}: alpha .*not finite"),
        (lambda a, b: {f"{Q}.lora_A.weight": a.to(torch.int8)}, f"{Q}: down .*whole ones"),
        (lambda a, b: {f"{Q}.lora_A.weight": a[:0], f"{Q}.lora_B.weight": b[:, :0]}, f"{Q}: .* do not fit"),
        (lambda a, b: {f"{Q}.alpha": torch.ones(2)}, f"{Q}: alpha .*more than one alpha"),
        (lambda a, b: {f"transformer.{Q}.lora_A.weight": a}, f"{Q} comes twice in this file"),
        (lambda a, b: {f"lora_unet_{Q.replace('.', '_')}.lora_up.weight": b}, f"{Q} comes twice in this file"),
    ],
)
def test_numbers_that_make_no_adapter_name_their_layer(pair, change, words):
    _, model, _ = pair
    width = model.get_submodule(Q).in_features
    a, b = torch.ones(2, width), torch.ones(width, 2)
    with pytest.raises(ValueError, match=words):
        load_lora(model, {f"{Q}.lora_A.weight": a, f"{Q}.lora_B.weight": b} | change(a, b))
    with pytest.raises(ValueError, match=f"{Q}: its scale would be nan"):
        load_lora(model, {f"{Q}.lora_A.weight": a, f"{Q}.lora_B.weight": b}, scale=float("nan"))
    assert not adapters(model)


def test_keys_that_fit_nothing_are_named(pair, rng):
    reference, model, _ = pair
    tensors = in_layout(random_adapters(model, rng), "diffusers")
    tensors["transformer.single_blocks.0.to_q.lora_A.weight"] = torch.zeros(2, 3)
    with pytest.warns(UserWarning, match="1 keys fit nothing: transformer.single_blocks.0"):
        report = load_lora(fresh(model, reference), tensors)
    assert report.unmatched == ["transformer.single_blocks.0.to_q.lora_A.weight"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {f"x{key}": value for key, value in t.items()}, "fit none of QwenImageTransformer2DModel"),
        (lambda t: t | {"transformer.transformer_blocks.0.attn.to_q.lokr_w1": torch.zeros(1)}, "a LoKr file"),
        (lambda t: t | {"transformer.transformer_blocks.0.attn.to_q.hada_w1_a": torch.zeros(1)}, "a LoHa file"),
        (lambda t: t | {"transformer.transformer_blocks.0.attn.to_q.dora_scale": torch.zeros(1)}, "a DoRA file"),
        (lambda t: dict(list(t.items())[1:]), "has only up in this file"),
        (lambda t: {key: value[:, :-1] for key, value in t.items()}, "a model of another size"),
        (lambda t: {}, "fit none of QwenImageTransformer2DModel"),
    ],
)
def test_a_wrong_file_gets_one_clear_sentence(pair, rng, change, words):
    reference, model, inputs = pair
    model = random_adapters(model, rng, rank=2)
    other = fresh(model, reference)
    before = out(other, inputs)
    with pytest.raises(ValueError, match=words):
        load_lora(other, change(in_layout(model, "diffusers")))
    assert not adapters(other) and difference(out(other, inputs), before) <= 1e-6


def test_borders(pair, tmp_path):
    _, model, _ = pair
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_lora(model, tmp_path / "none.safetensors")
    (tmp_path / "pickled.safetensors").write_bytes(b"\x80\x02" * 20)
    with pytest.raises(ValueError, match="pickled files are never opened"):
        load_lora(model, tmp_path / "pickled.safetensors")
    with pytest.raises(ValueError, match="no adapters to save"):
        save_lora(model, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"ends with \['to_x'\]"):
        add_lora(model, targets=("to_q", "to_x"))
    with pytest.raises(ValueError, match="rank must be at least 1"):
        add_lora(model, rank=0)
    add_lora(model)
    with pytest.raises(ValueError, match="adapters already"):
        add_lora(model)


def test_a_saved_file_says_rank_and_alpha(pair, tmp_path):
    _, model, _ = pair
    add_lora(model, rank=4, alpha=2)
    save_lora(model, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        said = json.loads(file.metadata()["lora_adapter_metadata"])
    assert said["transformer.r"] == 4 and said["transformer.lora_alpha"] == 2
    assert sorted(load_file(tmp_path / "a.safetensors")) == sorted(f"transformer.{key}" for key in lora_state(model))

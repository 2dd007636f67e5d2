"""At the released size every module has the released tensors: names, shapes, counts. Nothing is allocated."""

import functools
import json
from pathlib import Path

import pytest
import torch

from minqwen.text_encoder import Qwen2_5_VLTextEncoder
from minqwen.transformer import QwenImageTransformer2DModel
from minqwen.vae import AutoencoderKLQwenImage

RELEASED = json.loads((Path(__file__).parent / "data" / "released_tensors.json").read_text())
# tensors and parameters of each component, as the sizes of the released files confirm
COUNTS = {
    "transformer": (1933, 20_430_401_088),
    "vae": (194, 126_892_531),
    "text_encoder": (729, 8_292_166_656),
}
MODULES = {
    "transformer": QwenImageTransformer2DModel,
    "vae": AutoencoderKLQwenImage,
    "text_encoder": Qwen2_5_VLTextEncoder,
}
CONFIGS = {
    "transformer": {
        "_class_name": "QwenImageTransformer2DModel", "_diffusers_version": "0.34.0.dev0", "attention_head_dim": 128,
        "axes_dims_rope": [16, 56, 56], "guidance_embeds": False, "in_channels": 64, "joint_attention_dim": 3584,
        "num_attention_heads": 24, "num_layers": 60, "out_channels": 16, "patch_size": 2, "pooled_projection_dim": 768,
    },
    "vae": {
        "_class_name": "AutoencoderKLQwenImage", "attn_scales": [], "base_dim": 96, "dim_mult": [1, 2, 4, 4],
        "dropout": 0.0, "num_res_blocks": 2, "temperal_downsample": [False, True, True], "z_dim": 16,
    },
    "text_encoder": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "vocab_size": 152064,
        "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"},
        "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
                          "out_hidden_size": 3584},
        "text_config": {"image_token_id": None, "sliding_window": None, "torch_dtype": "float32"},
    },
}  # fmt: skip


@functools.cache
def released(component):
    """The module of the released config, without memory."""
    with torch.device("meta"):
        return MODULES[component](**CONFIGS[component])


@pytest.mark.parametrize("component", MODULES)
def test_the_committed_list_has_the_released_counts(component):
    numbers = sum(torch.Size(shape).numel() for shape in RELEASED[component].values())
    assert (len(RELEASED[component]), numbers) == COUNTS[component]


@pytest.mark.slow
@pytest.mark.parametrize("config", ["released config.json", "defaults"])
@pytest.mark.parametrize("component", MODULES)
def test_names_and_shapes(component, config):
    expected = dict(RELEASED[component])
    expected.pop("lm_head.weight", None)  # predicts words; nothing here reads it
    with torch.device("meta"):
        module = MODULES[component]() if config == "defaults" else released(component)
    assert {name: list(tensor.shape) for name, tensor in module.state_dict().items()} == expected


@pytest.mark.slow
@pytest.mark.parametrize("component", MODULES)
def test_released_weights_are_accepted_strictly(component):
    """Tensors of the released names and shapes load; one missing, one unexpected, one misshapen do not."""

    def load(changes):
        shapes = RELEASED[component] | changes
        tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items() if shape}
        with torch.device("meta"):
            released(component).load_state_dict(tensors, strict=True, assign=True)

    load({})
    name = next(n for n in RELEASED[component] if n != "lm_head.weight")
    for changes in ({name: None}, {"frobnicate.weight": [3]}, {name: [7, 7]}):
        with pytest.raises(RuntimeError, match="frobnicate" if "frobnicate.weight" in changes else name):
            load(changes)

"""Writes tests/data/released_tensors.json: names and shapes at the released size, as the reference builds them.

    python tests/make_released_list.py

The text encoder's names are turned into those of the released shards (model.*, visual.*, lm_head.weight).
"""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

TEXT = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
}
VISION = {"hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584, "depth": 32}


def main() -> None:
    with torch.device("meta"):
        modules = {
            "transformer": QwenImageTransformer2DModel(),
            "vae": AutoencoderKLQwenImage(),
            "text_encoder": Qwen2_5_VLForConditionalGeneration(
                Qwen2_5_VLConfig(text_config=TEXT, vision_config=VISION)
            ),
        }
    lists = {}
    for component, module in modules.items():
        shapes = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
        if component == "text_encoder":
            renames = (("model.language_model.", "model."), ("model.visual.", "visual."))
            for old, new in renames:
                shapes = {new + n.removeprefix(old) if n.startswith(old) else n: s for n, s in shapes.items()}
        lists[component] = dict(sorted(shapes.items()))
        print(component, len(shapes), sum(torch.Size(s).numel() for s in shapes.values()))
    text = json.dumps(lists, separators=(",", ":")).replace("],", "],\n").replace("{", "{\n")
    (Path(__file__).parent / "data" / "released_tensors.json").write_text(text + "\n")


if __name__ == "__main__":
    main()

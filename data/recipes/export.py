"""Writes the trained parts as a checkpoint in the released layout, bf16: python data/recipes/export.py FOLDER

Needs vae_config.json, vae.pt and transformer.pt in runs/.
"""

import json
import sys
from pathlib import Path

import torch
from make_tokenizer import build, save
from safetensors.torch import save_file
from tiny_models import TRANSFORMER, load_vae, text_config

from minqwen.run import read_state
from minqwen.vae import AutoencoderKLQwenImage

DIFFUSERS = "0.34.0.dev0"  # the version that the released files name
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": DIFFUSERS,
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "invert_sigmas": False,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "stochastic_sampling": False,
    "time_shift_type": "exponential",
    "use_beta_sigmas": False,
    "use_dynamic_shifting": True,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}
PROCESSOR = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "Qwen2VLImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "max_pixels": 12845056,
    "merge_size": 2,
    "min_pixels": 3136,
    "patch_size": 14,
    "processor_class": "Qwen2VLProcessor",
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"longest_edge": 12845056, "shortest_edge": 3136},
    "temporal_patch_size": 2,
}
MODEL_INDEX = {
    "_class_name": "QwenImageEditPipeline",
    "_diffusers_version": DIFFUSERS,
    "_area": 96 * 96,  # ours: the default working size, in pixels
    "_true_cfg_scale": 2.0,  # ours: the default guidance, the best of 1 to 5 (see evaluate.py)
    "processor": ["transformers", "Qwen2VLProcessor"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "QwenImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLQwenImage"],
}


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_weights(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file({k: v.bfloat16().contiguous() for k, v in sorted(tensors.items())}, path, metadata={"format": "pt"})
    path.chmod(0o644)


def export(folder: Path, runs: Path = Path("runs")) -> None:
    tokenizer = build()
    for name in ("tokenizer", "processor"):
        save(tokenizer, folder / name)
    write_json(folder / "processor" / "preprocessor_config.json", PROCESSOR)
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(folder / "model_index.json", MODEL_INDEX)

    config = json.loads((runs / "vae_config.json").read_text(encoding="utf-8"))
    released = {"dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": [], "dropout": 0.0,
                "temperal_downsample": [False, True, True]}  # fmt: skip
    config = {"_class_name": AutoencoderKLQwenImage.__name__, "_diffusers_version": DIFFUSERS} | config | released
    write_json(folder / "vae" / "config.json", config)
    write_weights(folder / "vae" / "diffusion_pytorch_model.safetensors", load_vae(runs).state_dict())

    average = read_state(runs / "transformer.pt")["parts"]["average"]
    parts = {"transformer": {}, "text_encoder": {}}
    for name, tensor in average.items():
        component, _, name = name.partition(".")
        parts[component][name] = tensor
    # the class that other software opens has an output head; nothing here reads it
    hidden = parts["text_encoder"]["model.norm.weight"].shape[0]
    parts["text_encoder"]["lm_head.weight"] = torch.zeros(tokenizer.get_vocab_size(), hidden)
    config = {"_class_name": "QwenImageTransformer2DModel", "_diffusers_version": DIFFUSERS} | TRANSFORMER
    write_json(folder / "transformer" / "config.json", config)
    write_json(folder / "text_encoder" / "config.json", text_config(tokenizer))
    write_weights(folder / "transformer" / "diffusion_pytorch_model.safetensors", parts["transformer"])
    write_weights(folder / "text_encoder" / "model.safetensors", parts["text_encoder"])


if __name__ == "__main__":
    export(Path(sys.argv[1]))
    size = sum(path.stat().st_size for path in Path(sys.argv[1]).rglob("*") if path.is_file())
    print(f"wrote {sys.argv[1]}, {size / 1e6:.1f} MB")

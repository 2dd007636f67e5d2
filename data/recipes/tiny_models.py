"""The tiny checkpoint's parts: their sizes, fresh or as far as they are trained.

The autoencoder, and text encoder and transformer as one module, since they are trained together.
"""

import json
from pathlib import Path

from torch import nn

from minqwen.run import read_state
from minqwen.text_encoder import Qwen2_5_VLTextEncoder
from minqwen.transformer import QwenImageTransformer2DModel
from minqwen.vae import AttentionBlock, AutoencoderKLQwenImage, ResidualBlock

VAE = {"base_dim": 16, "z_dim": 16, "latents_mean": [0.0] * 16, "latents_std": [1.0] * 16}
TRANSFORMER = {
    "attention_head_dim": 32,
    "axes_dims_rope": [4, 14, 14],
    "guidance_embeds": False,
    "in_channels": 64,
    "joint_attention_dim": 128,
    "num_attention_heads": 5,
    "num_layers": 6,
    "out_channels": 16,
    "patch_size": 2,
}


def build_vae(config: dict = VAE) -> AutoencoderKLQwenImage:
    """A fresh autoencoder whose branches start small, so that the residual paths carry the picture first."""
    vae = AutoencoderKLQwenImage(**config)
    for module in vae.modules():
        if isinstance(module, ResidualBlock):
            module.conv2.weight.data *= 0.3
        if isinstance(module, AttentionBlock):
            module.proj.weight.data *= 0.1
    vae.quant_conv.bias.data[16:] = -5.0  # log-variance: nearly no noise at first
    return vae


def load_vae(runs: Path) -> AutoencoderKLQwenImage:
    """The trained autoencoder, frozen."""
    vae = build_vae(json.loads((runs / "vae_config.json").read_text(encoding="utf-8")))
    vae.load_state_dict(read_state(runs / "vae.pt")["parts"]["vae"])
    return vae.eval().requires_grad_(False)


def text_config(tokenizer) -> dict:
    """text_encoder/config.json in the released, flat form."""
    ids = {name: tokenizer.token_to_id(f"<|{name}|>") for name in ("image_pad", "video_pad", "endoftext", "im_end")}
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": {"mrope_section": [4, 6, 6], "rope_type": "default", "type": "default"},
        "max_position_embeddings": 4096,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "bos_token_id": ids["endoftext"],
        "eos_token_id": ids["im_end"],
        "image_token_id": ids["image_pad"],
        "video_token_id": ids["video_pad"],
        "vision_start_token_id": tokenizer.token_to_id("<|vision_start|>"),
        "vision_end_token_id": tokenizer.token_to_id("<|vision_end|>"),
        "vision_token_id": tokenizer.token_to_id("<|vision_pad|>"),
        "torch_dtype": "bfloat16",
        "vision_config": {
            "depth": 2,
            "hidden_act": "silu",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "in_channels": 3,
            "in_chans": 3,
            "out_hidden_size": 128,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": 112,
            "fullatt_block_indexes": [1],
            "model_type": "qwen2_5_vl",
        },
    }


def build(tokenizer) -> nn.ModuleDict:
    """Fresh text encoder and transformer; modulation and output begin at zero, so that every block is the identity."""
    net = nn.ModuleDict(
        {
            "transformer": QwenImageTransformer2DModel(**TRANSFORMER),
            "text_encoder": Qwen2_5_VLTextEncoder(**text_config(tokenizer)),
        }
    )
    transformer = net["transformer"]
    zero = [transformer.norm_out.linear, transformer.proj_out]
    for block in transformer.transformer_blocks:
        zero += [block.img_mod[1], block.txt_mod[1]]
    for layer in zero:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    nn.init.normal_(net["text_encoder"].model.embed_tokens.weight, std=0.1)
    return net

"""diffusers' own pipelines over a checkpoint folder, made to run without torchvision and with the right positions."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from transformers import BatchFeature, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil


class Processor:
    """What Qwen2VLProcessor does for pictures and text; the class itself cannot be built without torchvision."""

    def __init__(self, folder: Path, tokenizer: Qwen2Tokenizer):
        self.image_processor, self.tokenizer = Qwen2VLImageProcessorPil.from_pretrained(folder), tokenizer

    def __call__(self, text, images, padding, return_tensors):
        images = images if isinstance(images, list) else [images]
        pictures = self.image_processor(images=images, return_tensors="pt")
        counts = iter((pictures["image_grid_thw"].prod(-1) // 4).tolist())
        filled = []
        for one in text:
            first, *parts = one.split("<|image_pad|>")
            filled.append(first + "".join("<|image_pad|>" * next(counts) + part for part in parts))
        tokens = self.tokenizer(filled, padding=padding, return_tensors="pt")
        return BatchFeature({**tokens, **pictures})


def reference_parts(folder: Path, dtype: torch.dtype = torch.float32) -> dict:
    """The components of a checkpoint as diffusers and transformers open them."""
    encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "text_encoder", dtype=dtype).eval()
    plain = encoder.forward

    def forward(input_ids, attention_mask, pixel_values=None, image_grid_thw=None, output_hidden_states=True):
        """diffusers 0.42.1 forgets mm_token_type_ids, without which transformers 5 gives images 1-D positions."""
        return plain(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            image_grid_thw=image_grid_thw,
            output_hidden_states=output_hidden_states,
            mm_token_type_ids=(input_ids == encoder.config.image_token_id).int(),
        )

    encoder.forward = forward
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        "vae": AutoencoderKLQwenImage.from_pretrained(folder / "vae", torch_dtype=dtype),
        "text_encoder": encoder,
        "tokenizer": Qwen2Tokenizer.from_pretrained(folder / "tokenizer"),
        "transformer": QwenImageTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=dtype),
    }


def drawing_pipeline(folder: Path, **options) -> QwenImagePipeline:
    pipe = QwenImagePipeline(**reference_parts(folder, **options))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def edit_pipeline(folder: Path, area: int, monkeypatch, plus: bool = False, **options):
    """QwenImageEditPipeline or QwenImageEditPlusPipeline at a working size of `area` pixels instead of 1024^2."""
    parts = reference_parts(folder, **options)
    processor = Processor(folder / "processor", parts["tokenizer"])
    module = pipeline_qwenimage_edit_plus if plus else pipeline_qwenimage_edit
    exact = module.calculate_dimensions
    small = lambda wanted, ratio: exact(area if wanted >= 1024 * 1024 else wanted, ratio)  # noqa: E731
    monkeypatch.setattr(module, "calculate_dimensions", small)
    if plus:
        monkeypatch.setattr(module, "CONDITION_IMAGE_SIZE", min(384 * 384, area))
        monkeypatch.setattr(module, "VAE_IMAGE_SIZE", area)
    pipe = (QwenImageEditPlusPipeline if plus else QwenImageEditPipeline)(processor=processor, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe

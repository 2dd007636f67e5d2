"""The pipeline: words, and pictures if there are any, in; a picture out.

    prompt -> text encoder -> embeddings          pictures -> VAE -> latents
    noise -> transformer, S times -> latents -> VAE -> picture

An edit is a drawing whose sequence goes on: behind the target's tokens stand those of the reference pictures, clean,
at every step. The transformer reads both and predicts a velocity for the target.
The surprise: guidance needs a second forward pass a step, and is silently off in diffusers when no negative prompt is
given; here the negative prompt defaults to one space.
Matches diffusers' QwenImagePipeline, QwenImageEditPipeline and QwenImageEditPlusPipeline (tests/test_pipeline.py).
Chapter 09.
"""

import os
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer
from tqdm import tqdm

from minqwen.checkpoint import Checkpoint
from minqwen.images import (
    calculate_dimensions,
    image_to_pixels,
    load_image,
    pack_latents,
    pixels_to_image,
    resize_image,
    unpack_latents,
)
from minqwen.prompt import EDIT, EDIT_PLUS, T2I, drop_prefix, load_image_settings, load_tokenizer, tokenize_prompts
from minqwen.sampling import euler_step, get_sigmas, guide
from minqwen.text_encoder import Qwen2_5_VLTextEncoder
from minqwen.transformer import QwenImageTransformer2DModel
from minqwen.vae import AutoencoderKLQwenImage

AREA = 1024 * 1024  # pixels of a released model's working size
CONDITION_AREA = 384 * 384  # what the text encoder of Edit-2509 and -2511 sees of each picture
TILE_ABOVE = 2048 * 1536  # larger pictures pass through the VAE in tiles
TILE = 1024  # pixels a side of a tile
GUIDE_TOGETHER = 1024  # up to so many image tokens both prompts share one forward pass: fewer, fuller operations
FAMILIES = {"QwenImagePipeline": None, "QwenImageEditPipeline": EDIT, "QwenImageEditPlusPipeline": EDIT_PLUS}
PARTS = {  # what holds weights
    "transformer": QwenImageTransformer2DModel,
    "vae": AutoencoderKLQwenImage,
    "text_encoder": Qwen2_5_VLTextEncoder,
}
OTHERS = {"QwenImage21Pipeline": "Qwen-Image-2.1", "QwenImageLayeredPipeline": "Qwen-Image-Layered"}
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "added_tokens.json", "tokenizer.json")
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")

Images = Image.Image | str | os.PathLike | list
Prompt = tuple[torch.Tensor, torch.Tensor | None]  # embeddings and mask, from encode_prompt
Callback = Callable[[int, float, torch.Tensor, torch.Tensor], None]


class QwenImagePipeline:
    """Draws (`generate`) and edits (`edit`); made by `from_pretrained`.

    transformer, vae, text_encoder: a part that is None is missed only by what needs it.
    edit_template: EDIT (one picture), EDIT_PLUS (several), or None where the checkpoint only draws.
    area: pixels of the default working size; true_cfg_scale: the default guidance.
    schedule: the keys of scheduler_config.json.
    """

    def __init__(
        self,
        transformer: QwenImageTransformer2DModel | None,
        vae: AutoencoderKLQwenImage | None,
        text_encoder: Qwen2_5_VLTextEncoder | None,
        tokenizer: Tokenizer,
        schedule: dict | None = None,
        image_settings: dict | None = None,
        edit_template=EDIT,
        area: int = AREA,
        true_cfg_scale: float = 4.0,
    ):
        self.transformer, self.vae, self.text_encoder, self.tokenizer = transformer, vae, text_encoder, tokenizer
        self.schedule, self.image_settings = schedule or {}, image_settings or {}
        self.edit_template, self.area, self.true_cfg_scale = edit_template, area, true_cfg_scale

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | os.PathLike,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        without: str | tuple[str, ...] = (),
    ) -> "QwenImagePipeline":
        """Open a checkpoint in the released layout, from a folder or a hub repository ("Qwen/Qwen-Image-Edit").

        device: by default CUDA, else MPS, else the CPU; dtype: by default bfloat16 on a GPU, float32 on a CPU.
        without: parts that stay where they are and become None: "transformer", "vae", "text_encoder".
        Raises FileNotFoundError where something is missing and ValueError for other families of models, weights
        that do not fit, and float16, in which the released model overflows.
        """
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        dtype = dtype or (torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16)
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype {dtype}: use bfloat16 or float32; the released model overflows in float16")
        without = {without} if isinstance(without, str) else set(without)
        if unknown := without - set(PARTS):
            raise ValueError(f"without {sorted(unknown)}: only {', '.join(PARTS)} can be left out")
        checkpoint = Checkpoint(path_or_repo)
        index = checkpoint.config("model_index.json")
        template = _edit_template(index, checkpoint.source)
        tokenizer = load_tokenizer(checkpoint.folder_of("tokenizer", TOKENIZER_FILES))
        settings = {}
        if template is not None:
            settings = load_image_settings(checkpoint.folder_of("processor", PROCESSOR_FILES))
        load = checkpoint.load
        return cls(
            *(None if name in without else load(part, name, device, dtype) for name, part in PARTS.items()),
            tokenizer,
            checkpoint.config("scheduler/scheduler_config.json"),
            settings,
            template,
            index.get("_area", AREA),  # only our own tiny checkpoint has these two keys
            index.get("_true_cfg_scale", 4.0),
        )

    @property
    def device(self) -> torch.device:
        return self._weight().device

    @property
    def dtype(self) -> torch.dtype:
        return self._weight().dtype

    def _weight(self) -> torch.Tensor:
        if self.transformer is not None:
            return self.transformer.img_in.weight
        part = self.vae if self.vae is not None else self.text_encoder
        if part is None:
            raise ValueError("this pipeline was opened without any of its parts")
        return next(part.parameters())

    def generate(
        self,
        prompt: str,
        width: int | None = None,
        height: int | None = None,
        negative_prompt: str | None = " ",
        true_cfg_scale: float | None = None,
        num_inference_steps: int = 50,
        generator: torch.Generator | None = None,
        latents: torch.Tensor | None = None,
        callback: Callback | None = None,
        progress: bool = True,
    ) -> Image.Image:
        """Draw a picture from words.

        width, height: pixels, by default a square of the checkpoint's area; rounded down to multiples of 16.
        negative_prompt, true_cfg_scale: guidance, by default the checkpoint's (4 when released), off when the
            scale is at most 1 or the negative prompt is None.
        generator: source of the starting noise; latents: the noise itself, packed (1, tokens, 64).
        callback(step, sigma, latents, velocity) runs after each prediction, with the packed latents it was made on.
        Raises ValueError for sizes or latents that do not fit, FloatingPointError when the numbers overflow.
        """
        side = calculate_dimensions(self.area, 1.0)[0]
        width, height = _multiple_of_16(width or side, "width"), _multiple_of_16(height or side, "height")
        scale = self.true_cfg_scale if true_cfg_scale is None else true_cfg_scale
        positive = self.encode_prompt(prompt)
        negative = self._negative(negative_prompt, scale)
        return self._sample(
            positive, negative, [], width, height, scale, num_inference_steps, generator, latents,
            callback, progress,
        )  # fmt: skip

    def edit(
        self,
        images: Images,
        prompt: str,
        area: int | None = None,
        width: int | None = None,
        height: int | None = None,
        negative_prompt: str | None = " ",
        true_cfg_scale: float | None = None,
        num_inference_steps: int = 50,
        generator: torch.Generator | None = None,
        latents: torch.Tensor | None = None,
        callback: Callback | None = None,
        progress: bool = True,
    ) -> Image.Image:
        """Change a picture, or make one out of several, as the prompt says.

        images: a PIL image or path, or a list of them for Edit-2509 and -2511. area: pixels of the working size,
        which keeps the picture's aspect ratio as far as multiples of 32 allow (by default the checkpoint's own,
        1024*1024 when released). width, height: the result's size, by default the working size of the picture, of
        the last one if there are several. The other keywords and errors are those of `generate`.
        """
        images = [load_image(image) for image in (images if isinstance(images, list | tuple) else [images])]
        if not images:
            raise ValueError("there is no picture to edit; to draw from words alone, use generate")
        if self.edit_template is EDIT and len(images) > 1:
            raise ValueError(f"this checkpoint edits one picture, got {len(images)}; several need Edit-2509 or -2511")
        resized, seen = self.resize_references(images, area)
        scale = self.true_cfg_scale if true_cfg_scale is None else true_cfg_scale
        positive = self.encode_prompt(prompt, seen)
        negative = self._negative(negative_prompt, scale, seen)
        references = [self.encode_image(image) for image in resized]
        width = _multiple_of_16(width or resized[-1].width, "width")
        height = _multiple_of_16(height or resized[-1].height, "height")
        return self._sample(
            positive, negative, references, width, height, scale, num_inference_steps, generator, latents,
            callback, progress,
        )  # fmt: skip

    def resize_references(
        self, images: list[Image.Image], area: int | None = None
    ) -> tuple[list[Image.Image], list[Image.Image]]:
        """RGB pictures at the working size of `area` pixels: as the transformer and as the text encoder see them."""
        area, small = area or self.area, min(CONDITION_AREA, area or self.area)
        resized = [resize_image(i, *calculate_dimensions(area, i.width / i.height)) for i in images]
        if self.edit_template is not EDIT_PLUS:
            return resized, resized
        return resized, [resize_image(i, *calculate_dimensions(small, i.width / i.height)) for i in images]

    @torch.inference_mode()
    def encode_prompt(
        self, prompt: str | list[str], images: Images | None = None, max_sequence_length: int = 512
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Prompt embeddings (B, Nt, C), zero where padded, and their mask (B, Nt), None if every token is valid.

        images: the pictures that a prompt speaks of, at the size at which the text encoder is to see them.
        max_sequence_length cuts prompts without images; a warning says by how much.
        """
        if images is not None and self.edit_template is None:
            raise ValueError("this checkpoint only draws; open an Edit checkpoint to change pictures")
        prompts = [prompt] if isinstance(prompt, str) else prompt
        images = images if images is None or isinstance(images, list | tuple) else [images]
        tokens = tokenize_prompts(
            self.tokenizer,
            prompts,
            None if images is None else [list(images)] * len(prompts),
            T2I if images is None else self.edit_template,
            max_sequence_length,
            self.image_settings,
        )
        inputs = [None if x is None else x.to(self.device) for x in tokens[:4]]
        return drop_prefix(self.text_encoder(*inputs), inputs[1], tokens.drop)

    @torch.inference_mode()
    def encode_image(self, image: Image.Image) -> torch.Tensor:
        """A picture, sides multiples of 16, as normalised latents (1, 16, 1, H/8, W/8): the posterior's mode."""
        tile = TILE if image.width * image.height > TILE_ABOVE else None
        pixels = image_to_pixels(image).to(self.device, self.dtype)
        return self.vae.normalize(self.vae.encode(pixels, tile=tile).mode())

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor, width: int, height: int) -> Image.Image:
        """Packed latents (1, tokens, 64) of a picture of width x height pixels, as that picture."""
        tile = TILE if width * height > TILE_ABOVE else None
        latents = unpack_latents(latents, height // 8, width // 8).to(self.device, self.dtype)
        return pixels_to_image(self.vae.decode(self.vae.denormalize(latents), tile=tile))

    def _negative(self, negative_prompt: str | None, scale: float, images: list | None = None):
        if scale <= 1 or negative_prompt is None:
            return None
        return self.encode_prompt(negative_prompt, images)

    @torch.inference_mode()
    def _sample(
        self, positive, negative, references, width, height, scale, steps, generator, latents, callback, progress
    ) -> Image.Image:
        if self.transformer is None:
            raise ValueError("this pipeline was opened without its transformer: it encodes, and draws nothing")
        h, w = height // 16, width // 16
        latents = self._noise(h, w, generator) if latents is None else _checked(latents, h, w)
        latents = latents.to(self.device, torch.float32)
        shapes = [(1, h, w)] + [(1, z.shape[-2] // 2, z.shape[-1] // 2) for z in references]
        reference = [pack_latents(z).to(self.dtype) for z in references]
        sigmas = get_sigmas(steps, h * w, **self.schedule).tolist()

        both = negative is not None and sum(h * w for _, h, w in shapes) <= GUIDE_TOGETHER
        joint = join_prompts(positive, negative) if both else None

        def velocity(prompt, sigma):
            tokens = torch.cat([latents.to(self.dtype), *reference], dim=1).expand(len(prompt[0]), -1, -1)
            timestep = torch.tensor([sigma], device=self.device)  # one, for all rows
            return self.transformer(tokens, *prompt, timestep, [shapes])[:, : h * w]

        for step in tqdm(range(steps), desc=f"{width}x{height}", disable=not progress):
            if negative is None:
                v = velocity(positive, sigmas[step])
            elif both:
                v = guide(*velocity(joint, sigmas[step]).split(1), scale)
            else:
                v = guide(velocity(positive, sigmas[step]), velocity(negative, sigmas[step]), scale)
            if not v.isfinite().all():
                raise FloatingPointError(
                    f"step {step}: numbers are no longer finite; try dtype=torch.float32"
                )
            if callback is not None:
                callback(step, sigmas[step], latents, v)
            latents = euler_step(latents, v, sigmas[step], sigmas[step + 1])
        return self.decode(latents, width, height)

    def _noise(self, h: int, w: int, generator: torch.Generator | None) -> torch.Tensor:
        """Starting noise, drawn in float32 on the generator's device: the same picture on every machine."""
        device = generator.device if generator is not None else "cpu"
        return pack_latents(torch.randn(1, 16, 1, 2 * h, 2 * w, generator=generator, device=device))


def join_prompts(positive: Prompt, negative: Prompt) -> Prompt:
    """Two prompts as one batch, zeros behind the shorter, and the mask that hides them (None: equally long)."""
    embeds, masks = zip(positive, negative, strict=True)
    longest = max(e.shape[1] for e in embeds)
    masks = [e.new_ones(e.shape[:2], dtype=torch.bool) if m is None else m for e, m in zip(embeds, masks, strict=True)]
    embeds = torch.cat([F.pad(e, (0, 0, 0, longest - e.shape[1])) for e in embeds])
    mask = torch.cat([F.pad(m, (0, longest - m.shape[1])) for m in masks])
    return embeds, None if mask.all() else mask


def _edit_template(index: dict, source: str):
    family = index.get("_class_name")
    if family not in FAMILIES:
        name = OTHERS.get(family, family)
        raise ValueError(
            f"{source} holds {name}, which minqwen does not compute; it runs Qwen-Image, Qwen-Image-2512, "
            "Qwen-Image-Edit, -Edit-2509 and -Edit-2511"
        )
    return FAMILIES[family]


def _multiple_of_16(side: int, name: str) -> int:
    if side < 16:
        raise ValueError(f"{name} is {side} pixels; the smallest is 16")
    if side % 16:
        warnings.warn(
            f"{name} {side} is no multiple of 16, so the picture has {side // 16 * 16}", stacklevel=3
        )
    return side // 16 * 16


def _checked(latents: torch.Tensor, h: int, w: int) -> torch.Tensor:
    if latents.ndim != 3 or latents.shape[:2] != (1, h * w):
        raise ValueError(f"latents must be packed noise of shape (1, {h * w}, 64), got {tuple(latents.shape)}")
    return latents

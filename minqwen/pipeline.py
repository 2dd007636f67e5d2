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
from numbers import Integral

import torch
from PIL import Image
from tokenizers import Tokenizer
from tqdm import tqdm

from minqwen.checkpoint import Checkpoint, choose_device
from minqwen.files import content_of, expect_numbers
from minqwen.images import (
    MAX_SIDE,
    calculate_dimensions,
    image_to_pixels,
    load_image,
    pack_latents,
    pixels_to_image,
    resize_image,
    unpack_latents,
)
from minqwen.memory import Shell, Turns
from minqwen.parallel import Passes, split_tokens
from minqwen.plans import TOGETHER, default_dtype, hold
from minqwen.prompt import EDIT, EDIT_PLUS, T2I, Prompt, check_prompts, drop_prefix, pad_prompts, tokenize_prompts
from minqwen.sampling import Callback, Velocity, denoise, get_sigmas, guide
from minqwen.text_encoder import Qwen2_5_VLTextEncoder
from minqwen.tokenizer import load_tokenizer
from minqwen.transformer import QwenImageTransformer2DModel
from minqwen.vae import AutoencoderKLQwenImage
from minqwen.vision import load_image_settings

AREA = 1024 * 1024  # pixels of a released model's working size
CONDITION_AREA = 384 * 384  # what the text encoder of Edit-2509 and -2511 sees of each picture
TILE_ABOVE = 2048 * 1536  # larger pictures pass through the VAE in tiles
TILE = 1024  # pixels a side of a tile
LOOK_AT_EVERY_STEP = ("cpu",)  # where a look at a number waits for nothing; a GPU's numbers are looked at in the end
FAMILIES = {"QwenImagePipeline": None, "QwenImageEditPipeline": EDIT, "QwenImageEditPlusPipeline": EDIT_PLUS}
# what holds weights
PARTS = dict(transformer=QwenImageTransformer2DModel, vae=AutoencoderKLQwenImage, text_encoder=Qwen2_5_VLTextEncoder)

Images = Image.Image | str | os.PathLike | list


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
        self.turns: Turns | None = None  # where the parts come and go; then they are no attributes but found there
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
        memory: str | float = "auto",
    ) -> "QwenImagePipeline":
        """Open a checkpoint in the released layout, from a folder or a hub repository ("Qwen/Qwen-Image-Edit").

        device: by default CUDA, else MPS, else the CPU; dtype: by default bfloat16 on a GPU, float32 on a CPU (or, for
            a model of the released size, bfloat16 if the CPU is faster in it).
        without: parts that stay where they are and become None: "transformer", "vae", "text_encoder".
        memory: "resident", "turns" or "stream" (see memory.py), a budget in GiB, or "auto": the first that fits.
        Raises FileNotFoundError where something is missing, ConnectionError where it should come from a hub that is
        away, and ValueError for other families of models, damaged files, weights that do not fit, a device that is not
        there, and float16, in which the released model overflows.
        """
        device = choose_device(device)
        if dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(f"dtype {dtype}: use bfloat16 or float32; the released model overflows in float16")
        without = {without} if isinstance(without, str) else set(without)
        if unknown := without - set(PARTS):
            raise ValueError(f"without {sorted(unknown)}: only {', '.join(PARTS)} can be left out")
        checkpoint, parts = Checkpoint(path_or_repo), [name for name in PARTS if name not in without]
        index = checkpoint.config("model_index.json")
        area, scale = index.get("_area", AREA), index.get("_true_cfg_scale", 4.0)  # only our tiny checkpoint has these
        with content_of(f"{checkpoint}/model_index.json"):
            if (family := str(index.get("_class_name"))) not in FAMILIES:
                raise ValueError(f"{checkpoint} is made for {family}; minqwen computes {', '.join(FAMILIES)}")
            expect_numbers(_true_cfg_scale=scale, _area=calculate_dimensions(area, 1.0)[0])
        schedule = checkpoint.config("scheduler/scheduler_config.json")
        with content_of(f"{checkpoint}/scheduler/scheduler_config.json"):
            get_sigmas(2, 4096, **schedule)  # a schedule that is not computed here is refused before anything large
        tokenizer = load_tokenizer(checkpoint.within("tokenizer"))
        settings = load_image_settings(checkpoint.within("processor")) if FAMILIES[family] else {}
        dtype = dtype or default_dtype(device, checkpoint, parts)
        shells = {name: Shell(checkpoint, PARTS[name], name, device, dtype) for name in parts}
        pipe = cls(None, None, None, tokenizer, schedule, settings, FAMILIES[family], area, scale)
        hold(pipe, shells, area, memory)
        return pipe

    def __getattr__(self, name: str):
        """A part that is no attribute: the one that comes now."""
        turns = vars(self).get("turns")
        if turns is None or name not in turns.shells:
            raise AttributeError(f"a {type(self).__name__} has no {name!r}")
        return turns[name]

    @property
    def device(self) -> torch.device:
        return self._weight().device

    @property
    def dtype(self) -> torch.dtype:
        return self._weight().dtype

    def _weight(self) -> torch.Tensor:
        if self.turns is not None:
            return self.turns.like
        if self.transformer is not None:
            return self.transformer.img_in.weight
        return next((self.vae or self.text_encoder).parameters())

    def check_pictures(self, count: int) -> None:
        """Raise ValueError if this checkpoint cannot change a picture, or not so many at once."""
        if count and self.edit_template is None:
            raise ValueError("this checkpoint only draws; open an Edit checkpoint to change pictures")
        if count > 1 and self.edit_template is EDIT:
            raise ValueError(f"this checkpoint edits one picture, got {count}; several need Edit-2509 or -2511")

    def generate(
        self, prompt: str, width: int | None = None, height: int | None = None, negative_prompt: str | None = " ",
        true_cfg_scale: float | None = None, num_inference_steps: int = 50, generator: torch.Generator | None = None,
        latents: torch.Tensor | None = None, callback: Callback | None = None, progress: bool = True,
    ) -> Image.Image:  # fmt: skip
        """Draw a picture from words.

        width, height: pixels, by default a square of the checkpoint's area; rounded down to multiples of 16.
        negative_prompt, true_cfg_scale: guidance, by default the checkpoint's (4 when released), off when the
            scale is at most 1 or the negative prompt is None.
        generator: source of the starting noise; latents: the noise itself, packed (1, tokens, 64).
        callback(step, sigma, latents, velocity) runs after each prediction, with the packed latents it was made on.
        Raises ValueError for prompts, numbers, sizes or latents that do not fit, TypeError for a prompt that is no
        text and latents that are no tensor, FloatingPointError when the numbers overflow.
        """
        walk = (num_inference_steps, generator, latents, callback, progress)
        return self._paint([], None, prompt, width, height, negative_prompt, true_cfg_scale, *walk)

    def edit(
        self, images: Images, prompt: str, area: int | None = None, width: int | None = None, height: int | None = None,
        negative_prompt: str | None = " ",
        true_cfg_scale: float | None = None, num_inference_steps: int = 50, generator: torch.Generator | None = None,
        latents: torch.Tensor | None = None, callback: Callback | None = None, progress: bool = True,
    ) -> Image.Image:  # fmt: skip
        """Change a picture, or make one out of several, as the prompt says.

        images: a PIL image or path, or a list of them for Edit-2509 and -2511. area: pixels of the working size,
        which keeps the picture's aspect ratio as far as multiples of 32 allow (by default the checkpoint's own,
        1024*1024 when released). width, height: the result's size, by default the working size of the picture, of
        the last one if there are several. The other keywords and errors are those of `generate`.
        """
        images = [load_image(image) for image in (images if isinstance(images, list | tuple) else [images])]
        if not images:
            raise ValueError("there is no picture to edit; to draw from words alone, use generate")
        self.check_pictures(len(images))
        walk = (num_inference_steps, generator, latents, callback, progress)
        return self._paint(images, area, prompt, width, height, negative_prompt, true_cfg_scale, *walk)

    def _paint(
        self, images, area, prompt, width, height, negative_prompt, true_cfg_scale, steps, generator, latents,
        callback, progress,
    ) -> Image.Image:  # fmt: skip
        """What `generate` and `edit` share: encode, walk from noise to latents, decode."""
        check_prompts(prompt=prompt, negative_prompt=" " if negative_prompt is None else negative_prompt)
        if vars(self).get("transformer", self.turns) is None:
            raise ValueError("this pipeline was opened without its transformer: it encodes, and draws nothing")
        working, conditions = self.resize_references(images, area)
        default = working[-1].size if working else calculate_dimensions(self.area, 1.0)
        width = _multiple_of_16(default[0] if width is None else width, "width")
        height = _multiple_of_16(default[1] if height is None else height, "height")
        h, w = height // 16, width // 16
        if latents is None:
            latents = starting_noise(h, w, generator)
        elif not isinstance(latents, torch.Tensor):
            raise TypeError(f"latents must be a tensor, got {type(latents).__name__}")
        elif latents.shape != (1, h * w, 64):
            raise ValueError(f"latents must be packed noise of shape (1, {h * w}, 64), got {tuple(latents.shape)}")
        elif not latents.isfinite().all():
            raise ValueError("latents hold numbers that are not finite")
        sigmas = get_sigmas(steps, h * w, **self.schedule)

        scale = self.true_cfg_scale if true_cfg_scale is None else true_cfg_scale
        expect_numbers(true_cfg_scale=scale)
        guided = scale > 1 and negative_prompt is not None
        texts = [prompt, negative_prompt] if guided else [prompt]
        prompts = [self.encode_prompt(text, conditions) for text in texts]
        references = [self.encode_image(image) for image in working]
        if self.turns is not None and "transformer" not in vars(self):  # else it is somebody else's
            self.turns.prepare(sigmas)
        velocity = self.velocity(prompts, references, width, height, scale)
        with tqdm(total=steps, desc=f"{width}x{height}", disable=not progress) as bar:
            latents = _walk(velocity, latents.to(self.device, torch.float32), sigmas, callback, bar)
        return self.decode(latents, width, height)

    def velocity(
        self, prompts: list[Prompt], references: list[torch.Tensor], width: int, height: int, true_cfg_scale: float
    ) -> Velocity:
        """velocity(latents, sigma) of a picture of width x height pixels, for `denoise`.

        prompts: encoded, one, or two (positive, negative) for guidance. references: latents from encode_image; they
        stand behind the target's tokens, clean, at every step, and what the model says about them is dropped.
        """
        shapes = [(1, height // 16, width // 16)]
        shapes += [(1, z.shape[-2] // 2, z.shape[-1] // 2) for z in references]
        turns = None if "transformer" in vars(self) else self.turns
        clean = [pack_latents(z).to(self.dtype) for z in references]
        if len(prompts) == 2 and sum(h * w for _, h, w in shapes) <= TOGETHER:
            prompts = [pad_prompts(prompts)]
        passes = Passes(len(prompts))

        @torch.inference_mode()
        def velocity(latents: torch.Tensor, sigma: float) -> torch.Tensor:
            tokens = torch.cat([latents.to(self.dtype), *clean], dim=1)
            timestep = torch.full((1,), sigma, device=self.device)  # filled there: a copy would wait for the GPU
            table = {} if turns is None else {"modulations": turns.modulations(sigma)}
            predictions, model = [], split_tokens(self.transformer, passes.group)
            for embeds, mask in passes.mine(prompts):
                rows = tokens.expand(len(embeds), -1, -1)
                rows = model(rows, embeds, mask, timestep, [shapes], **table)
                for each in passes.exchanged(rows[:, : latents.shape[1]]):
                    predictions += each.split(1)
            return guide(*predictions, true_cfg_scale) if len(predictions) == 2 else predictions[0]

        return velocity

    def resize_references(self, images: list, area: int | None = None) -> tuple[list, list]:
        """Two copies of each RGB picture: the reference, and what the text encoder looks at.

        References have the working size of `area` pixels. Edit-2509 and -2511 look at smaller copies, resized from
        the given pictures; the others look at the references.
        """
        area = self.area if area is None else area
        references = [_resize_to(area, image) for image in images]
        if self.edit_template is not EDIT_PLUS:
            return references, references
        return references, [_resize_to(area_seen(EDIT_PLUS, area), image) for image in images]

    @torch.inference_mode()
    def encode_prompt(
        self, prompt: str | list[str], images: Images | None = None, max_sequence_length: int = 512
    ) -> Prompt:
        """Prompt embeddings (B, Nt, C), zero where padded, and their mask (B, Nt), None if every token is valid.

        images: the pictures that a prompt speaks of, at the size at which the text encoder is to see them.
        max_sequence_length cuts prompts without images; a warning says by how much.
        """
        prompts = prompt if isinstance(prompt, list | tuple) else [prompt]
        template, pictures = T2I, None
        if images:
            images = images if isinstance(images, list | tuple) else [images]
            self.check_pictures(len(images))
            template, pictures = self.edit_template, [images] * len(prompts)
        tokens = tokenize_prompts(self.tokenizer, prompts, pictures, template, max_sequence_length, self.image_settings)
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


def area_seen(template, area: int) -> int:
    """Pixels of the copy of a picture that the text encoder looks at."""
    return min(CONDITION_AREA, area) if template is EDIT_PLUS else area


def starting_noise(h: int, w: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """Noise (1, h * w, 64), drawn in float32 on the generator's device: the same picture on every machine."""
    device = generator.device if generator is not None else "cpu"
    return pack_latents(torch.randn(1, 16, 1, 2 * h, 2 * w, generator=generator, device=device))


def _walk(
    velocity: Velocity, latents: torch.Tensor, sigmas: torch.Tensor, callback: Callback | None, bar: tqdm
) -> torch.Tensor:
    """`denoise` with a progress bar, and an error in place of a black picture."""
    finite = []  # a flag a step, which stays on the device

    def watch(step: int, sigma: float, latents: torch.Tensor, v: torch.Tensor) -> None:
        finite.append(v.isfinite().all())
        if v.device.type in LOOK_AT_EVERY_STEP:
            _expect_finite(finite)
        if callback is not None:
            callback(step, sigma, latents, v)
        bar.update()

    latents = denoise(velocity, latents, sigmas, callback=watch)
    _expect_finite(finite)
    return latents


def _expect_finite(flags: list[torch.Tensor]) -> None:
    flags = torch.stack(flags)
    if not flags.all():
        step = flags.tolist().index(False)
        why = "weights or a LoRA hold NaN, or bfloat16 overflows"
        raise FloatingPointError(f"step {step}: numbers are no longer finite: {why}")


def _resize_to(area: int, image: Image.Image) -> Image.Image:
    return resize_image(image, *calculate_dimensions(area, image.width / image.height))


def _multiple_of_16(side: int, name: str) -> int:
    if not (isinstance(side, Integral) and 16 <= side <= MAX_SIDE):
        raise ValueError(f"{name} is {side!r} pixels; expected a whole number from 16 to {MAX_SIDE}")
    if side % 16:
        warnings.warn(f"{name} {side} is no multiple of 16, so the picture has {side // 16 * 16}", stacklevel=4)
    return side // 16 * 16

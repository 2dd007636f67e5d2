"""From words and pictures to the numbers that the text encoder reads.

    prompts, images  ->  ids (B, L), mask (B, L), patches (P, 1176), grids (n, 3)
    hidden (B, L, C), mask  ->  embeds (B, Nt, C), mask (B, Nt) or None

The prompt goes into a chat template whose system message tells the language model what to look at. The states
of that constant prefix (34 or 64 tokens) are dropped afterwards: what is kept is the images, the prompt and
five closing tokens.
The surprise: cutting a long prompt before the encoder or after it is the same, because the encoder is causal.
Matches diffusers' QwenImage pipelines, transformers' Qwen2Tokenizer and Qwen2VLImageProcessorPil
(tests/test_prompt.py). Chapter 07.
"""

import inspect
import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor

Prompt = tuple[Tensor, Tensor | None]  # embeddings (B, Nt, C) and their mask (B, Nt), None: every token is valid

PAD = "<|endoftext|>"
IMAGE_PAD = "<|image_pad|>"

# Bytes merge only inside these: English endings, words, single digits, punctuation, line ends, spaces.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Template(NamedTuple):
    text: str  # "{}" is where the pictures and the prompt go
    drop: int  # tokens in front of "{}", the same for every prompt
    picture: str | None  # put in front of the prompt for each image; None: the template takes no images


T2I = Template(
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    34,
    None,
)
EDIT = Template(
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a "
    "new image that meets the user's requirements while maintaining consistency with the original input "
    "where appropriate.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    64,
    f"<|vision_start|>{IMAGE_PAD}<|vision_end|>",
)
EDIT_PLUS = EDIT._replace(picture=f"Picture {{}}: <|vision_start|>{IMAGE_PAD}<|vision_end|>")


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The byte-level BPE tokenizer in `folder`, from vocab.json and merges.txt, or else from tokenizer.json.

    The two files come first because every released repository has them, and some have no tokenizer.json. Ids
    are never guessed: added tokens (`<|im_start|>` ...) must be listed in a file, with the ids they get here.
    Raises FileNotFoundError when neither form is there, ValueError when added tokens are missing or disagree.
    """
    folder = Path(folder)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        tokenizer = _byte_level_bpe(folder)
    elif (folder / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
    else:
        raise FileNotFoundError(
            f"no tokenizer in {folder}: expected vocab.json and merges.txt, or tokenizer.json"
        )
    needed = (PAD, "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", IMAGE_PAD)
    if missing := [token for token in needed if tokenizer.token_to_id(token) is None]:
        raise ValueError(
            f"the tokenizer in {folder} does not list {missing}: expected them in tokenizer_config.json "
            "(added_tokens_decoder), added_tokens.json or tokenizer.json"
        )
    return tokenizer


def _byte_level_bpe(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    tokenizer.normalizer = normalizers.NFC()  # e + combining accent becomes é, as in the training text
    split = pre_tokenizers.Split(Regex(WORDS), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    for id, token in sorted(_added_tokens(folder).items()):  # each gets the next free id
        tokenizer.add_tokens([token])
        if (got := tokenizer.token_to_id(token.content)) != id:
            raise ValueError(
                f"{folder} lists {token.content!r} as token {id}, but after the entries of vocab.json it is "
                f"number {got}: the files do not belong together"
            )
    return tokenizer


def _added_tokens(folder: Path) -> dict[int, AddedToken]:
    """id -> token, from the first file that lists them."""
    if listed := _read_json(folder / "tokenizer_config.json").get("added_tokens_decoder"):
        return {int(id): _added_token(**token) for id, token in listed.items()}
    if listed := _read_json(folder / "added_tokens.json"):
        return {id: _added_token(content) for content, id in listed.items()}
    return {t["id"]: _added_token(**t) for t in _read_json(folder / "tokenizer.json").get("added_tokens", [])}


def _added_token(content: str, special: bool = True, **rest) -> AddedToken:
    flags = {key: rest.get(key, False) for key in ("lstrip", "rstrip", "single_word", "normalized")}
    return AddedToken(content, special=special, **flags)


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def load_image_settings(folder: str | Path) -> dict:
    """Keywords for `image_patches`, from preprocessor_config.json in `processor/` or transformers 5's
    processor_config.json; what neither says has the released value.

    Raises ValueError for a step that is not computed here.
    """
    folder = Path(folder)
    config = _read_json(folder / "preprocessor_config.json")
    config = config or _read_json(folder / "processor_config.json").get("image_processor", {})
    computed = {"resample": 3, "do_resize": True, "do_rescale": True, "do_normalize": True}
    for key, value in computed.items():
        if config.get(key, value) != value:
            raise ValueError(f"{folder}: {key} = {config[key]!r}; only {value!r} is computed here")
    if not math.isclose(factor := config.get("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-6):
        raise ValueError(f"{folder}: rescale_factor = {factor!r}; only 1/255 is computed here")
    size = config.get("size") or {}
    said = {"min_pixels": size.get("shortest_edge"), "max_pixels": size.get("longest_edge")}
    said |= {key: value for key, value in config.items() if value is not None}
    keys = list(inspect.signature(image_patches).parameters)[1:]
    return {key: said[key] for key in keys if said.get(key) is not None}


def smart_resize(
    height: int, width: int, factor: int = 28, min_pixels: int = 3136, max_pixels: int = 12845056
) -> tuple[int, int]:
    """(height, width) in pixels, as multiples of `factor`, with an area between min_pixels and max_pixels.

    384×384 -> 392×392, 896×1184 -> 896×1176. Raises ValueError when one side is over 200 times the other.
    Source: smart_resize in transformers' Qwen2VLImageProcessorPil.
    """
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"an image of {width}×{height} pixels: one side may be at most 200 times the other")
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        return tuple(max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    if h * w < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        return tuple(math.ceil(side * grow / factor) * factor for side in (height, width))
    return h, w


def image_patches(
    image: Image.Image,
    patch_size: int = 14,  # pixels
    merge_size: int = 2,  # 2×2 patches become one token
    temporal_patch_size: int = 2,  # frames; a still image is shown twice
    min_pixels: int = 3136,  # 56²
    max_pixels: int = 12845056,  # 3584²; transformers' own default, 1003520, would shrink a 1024² image
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073),
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711),
) -> tuple[Tensor, tuple[int, int, int]]:
    """A picture -> (patches (gh·gw, 1176) of normalised pixels, fp32; grid (1, gh, gw)).

    Each row is one patch, laid out (channel, frame, y, x); rows come square by square of 2×2 patches, since
    those four become one token. Bicubic resize by PIL, on 8-bit pixels; grids as `smart_resize` says. Raises
    ValueError for an image that is not RGB. Source: Qwen2VLImageProcessorPil.
    """
    if not isinstance(image, Image.Image):
        raise TypeError(f"expected a PIL image, got {type(image).__name__}")
    if image.mode != "RGB":
        raise ValueError(f"expected an RGB image, got {image.mode}: use minqwen.images.load_image")
    h, w = smart_resize(image.height, image.width, patch_size * merge_size, min_pixels, max_pixels)
    pixels = np.asarray(image.resize((w, h), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    pixels = (pixels - np.float32(image_mean)) / np.float32(image_std)
    size = {"a": merge_size, "b": merge_size, "y": patch_size, "x": patch_size}
    patches = rearrange(pixels, "(h a y) (w b x) c -> (h w a b) c y x", **size)
    rows = repeat(patches, "n c y x -> n (c t y x)", t=temporal_patch_size)
    return torch.from_numpy(rows), (1, h // patch_size, w // patch_size)


class TokenizedPrompts(NamedTuple):
    """The text encoder's four arguments, in order, and the prefix to drop from its result."""

    input_ids: Tensor  # (B, L), padded on the right with <|endoftext|>
    attention_mask: Tensor  # (B, L) bool, False for padding
    pixel_values: Tensor | None  # (P, 1176), the patches of all images of all prompts
    image_grid_thw: Tensor | None  # (n, 3)
    drop: int


def tokenize_prompts(
    tokenizer: Tokenizer,
    prompts: list[str],
    images: list[list[Image.Image]] | None = None,  # for each prompt its images
    template: Template = T2I,
    max_sequence_length: int = 1024,  # text tokens kept, T2I only; the pipelines' calls say 512
    image_settings: dict | None = None,  # from load_image_settings
) -> TokenizedPrompts:
    """Prompts and their images, in the template, as token ids and patches.

    A T2I prompt of more than `max_sequence_length` tokens is cut, with a warning that says by how much.
    (diffusers cuts at 1024 tokens, encodes, and cuts the states at max_sequence_length: the same states, as
    no token sees those behind it.) Edit templates are never cut. `<|im_end|>` typed in a prompt acts as the
    real token. Raises TypeError for a prompt that is no string, ValueError for images that do not suit the
    template or for `<|image_pad|>` in a prompt. Source: _get_qwen_prompt_embeds in diffusers' pipelines.
    """
    images = images if images is not None else [[] for _ in prompts]
    _check(prompts, images, template, max_sequence_length)
    settings = {"merge_size": 2} | (image_settings or {})
    cut = [[image_patches(image, **settings) for image in each] for each in images]
    counts = [[math.prod(grid) // settings["merge_size"] ** 2 for _, grid in each] for each in cut]
    texts = [template.text.format(_pictures(template, c) + p) for p, c in zip(prompts, counts, strict=True)]
    rows = [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
    if template.picture is None:
        rows = _truncate(rows, template.drop, max_sequence_length)
    ids = torch.full((len(rows), max(map(len, rows))), tokenizer.token_to_id(PAD))
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for n, row in enumerate(rows):
        ids[n, : len(row)], mask[n, : len(row)] = torch.tensor(row), True
    cut = [image for each in cut for image in each]
    if not cut:
        return TokenizedPrompts(ids, mask, None, None, template.drop)
    patches, grids = zip(*cut, strict=True)
    return TokenizedPrompts(ids, mask, torch.cat(patches), torch.tensor(grids), template.drop)


def _check(prompts: list, images: list[list], template: Template, max_sequence_length: int) -> None:
    if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise TypeError(f"prompts must be a list of strings, at least one, got {prompts!r}")
    if any(IMAGE_PAD in prompt for prompt in prompts):
        raise ValueError(f"a prompt holds {IMAGE_PAD}, which stands for an image: take it out")
    if len(images) != len(prompts):
        raise ValueError(f"expected a list of images for each of {len(prompts)} prompts, got {len(images)}")
    for each in images:
        if template.picture is None and each:
            raise ValueError("this template takes no images: use EDIT for one image, EDIT_PLUS for several")
        if template.picture == EDIT.picture and len(each) != 1:
            raise ValueError(f"EDIT takes one image a prompt, got {len(each)}: use EDIT_PLUS for several")
    if not 1 <= max_sequence_length <= 1024:
        raise ValueError(f"max_sequence_length must be between 1 and 1024, got {max_sequence_length}")


def _pictures(template: Template, counts: list[int]) -> str:
    """The template's text for each image, with as many placeholders as the image has tokens."""
    numbered = enumerate(counts, start=1)
    return "".join(template.picture.format(n).replace(IMAGE_PAD, IMAGE_PAD * count) for n, count in numbered)


def _truncate(rows: list[list[int]], drop: int, max_sequence_length: int) -> list[list[int]]:
    for n, ids in enumerate(rows):
        if (lost := len(ids) - drop - max_sequence_length) > 0:
            warnings.warn(
                f"prompt {n} has {len(ids) - drop} tokens, five closing ones included; only the first "
                f"{max_sequence_length} are kept and {lost} are lost",
                stacklevel=3,
            )
    return [ids[: drop + max_sequence_length] for ids in rows]


def drop_prefix(hidden: Tensor, attention_mask: Tensor, drop: int) -> tuple[Tensor, Tensor | None]:
    """Take the template's prefix off the encoder's states and blank the padding.

    hidden (B, L, C), attention_mask (B, L) padded on the right -> (embeds (B, Nt, C), zero where padded;
    mask (B, Nt), True for tokens, or None when every token is valid: attention may then run without a mask).
    """
    mask = attention_mask.bool()
    assert bool(mask[:, : drop + 1].all()), "expected right padding, and tokens behind the prefix"
    if bool(mask.all()):
        return hidden[:, drop:], None
    mask = mask[:, drop : int(mask.sum(1).max())]
    hidden = hidden[:, drop : drop + mask.shape[1]].masked_fill(~mask[..., None], 0)
    return hidden, None if bool(mask.all()) else mask


def pad_prompts(prompts: Sequence[Prompt]) -> Prompt:
    """Several prompts as one batch: zeros behind the shorter ones, and the mask that hides them.

    Each is (embeds (b, n, C), mask (b, n) or None); the result's mask is None where all are equally long and valid.
    """
    longest = max(embeds.shape[1] for embeds, _ in prompts)
    padded, masks = [], []
    for embeds, mask in prompts:
        if mask is None:
            mask = embeds.new_ones(embeds.shape[:2], dtype=torch.bool)
        behind = longest - embeds.shape[1]
        padded.append(F.pad(embeds, (0, 0, 0, behind)))
        masks.append(F.pad(mask, (0, behind)))
    mask = torch.cat(masks)
    return torch.cat(padded), None if bool(mask.all()) else mask

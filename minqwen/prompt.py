"""From words and pictures to the numbers that the text encoder reads.

    prompts, images  ->  ids (B, L), mask (B, L), patches (P, 1176), grids (n, 3)
    hidden (B, L, C), mask  ->  embeds (B, Nt, C), mask (B, Nt) or None

The prompt goes into a chat template whose system message tells the language model what to look at. The states
of that constant prefix (34 or 64 tokens) are dropped afterwards: what is kept is the images, the prompt and
five closing tokens.
The surprise: cutting a long prompt before the encoder or after it is the same, because the encoder is causal.
Matches diffusers' QwenImage pipelines (tests/test_prompt.py). Chapter 07.
"""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minqwen.tokenizer import IMAGE_PAD, PAD
from minqwen.vision import image_patches

Prompt = tuple[Tensor, Tensor | None]  # embeddings (B, Nt, C) and their mask (B, Nt), None: every token is valid


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
    settings = image_settings or {}
    merge = settings.get("merge_size", 2)
    texts, patches, grids = [], [], []
    for prompt, pictures in zip(prompts, images, strict=True):
        before = ""  # the template's text for each picture, with a placeholder for each of its tokens
        for n, picture in enumerate(pictures, start=1):
            rows, grid = image_patches(picture, **settings)
            before += template.picture.format(n).replace(IMAGE_PAD, IMAGE_PAD * (len(rows) // merge**2))
            patches.append(rows)
            grids.append(grid)
        texts.append(template.text.format(before + prompt))
    rows = [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
    if template.picture is None:
        rows = _truncate(rows, template.drop, max_sequence_length)
    rows = [torch.tensor(row) for row in rows]
    ids = pad_sequence(rows, batch_first=True, padding_value=tokenizer.token_to_id(PAD))
    mask = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows], batch_first=True)
    if not grids:
        return TokenizedPrompts(ids, mask, None, None, template.drop)
    return TokenizedPrompts(ids, mask, torch.cat(patches), torch.tensor(grids), template.drop)


def check_prompts(**prompts: str) -> None:
    """Raise ValueError, or TypeError, that names what is no single prompt that can become tokens."""
    for name, prompt in prompts.items():
        if isinstance(prompt, list | tuple):
            raise ValueError(f"{name}: one call makes one picture, got {len(prompt)} prompts: call once for each")
        if not isinstance(prompt, str):
            raise TypeError(f"{name} must be a text, got {type(prompt).__name__}")
        if IMAGE_PAD in prompt:
            raise ValueError(f"a {name} holds {IMAGE_PAD}, which stands for an image: take it out")
        if halves := [letter for letter in prompt if "\ud800" <= letter <= "\udfff"]:
            raise ValueError(f"a {name} holds half a character, {halves[0]!r}: was an emoji cut, or is it no UTF-8?")


def _check(prompts: list, images: list[list], template: Template, max_sequence_length: int) -> None:
    if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise TypeError(f"prompts must be a list of strings, at least one, got {prompts!r}")
    for prompt in prompts:
        check_prompts(prompt=prompt)
    if len(images) != len(prompts):
        raise ValueError(f"expected a list of images for each of {len(prompts)} prompts, got {len(images)}")
    for each in images:
        if template.picture is None and each:
            raise ValueError("this template takes no images: use EDIT for one image, EDIT_PLUS for several")
        if template.picture == EDIT.picture and len(each) != 1:
            raise ValueError(f"EDIT takes one image a prompt, got {len(each)}: use EDIT_PLUS for several")
    if not 1 <= max_sequence_length <= 1024:
        raise ValueError(f"max_sequence_length must be between 1 and 1024, got {max_sequence_length}")


def _truncate(rows: list[list[int]], drop: int, most: int) -> list[list[int]]:
    for n, ids in enumerate(rows):
        tokens = len(ids) - drop
        if tokens > most:
            lost = f"only the first {most} are kept and {tokens - most} are lost"
            warnings.warn(f"prompt {n} has {tokens} tokens, five closing ones included; {lost}", stacklevel=3)
    return [ids[: drop + most] for ids in rows]


def drop_prefix(hidden: Tensor, attention_mask: Tensor, drop: int) -> Prompt:
    """Take the template's prefix off the encoder's states and blank the padding.

    hidden (B, L, C), attention_mask (B, L) padded on the right -> (embeds (B, Nt, C), zero where padded;
    mask (B, Nt), True for tokens, or None when every token is valid: attention may then run without a mask).
    """
    mask = attention_mask.bool()
    assert bool(mask[:, : drop + 1].all()), "expected right padding, and tokens behind the prefix"
    mask = mask[:, drop : int(mask.sum(1).max())]
    hidden = hidden[:, drop : drop + mask.shape[1]].masked_fill(~mask[..., None], 0)
    return hidden, None if bool(mask.all()) else mask


def pad_prompts(prompts: Sequence[Prompt]) -> Prompt:
    """Several prompts as one batch: zeros behind the shorter ones, and the mask that hides them.

    Each is (embeds (b, n, C), mask (b, n) or None); the result's mask is None where all are equally long and valid.
    """
    rows, masks = [], []
    for embeds, mask in prompts:
        rows.extend(embeds)
        masks.extend(embeds.new_ones(embeds.shape[:2], dtype=torch.bool) if mask is None else mask)
    mask = pad_sequence(masks, batch_first=True)
    return pad_sequence(rows, batch_first=True), None if bool(mask.all()) else mask

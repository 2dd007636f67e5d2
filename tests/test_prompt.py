"""Templates, tokens and padding; the whole encoding against diffusers' pipelines.

These tests use a small vocabulary of the same kind as the real one; the published ids are checked when MINQWEN_MODEL
names a folder.
"""

import os
from pathlib import Path

import pytest
import torch
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline, QwenImagePipeline
from PIL import Image
from small_tokenizer import write_tokenizer
from tokenizers import Tokenizer
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from minqwen import prompt as P
from minqwen.text_encoder import Qwen2_5_VLTextEncoder
from minqwen.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def released_form(tmp_path_factory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def reference(released_form) -> Qwen2Tokenizer:
    return Qwen2Tokenizer.from_pretrained(released_form)


@pytest.fixture(scope="module")
def tokenizer(released_form) -> Tokenizer:
    return load_tokenizer(released_form)


def noise(rng, width: int, height: int) -> Image.Image:
    return Image.frombytes("RGB", (width, height), rng.randbytes(3 * width * height))


# ---- templates


def test_templates_are_those_of_diffusers():
    none = dict.fromkeys(["scheduler", "vae", "text_encoder", "tokenizer", "transformer"])
    for template, pipe in [
        (P.T2I, QwenImagePipeline(**none)),
        (P.EDIT, QwenImageEditPipeline(**none, processor=None)),
        (P.EDIT_PLUS, QwenImageEditPlusPipeline(**none, processor=None)),
    ]:
        expected = pipe.prompt_template_encode.replace(P.EDIT.picture, "")  # EDIT's holds the picture
        assert (template.text, template.drop) == (expected, pipe.prompt_template_encode_start_idx)


def check_prefix_lengths(tokenizer: Tokenizer):
    for template in (P.T2I, P.EDIT, P.EDIT_PLUS):
        prefix, suffix = template.text.split("{}")
        assert len(tokenizer.encode(prefix).ids) == template.drop
        assert len(tokenizer.encode(suffix).ids) == 5


def test_prefixes_are_34_and_64_tokens(tokenizer):
    check_prefix_lengths(tokenizer)


def test_prefixes_of_the_shipped_tokenizer():
    folder = Path(__file__).parents[1] / "data" / "tiny" / "tokenizer"
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist yet")
    check_prefix_lengths(load_tokenizer(folder))


def test_published_ids_of_the_real_vocabulary():
    folder = Path(os.environ.get("MINQWEN_MODEL", "")) / "tokenizer"
    if "MINQWEN_MODEL" not in os.environ or not folder.is_dir():
        pytest.skip("MINQWEN_MODEL names no local folder with a tokenizer/ in it")
    tokenizer = load_tokenizer(folder)
    if tokenizer.get_vocab_size() < 151_643:
        pytest.skip(f"{folder} is not of the released size: {tokenizer.get_vocab_size()} tokens")
    check_prefix_lengths(tokenizer)
    for text, ids in {
        P.T2I.text.split("{}")[0]: [
            151644, 8948, 198, 74785, 279, 2168, 553, 44193, 279, 1894, 11, 6083, 11, 1379, 11, 10434, 11,
            12194, 11, 1467, 11, 27979, 11871, 315, 279, 6171, 323, 4004, 25, 151645, 198, 151644, 872, 198
        ],
        P.EDIT.text.split("{}")[0]: [
            151644, 8948, 198, 74785, 279, 1376, 4419, 315, 279, 1946, 2168, 320, 3423, 11, 6083, 11, 1379,
            11, 10434, 11, 6171, 11, 4004, 701, 1221, 10339, 1246, 279, 1196, 594, 1467, 7600, 1265, 11596,
            476, 5602, 279, 2168, 13, 19813, 264, 501, 2168, 429, 20027, 279, 1196, 594, 8502, 1393, 20337,
            28137, 448, 279, 4024, 1946, 1380, 8311, 13, 151645, 198, 151644, 872, 198
        ],
        P.EDIT.text.split("{}")[1]: [151645, 198, 151644, 77091, 198],
        "Picture 1: " + P.EDIT.picture: [24669, 220, 16, 25, 220, 151652, 151655, 151653],
        "a cat": [64, 8251],
        " ": [220],
        "dance monkey": [98875, 38703],
        "bad quality": [13855, 4271],
        "<tool_call>": [151657],
    }.items():  # fmt: skip
        assert tokenizer.encode(text).ids == ids, text


# ---- prompts


def test_an_empty_prompt_keeps_five_tokens(tokenizer):
    batch = P.tokenize_prompts(tokenizer, ["", " ", "a cat"])
    assert (batch.attention_mask.sum(1) - batch.drop).tolist() == [5, 6, 7]
    assert batch.input_ids[0, -2:].tolist() == [tokenizer.token_to_id("<|endoftext|>")] * 2
    assert batch.pixel_values is None and batch.image_grid_thw is None


def test_images_become_as_many_tokens_as_they_have_squares(rng, tokenizer):
    images = [[noise(rng, 64, 64)], [noise(rng, 100, 200), noise(rng, 300, 60)]]
    batch = P.tokenize_prompts(tokenizer, ["add", "remove the cat"], images, P.EDIT_PLUS)
    assert batch.image_grid_thw.tolist() == [[1, 4, 4], [1, 14, 8], [1, 4, 22]]
    assert (batch.input_ids == tokenizer.token_to_id("<|image_pad|>")).sum(1).tolist() == [4, 28 + 22]
    assert len(batch.pixel_values) == 16 + 112 + 88
    text = tokenizer.decode(batch.input_ids[1].tolist(), skip_special_tokens=False)
    assert "user\nPicture 1: <|vision_start|>" in text and "<|vision_end|>Picture 2: <|vision_start|>" in text


def test_long_prompts_are_cut_and_said_so(tokenizer):
    long = " cat" * 30
    with pytest.warns(UserWarning, match="prompt 1 has 35 tokens.* first 20 are kept and 15 are lost"):
        batch = P.tokenize_prompts(tokenizer, ["a", long], max_sequence_length=20)
    assert batch.attention_mask.sum(1).tolist() == [34 + 6, 34 + 20]
    assert torch.equal(batch.input_ids, P.tokenize_prompts(tokenizer, ["a", long]).input_ids[:, : 34 + 20])


def test_edit_prompts_are_never_cut(rng, tokenizer, recwarn):
    batch = P.tokenize_prompts(tokenizer, ["cat " * 2000], [[noise(rng, 64, 64)]], P.EDIT)
    assert batch.input_ids.shape[1] > 2000 and not recwarn.list


def test_wrong_prompts_and_images_say_so(rng, tokenizer):
    image = noise(rng, 64, 64)
    for prompts, images, template, error, message in [
        ("a cat", None, P.T2I, TypeError, "list of strings"),
        ([None], None, P.T2I, TypeError, "list of strings"),
        ([], None, P.T2I, TypeError, "at least one"),
        (["a <|image_pad|>"], None, P.T2I, ValueError, "stands for an image"),
        (["a"], [[image]], P.T2I, ValueError, "takes no images"),
        (["a"], None, P.EDIT, ValueError, "EDIT takes one image"),
        (["a"], [[image, image]], P.EDIT, ValueError, "EDIT_PLUS for several"),
        (["a", "b"], [[image]], P.EDIT, ValueError, "each of 2 prompts, got 1"),
    ]:
        with pytest.raises(error, match=message):
            P.tokenize_prompts(tokenizer, prompts, images, template)
    with pytest.raises(ValueError, match="between 1 and 1024"):
        P.tokenize_prompts(tokenizer, ["a"], max_sequence_length=1025)


@pytest.mark.parametrize("name", ["prompt", "negative_prompt"])
@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        (["a", "b"], ValueError, "one call makes one picture, got 2 prompts"),
        (("a",), ValueError, "got 1 prompts"),
        (None, TypeError, "must be a text, got NoneType"),
        (b"a", TypeError, "must be a text, got bytes"),
        ("a face \ud83d", ValueError, "holds half a character"),
        ("\ude00 a face", ValueError, "holds half a character"),
        ("a <|image_pad|>", ValueError, "stands for an image"),
    ],
)
def test_what_is_no_single_prompt_is_named(name, prompt, error, message):
    P.check_prompts(prompt="a \U0001f600", negative_prompt="")
    with pytest.raises(error, match=f"{name}.*{message}"):
        P.check_prompts(**{name: prompt})


def test_drop_prefix():
    hidden = torch.arange(1.0, 13).view(2, 6, 1)
    embeds, mask = P.drop_prefix(hidden, torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]]), drop=2)
    assert embeds[..., 0].tolist() == [[3, 4, 0], [9, 10, 11]]
    assert mask.tolist() == [[True, True, False], [True, True, True]]
    for same in ([[1] * 6] * 2, [[1] * 4 + [0] * 2] * 2):  # one length: nothing to mask
        embeds, mask = P.drop_prefix(hidden, torch.tensor(same), drop=2)
        assert mask is None and torch.equal(embeds, hidden[:, 2 : sum(same[0])])
    with pytest.raises(AssertionError, match="right padding"):
        P.drop_prefix(hidden, torch.tensor([[0, 1, 1, 1, 1, 1]] * 2), drop=2)


def test_prompts_are_padded_to_the_longest():
    """Behind the shorter stand zeros that the mask hides; where nothing is hidden there is no mask."""
    short, long = (torch.randn(1, n, 4, dtype=torch.bfloat16) for n in (2, 5))
    two = torch.randn(2, 3, 4, dtype=torch.bfloat16), torch.tensor([[True, True, False], [True, True, True]])
    embeds, mask = P.pad_prompts([(short, None), two, (long, None)])
    assert embeds.shape == (4, 5, 4) and embeds.dtype == torch.bfloat16
    assert torch.equal(embeds[:1, :2], short) and torch.equal(embeds[1:3, :3], two[0]) and torch.equal(embeds[3:], long)
    assert not embeds[0, 2:].any() and not embeds[1:3, 3:].any()
    assert mask.int().tolist() == [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    embeds, mask = P.pad_prompts([(long, None), (long, torch.ones(1, 5, dtype=torch.bool))])
    assert mask is None and torch.equal(embeds, torch.cat([long, long]))


# ---- the whole way, against diffusers' pipelines


class Processor:
    """Qwen2VLProcessor without its video part, which asks for torchvision."""

    def __init__(self, tokenizer):
        self.tokenizer, self.images = tokenizer, Qwen2VLImageProcessorPil()

    def __call__(self, text, images, padding, return_tensors):
        patches = self.images(images, return_tensors="pt")
        counts = iter((patches.image_grid_thw.prod(-1) // 4).tolist())
        parts = [t.split("<|image_pad|>") for t in text]
        text = [p[0] + "".join("<|image_pad|>" * next(counts) + rest for rest in p[1:]) for p in parts]
        batch = self.tokenizer(text, padding=padding, padding_side="right", return_tensors="pt")
        batch.update(patches)
        return batch


@pytest.fixture(scope="module")
def encoders(reference):
    """A small random text encoder, the reference's and ours."""
    image_token = reference.convert_tokens_to_ids("<|image_pad|>")
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "rms_norm_eps": 1e-6}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(reference)}
    rope = {"mrope_section": [2, 2, 2], "rope_theta": 1e6, "rope_type": "default"}
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 20, "num_heads": 1, "out_hidden_size": 48}
    config = {
        "image_token_id": image_token,
        "text_config": sizes | heads | {"rope_parameters": rope},
        "vision_config": vision | {"fullatt_block_indexes": [1]},
    }
    torch.manual_seed(0)
    theirs = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config)).eval().requires_grad_(False)
    for p in theirs.parameters():
        p.data += torch.randn_like(p) * 0.1
    ours = Qwen2_5_VLTextEncoder(**config).eval()
    ours.load_state_dict(theirs.state_dict())
    forward = theirs.forward

    def with_types(input_ids, **rest):
        return forward(input_ids=input_ids, mm_token_type_ids=(input_ids == image_token).int(), **rest)

    theirs.forward = with_types
    return theirs, ours


def reference_embeds(pipeline, encoder, tokenizer, prompts, images=None, length=1024):
    pipe = pipeline(
        scheduler=None, vae=None, transformer=None, text_encoder=encoder, tokenizer=tokenizer,
        **({} if images is None else {"processor": Processor(tokenizer)}),
    )  # fmt: skip
    given = {} if images is None else {"image": images}
    return pipe.encode_prompt(prompt=prompts, device="cpu", max_sequence_length=length, **given)


@torch.no_grad()
@pytest.mark.parametrize("length", [1024, 12])
def test_t2i_embeddings_equal_diffusers(encoders, tokenizer, reference, length):
    theirs, ours = encoders
    prompts = ["a cat", "", "cafe\u0301 don't 你好 " * 4]
    expected, expected_mask = reference_embeds(QwenImagePipeline, theirs, reference, prompts, length=length)
    with pytest.warns(UserWarning) if length == 12 else pytest.MonkeyPatch.context():
        batch = P.tokenize_prompts(tokenizer, prompts, max_sequence_length=length)
    embeds, mask = P.drop_prefix(ours(*batch[:4]), batch.attention_mask, batch.drop)
    assert torch.equal(mask, expected_mask.bool())
    assert embeds.shape == expected.shape and (embeds - expected).abs().max() <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize(
    "pipeline, template", [(QwenImageEditPipeline, "EDIT"), (QwenImageEditPlusPipeline, "EDIT_PLUS")]
)
def test_edit_embeddings_equal_diffusers(rng, encoders, tokenizer, reference, pipeline, template):
    theirs, ours = encoders
    count = 1 if template == "EDIT" else 2
    images = [noise(rng, rng.randint(40, 200), rng.randint(40, 200)) for _ in range(count)]
    expected, expected_mask = reference_embeds(pipeline, theirs, reference, ["make the cat red"], images)
    batch = P.tokenize_prompts(tokenizer, ["make the cat red"], [images], getattr(P, template))
    embeds, mask = P.drop_prefix(ours(*batch[:4]), batch.attention_mask, batch.drop)
    assert mask is None and expected_mask is None
    assert embeds.shape == expected.shape and (embeds - expected).abs().max() <= 1e-5

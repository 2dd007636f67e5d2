"""Makes the tiny checkpoint's tokenizer: python data/recipes/make_tokenizer.py FOLDER

Byte-level BPE as in the released model, but of a few hundred pieces: every word of the toy world and of the prompt
templates is one token, with and without the space before it; any other text falls apart into bytes and still works.
"""

import json
import sys
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from minqwen.prompt import EDIT, T2I
from minqwen.tokenizer import WORDS
from minqwen.world import vocabulary

# in the released order; only some are used, but the order fixes the ids
ADDED = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
TEMPLATE_WORDS = "system user assistant Picture"


def build() -> Tokenizer:
    """The tokenizer, trained on a list of words, each of which becomes one piece."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    template = " ".join(t.text for t in (T2I, EDIT))
    for token in ADDED:
        template = template.replace(token, " ")
    words = template.replace("{}", " ").split() + vocabulary() + TEMPLATE_WORDS.split()
    lines = [form for word in dict.fromkeys(words) for form in (word, " " + word)]
    trainer = trainers.BpeTrainer(
        vocab_size=10_000, min_frequency=1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in ADDED])
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """All the files of a released `tokenizer/` folder, tokenizer.json besides."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.model.save(str(folder))  # vocab.json, merges.txt
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {token: tokenizer.token_to_id(token) for token in ADDED}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(id): {"content": token} | flags for token, id in ids.items()},
        "additional_special_tokens": ADDED[1:],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    special = {"additional_special_tokens": ADDED[1:], "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    for name, content in [
        ("tokenizer_config.json", config),
        ("added_tokens.json", ids),
        ("special_tokens_map.json", special),
    ]:
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    save(build(), Path(sys.argv[1]))

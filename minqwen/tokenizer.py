"""The tokenizer: text becomes numbers, by byte-level BPE, from the files that stand in a checkpoint.

    "a red star"  ->  ids of pieces such as "a", " red", " star"

A fixed pattern cuts text into words; inside each word bytes are merged, pair by pair, in a learned order. The
`tokenizers` package does the work; here its parts are put together.
The surprise: the released folders have no tokenizer.json, the file that this package reads at once, and the ids of
`<|im_start|>` and its like stand in neither vocab.json nor merges.txt, but in a third file.
Matches transformers' Qwen2Tokenizer (tests/test_tokenizer.py). Chapter 07.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

PAD = "<|endoftext|>"
IMAGE_PAD = "<|image_pad|>"
NEEDED = (PAD, "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", IMAGE_PAD)

# Bytes merge only inside these: English endings, words, single digits, punctuation, line ends, spaces.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer in `folder`, in one of two forms.

    As released: vocab.json and merges.txt, with the added tokens (`<|im_start|>` ...) and their ids listed in
    tokenizer_config.json or added_tokens.json. Or else tokenizer.json, which transformers 5 saves alone.
    Raises FileNotFoundError when neither form is there, ValueError when added tokens are missing or disagree.
    """
    folder = Path(folder)
    vocab, merges, whole = (folder / name for name in ("vocab.json", "merges.txt", "tokenizer.json"))
    added = _added_tokens(folder)
    if added and vocab.is_file() and merges.is_file():
        tokenizer = _byte_level_bpe(vocab, merges, added)
    elif whole.is_file():
        tokenizer = Tokenizer.from_file(str(whole))
        tokenizer.no_truncation()
        tokenizer.no_padding()
    else:
        released = "vocab.json and merges.txt, the added tokens listed in tokenizer_config.json or added_tokens.json"
        raise FileNotFoundError(f"no tokenizer in {folder}: expected {released}; or else tokenizer.json")
    if missing := [token for token in NEEDED if tokenizer.token_to_id(token) is None]:
        raise ValueError(f"the tokenizer in {folder} does not list {missing}")
    return tokenizer


def _byte_level_bpe(vocab: Path, merges: Path, added: dict[int, AddedToken]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    tokenizer.normalizer = normalizers.NFC()  # e + combining accent becomes é, as in the training text
    split = pre_tokenizers.Split(Regex(WORDS), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    for id, token in sorted(added.items()):
        tokenizer.add_tokens([token])  # it gets the next free id
        if (got := tokenizer.token_to_id(token.content)) != id:
            files = f"{vocab} and the list of added tokens do not belong together"
            raise ValueError(f"{files}: {token.content!r} would be {got}, not {id}")
    return tokenizer


def _added_tokens(folder: Path) -> dict[int, AddedToken]:
    """id -> token, from the first file that lists them."""
    if listed := _read_json(folder / "tokenizer_config.json").get("added_tokens_decoder"):
        return {int(id): AddedToken(**token) for id, token in listed.items()}
    listed = _read_json(folder / "added_tokens.json")
    return {id: AddedToken(content, special=True) for content, id in listed.items()}


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

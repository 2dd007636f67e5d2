"""The tokenizer: text becomes numbers, by byte-level BPE, from the files that stand in a checkpoint.

    "a small cat"  ->  ids of pieces such as "a", " small", " cat"

A fixed pattern cuts text into words; inside each word bytes are merged, pair by pair, in a learned order. The
`tokenizers` package does the work; here its parts are put together.
The surprise: the released folders have no tokenizer.json, the file that this package reads at once, and the ids of
`<|im_start|>` and its like stand in neither vocab.json nor merges.txt, but in a third file.
Matches transformers' Qwen2Tokenizer (tests/test_tokenizer.py). Chapter 07.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from minqwen.files import content_of, finder, read_json

PAD = "<|endoftext|>"
IMAGE_PAD = "<|image_pad|>"
LISTS = ("tokenizer_config.json", "tokenizer.json", "added_tokens.json")  # where added tokens may stand
NEEDED = (PAD, "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", IMAGE_PAD)

# Bytes merge only inside these: English endings, words, single digits, punctuation, line ends, spaces.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def load_tokenizer(folder) -> Tokenizer:
    """The tokenizer in `folder` (a path, or Checkpoint.within), in one of two forms.

    As released: vocab.json and merges.txt, with the added tokens (`<|im_start|>` ...) and their ids listed in
    tokenizer_config.json or added_tokens.json. Or else tokenizer.json, which transformers 5 saves alone.
    Raises FileNotFoundError when neither form is there, ValueError for a damaged file and when files disagree.
    """
    find = finder(folder)
    added = _added_tokens(find)
    vocab = find("vocab.json", "tokenizer.json") if added else find("tokenizer.json")
    merges = find("merges.txt", "tokenizer.json") if vocab and vocab.name == "vocab.json" else vocab
    if merges is None:
        released = "vocab.json and merges.txt, the added tokens listed in tokenizer_config.json or added_tokens.json"
        raise FileNotFoundError(f"no tokenizer in {folder}: expected {released}; or else tokenizer.json")
    if merges.name == "merges.txt":
        tokenizer = _byte_level_bpe(vocab, merges, added)
    else:
        with content_of(merges):
            whole = read_json(merges)
            pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in whole["model"]["merges"])
            _fit(whole["model"]["vocab"], pairs, {token["content"] for token in whole["added_tokens"]})
            tokenizer = Tokenizer.from_str(json.dumps(whole))
        tokenizer.no_truncation()
        tokenizer.no_padding()
    if missing := [token for token in NEEDED if tokenizer.token_to_id(token) is None]:
        raise ValueError(f"the tokenizer in {folder} does not list {missing}")
    return tokenizer


def _byte_level_bpe(vocab: Path, merges: Path, added: dict[int, AddedToken]) -> Tokenizer:
    tokenizer = Tokenizer(_bpe(vocab, merges, {token.content for token in added.values()}))
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


def _bpe(vocab: Path, merges: Path, added: set[str]) -> models.BPE:
    pieces = read_json(vocab)
    with content_of(f"{vocab} with {merges}"):
        lines = merges.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        pairs = [tuple(line.split(" ")) for line in lines if not line.startswith("#version")]
        _fit(pieces, pairs, added)
        return models.BPE(pieces, pairs)


def _fit(pieces: dict[str, int], pairs: Iterable[Sequence[str]], added: set[str]) -> None:
    """The pieces are 256 bytes and what each merge makes, no more and no fewer: so a file that was cut off is found."""
    made = {"".join(pair) for pair in pairs} | set(pre_tokenizers.ByteLevel.alphabet())
    odd = sorted((pieces.keys() - (added - made)) ^ made)
    if odd or sorted(pieces.values()) != list(range(len(pieces))):
        what = f"{len(odd)} pieces stand in one of them only: {str(odd[:3])[:200]}" if odd else "ids come twice"
        raise ValueError(f"pieces or merges are damaged, or do not belong together ({what}): fetch both again")


def _added_tokens(find: Callable[..., Path | None]) -> dict[int, AddedToken]:
    """id -> token, from the first file that lists them; none where tokenizer.json comes first."""
    path = find(*LISTS)
    if path and path.name == LISTS[0]:
        if listed := read_json(path).get("added_tokens_decoder"):
            with content_of(path):
                return {int(id): AddedToken(**token) for id, token in listed.items()}
        path = find(*LISTS[1:])
    listed = read_json(path) if path and path.name == LISTS[2] else {}
    with content_of(path):
        return {int(id): AddedToken(content, special=True) for content, id in listed.items()}

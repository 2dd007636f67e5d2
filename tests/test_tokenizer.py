"""The tokenizer against transformers' own, in each form in which its files come.

These tests train a small vocabulary; the published ids are checked in test_prompt.py when MINQWEN_MODEL names a folder.
"""

import json
from pathlib import Path

import pytest
from small_tokenizer import PLAIN, SPECIAL, write_tokenizer
from tokenizers import Tokenizer
from transformers import Qwen2Tokenizer

from minqwen.prompt import EDIT
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


PIECES = [
    *["é", "e\u0301", "o\u0302\u0323", "ﬁ", "한국어", "\u1112\u1161\u11ab", "你好，世界", "日本語"],
    *["مرحبا", "Привет", "🙂", "👩\u200d🚀", "\u200b"],
    *["\n", "\r\n", "\n\n ", " ", "   ", "\t", "\u00a0", "\u3000"],
    *["12345", "٣٤", "½", "a1", "a,", "a\n", "\na", "don't", "I'LL", "'s", "cat", " dog", "!?", "<|", "|>"],
    *[">\u0338", "<tool_call>\u0338", *SPECIAL, *PLAIN],
]


def random_text(rng) -> str:
    """Pieces and any characters that there are (those from D800 to DFFF are none)."""
    characters = [chr(rng.randrange(32, 0xD800)) for _ in range(9)] + [chr(rng.randrange(0xE000, 0x110000))]
    return "".join(rng.choice(rng.choice([PIECES, characters])) for _ in range(rng.randint(0, 25)))


def test_ids_equal_transformers(rng, tokenizer, reference, released_form, tmp_path):
    """From vocab.json and merges.txt, and from the tokenizer.json that transformers makes of them."""
    reference.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file() and not (tmp_path / "vocab.json").is_file()
    from_json = load_tokenizer(tmp_path)
    texts = PIECES + [random_text(rng) for _ in range(300)]
    expected = reference(texts).input_ids
    for ours in (tokenizer, from_json):
        got = [encoding.ids for encoding in ours.encode_batch(texts, add_special_tokens=False)]
        wrong = [text for text, a, b in zip(texts, got, expected, strict=True) if a != b]
        assert not wrong, wrong


def test_text_comes_back(rng, tokenizer):
    """No character is unknown to a tokenizer that ends in bytes."""
    text = "red\u2028 Ω 你好 🙂\n\tnew"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize("form", ["added_tokens.json", "tokenizer.json", "both, settings left in"])
def test_other_places_of_added_tokens(form, tokenizer, reference, released_form, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((released_form / name).read_bytes())
    if form == "added_tokens.json":
        listed = {token: tokenizer.token_to_id(token) for token in SPECIAL + PLAIN}
        (tmp_path / form).write_text(json.dumps(listed))
    else:
        reference.save_pretrained(tmp_path)  # tokenizer.json, and a tokenizer_config.json without the list
        if form != "tokenizer.json":
            (tmp_path / "vocab.json").unlink()
            saved = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
            saved.enable_truncation(3)
            saved.enable_padding(length=9)
            saved.save(str(tmp_path / "tokenizer.json"))
    for text in ("a", EDIT.text.format("<tool_call> cafe\u0301")):
        assert load_tokenizer(tmp_path).encode(text).ids == tokenizer.encode(text).ids


def test_a_broken_tokenizer_folder_says_what_is_wrong(released_form, tmp_path):
    with pytest.raises(FileNotFoundError, match="expected vocab.json and merges.txt.* or else tokenizer.json"):
        load_tokenizer(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((released_form / name).read_bytes())
    with pytest.raises(FileNotFoundError, match="the added tokens listed in tokenizer_config.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<|endoftext|>": 151643}')
    with pytest.raises(ValueError, match="vocab.json and the list of added tokens do not belong together"):
        load_tokenizer(tmp_path)
    free = len(json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8")))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|endoftext|>": free}))
    with pytest.raises(ValueError, match="does not list .*im_start"):
        load_tokenizer(tmp_path)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


def damaged(source: Path, target: Path, name: str, harm) -> Path:
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    (target / name).write_bytes(harm((target / name).read_bytes()))
    return target


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "harm",
    [
        lambda data: POINTER,
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: bytes(len(data)),
        lambda data: b"\xff\xfe",
        lambda data: b"[]",
    ],
    ids=["pointer", "cut", "empty", "zeros", "no UTF-8", "a list"],
)
def test_a_damaged_file_is_named(released_form, tmp_path, name, harm):
    with pytest.raises(ValueError, match=name):
        load_tokenizer(damaged(released_form, tmp_path, name, harm))


@pytest.mark.parametrize("keep", [slice(-1), slice(1, None), slice(30), slice(1)])
def test_merges_that_lost_lines_are_found(released_form, tmp_path, keep):
    """Other merges would give other ids, without a word."""

    def harm(data: bytes) -> bytes:
        head, *lines = data.splitlines(keepends=True)
        return head + b"".join(lines[keep])

    with pytest.raises(ValueError, match="merges.txt: pieces or merges are damaged, or .* together .[0-9]+ pieces"):
        load_tokenizer(damaged(released_form, tmp_path, "merges.txt", harm))


@pytest.mark.parametrize("change", [{"a": 5}, {"a": "5"}, {"a": None}, {"a": 10**30}, {"zzzz": 999}])
def test_a_vocabulary_with_other_entries_is_refused(released_form, tmp_path, change):
    with pytest.raises(ValueError, match="vocab.json with .*merges.txt"):
        load_tokenizer(
            damaged(released_form, tmp_path, "vocab.json", lambda b: json.dumps(json.loads(b) | change).encode())
        )


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"model": {"type": "BPE"}}', POINTER])
def test_a_damaged_tokenizer_json_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match="tokenizer.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("listed", ['{"<|im_end|>": null}', '{"<|im_end|>": [1]}', '{"<|im_end|>": "x"}', "[]", ""])
def test_a_damaged_list_of_added_tokens_is_named(released_form, tmp_path, listed):
    folder = damaged(released_form, tmp_path, "tokenizer_config.json", lambda b: b"{}")
    (folder / "added_tokens.json").write_text(listed)
    with pytest.raises(ValueError, match="added_tokens.json"):
        load_tokenizer(folder)

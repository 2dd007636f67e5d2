"""files.py: what is damaged is named, by path and reason. (Writing whole files: tests/test_checkpoint.py.)"""

import json

import pytest
import torch
from safetensors.torch import save

from minqwen.files import content_of, expect_numbers, open_weights, read_json, save_weights, write_json

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n"
PAGE = b"<!DOCTYPE html><title>404</title>"


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"null", b'"words"', b"{", b'{"a": 1', b"\xff\xfe{}", bytes(100), POINTER, PAGE, b'{"a":' * 3000],
)
def test_a_small_file_that_holds_no_object_is_named(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match="config.json holds no JSON object"):
        read_json(tmp_path / "config.json")


def test_what_is_written_comes_back(tmp_path):
    write_json(tmp_path / "a.json", {"猫": [1, None]})
    assert read_json(tmp_path / "a.json") == {"猫": [1, None]} == json.loads((tmp_path / "a.json").read_text("utf-8"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


WHOLE = save({"a": torch.ones(4)})


@pytest.mark.parametrize("content", [b"", WHOLE[:5], WHOLE[:20], WHOLE[:-1], WHOLE + b"\0", POINTER, PAGE, bytes(100)])
def test_weights_that_are_damaged_are_named(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="a.safetensors is damaged"), open_weights(tmp_path / "a.safetensors"):
        pass


def test_a_tensor_that_is_not_there_and_a_file_that_is_not_there(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(WHOLE)
    with pytest.raises(ValueError, match="a.safetensors .*does not contain tensor b"):
        with open_weights(tmp_path / "a.safetensors") as weights:
            weights.get_tensor("b")
    with pytest.raises(FileNotFoundError, match="no such file: .*gone"), open_weights(tmp_path / "gone"):
        pass


def test_what_a_small_file_leads_to_names_it():
    for error in (KeyError("a"), TypeError("a"), ValueError("a"), OverflowError("a"), RuntimeError("a")):
        with pytest.raises(ValueError, match="^some/config.json: .*a"), content_of("some/config.json"):
            raise error
    with pytest.raises(ValueError, match="^config.json is odd$"), content_of("config.json"):
        raise ValueError("config.json is odd")  # it is named already


@pytest.mark.parametrize("value", [None, True, "1", [1], float("nan"), float("inf"), 1j])
def test_what_is_no_number_is_named(value):
    expect_numbers(a=1, b=0.5)
    with pytest.raises(ValueError, match="b must be a finite number"):
        expect_numbers(a=1, b=value)


def test_equal_content_is_equal_bytes_in_every_process(tmp_path):
    """In one process too: safetensors orders metadata anew for each file."""
    metadata = {f"key {n}": 'a "word"\n猫\x01' for n in range(20)}
    tensors, written = {"b": torch.ones(3), "a": torch.zeros(2, dtype=torch.bfloat16)}, set()
    for n in range(8):
        save_weights(tensors, tmp_path / f"{n}.safetensors", metadata)
        written.add((tmp_path / f"{n}.safetensors").read_bytes())
    with open_weights(tmp_path / "0.safetensors") as file:
        assert file.metadata() == metadata and all(torch.equal(file.get_tensor(k), t) for k, t in tensors.items())
    assert len(written) == 1

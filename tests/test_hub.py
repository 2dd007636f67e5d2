"""hub.py: downloads and byte ranges; what the hub does wrong is said, and an error of our own is none of the hub's.

The hub is a small server on this machine, which counts the bytes that it sends.
"""

import errno
import io
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from hub import ask_only, serving
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.utils import close_session
from released import BLOCK, CONFIG, STEM, edit_header, same, small_transformer, write_sharded
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import minqwen.hub
from minqwen.checkpoint import Checkpoint
from minqwen.hub import Repository
from minqwen.pipeline import QwenImagePipeline
from minqwen.transformer import QwenImageTransformer2DModel

TINY = Path(__file__).resolve().parents[1] / "data" / "tiny"
VAE = {"encoder.conv_in.weight": torch.arange(2000.0), "decoder.conv_out.bias": torch.arange(5).half()}


@pytest.fixture
def wanted() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return dict(small_transformer().state_dict())


@pytest.fixture
def hub(wanted, tmp_path, monkeypatch):
    """A transformer in shards and an autoencoder in one file, on a hub."""
    folder = tmp_path / "released"
    write_sharded(wanted, folder / "transformer")
    (folder / "transformer" / "config.json").write_text(json.dumps(CONFIG))
    (folder / "vae").mkdir()
    save_file(VAE, folder / "vae" / STEM)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the waits between attempts
    with serving(folder) as hub:
        ask_only(hub, tmp_path / "cache", monkeypatch)
        yield hub


def starting(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def headers(folder) -> int:
    return sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in folder.glob("*.safetensors"))


# Byte ranges


def test_one_prefix_comes_by_byte_ranges(hub, wanted, capsys):
    checkpoint, block = Checkpoint("owner/name"), starting(wanted, BLOCK)
    assert same(checkpoint.tensors("transformer", BLOCK), block)
    size = sum(tensor.nbytes for tensor in block.values())
    said = tqdm.format_sizeof(size, "B")
    assert hub.sent_weights() == checkpoint.fetched == headers(hub.folder / "transformer") + size
    assert f"transformer/{BLOCK}*: {len(block)} tensors, {said} from owner/name" in capsys.readouterr().out


def test_a_header_is_read_once(hub, wanted):
    checkpoint = Checkpoint("owner/name")
    for block in ("transformer_blocks.0.", "transformer_blocks.1.", "proj_out."):
        checkpoint.tensors("transformer", block)
    checkpoint.shapes("transformer")
    assert sum(1 for path in hub.requests if path.endswith(".safetensors")) == 2 * 4 + 2 * 32 + 2


def test_the_amount_is_said_before_the_first_tensor_comes(hub, capsys):
    hub.fault = "another range"  # headers come right, tensors do not
    with pytest.raises(ConnectionError):
        Checkpoint("owner/name").tensors("transformer", BLOCK)
    assert "B from owner/name" in capsys.readouterr().out


def test_names_and_shapes_come_from_the_headers_alone(hub, wanted):
    assert Checkpoint("owner/name").shapes("transformer") == {name: tuple(t.shape) for name, t in wanted.items()}
    assert hub.sent_weights() == headers(hub.folder / "transformer")
    assert Checkpoint("owner/name").shapes("vae") == {name: tuple(t.shape) for name, t in VAE.items()}


def test_a_prefix_of_a_single_file_comes_by_byte_ranges(hub):
    assert same(Checkpoint("owner/name").tensors("vae", "decoder."), starting(VAE, "decoder."))
    assert hub.sent_weights() == headers(hub.folder / "vae") + 10


@pytest.mark.slow
def test_blocks_come_one_at_a_time(hub, wanted, capsys):
    checkpoint, found, order, earlier, alive = Checkpoint("owner/name"), {}, [], [], []
    fetch = Repository.fetch

    def watched(self, file, start, stop):
        alive.append(sum(tensor() is not None for tensor in earlier))
        return fetch(self, file, start, stop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Repository, "fetch", watched)
        for prefix, tensors in checkpoint.blocks("transformer"):
            order.append(prefix)
            found |= {name: tensor.clone() for name, tensor in tensors.items()}
            earlier += [weakref.ref(tensor) for tensor in tensors.values()]
            del tensors
    assert order == ["", BLOCK, "transformer_blocks.1.", "transformer_blocks.2."]
    assert same(found, wanted)
    assert len(alive) >= len(wanted) and set(alive) == {0}, "a block was held while the next one came"
    size = sum(tensor.nbytes for tensor in wanted.values())
    assert hub.sent_weights() == headers(hub.folder / "transformer") + size
    assert capsys.readouterr().out.count("B from owner/name") == 1


# Downloads


def test_a_whole_component_equals_the_folder(hub, wanted, capsys):
    module = Checkpoint("owner/name").load(QwenImageTransformer2DModel, "transformer")
    assert same(module.state_dict(), wanted)
    said = tqdm.format_sizeof(sum(tensor.nbytes for tensor in wanted.values()), "B")
    assert f"transformer/*: {len(wanted)} tensors, {said} from owner/name" in capsys.readouterr().out


@pytest.mark.parametrize("component", ["transformer", "vae"])
@pytest.mark.parametrize("how", ["no network", "HF_HUB_OFFLINE"])
def test_what_was_downloaded_is_read_without_the_hub(hub, wanted, capsys, component, how, monkeypatch):
    before = Checkpoint("owner/name").tensors(component)
    sent = hub.sent_weights()
    prefix = next(iter(before))[:12]
    assert same(Checkpoint("owner/name").tensors(component, prefix), starting(before, prefix))
    assert hub.sent_weights() == sent
    hub.stop()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", how == "HF_HUB_OFFLINE")
    capsys.readouterr()
    checkpoint = Checkpoint("owner/name")
    assert same(checkpoint.tensors(component), before)
    assert same({name: t for _, block in checkpoint.blocks(component) for name, t in block.items()}, before)
    assert capsys.readouterr().out == ""


def test_a_download_that_breaks_off_is_no_file(hub):
    name = "transformer/" + min(path.name for path in (hub.folder / "transformer").glob("*.safetensors"))
    hub.fault = "cut off"
    with pytest.raises((ConnectionError, OSError)):
        Repository("owner/name").download(name)
    hub.fault = None
    assert Repository("owner/name").download(name).read_bytes() == (hub.folder / name).read_bytes()


WEIGHTS = f"vae/{STEM}"
STATUSES = (429, 500, 502, 503, 504)


def downloaded(file=WEIGHTS) -> bytes:
    """As the next run does it."""
    return Repository("owner/name").download(file).read_bytes()


def left_in(cache: Path) -> list[Path]:
    """Files that a run would take for whole, and parts of files."""
    return [path for path in cache.glob("models--*/[bs]*/**/*") if path.is_symlink() or path.is_file()]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["cut off", "reset"])
def test_a_download_that_is_cut_at_any_byte_ends_in_the_right_bytes(hub, tmp_path, monkeypatch, fault):
    failed, data = 0, (hub.folder / WEIGHTS).read_bytes()
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)
    for seed in range(20):
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / str(seed)))
        early = seed % 2 == 1  # before anything is written, and so often that runs fail
        hub.chance, hub.fault, hub.times = random.Random(seed), fault, 30 if early else 3
        if early:
            monkeypatch.setattr(hub.chance, "randrange", lambda length: 90)
        for _ in range(9):
            try:
                assert downloaded() == data
                break
            except ConnectionError as error:
                failed += 1
                assert f"{WEIGHTS} of owner/name" in str(error)
                assert not Repository("owner/name").cached(WEIGHTS)
        assert hub.times == 0 and downloaded() == data
    assert failed


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["cut off", "reset"])
def test_ranges_that_are_cut_at_any_byte_end_in_the_right_numbers(hub, wanted, fault):
    Checkpoint("owner/name").weight_map("transformer")
    block, failed = starting(wanted, "transformer_blocks.1.attn.to_q"), 0
    for seed in range(20):
        checkpoint, hub.chance = Checkpoint("owner/name"), random.Random(seed)
        hub.fault, hub.times = fault, seed
        for _ in range(9):
            try:
                assert same(checkpoint.tensors("transformer", "transformer_blocks.1.attn.to_q"), block)
                break
            except ConnectionError as error:
                failed += 1
                assert "/owner/name/resolve/main/transformer/" in str(error)
        assert hub.times == 0
    assert failed > 9


@pytest.mark.slow
def test_a_download_that_is_killed_leaves_no_file(hub, tmp_path):
    hub.fault = "silent"
    code = f"from minqwen.hub import Repository; Repository('owner/name').download({WEIGHTS!r})"
    told = {"HF_ENDPOINT": constants.ENDPOINT, "HF_HUB_CACHE": constants.HF_HUB_CACHE, "HF_HUB_DISABLE_XET": "1"}
    told |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DOWNLOAD_TIMEOUT": "60"}
    with subprocess.Popen([sys.executable, "-c", code], env=os.environ | told, cwd=TINY.parents[1]) as run:
        while not hub.sent_weights() and run.poll() is None:
            threading.Event().wait(0.05)
        assert run.poll() is None
        run.kill()
    assert left_in(tmp_path / "cache"), "it was killed too early to prove anything"
    assert not Repository("owner/name").cached(WEIGHTS)
    hub.fault = None
    assert downloaded() == (hub.folder / WEIGHTS).read_bytes()


@pytest.mark.parametrize("fault", ["other bytes", "longer", "shorter"])
@pytest.mark.parametrize("cdn", [False, True], ids=["", "cdn"])
def test_a_download_of_other_bytes_or_another_length_is_no_file(hub, fault, cdn):
    hub.fault, hub.cdn = fault, cdn
    with pytest.raises(ConnectionError, match=f"(?s)cannot download {WEIGHTS} of owner/name .*run it again"):
        downloaded()
    assert not Repository("owner/name").cached(WEIGHTS)
    hub.fault = None
    assert downloaded() == (hub.folder / WEIGHTS).read_bytes()


def test_a_download_is_never_of_two_contents(hub, monkeypatch):
    old = (hub.folder / WEIGHTS).read_bytes()
    save_file({name: tensor + 1 for name, tensor in VAE.items()}, hub.folder / "new")
    new = (hub.folder / "new").read_bytes()
    assert len(new) == len(old)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)
    monkeypatch.setattr("time.sleep", lambda seconds: (hub.folder / WEIGHTS).write_bytes(new))
    hub.fault, hub.times = "cut off", 1
    try:  # which of both it is depends on huggingface_hub's version
        assert downloaded() == new
    except ConnectionError as error:
        assert "not those that the hub announced" in str(error)
    assert downloaded() == new


class FullDisk(io.FileIO):
    """A file on a disk with room for 3,000 bytes."""

    def write(self, data) -> int:
        if self.tell() + len(data) > 3000:
            super().write(bytes(data)[: 3000 - self.tell()])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def test_a_disk_that_is_full_is_said_and_no_file_is_left(hub, tmp_path, monkeypatch):
    opens = Path.open

    def opened(path, mode="r", *args, **kwargs):
        return FullDisk(path, mode[0]) if path.suffix == ".incomplete" else opens(path, mode, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", opened)
        patch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)
        with pytest.raises(
            OSError, match=f"{WEIGHTS} of owner/name .*{tmp_path}/cache: .*No space left.*again"
        ) as error:
            downloaded()
    assert not isinstance(error.value, ConnectionError)
    assert not Repository("owner/name").cached(WEIGHTS)
    assert downloaded() == (hub.folder / WEIGHTS).read_bytes()


# What the hub does wrong


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("asked", ["HEAD", "GET", "range"])
def test_a_hub_that_is_busy_is_asked_again_but_not_for_ever(hub, asked, status):
    def read():
        if asked == "range":
            return Repository("owner/name").fetch(WEIGHTS, 0, 5000)
        return downloaded()[:5000]

    hub.fault = f"{asked} {status}"
    with pytest.raises(ConnectionError, match=f"owner/name.*{status}|{status}.*owner/name") as error:
        read()
    assert WEIGHTS in str(error.value) and 3 < len(hub.requests) < 60
    hub.times = len(minqwen.hub.WAITS)
    assert read() == (hub.folder / WEIGHTS).read_bytes()[:5000]
    assert hub.times == 0


@pytest.mark.parametrize(("asked", "waited"), [(7, [7, 7, 7]), (2, [2, 2, 4]), (10**9, [minqwen.hub.LONGEST] * 3)])
def test_a_hub_that_says_how_long_it_is_busy_is_left_alone_so_long(hub, asked, waited, monkeypatch):
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    hub.fault, hub.times, hub.retry_after = "range 429", 3, asked
    assert len(Repository("owner/name").fetch(WEIGHTS, 0, 5000)) == 5000
    assert waits == waited


@pytest.mark.slow
@pytest.mark.parametrize("asked", ["file", "range"])
def test_a_line_that_falls_silent_is_given_up(hub, asked, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.04)
    read = downloaded if asked == "file" else lambda: Repository("owner/name").fetch(WEIGHTS, 0, 5000)
    hub.fault, started = "silent", time.monotonic()
    with pytest.raises(ConnectionError, match=f"{WEIGHTS}.*(timed out|ReadTimeout)"):
        read()
    assert time.monotonic() - started < 15
    hub.times = 3
    assert read()[:5000] == (hub.folder / WEIGHTS).read_bytes()[:5000]


@pytest.mark.slow
def test_a_hub_that_is_slow_is_waited_for(hub, monkeypatch):
    monkeypatch.setattr(minqwen.hub, "PATIENCE", 0.1)
    hub.fault = "late"  # every answer takes 0.3 s
    assert downloaded() == (hub.folder / WEIGHTS).read_bytes()
    assert len(Repository("owner/name").fetch(f"transformer/{STEM}.index.json", 0, 500)) == 500


@pytest.mark.parametrize(("cdn", "etags"), [(False, True), (True, True), (False, False)])
@pytest.mark.parametrize("before", [1, 2, 3])
def test_tensors_are_never_of_two_contents(hub, before, cdn, etags, monkeypatch):
    hub.cdn, hub.etags, works, asked = cdn, etags, minqwen.hub._ask, []
    assert same(Checkpoint("owner/name").tensors("vae", "e"), starting(VAE, "e"))
    new = {name: tensor + 1 for name, tensor in VAE.items()}
    new |= {} if etags else {"more": torch.zeros(1)}  # without ETags another length tells

    def ask(*args):
        asked.append(args)
        if len(asked) == before + 1:
            save_file(new, hub.folder / WEIGHTS)
        return works(*args)

    monkeypatch.setattr(minqwen.hub, "_ask", ask)
    checkpoint = Checkpoint("owner/name")
    with pytest.raises(ConnectionError, match=f"owner/name/{WEIGHTS} on the hub changed while it was read"):
        list(checkpoint.blocks("vae"))
    with pytest.raises(ConnectionError, match="changed"):  # what was read before would not fit
        checkpoint.tensors("vae", "decoder.")
    assert same(Checkpoint("owner/name").tensors("vae", "decoder."), starting(new, "decoder."))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no ranges", "HTTP 200, no range, 0 bytes read; the server does not serve byte ranges"),
        ("another range", "HTTP 206, bytes [0-9]+-.* 0 bytes read; "),
        ("range 503", "cannot read http://.*: HTTP 503, no range, 0 bytes read$"),
        ("cut off", "cannot read http://.*: RemoteProtocolError: "),
    ],
)
def test_an_answer_that_is_not_the_range_never_becomes_numbers(hub, wanted, fault, message):
    checkpoint = Checkpoint("owner/name")
    checkpoint.weight_map("transformer")  # the index comes whole, the weights do not
    hub.fault = fault
    with pytest.raises(ConnectionError, match=message):
        checkpoint.tensors("transformer", BLOCK)
    hub.fault = None  # and what came of it does no harm later
    assert same(checkpoint.tensors("transformer", BLOCK), starting(wanted, BLOCK))


@pytest.mark.parametrize("fault", ["range 503", "cut off", "reset", "longer"])
def test_a_hub_that_stumbles_is_asked_again(hub, wanted, fault):
    checkpoint = Checkpoint("owner/name")
    checkpoint.weight_map("transformer")
    hub.fault, hub.times = fault, len(minqwen.hub.WAITS)
    assert same(checkpoint.tensors("transformer", BLOCK), starting(wanted, BLOCK))


@pytest.mark.parametrize("error", [TypeError("our own"), AttributeError("our own"), RuntimeError("our own")])
def test_an_error_of_our_own_is_none_of_the_network(hub, monkeypatch, error):
    def ask(url, start, stop):
        asked.append(url)
        raise error

    asked, works = [], minqwen.hub._ask
    for before in (0, 1, 2):  # in the header's length, in the header, in a tensor
        with monkeypatch.context() as patch:
            checkpoint = Checkpoint("owner/name")
            answers = iter([works] * before + [ask] * 9)
            patch.setattr(minqwen.hub, "_ask", lambda *args, answers=answers: next(answers)(*args))
            with pytest.raises(type(error), match="^our own$"):
                checkpoint.tensors("vae", "decoder.")
    assert len(asked) == 3
    monkeypatch.setattr(minqwen.hub, "hf_hub_download", lambda *args, **kwargs: len(None))
    with pytest.raises(TypeError, match="has no len"):
        Checkpoint("owner/name").config("transformer/config.json")


def test_a_download_that_its_own_library_breaks_off(hub, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("Data processing error: connection reset")  # as hf_xet says it

    monkeypatch.setattr(minqwen.hub, "hf_hub_download", broken)
    with pytest.raises(ConnectionError, match="cannot download vae/config.json of owner/name .*run it again"):
        Checkpoint("owner/name").config("vae/config.json")


@pytest.mark.slow
def test_a_hub_that_cannot_be_reached(hub, monkeypatch):
    hub.stop()
    with pytest.raises(ConnectionError, match="transformer/config.json of owner/name"):
        Checkpoint("owner/name").load(QwenImageTransformer2DModel, "transformer")
    with pytest.raises(ConnectionError, match=f"vae/{STEM} of owner/name, not cached: http://127.* is away"):
        Repository("owner/name").table(f"vae/{STEM}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()  # the session of before does not know
    with pytest.raises(ConnectionError, match="offline"):
        Repository("owner/name").table(f"vae/{STEM}")


@pytest.mark.slow
def test_a_name_that_is_looked_up_for_ever_is_a_hub_that_is_away(hub, monkeypatch):
    assert minqwen.hub.PATIENCE + 0.5 < 5
    monkeypatch.setattr(minqwen.hub, "PATIENCE", 0)
    ended, started = threading.Event(), time.monotonic()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: ended.wait(20) and [])
    with pytest.raises(ConnectionError, match=f"{WEIGHTS} of owner/name.*{constants.ENDPOINT}.*name a folder"):
        downloaded()
    ended.set()
    assert time.monotonic() - started < 2


@pytest.fixture
def whole(hub, tmp_path):
    """data/tiny as released: no tokenizer.json, no index for what is in one file; the transformer in two."""
    folder = tmp_path / "whole"
    shutil.copytree(
        TINY, folder, ignore=shutil.ignore_patterns("tokenizer.json", "added_tokens.json", "*.csv", "*.png")
    )
    tensors = load_file(folder / "transformer" / STEM)
    shutil.rmtree(folder / "transformer")
    write_sharded(tensors, folder / "transformer")
    shutil.copy(TINY / "transformer" / "config.json", folder / "transformer")
    index = folder / "transformer" / f"{STEM}.index.json"
    size = {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
    index.write_text(json.dumps(json.loads(index.read_text()) | {"metadata": size}))
    hub.folder = folder
    return hub


def opened(name="owner/name"):
    return QwenImagePipeline.from_pretrained(name, device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("offline", [False, True], ids=["no network", "HF_HUB_OFFLINE"])
@pytest.mark.parametrize("by", ["hf download", "minqwen"])
def test_a_whole_repository_in_the_cache_opens_without_the_hub(whole, by, offline, monkeypatch):
    if by == "minqwen":
        opened()
    else:
        for path in whole.folder.rglob("*.*"):
            hf_hub_download("owner/name", path.relative_to(whole.folder).as_posix())
    whole.requests.clear()
    opened()
    assert whole.requests == []
    whole.stop()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    opened()


@pytest.mark.slow
@pytest.mark.parametrize("offline", [False, True], ids=["no network", "HF_HUB_OFFLINE"])
@pytest.mark.parametrize("name", ["vae/config.json", f"vae/{STEM}", "tokenizer/merges.txt", "a shard"])
def test_what_is_missing_without_the_hub_is_named_at_once(whole, tmp_path, name, offline, monkeypatch):
    opened()
    (snapshot,) = (tmp_path / "cache").glob("*/snapshots/*")
    name = f"transformer/{max((snapshot / 'transformer').glob('*.safetensors')).name}" if name == "a shard" else name
    (snapshot / name).unlink()
    whole.stop()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    started = time.monotonic()
    with pytest.raises(
        ConnectionError, match=f"{name}.* of owner/name.*: http://127.*name a folder that holds all files"
    ) as error:
        opened()
    assert time.monotonic() - started < 5
    assert ("MB in " in str(error.value)) == name.startswith("transformer")  # of which an index tells the size


def test_what_the_hub_does_not_have(hub):
    with pytest.raises(FileNotFoundError, match="owner/other on the hub"):
        Checkpoint("owner/other").config("model_index.json")
    with pytest.raises(FileNotFoundError, match="owner/other on the hub"):
        Checkpoint("owner/other").tensors("transformer", "proj_out.")
    with pytest.raises(FileNotFoundError, match="owner/name has no text_encoder/config.json"):
        Checkpoint("owner/name").load(QwenImageTransformer2DModel, "text_encoder")
    with pytest.raises(FileNotFoundError, match="owner/name has no safetensors weights in text_encoder/"):
        Checkpoint("owner/name").tensors("text_encoder", "model.")


def test_damaged_files_are_refused(hub):
    transformer = hub.folder / "transformer"
    weight_map = json.loads((transformer / f"{STEM}.index.json").read_text())["weight_map"]
    name = next(name for name in weight_map if name.startswith(BLOCK))
    shard = transformer / weight_map[name]
    pristine = shard.read_bytes()

    def refused(change, message):
        shard.write_bytes(pristine)
        edit_header(shard, change)
        with pytest.raises(ValueError, match=message):
            Checkpoint("owner/name").tensors("transformer", BLOCK)

    where = re.escape(f"owner/name/transformer/{shard.name}")
    refused(lambda header: header.pop(name), f"{where} does not match its index.*{name}")
    refused(lambda header: header[name].update(shape=[3]), f"{name}: .* bytes do not make")
    refused(lambda header: header[name].update(shape=[-1, -1]), f"{name}: .* bytes do not make")
    refused(lambda header: header[name].update(dtype="I3"), f"{name} is stored as I3")
    refused(lambda header: header[name].pop("dtype"), f"{where} is not a safetensors file: its header is damaged")
    refused(lambda header: header.update({name: 5}), f"{where} is not a safetensors file: its header is damaged")
    shard.write_bytes(b"<html>Sign in to go on</html>" * 40)
    with pytest.raises(ValueError, match=f"{where} is not a safetensors file"):
        Checkpoint("owner/name").tensors("transformer", BLOCK)

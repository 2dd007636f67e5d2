"""The chapters' cells "On the released weights" read slices by byte range, from files that the reference wrote.

A hub on this machine serves a checkpoint of the released names and layout, in bf16, the transformer in shards, whose
weights diffusers and transformers wrote, of another size than the tiny one. For each chapter the set-up, the
definitions and that section run in a namespace of their own, in the tier `slice`; they assert names, shapes and parity
with the reference themselves.
"""

import json
import shutil
import sys
import types
from pathlib import Path

import pytest
import tools
import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler
from diffusers import QwenImageTransformer2DModel as Reference
from hub import ask_only, serving
from reference import randomise_
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from minqwen.shrink import shrink

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS, TINY = ROOT / "notebooks", ROOT / "data" / "tiny"
CONFIG = {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 128, "joint_attention_dim": 48}
VAE = {"base_dim": 4, "num_res_blocks": 1}
TEXT = {  # two layers of the released kind: grouped heads, three sections of rotary positions
    "text_config": {
        "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 1000, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [2, 2, 2]},
    },
    "vision_config": {
        "depth": 2, "hidden_size": 32, "intermediate_size": 40, "num_heads": 2, "out_hidden_size": 48,
        "fullatt_block_indexes": [1],
    },
    "image_token_id": 9, "video_token_id": 8, "vision_start_token_id": 7, "vision_end_token_id": 6,
}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # matplotlib's, of NumPy
CHAPTERS = list(tools.holders().values())


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("released")
    randomise_(Reference(**CONFIG)).bfloat16().save_pretrained(folder / "transformer", max_shard_size="4MB")
    randomise_(AutoencoderKLQwenImage(**VAE)).bfloat16().save_pretrained(folder / "vae")
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**TEXT))
    randomise_(encoder).bfloat16().save_pretrained(folder / "text_encoder")
    FlowMatchEulerDiscreteScheduler.from_pretrained(TINY / "scheduler").save_pretrained(folder / "scheduler")
    for part in ("tokenizer", "processor"):
        shutil.copytree(TINY / part, folder / part)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "QwenImageEditPipeline"}))
    return folder


@pytest.fixture
def hub(released, tmp_path, monkeypatch):
    monkeypatch.setenv("MINQWEN_TIER", "slice")
    monkeypatch.setenv("MINQWEN_MODEL", "owner/name")
    with serving(released) as hub:
        ask_only(hub, tmp_path / "cache", monkeypatch)
        yield hub


@pytest.fixture
def chapter(monkeypatch):
    """A namespace to run a chapter in, which leaves nothing behind."""
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.chdir(NOTEBOOKS)
    course, threads = sys.modules.pop("course", None), torch.get_num_threads()  # course reads the tier when imported
    torch.set_num_threads(1)  # sums in one order whatever else the machine does: 1e-5 is met always or never
    chapter = types.ModuleType("chapter")
    monkeypatch.setitem(sys.modules, "chapter", chapter)
    yield chapter
    torch.set_grad_enabled(True)
    torch.set_num_threads(threads)
    sys.modules["matplotlib.pyplot"].close("all")
    del sys.modules["course"]
    if course is not None:
        sys.modules["course"] = course


def slice_code(path: Path) -> str:
    """Set-up, definitions and the section on the released weights, as one script."""
    code, inside, first = [], False, True
    for cell in tools.read(path).cells:
        if cell.cell_type == "markdown":
            headings = [line for line in cell.source.splitlines() if line.startswith("## ")]
            inside = "On the released weights" in headings[-1] if headings else inside
        elif first or inside or tools.HEAD.match(cell.source):
            code.append(cell.source)
            first = False
    return "\n\n".join(code)


@pytest.mark.slow
@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapters_slice_is_read_by_byte_range(path, hub, chapter, capsys):
    exec(compile(slice_code(path), path.name, "exec"), vars(chapter))
    assert "tier slice" in capsys.readouterr().out
    stored = sum(file.stat().st_size for file in hub.folder.rglob("*.safetensors"))
    assert 0 < chapter.checkpoint.fetched < stored
    assert hub.sent_weights() == chapter.checkpoint.fetched, "weights came in another way than by ranges"


@pytest.fixture(scope="module")
def small(released, tmp_path_factory):
    """The same checkpoint as minqwen.shrink writes it, at 4 bits."""
    folder = tmp_path_factory.mktemp("small") / "small"
    shrink(released, folder, bits=4, progress=False)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_shows_a_shrunk_checkpoint_in_the_tier_full(path, small, chapter, monkeypatch, capsys):
    monkeypatch.setenv("MINQWEN_TIER", "full")
    monkeypatch.setenv("MINQWEN_MODEL", str(small))
    exec(compile(slice_code(path), path.name, "exec"), vars(chapter))
    assert "tier full" in capsys.readouterr().out

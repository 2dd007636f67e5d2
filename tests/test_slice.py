"""The chapters' cells "On the released weights" read slices by byte range, from files that the reference wrote.

A hub on this machine serves a checkpoint of the released names and layout, in bf16, the transformer in shards, whose
weights diffusers and transformers wrote, of another size than the tiny one. For each chapter the set-up, the
definitions and that section run in a fresh process, in the tier `slice`; they assert names, shapes and parity with the
reference themselves.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler
from diffusers import QwenImageTransformer2DModel as Reference
from hub import Hub
from reference import randomise_
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS, TINY = ROOT / "notebooks", ROOT / "data" / "tiny"
sys.path.insert(0, str(NOTEBOOKS))

import tools  # noqa: E402

CONFIG = {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 128, "joint_attention_dim": 48}
VAE = {"base_dim": 12, "num_res_blocks": 1}
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
CHAPTERS = sorted(path for path in NOTEBOOKS.glob("[0-9][0-9]_*.ipynb") if path.name[:2] in tools.SHOWN)
WAY_OUT = "print('HUB', checkpoint.fetched)"


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
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
    server = Hub(folder)
    threading.Thread(target=partial(server.serve_forever, poll_interval=0.01), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


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
    return "\n\n".join([*code, WAY_OUT])


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapters_slice_is_read_by_byte_range(path, hub, tmp_path):
    hub.bodies.clear()
    environment = os.environ | {
        "MINQWEN_TIER": "slice",
        "MINQWEN_MODEL": "owner/name",
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(tmp_path),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "MPLBACKEND": "Agg",
    }
    script = tmp_path / "chapter.py"
    script.write_text(slice_code(path))
    environment["PYTHONPATH"] = f"{NOTEBOOKS}{os.pathsep}{ROOT}"
    done = subprocess.run([sys.executable, script], env=environment, cwd=NOTEBOOKS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "tier slice" in done.stdout
    fetched = int(done.stdout.split("HUB ")[1])
    stored = sum(file.stat().st_size for file in hub.folder.rglob("*.safetensors"))
    assert 0 < fetched < stored
    sent = sum(size for name, size in hub.bodies.items() if name.endswith(".safetensors"))
    assert sent == fetched, "weights came in another way than by ranges"

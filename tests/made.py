"""A checkpoint of the released geometry with made numbers, served by a hub on this machine: 57.7 GB that lie nowhere.

Each answer is computed from its offset: the files' data are one window of random numbers, again and again.
"""

import json
import math
import re
import shutil
from pathlib import Path

import torch
from hub import Hub, HubHandler
from test_released_size import CONFIGS, RELEASED

TINY = Path(__file__).resolve().parents[1] / "data" / "tiny"
WINDOW = 2**25  # numbers
STEMS = {"transformer": "diffusion_pytorch_model", "text_encoder": "model", "vae": "diffusion_pytorch_model"}
BLOCK = re.compile(r"^(transformer_blocks|model\.layers|visual\.blocks)\.(\d+)\.")
LISTS = {"transformer_blocks": "num_layers", "model.layers": "num_hidden_layers", "visual.blocks": "depth"}


def configs(layers: int | None = None) -> dict[str, dict]:
    """The released configs, with so many blocks in each list; the ids of pictures are those of the tiny tokenizer."""
    made = json.loads(json.dumps(CONFIGS))
    tiny = json.loads((TINY / "text_encoder/config.json").read_text(encoding="utf-8"))
    made["text_encoder"]["image_token_id"] = tiny["image_token_id"]
    if layers:
        made["transformer"]["num_layers"] = made["text_encoder"]["num_hidden_layers"] = layers
        made["text_encoder"]["vision_config"]["depth"] = layers
    return made


def shapes(component: str, layers: int | None = None) -> dict[str, list[int]]:
    """Names and shapes of the released tensors, of the first blocks only."""
    kept = {}
    for name, shape in RELEASED[component].items():
        block = BLOCK.match(name)
        if block is None or layers is None or int(block[2]) < layers:
            kept[name] = shape
    return kept


class MadeFile:
    """A safetensors file of bfloat16 numbers that is nowhere; `read` gives any of its bytes."""

    def __init__(self, tensors: dict[str, list[int]], window: bytes):
        table, place = {}, 0
        for name, shape in tensors.items():
            end = place + 2 * math.prod(shape)
            table[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [place, end]}
            place = end
        header = json.dumps(table).encode()
        header += b" " * (-len(header) % 8)
        self.head, self.window = len(header).to_bytes(8, "little") + header, window
        self.size = len(self.head) + place

    def read(self, start: int, stop: int) -> bytes:
        stop = min(stop, self.size)
        parts = [self.head[start:stop]] if start < len(self.head) else []
        place = max(start, len(self.head)) - len(self.head)
        while place < stop - len(self.head):
            within = place % len(self.window)
            part = self.window[within : within + stop - len(self.head) - place]
            parts.append(part)
            place += len(part)
        return b"".join(parts)


class MadeHub(Hub):
    """Serves the made checkpoint as owner/name; `folder` takes its small files."""

    def __init__(self, folder: Path, layers: int | None = None):
        super().__init__(folder)
        self.RequestHandlerClass = MadeHandler
        chance = torch.Generator().manual_seed(0)
        numbers = torch.randn(WINDOW, generator=chance).mul_(0.02).bfloat16()
        window = numbers.view(torch.uint8).numpy().tobytes()
        for name in ("tokenizer", "processor", "scheduler"):
            shutil.copytree(TINY / name, folder / name)
        index = json.loads((TINY / "model_index.json").read_text(encoding="utf-8"))
        plain = {key: value for key, value in index.items() if key not in ("_area", "_true_cfg_scale")}
        (folder / "model_index.json").write_text(json.dumps(plain), encoding="utf-8")
        self.made = {}
        for component, config in configs(layers).items():
            (folder / component).mkdir()
            (folder / component / "config.json").write_text(json.dumps(config), encoding="utf-8")
            path = f"{component}/{STEMS[component]}.safetensors"
            self.made[path] = MadeFile(shapes(component, layers), window)


class MadeHandler(HubHandler):
    def do_GET(self, body=True):
        name = self.path.removeprefix("/owner/name/resolve/main/")
        made = self.server.made.get(name)
        if made is None:
            return super().do_GET(body)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not wanted:  # a file of 41 GB is asked for as a whole by nobody here
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
        first, last = int(wanted[1]), min(int(wanted[2]), made.size - 1)
        told = {"ETag": f'"{name}"', "Content-Range": f"bytes {first}-{last}/{made.size}"}
        self.answer(206, made.read(first, last + 1), told, body)

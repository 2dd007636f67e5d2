"""Is a checkpoint what minqwen takes it for? A report, point by point, to paste into an issue.

    python -m minqwen.verify Qwen/Qwen-Image-Edit --photo holiday.jpg     about 1 GB is read, by byte ranges
    python -m minqwen.verify data/tiny

minqwen was written where the released weights could not be reached. Each point is something that it takes for granted:
a setting, a name, an id, one block's and the autoencoder's numbers beside diffusers', where that is installed.
The surprise: a checkpoint that differs is no wrong one; a smaller model differs in its sizes, and all of it computes.
"fails" alone says that minqwen would not open it, or would paint something else.
Tests: tests/test_verify.py. Chapter 11.
"""

import inspect
import math
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from copy import deepcopy
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from minqwen.block import QwenImageTransformerBlock
from minqwen.checkpoint import Checkpoint, assign
from minqwen.command import Parser, one_line, read_picture
from minqwen.difference import first_difference, record
from minqwen.images import calculate_dimensions, image_to_pixels, resize_image
from minqwen.pipeline import FAMILIES, PARTS
from minqwen.plans import in_bytes
from minqwen.prompt import EDIT, T2I
from minqwen.quantize import quantize_blocks
from minqwen.rope import QwenEmbedRope
from minqwen.sampling import SCHEDULER, get_sigmas, resolution_shift
from minqwen.text_encoder import Qwen2_5_VLTextModel, read_config
from minqwen.tokenizer import load_tokenizer
from minqwen.vae import AutoencoderKLQwenImage
from minqwen.vision import Qwen2_5_VLVisionTower, image_patches, load_image_settings

TENSORS = {"transformer": 1933, "vae": 194, "text_encoder": 729}  # of the released files
CLASSES = {name: part.__name__ for name, part in PARTS.items()} | {
    "text_encoder": "Qwen2_5_VLForConditionalGeneration", "tokenizer": "Qwen2Tokenizer", "scheduler": SCHEDULER,
    "processor": "Qwen2VLProcessor"}  # fmt: skip
STALE = {"guidance_embeds": False, "pooled_projection_dim": 768, "attn_scales": (), "dropout": 0.0,
         "invert_sigmas": False, "stochastic_sampling": False, "use_beta_sigmas": False,
         "use_exponential_sigmas": False, "use_karras_sigmas": False}  # nothing reads these  # fmt: skip
IDS = {"<|im_end|>\n<|im_start|>assistant\n": [151645, 198, 151644, 77091, 198],
       "Picture 1: ": [24669, 220, 16, 25, 220], "a cat": [64, 8251], "dance monkey": [98875, 38703]}  # fmt: skip
BLOCK = "transformer_blocks.0."
SHAPES = [(1, 8, 8)]  # of what the block is tried on
EQUAL = 1e-5  # of the largest number: what float32 sums in another order differ by
SOFT = 26  # dB by which the photo must come back
ABSENT = "diffusers is not installed"


class Found(NamedTuple):
    """What was found at a point, and which of it is otherwise than in the released files, or is worse: wrong."""

    said: str
    other: tuple[str, ...] = ()
    wrong: str = ""
    status: str = "as expected"

    def row(self) -> tuple[str, str]:
        if self.wrong:
            return "**fails**", self.wrong
        return ("**differs**", f"{self.said}; {'; '.join(self.other)}") if self.other else (self.status, self.said)


def compared(found: dict, *expected: Callable | dict) -> tuple[str, ...]:
    """What is otherwise than here or than the defaults of these functions, and keys that none of them knows."""
    known = {}
    for each in expected:
        known |= {k: p.default for k, p in inspect.signature(each).parameters.items()} if callable(each) else each
    plain = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items() if not k.startswith("_")}
    other = [f"{k} is {str(v):.50}, not {str(known[k]):.50}" for k, v in plain.items() if k in known and v != known[k]]
    return (*other, *(f"{k} ({str(v):.50}) is unknown" for k, v in plain.items() if k not in known))


def pipeline_class(checkpoint: Checkpoint, _) -> Found:
    index = checkpoint.config("model_index.json")
    name = index.get("_class_name")
    if name not in FAMILIES:
        return Found("", wrong=f"{name} is none of {', '.join(FAMILIES)}")
    classes = {part: value[1] for part, value in index.items() if isinstance(value, list)}
    return Found(name, compared(classes, CLASSES))


def config(file: str, *expected: Callable | dict) -> Callable[[Checkpoint, object], Found]:
    """A JSON file, whose values are expected to be the defaults of these functions."""

    def point(checkpoint: Checkpoint, _) -> Found:
        found = checkpoint.config(file)
        return Found(f"keys: {', '.join(k for k in found if not k.startswith('_'))}", compared(found, *expected))

    return point


def text_config(checkpoint: Checkpoint, _) -> Found:
    config = checkpoint.config("text_encoder/config.json")
    text, vision, image = read_config(config)
    known = {k: v for k, v in vision.items() if k in inspect.signature(Qwen2_5_VLVisionTower).parameters}
    other = compared(known, Qwen2_5_VLVisionTower, {"in_chans": 3})
    other += compared(text | {"image_token_id": image}, Qwen2_5_VLTextModel, {"image_token_id": 151655})
    return Found("flat" if "hidden_size" in config else "nested, as transformers 5 saves it", other)


def processor_config(checkpoint: Checkpoint, _) -> Found | str:
    if checkpoint.config("model_index.json").get("_class_name") == "QwenImagePipeline":
        return "a model that only draws has none"
    settings = load_image_settings(checkpoint.within("processor"))
    return Found(f"max_pixels: {settings.get('max_pixels')}", compared(settings, image_patches))


def tokenizer(checkpoint: Checkpoint, _) -> Found:
    inner = checkpoint.within("tokenizer")
    made, whole = load_tokenizer(inner), "there" if inner.file("tokenizer.json") else "not there"
    for name, template in {"T2I": T2I, "EDIT": EDIT}.items():
        count = len(made.encode(template.text.split("{}")[0]).ids)
        if count != template.drop:
            return Found("", wrong=f"the {name} template begins with {count} tokens, {template.drop} are dropped")
    other = [f"{text!r} is {ids}" for text, wanted in IDS.items() if (ids := made.encode(text).ids) != wanted]
    return Found(f"templates of {T2I.drop} and {EDIT.drop} tokens; tokenizer.json is {whole}", tuple(other))


def tensors(component: str) -> Callable[[Checkpoint, object], Found]:
    """Names and shapes of a component, from the headers of its files."""

    def point(checkpoint: Checkpoint, _) -> Found:
        stored = checkpoint.shapes(component)
        rename = getattr(PARTS[component], "released_name", str)
        shapes = {rename(name): shape for name, shape in stored.items() if rename(name)}
        with torch.device("meta"):
            module = PARTS[component](**checkpoint.config(f"{component}/config.json"))
            assign(module, {name: torch.empty(shape) for name, shape in shapes.items()}, component)
        size = sum(checkpoint.stored_bytes(component).values()) / sum(map(math.prod, stored.values()))
        first = next(name for name in stored if ".0." in name)
        other = [f"{len(stored)} tensors, not {TENSORS[component]}"] * (len(stored) != TENSORS[component])
        if changed := [name for name in stored if rename(name) not in (name, None)]:
            other.append(f"{len(changed)} have newer names, such as {changed[0]}")
        return Found(f"{len(stored)} tensors, {size:.3g} bytes a number, such as {first}", tuple(other))

    return point


def beside(mine: list[Tensor], theirs: list[Tensor], why: Callable[[], object] = str) -> Found:
    """What a part computes beside what diffusers' computes; why: asked where they part."""
    shares = [(a - b).abs().max() / b.abs().max() for a, b in zip(mine, theirs, strict=True)]
    share = torch.stack(shares).max().item()  # not a number, if one is
    wrong = "" if share <= EQUAL else f"{share:.2g} of the largest number away from diffusers': {why()}"
    return Found(f"as diffusers computes it, within {share:.1g} of the largest number", wrong=wrong)


def load_block(checkpoint: Checkpoint) -> tuple[QwenImageTransformerBlock, tuple[int, int, int], dict]:
    """The first block in float32, its sizes, and inputs for it."""
    config = checkpoint.config("transformer/config.json")
    heads, width = config["num_attention_heads"], config["attention_head_dim"]
    stored = checkpoint.tensors("transformer", BLOCK)
    if broken := [name for name, tensor in stored.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{', '.join(broken)} holds numbers that are none")
    with torch.device("meta"):
        block = QwenImageTransformerBlock(heads * width, heads, width).eval()
    assign(block, {name.removeprefix(BLOCK): tensor.float() for name, tensor in stored.items()}, BLOCK)
    chance = torch.Generator().manual_seed(0)
    img, txt, temb = (torch.randn(1, *size, heads * width, generator=chance) for size in ((64,), (16,), ()))
    rotary = QwenEmbedRope(10000, tuple(config["axes_dims_rope"]))(SHAPES, 16)
    names = "hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb"
    return block, (heads * width, heads, width), dict(zip(names, (img, txt, temb, rotary), strict=True))


def block(checkpoint: Checkpoint, _) -> Found | str:
    """The first block beside diffusers'."""
    if not find_spec("diffusers"):
        return ABSENT
    mine, sizes, inputs = load_block(checkpoint)
    module = import_module("diffusers.models.transformers.transformer_qwenimage")
    theirs = module.QwenImageTransformerBlock(*sizes).eval()
    theirs.load_state_dict(mine.state_dict())
    axes = checkpoint.config("transformer/config.json")["axes_dims_rope"]
    rotary = module.QwenEmbedRope(10000, axes, True)([SHAPES], max_txt_seq_len=16)
    same = inputs | {"encoder_hidden_states_mask": None, "image_rotary_emb": rotary}
    first = lambda: first_difference(record(mine, **inputs), record(theirs, **same))  # noqa: E731
    return beside(mine(**inputs), theirs(**same), first)


def load_vae(checkpoint: Checkpoint, photo: Image.Image) -> tuple[AutoencoderKLQwenImage, list[Tensor]]:
    """The autoencoder; the photo's pixels, its latents, and what these become again."""
    with torch.device("meta"):
        vae = AutoencoderKLQwenImage(**checkpoint.config("vae/config.json")).eval()
    stored = checkpoint.read(checkpoint.weight_map("vae"), by_ranges=True)
    assign(vae, {name: tensor.float() for name, tensor in stored.items()}, "vae")
    pixels = image_to_pixels(resize_image(photo, *calculate_dimensions(256**2, photo.width / photo.height)))
    latents = vae.encode(pixels).mode()
    return vae, [pixels, latents, vae.decode(latents)]


def photo_back(checkpoint: Checkpoint, photo: Image.Image) -> Found:
    """A photo, encoded and decoded; the latents' spread beside the one in the config."""
    vae, (pixels, latents, back) = load_vae(checkpoint, photo)
    loss = 10 * math.log10(4 / (back.clamp(-1, 1) - pixels).square().mean().item())
    spread = latents.squeeze().std((1, 2)) / torch.tensor(vae.latents_std)
    said = f"{loss:.1f} dB; spread of the latents {spread.min():.2g} to {spread.max():.2g} of latents_std"
    return Found(said, () if loss > SOFT else (f"{SOFT} dB and more are expected",))


def autoencoder(checkpoint: Checkpoint, photo: Image.Image) -> Found | str:
    """The photo's latents and its way back beside diffusers'."""
    if not find_spec("diffusers"):
        return ABSENT
    vae, (pixels, *mine) = load_vae(checkpoint, photo)
    config = {k: v for k, v in checkpoint.config("vae/config.json").items() if not k.startswith("_")}
    module = import_module("diffusers.models.autoencoders.autoencoder_kl_qwenimage")
    theirs = module.AutoencoderKLQwenImage(**config).eval().requires_grad_(False)
    theirs.load_state_dict(vae.state_dict())
    return beside(mine, [latents := theirs.encode(pixels).latent_dist.mode(), theirs.decode(latents).sample])


def four_bits(checkpoint: Checkpoint, _) -> Found:
    """What a block loses at 4 bits."""
    whole, _, inputs = load_block(checkpoint)
    small = nn.ModuleDict({"transformer_blocks": nn.ModuleList([deepcopy(whole)])})
    quantize_blocks(small, 4)
    errors = {}
    for name, layer in whole.named_modules():
        if isinstance(layer, nn.Linear) and "_mod." not in name:
            lost = small.get_submodule(BLOCK + name).unpacked() - layer.weight
            errors[name] = (lost.norm() / layer.weight.norm()).item()
    worst, starts = max(errors, key=errors.get), [inputs["encoder_hidden_states"], inputs["hidden_states"]]
    moves = [[end - start for end, start in zip(each(**inputs), starts, strict=True)]
             for each in (whole, small["transformer_blocks"][0])]  # fmt: skip
    text, image = (((few - all_).norm() / all_.norm()).item() for all_, few in zip(*moves, strict=True))
    said = f"weights {sum(errors.values()) / len(errors):.3f} (worst: {worst}, {errors[worst]:.3f}), "
    said += f"what the block adds: text {text:.3f}, image {image:.3f}"
    return Found(said, status="measured")


POINTS = {
    "model_index.json": pipeline_class,
    "transformer/config.json": config("transformer/config.json", PARTS["transformer"], STALE),
    "vae/config.json": config("vae/config.json", PARTS["vae"], STALE),
    "text_encoder/config.json": text_config,
    "scheduler": config("scheduler/scheduler_config.json", get_sigmas, resolution_shift, STALE),
    "processor": processor_config,
    "tokenizer": tokenizer,
    "transformer: names and shapes": tensors("transformer"),
    "vae: names and shapes": tensors("vae"),
    "text_encoder: names and shapes": tensors("text_encoder"),
    "a block": block,
    "the photo, there and back": photo_back,
    "the autoencoder": autoencoder,
    "a block at 4 bits, relative error": four_bits,
}


def rows(checkpoint: Checkpoint, photo: Image.Image) -> Iterator[tuple[str, str, str]]:
    """The report: a point; "as expected", "measured", "differs", "fails" or "not run"; what was found."""
    if checkpoint.config("model_index.json").get("_shrunk"):
        raise ValueError(f"{checkpoint} was written by shrink: verify the checkpoint that it was made of")
    for name, point in POINTS.items():
        try:
            with torch.no_grad(), redirect_stdout(sys.stderr):  # what is fetched is no part of the report
                found = point(checkpoint, photo)
        except (ValueError, OSError, LookupError, RuntimeError, TypeError) as error:
            found = Found("", wrong=" ".join(str(error).split())[:400])
        yield name, *(found.row() if isinstance(found, Found) else ("not run", found))


def command_line() -> Parser:
    """The command's options."""
    purpose = "Whether a checkpoint is what minqwen takes it for: a report in Markdown, to paste into an issue."
    parser = Parser("verify", purpose, "python -m minqwen.verify Qwen/Qwen-Image-Edit > report.md")
    parser.add_argument("model", help="checkpoint folder or hub repository, as released; about 1 GB of it is read")
    parser.add_argument("--photo", default="data/pictures/coffee.png", help="to be encoded and decoded")
    return parser


@one_line("verify")
def main(arguments: list[str] | None = None) -> None:
    """The command; ends with 1 if a point fails."""
    asked = command_line().parse_args(arguments)
    photo, checkpoint = read_picture(asked.photo), Checkpoint(asked.model)
    there = [f"{name} {version(name)}" for name in ("minqwen", "torch", "diffusers") if find_spec(name)]
    print(f"{asked.model}: {', '.join(there)}, Python {platform.python_version()} on {platform.system()}\n")
    print("| point | | found |\n|---|---|---|")
    failed = 0
    for name, status, found in rows(checkpoint, photo):
        failed += "fails" in status
        print(f"| {name} | {status} | {found.replace('|', chr(92) + '|')} |", flush=True)
    print(f"\n{failed} of {len(POINTS)} points fail; {in_bytes(checkpoint.fetched)} read by byte ranges.")
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()

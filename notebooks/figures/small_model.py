"""The small trained model and the scene that most lessons edit: opened once, and in one place."""

from functools import cache

from PIL import Image

from course import MODEL, ROOT, TIER, TINY
from minqwen.pipeline import PARTS, QwenImagePipeline

SCENE = ROOT / "data/pictures/scene.png"  # a cat, a tree and a cake
WISH = "replace the cat with a fox"  # an edit that the small model gets right
FULL = TIER == "full"
# What the model of the tier is asked for.
WHOLE_SCENE = ROOT / "data/pictures/coffee.png" if FULL else SCENE
WHOLE_WISH = "replace the coffee with green tea" if FULL else WISH


@cache
def model() -> QwenImagePipeline:
    """The small model on the CPU, its weights frozen."""
    return _frozen(QwenImagePipeline.from_pretrained(TINY, device="cpu"))


@cache
def whole_model() -> QwenImagePipeline:
    """The model of the tier: the small one, or in the tier full the released one."""
    return _frozen(QwenImagePipeline.from_pretrained(MODEL)) if FULL else model()


@cache
def given() -> Image.Image:
    """The scene."""
    return Image.open(SCENE).convert("RGB")


def _frozen(pipe: QwenImagePipeline) -> QwenImagePipeline:
    for name in PARTS:
        getattr(pipe, name).requires_grad_(False)
    return pipe

"""Makes the README's and the card's pictures of edits by data/tiny: python data/recipes/readme_picture.py"""

import matplotlib.pyplot as plt
import torch
from matplotlib import font_manager
from PIL import Image

from minqwen.lora import load_lora
from minqwen.pipeline import QwenImagePipeline
from minqwen.prompt import EDIT_PLUS
from minqwen.world import Scene, Thing, draw

WISHES = [
    "replace the cat\nwith a fox",
    "remove the cake",
    "add a rocket\nat the top right",
    "move the cat\nto the top right",
    "swap the cat\nand the cake",
    "make the background\ngreen",
    "在右上角加熊猫",
]
TWO = [
    draw(Scene("white", (Thing("panda", "top left"), Thing("cake", "bottom left")))),
    draw(Scene("blue", (Thing("rocket", "top right"), Thing("cake", "bottom right")))),
]
TWO_WISHES = ["put the cake of Picture 2\non Picture 1", "Picture 1 should have\nthe vehicle of Picture 2"]
CHINESE_FONTS = {"Noto Sans CJK SC", "WenQuanYi Zen Hei", "PingFang SC", "Microsoft YaHei"}  # one of them is needed
EXCHANGED = "the first wish, the pictures\ngiven in the other order"


def edits(pipe: QwenImagePipeline, given: list[Image.Image], wishes: list[str]) -> list[Image.Image]:
    options = {"num_inference_steps": 20, "progress": False}
    return [
        pipe.edit(given, wish.replace("\n", " "), generator=torch.Generator().manual_seed(1), **options)
        for wish in wishes
    ]


def save(path: str, columns: int, pictures: list[Image.Image], titles: list[str], size: tuple[float, float]) -> None:
    figure, axes = plt.subplots(len(pictures) // columns, columns, figsize=size, facecolor="white")
    for axis, picture, title in zip(axes.flat, pictures, titles, strict=True):
        axis.imshow(picture.resize((512, 512), Image.Resampling.BICUBIC))
        axis.set_title(title, fontsize=13)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_color("#bbbbbb")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    plt.rcParams["font.family"] = ["DejaVu Sans", *CHINESE_FONTS & set(font_manager.get_font_names())]
    pipe = QwenImagePipeline.from_pretrained("data/tiny")
    scene = Image.open("data/pictures/scene.png")
    save("data/readme.png", 4, [scene, *edits(pipe, [scene], WISHES)], ["given", *WISHES], (11.2, 6.8))
    pipe.edit_template = EDIT_PLUS
    load_lora(pipe.transformer, "data/tiny/edit_plus_lora.safetensors")
    pictures = [*TWO, *edits(pipe, TWO, TWO_WISHES), *edits(pipe, TWO[::-1], TWO_WISHES[:1])]
    save("data/tiny/edit_plus.png", 5, pictures, ["Picture 1", "Picture 2", *TWO_WISHES, EXCHANGED], (16, 4.2))

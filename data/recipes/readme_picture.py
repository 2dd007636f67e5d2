"""Makes the README's and the card's pictures of edits by data/tiny: python data/recipes/readme_picture.py"""

import matplotlib.pyplot as plt
import torch
from PIL import Image

from minqwen.lora import load_lora
from minqwen.pipeline import QwenImagePipeline
from minqwen.prompt import EDIT_PLUS
from minqwen.world import Scene, Thing, draw

WISHES = [
    "make the star\ngreen",
    "remove\nthe red circle",
    "add a blue square\nat the bottom right",
    "turn the heart\ninto a triangle",
    "change the background\nto black",
]
TWO = [
    draw(Scene("white", (Thing("circle", "red", "top left"), Thing("star", "purple", "bottom left")))),
    draw(Scene("black", (Thing("square", "cyan", "top right"), Thing("star", "yellow", "bottom right")))),
]
TWO_WISHES = ["put the star of Picture 2\non Picture 1", "Picture 1 should have\nthe cyan shape of Picture 2"]
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
    pipe = QwenImagePipeline.from_pretrained("data/tiny")
    scene = Image.open("data/pictures/scene.png")
    save("data/readme.png", 3, [scene, *edits(pipe, [scene], WISHES)], ["given", *WISHES], (8.4, 6.4))
    pipe.edit_template = EDIT_PLUS
    load_lora(pipe.transformer, "data/tiny/edit_plus_lora.safetensors")
    pictures = [*TWO, *edits(pipe, TWO, TWO_WISHES), *edits(pipe, TWO[::-1], TWO_WISHES[:1])]
    save("data/tiny/edit_plus.png", 5, pictures, ["Picture 1", "Picture 2", *TWO_WISHES, EXCHANGED], (16, 4.2))

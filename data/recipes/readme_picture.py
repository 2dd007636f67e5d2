"""Makes the README's picture from data/tiny: python data/recipes/readme_picture.py"""

import matplotlib.pyplot as plt
import torch
from PIL import Image

from minqwen.pipeline import QwenImagePipeline

WISHES = [
    "make the star\ngreen",
    "remove\nthe red circle",
    "add a blue square\nat the bottom right",
    "turn the heart\ninto a triangle",
    "change the background\nto black",
]

pipe = QwenImagePipeline.from_pretrained("data/tiny")
given = Image.open("data/pictures/scene.png")
pictures = [given]
for wish in WISHES:
    generator = torch.Generator().manual_seed(1)
    instruction = wish.replace("\n", " ")
    pictures.append(pipe.edit(given, instruction, num_inference_steps=20, generator=generator, progress=False))

figure, axes = plt.subplots(2, 3, figsize=(8.4, 6.4), facecolor="white")
for axis, picture, title in zip(axes.flat, pictures, ["given", *WISHES], strict=True):
    axis.imshow(picture.resize((512, 512), Image.Resampling.BICUBIC))
    axis.set_title(title, fontsize=13)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_color("#bbbbbb")
figure.tight_layout()
figure.savefig("data/readme.png", dpi=100)

"""Train the small Lumina 2 model, a flow model of parts of photographs."""

import bz2
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor
from training import Recipe, emoji, flow_loss, main

PHOTOS = {
    "astronaut": "astronaut.png",
    "cat": "chelsea.png",
    "coffee": "coffee.png",
    "rocket": "rocket.jpg",
    "galaxies": "hubble_deep_field.jpg",
    "tissue": "ihc.png",
    "retina": "retina.jpg",
    "motorcycle": "motorcycle_left.png",
    "bricks": "brick.png",
    "temple": "china.jpg",
    "flower": "flower.jpg",
    "raccoon": "face.dat",
}
ROWS, COLUMNS = ("upper", "middle", "lower"), ("left", "centre", "right")
ZOOMS = {"near": (0.38, 0.46), "half": (0.6, 0.7), "whole": (0.9, 1.0)}  # side of the part, of the photo's shorter side
SIDE, SHORTER, NO_PROMPT, NAME_ONLY = 128, 320, 0.12, 0.2
SHIFT = 3.0


def vocabulary(pad: str) -> list[str]:
    """Every word that a caption can hold, the pad word first."""
    return [pad, *PHOTOS, *ROWS, *COLUMNS, *ZOOMS]


def load_photo(path: Path) -> Tensor:
    """A photograph [3,H,W] in 0..1, its shorter side SHORTER."""
    if path.suffix == ".dat":  # scipy's raccoon
        image = Image.fromarray(np.frombuffer(bz2.decompress(path.read_bytes()), np.uint8).reshape(768, 1024, 3))
    else:
        image = Image.open(path).convert("RGB")
    scale = SHORTER / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def load_photos(folder: str) -> list[Tensor]:
    """The photographs, in the order of PHOTOS."""
    return [load_photo(Path(folder, file)) for file in PHOTOS.values()]


def part(photo: Tensor, place: tuple[int, int, int], draws: list[float]) -> Tensor:
    """A part [3,SIDE,SIDE] of a photograph; place: numbers of row, column and zoom; draws: four random in 0..1."""
    row, column, zoom = place
    low, high = list(ZOOMS.values())[zoom]
    side = round(SHORTER * (low + (high - low) * draws[0]))
    photo = photo.flip(2) if draws[1] < 0.5 else photo
    top = int((photo.shape[1] - side) * (row + draws[2]) / 3)
    left = int((photo.shape[2] - side) * (column + draws[3]) / 3)
    cut = photo[None, :, top : top + side, left : left + side]
    return F.interpolate(cut, (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)[0].clamp(0, 1)


def caption(name: int, place: tuple[int, int, int]) -> str:
    """The prompt of one picture, e.g. "cat upper left near"."""
    row, column, zoom = place
    return f"{list(PHOTOS)[name]} {ROWS[row]} {COLUMNS[column]} {list(ZOOMS)[zoom]}"


def shorten(prompt: str, draw: float) -> str:
    """The prompt, its name alone, or nothing, by a random number draw in 0..1."""
    if draw < NO_PROMPT:
        return ""
    return prompt.partition(" ")[0] if draw < NAME_ONLY else prompt


def batch(photos: list[Tensor], count: int, generator: Generator) -> tuple[Tensor, list[str]]:
    """Random parts [count,3,SIDE,SIDE] of photographs, and their prompts."""
    names = torch.randint(len(photos), (count,), generator=generator).tolist()
    places = [tuple(place) for place in torch.randint(3, (count, 3), generator=generator).tolist()]
    draws = torch.rand(count, 5, generator=generator).tolist()
    pictures = torch.stack([part(photos[n], p, d) for n, p, d in zip(names, places, draws)])
    return pictures, [shorten(caption(n, p), d[4]) for n, p, d in zip(names, places, draws)]


def build() -> torch.nn.Module:
    """A fresh model; every block starts as the identity and the output as zero."""
    import photos_lumina  # needs the host

    model = photos_lumina.network(torch.nn)
    for name, weight in model.named_parameters():
        if "adaLN_modulation" in name or name.startswith("final_layer.linear"):
            torch.nn.init.zeros_(weight)
    return model


def velocity(model: torch.nn.Module, x: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
    """What the network gives for latents of flow time sigma."""
    return model(x, sigma, context=context, num_tokens=context.shape[1])


def loss(model: torch.nn.Module, codec: Any, pictures: Tensor, prompts: list[str], generator: Generator) -> Tensor:
    """Squared error of the velocity."""
    return flow_loss(partial(velocity, model), codec, pictures, prompts, generator, SHIFT)


RECIPE = Recipe("photos_lumina", build, loss, batch, vocabulary, emoji.PhotoCodec, load=load_photos)
if __name__ == "__main__":
    main(RECIPE)

"""Pictures of a benchmark: how far they are from a reference, as files, and side by side."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

CELL, GAP, LABEL = 128, 6, 24


def closeness(pictures: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """PSNR in dB (infinite when equal) and SSIM of each picture, two arrays [batch]."""
    a, b = (torch.from_numpy(x).movedim(-1, 1) for x in (pictures, reference))
    psnr = peak_signal_noise_ratio(a, b, data_range=1.0, dim=(1, 2, 3), reduction="none")
    ssim = structural_similarity_index_measure(a, b, data_range=1.0, reduction="none")
    return psnr.numpy(), np.asarray(ssim)


def to_image(picture: np.ndarray) -> Image.Image:
    """An array [height, width, 3] in 0..1 as a picture."""
    return Image.fromarray((picture.clip(0, 1) * 255).round().astype(np.uint8))


def difference(a: np.ndarray, b: np.ndarray, gain: float) -> np.ndarray:
    """Absolute difference of two arrays, enlarged."""
    return np.abs(a - b) * gain


def sheet(columns: Mapping[str, np.ndarray], titles: Sequence[str], rows: int) -> Image.Image:
    """Pictures side by side: `columns` maps a label to an array [batch, height, width, 3].

    The first `rows` of each batch are shown, one below the other, with `titles` beside them.
    """
    margin = 2 * CELL
    size = (margin + len(columns) * (CELL + GAP), LABEL + rows * (CELL + GAP))
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(13)
    for x, (label, pictures) in enumerate(columns.items()):
        left = margin + x * (CELL + GAP)
        draw.text((left + CELL / 2, LABEL / 2), label, "black", font, anchor="mm")
        for y in range(rows):
            cell = to_image(pictures[y]).resize((CELL, CELL), Image.Resampling.NEAREST)
            canvas.paste(cell, (left, LABEL + y * (CELL + GAP)))
    for y, title in enumerate(titles[:rows]):
        draw.text((margin - GAP, LABEL + y * (CELL + GAP) + CELL / 2), title, "black", font, anchor="rm")
    return canvas

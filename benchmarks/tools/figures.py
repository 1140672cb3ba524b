"""Figures as files, without a screen."""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from PIL import Image

matplotlib.use("Agg")
from matplotlib import pyplot as plt

__all__ = ["plt", "save"]


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a small PNG of 256 colours."""
    figure.savefig(path, dpi=90)
    plt.close(figure)
    with Image.open(path) as picture:
        few = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    few.save(path, optimize=True)

"""A canvas for charts that a node hands on as IMAGE."""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

INK, PAPER, GRID = "#222222", "#ffffff", "#dddddd"


class Canvas:
    """`draw` is PIL's; coordinates are in pixels from the top left corner."""

    def __init__(self, width: int, height: int) -> None:
        self.picture = Image.new("RGB", (width, height), PAPER)
        self.draw = ImageDraw.Draw(self.picture)

    def text(self, where: tuple[float, float], text: str, size: int = 13, anchor: str | None = None) -> None:
        """Write `text`; anchor: PIL's, which of its points lies at `where`."""
        self.draw.text(where, text, fill=INK, font=ImageFont.load_default(size), anchor=anchor)

    def image(self) -> torch.Tensor:
        """The picture as IMAGE [1, height, width, 3] in 0..1."""
        return torch.from_numpy(np.array(self.picture, dtype=np.float32) / 255)[None]

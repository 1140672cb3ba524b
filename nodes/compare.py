"""FasterCacheCompare: how far two pictures, videos or latents are apart."""

from typing import Any

from comfy_api.latest import io, ui
from torch import Tensor

from ..fastercache_core.metrics import psnr, ssim
from .schema import schema, wrong

GAIN = 8.0

Result = Tensor | dict[str, Any]  # an IMAGE [batch, height, width, channels] in 0..1, or a LATENT


class FasterCacheCompare(io.ComfyNode):
    """Measures how far two results are apart: PSNR in dB (above 40 hardly anybody sees a difference, below 30 most do),
    SSIM (1 = equal) and a map of the difference."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        kinds, other = [io.Image, io.Latent], "The same seed and prompt, sampled with a cache. Same kind and size."
        inputs = [
            io.MultiType.Input("reference", kinds, tooltip="The picture, video or latent sampled in full."),
            io.MultiType.Input("other", kinds, tooltip=other),
        ]
        outputs = [
            io.Float.Output("psnr", tooltip="Mean over the batch, in dB; 100 when equal."),
            io.Float.Output("ssim", tooltip="Mean over the batch, 1.0 when equal."),
            io.Image.Output("difference", tooltip=f"Absolute difference, {GAIN:.0f} times enlarged."),
            io.String.Output("text", tooltip="The figures as text."),
        ]
        return schema(cls, "FasterCacheCompare", "FasterCache Compare", inputs, outputs, is_output_node=True)

    @classmethod
    def execute(cls, reference: Result, other: Result) -> io.NodeOutput:
        (a, peak), (b, _) = _frames(reference), _frames(other)
        if isinstance(reference, dict) != isinstance(other, dict) or a.shape != b.shape:
            sizes = f"`reference` is {_size(reference, a)} and `other` is {_size(other, b)}"
            raise wrong(cls, f"{sizes}; both must be of the same kind and size.")
        decibels, similarity = psnr(a, b, peak).clamp(max=100.0), ssim(a, b, peak)
        mean = float(decibels.mean()), float(similarity.mean())
        names = ["mean", *range(len(decibels))]
        figures = [mean, *zip(decibels.tolist(), similarity.tolist(), strict=True)]
        text = "\n".join(f"{n}: PSNR {p:.2f} dB, SSIM {s:.4f}" for n, (p, s) in zip(names, figures, strict=True))
        return io.NodeOutput(*mean, difference_map(a, b, peak), text, ui=ui.PreviewText(text))


def difference_map(a: Tensor, b: Tensor, peak: float) -> Tensor:
    """Absolute difference of [batch, channels, height, width] as IMAGE [batch, height, width, 3]."""
    difference = ((a - b).abs() * GAIN / peak).clamp(0, 1).movedim(1, -1)
    if difference.shape[-1] != 3:
        difference = difference.mean(-1, keepdim=True).expand(*difference.shape[:-1], 3)
    return difference.float().contiguous()


def _frames(value: Result) -> tuple[Tensor, float]:
    """Frames [n, channels, height, width] on the CPU, and their peak value."""
    if not isinstance(value, dict):
        return value.movedim(-1, 1).cpu().float(), 1.0
    samples = value["samples"].cpu().float()
    peak = float(samples.max() - samples.min()) or 1.0
    if samples.ndim == 5:  # video latents: batch, channels, frames, height, width
        samples = samples.movedim(2, 1).flatten(0, 1)
    return samples, peak


def _size(value: Result, frames: Tensor) -> str:
    kind = "a LATENT" if isinstance(value, dict) else "an IMAGE"
    return f"{kind} of {' x '.join(str(n) for n in frames.shape)}"

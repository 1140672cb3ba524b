"""FasterCacheCompare: how far two pictures, videos or latents are apart."""
from comfy_api.latest import io, ui

from ..fastercache_core.metrics import psnr, ssim
from .schema import schema

GAIN = 8.0


class FasterCacheCompare(io.ComfyNode):
    """Measures two results against each other."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="FasterCacheCompare",
            display_name="FasterCache Compare",
            description="Measures how far two results are apart: PSNR in dB (above 40 hardly anybody sees a "
                        "difference, below 30 most do), SSIM (1 = equal) and a map of the difference.",
            inputs=[
                io.MultiType.Input("reference", [io.Image, io.Latent],
                                   tooltip="The picture, video frames or latent sampled in full."),
                io.MultiType.Input("other", [io.Image, io.Latent],
                                   tooltip="The same seed and prompt, sampled with a cache. Same kind and size."),
            ],
            outputs=[
                io.Float.Output("psnr", tooltip="Mean over the batch, in dB; 100 when equal."),
                io.Float.Output("ssim", tooltip="Mean over the batch, 1.0 when equal."),
                io.Image.Output("difference", tooltip=f"Absolute difference, {GAIN:.0f} times enlarged."),
                io.String.Output("text", tooltip="The figures as text."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, reference, other):
        a, peak = _frames(reference)
        b, _ = _frames(other)
        if isinstance(reference, dict) != isinstance(other, dict) or a.shape != b.shape:
            raise ValueError(f"FasterCacheCompare: `reference` is {_size(reference, a)} and `other` is "
                             f"{_size(other, b)}; both must be of the same kind and size.")
        decibels, similarity = psnr(a, b, peak).clamp(max=100.0), ssim(a, b, peak)
        text = "\n".join(f"{i}: PSNR {p:.2f} dB, SSIM {s:.4f}"
                         for i, (p, s) in enumerate(zip(decibels.tolist(), similarity.tolist())))
        text = f"mean: PSNR {decibels.mean():.2f} dB, SSIM {similarity.mean():.4f}\n{text}"
        return io.NodeOutput(float(decibels.mean()), float(similarity.mean()),
                             difference_map(a, b, peak), text, ui=ui.PreviewText(text))


def difference_map(a, b, peak):
    """Absolute difference of [batch, channels, height, width] as IMAGE [batch, height, width, 3]."""
    difference = ((a - b).abs() * GAIN / peak).clamp(0, 1).movedim(1, -1)
    if difference.shape[-1] != 3:
        difference = difference.mean(-1, keepdim=True).expand(*difference.shape[:-1], 3)
    return difference.float().contiguous()


def _frames(value):
    """Frames [n, channels, height, width] of an IMAGE or LATENT on the CPU, and their peak value."""
    if not isinstance(value, dict):
        return value.movedim(-1, 1).cpu().float(), 1.0
    samples = value["samples"].cpu().float()
    peak = float(samples.max() - samples.min()) or 1.0
    if samples.ndim == 5:  # video latents: batch, channels, frames, height, width
        samples = samples.movedim(2, 1).flatten(0, 1)
    return samples, peak


def _size(value, frames):
    kind = "a LATENT" if isinstance(value, dict) else "an IMAGE"
    return f"{kind} of {frames.shape[0]} x {frames.shape[1]} x {frames.shape[2]} x {frames.shape[3]}"

"""The pictures of a bed's card, contact.jpg, and how like its teacher a distilled bed draws.

python dev.py contact mmdit_turbo8 photos
"""

import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from testbed.beds import BEDS, Bed
from testbed.server import comfyui_path

COUNT, SEED, ACROSS = 16, 7, 8


def import_host() -> None:
    """Make ComfyUI importable, on the CPU."""
    sys.path.insert(0, str(comfyui_path()))
    import comfy.cli_args

    comfy.cli_args.args.cpu = True


def sample(bed: Bed, model: Any, steps: int, cfg: float) -> Tensor:
    """Pictures [COUNT, frames, 3, side, side] of the first report prompts."""
    import comfy.sample

    prompts = bed.prompts("report")[:COUNT]
    latent = bed.empty(COUNT)
    inputs = steps, cfg, "euler", bed.scheduler, bed.conditioning(prompts), bed.conditioning([""]), latent
    noise = comfy.sample.prepare_noise(latent, SEED)
    pictures = bed.decode(model, comfy.sample.sample(model, noise, *inputs, disable_pbar=True, seed=SEED))
    return pictures if bed.frames > 1 else pictures[:, None]


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """dB for each sample."""
    return -10 * (a - b).square().flatten(1).mean(1).log10()


def sheet(upper: Tensor, lower: Tensor) -> Image.Image:
    """Upper samples above the lower ones, ACROSS in a row; of clips every third frame, those two side by side."""
    if upper.shape[1] > 1:
        rows = torch.cat([upper[:, ::3], lower[:, ::3]], 1).flatten(0, 1)
        across = 2 * upper[:, ::3].shape[1]
    else:
        rows, across = torch.cat([upper, lower]).flatten(0, 1), ACROSS
    cells = rows.unflatten(0, (-1, across)).permute(0, 3, 1, 4, 2)
    pixels = cells.reshape(cells.shape[0] * cells.shape[1], -1, 3)
    return Image.fromarray((pixels * 255).round().byte().numpy())


def compare(name: str, bed: Bed, drawn: Tensor) -> Tensor:
    """Print how near `drawn` comes to the teacher's full sampling, beside as few steps of the teacher itself."""
    teacher = BEDS[bed.teacher]
    model = teacher.load()
    full = sample(teacher, model, teacher.steps, teacher.cfg)
    fewer = sample(teacher, model, bed.steps, teacher.cfg)
    unguided = sample(teacher, model, bed.steps, bed.cfg)
    print(f"{name}: PSNR to {bed.teacher}, {teacher.steps} steps, cfg {teacher.cfg:g}, {COUNT} samples, mean (least)")
    for what, pictures in (
        (f"this, {bed.steps} steps, cfg {bed.cfg:g}", drawn),
        (f"{bed.teacher}, {bed.steps} steps, cfg {teacher.cfg:g}", fewer),
        (f"{bed.teacher}, {bed.steps} steps, cfg {bed.cfg:g}", unguided),
    ):
        decibels = psnr(pictures, full)
        print(f"  {what}: {decibels.mean():.1f} ({decibels.min():.1f})", flush=True)
    return full


def draw(name: str, folder: Path | None = None) -> None:
    """Write the contact sheet of a bed; a distilled one beside its teacher, others beside themselves at cfg 1."""
    bed = BEDS[name]
    model = bed.load()
    upper = sample(bed, model, bed.steps, bed.cfg)
    lower = compare(name, bed, upper) if bed.teacher else sample(bed, model, bed.steps, 1.0)
    sheet(upper, lower).save((folder or bed.file.parent) / "contact.jpg", quality=90)


def main() -> None:
    """Draw the beds that the command line names."""
    if not sys.argv[1:] or not set(sys.argv[1:]) <= set(BEDS):
        sys.exit(f"{__doc__}\nBeds: {', '.join(BEDS)}")
    names, sys.argv = sys.argv[1:], sys.argv[:1]
    import_host()
    for name in names:
        draw(name)


if __name__ == "__main__":
    main()

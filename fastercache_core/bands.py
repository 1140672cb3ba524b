"""The low and high spatial frequencies of a tensor (the split of FasterCache, section 3.2)."""
import torch


def disc(height, width, radius, device=None):
    """Mask [height, width] of the frequencies within `radius` (index units) of the mean, unshifted.

    Same set as the disc around the centre of a shifted spectrum in the released code.
    """
    fy = torch.fft.fftfreq(height, d=1 / height, device=device)
    fx = torch.fft.fftfreq(width, d=1 / width, device=device)
    return fy[:, None] ** 2 + fx[None, :] ** 2 <= radius ** 2


def disc_radius(height, width, fraction):
    """Whole-number radius: `fraction` of the shorter side (released code: a fifth)."""
    return int(min(height, width) * fraction + 1e-9)


def low_pass(x, fraction):
    """Low frequencies of `x` [..., height, width], in its own dtype; the rest is `x` minus this.

    The transform runs in at least float32. Source: FasterCache eq. 6-9.
    """
    height, width = x.shape[-2:]
    wide = x if x.dtype == torch.float64 else x.float()
    mask = disc(height, width, disc_radius(height, width, fraction), x.device)
    return torch.fft.ifft2(torch.fft.fft2(wide) * mask).real.to(x.dtype)

"""Which model this is: a short text that another file of the same weights has too."""
import hashlib

# So many parameters are looked at; one-dimensional ones, which LoRAs leave alone.
LOOKED_AT = 16


def model_fingerprint(model):
    """Class, size and a digest of some weights of a MODEL (ModelPatcher), e.g. "SD3 9.1M 3f2a90bc".

    The same for every precision of the file and with or without LoRAs; another checkpoint of the same
    architecture has another one.
    """
    network = getattr(model.model.diffusion_model, "_orig_mod", model.model.diffusion_model)
    parameters = sorted(network.named_parameters())
    shapes = [f"{name} {tuple(p.shape)}" for name, p in parameters]
    small = [p for _, p in parameters if p.ndim == 1 and p.numel() > 1]
    chosen = small[::max(len(small) // LOOKED_AT, 1)][:LOOKED_AT]
    values = [f"{float(p.detach().float().abs().mean()):.1e}" for p in chosen]
    digest = hashlib.sha256("\n".join([*shapes, *values]).encode()).hexdigest()[:8]
    millions = sum(p.numel() for _, p in parameters) / 1e6
    return f"{type(model.model).__name__} {millions:.1f}M {digest}"

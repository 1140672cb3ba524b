"""Which conditioning is which: identities that survive batching, and signs that one changed."""


def branch_keys(transformer_options, shape):
    """One identity per chunk of the batch the host runs now.

    The host's uuid alone collides (area conditionings copy the opposite one's), so the place in
    the guider's list, the occurrence within this batch and the latent shape are added.
    """
    pairs = list(zip(transformer_options["uuids"], transformer_options["cond_or_uncond"]))
    return [(str(uuid), index, pairs[:i].count((uuid, index)), tuple(shape[1:]))
            for i, (uuid, index) in enumerate(pairs)]


def fingerprint(conds, sigma, x):
    """What must stay the same for cached values to be valid: latent shape and active conditionings."""
    active = tuple(tuple(_identity(c, sigma) for c in branch or () if is_active(c, sigma))
                   for branch in conds)
    return tuple(x.shape), x.dtype, x.device, active


def is_active(cond, sigma):
    """True when `sigma` lies in the conditioning's own timestep range, by the host's test."""
    return not (("timestep_start" in cond and sigma > cond["timestep_start"])
                or ("timestep_end" in cond and sigma < cond["timestep_end"]))


def branch_is_active(branch, sigma):
    """True when the host will run at least one conditioning of this list at `sigma`."""
    return any(is_active(cond, sigma) for cond in branch or ())


def _identity(cond, sigma):
    return str(cond.get("uuid")), tuple(_controls(cond.get("control"), sigma))


def _controls(control, sigma):
    while control is not None:
        start, end = getattr(control, "timestep_range", None) or (float("inf"), 0.0)
        yield end <= sigma <= start
        control = getattr(control, "previous_controlnet", None)

"""Which conditioning is which: identities that survive batching, and signs that one changed."""


def window_of(transformer_options):
    """Identity of the context window that runs now, None when the latent is sampled whole."""
    window = transformer_options.get("context_window")
    return tuple(window.index_list) if window is not None else None


def branch_keys(transformer_options, window, shape):
    """One identity per chunk of the batch the host runs now.

    The host's uuid alone collides (area conditionings copy the opposite one's, windows share
    theirs), so the place in the guider's list, the occurrence within this batch, the window and
    the latent shape are added.
    """
    pairs = list(zip(transformer_options["uuids"], transformer_options["cond_or_uncond"]))
    return [(str(uuid), index, pairs[:i].count((uuid, index)), window, tuple(shape[1:]))
            for i, (uuid, index) in enumerate(pairs)]


def reference_branch(conds, guider_conds):
    """Index in `conds` of the guider's positive conditioning, None when it is not among them.

    Guiders order their lists differently and windows copy them, but the uuids stay.
    """
    positive = _uuids(guider_conds.get("positive"))
    return next((i for i, branch in enumerate(conds) if branch and _uuids(branch) == positive), None)


def branch_name(index, reference, count):
    """What a branch is called in reports."""
    if index == reference:
        return "cond"
    return "uncond" if count == 2 else f"uncond {index}"


def fingerprint(conds, sigma, x):
    """What must stay the same for cached values to be valid: latent and active conditionings."""
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


def _uuids(branch):
    return [str(cond.get("uuid")) for cond in branch or ()]


def _identity(cond, sigma):
    return str(cond.get("uuid")), tuple(_controls(cond.get("control"), sigma)), tuple(_hooks(cond, sigma))


def _controls(control, sigma):
    while control is not None:
        start, end = getattr(control, "timestep_range", None) or (float("inf"), 0.0)
        yield end <= sigma <= start
        control = getattr(control, "previous_controlnet", None)


def _hooks(cond, sigma):
    hooks = cond.get("hooks")
    for hook in hooks.hooks if hooks is not None else ():
        yield sum(keyframe.start_t >= sigma for keyframe in hook.hook_keyframe.keyframes)

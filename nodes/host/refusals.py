"""What cannot work with what, decided before sampling starts: every refusal has its reason."""
from .families import available, find_family
from .samplers import sampler_facts, sampler_name

METHODS = ("jump", "guidance", "reuse")


def refusals(settings, guider, sampler):
    """Methods of `settings` that must not run here, dict method name -> reason."""
    wanted = [name for name in METHODS if getattr(settings, name) is not None]
    reason = _everything(guider, sampler)
    if reason:
        return dict.fromkeys(wanted, reason)
    checks = {"jump": lambda: _jump(settings, guider, sampler), "reuse": lambda: _reuse(settings, guider)}
    found = {name: checks[name]() for name in wanted if name in checks}
    return {name: reason for name, reason in found.items() if reason}


def _everything(guider, sampler):
    options = guider.model_options
    if "easycache" in options.get("transformer_options", {}):
        return "EasyCache or LazyCache is on the same model: nothing is skipped here, remove one of the two"
    if options.get("multigpu_clones"):
        return "sampling on several GPUs at once is not cached yet: nothing is skipped"
    if _mixes_branches(options):
        return "NAGuidance mixes the branches inside the network and needs both in every pass: nothing is skipped"
    if sampler_facts(sampler) is None:
        return f"the calls of sampler {sampler_name(sampler)} cannot be foreseen: nothing is skipped"
    return None


def _mixes_branches(options):
    patches = options.get("transformer_options", {}).get("patches", {}).get("attn1_output_patch", [])
    return any("NAGuidance" in getattr(patch, "__qualname__", "") for patch in patches)


def _jump(settings, guider, sampler):
    if "sampler_calc_cond_batch_function" in guider.model_options:
        return "another node runs the branches one by one: no evaluation is forecast"
    facts = sampler_facts(sampler)
    if facts.noise:
        return f"sampler {sampler_name(sampler)} adds noise on the way: no evaluation is forecast"
    if (facts.calls > 1 or facts.order > 1) and not (settings.auto and facts.solver):
        return (f"sampler {sampler_name(sampler)} builds on differences between evaluations: "
                "none is forecast")
    return None


def _reuse(settings, guider):
    network = guider.model_patcher.model.diffusion_model
    family, kinds = find_family(getattr(network, "_orig_mod", network)), settings.reuse.intervals
    if available(family, kinds)[0]:
        return None
    return f"{family.name} has no {' or '.join(kinds)} features to reuse: all of it always runs"

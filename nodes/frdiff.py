"""FRDiff on a MODEL: key evaluations, and between them reused features, held scores or a mix of both."""
from comfy_api.latest import io

from ..fastercache_core.guidance import GuidanceSettings
from ..fastercache_core.jump import JumpSettings
from ..fastercache_core.mixing import MIXINGS, MixSettings
from ..fastercache_core.settings import CacheSettings
from .features import storage_inputs, storage_settings
from .host.attach import attach
from .host.identity import model_fingerprint
from .host.plans import ALWAYS, planned_reuse
from .policy import CachePolicy
from .schema import advanced, choice, name_of, schema, window, window_inputs


def frdiff_settings(mixing, storage):
    """CacheSettings of FRDiff as published: scores are held, features of key evaluations are reused as they are."""
    return CacheSettings(f"FRDiff 1 in {mixing.every}", GuidanceSettings(ALWAYS, "hold"), planned_reuse(storage),
                         JumpSettings(ALWAYS, "hold"), plan=mixing)


def policy_settings(policy, storage):
    """CacheSettings that follow a policy: forecasts as measured or as the policy weighs them."""
    return CacheSettings(f"policy at cost {policy.cost:.2f}", GuidanceSettings(ALWAYS),
                         planned_reuse(storage), JumpSettings(ALWAYS), plan=policy)


def refuse_other_model(node, policy, model, other_model):
    """Raise ValueError naming `node` when a policy is another model's and that was not asked for."""
    own = model_fingerprint(model)
    if not (other_model or policy.matches(own)):
        raise ValueError(f"{node}: the policy was found on {policy.setup.model}, but this model is {own}. Find one for "
                         "this model with FasterCache Auto-FR, or switch on other_model to use it all the same.")


class FasterCacheFRDiff(io.ComfyNode):
    """FRDiff's feature reuse and score mixing, or the policy that Auto-FR found."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="FasterCacheFRDiff",
            display_name="FasterCache FRDiff",
            description="FRDiff: some steps are computed in full, the others take features from the cache (late "
                        "steps), the last score (early ones) or a mix of both. With a policy from FasterCache "
                        "Auto-FR, every step does what was found best on your own model.",
            inputs=[
                io.Model.Input("model", tooltip="The model to sample faster. It is not changed itself."),
                CachePolicy.Input("policy", optional=True,
                                  tooltip="From FasterCache Auto-FR or a file. In its place the inputs below say "
                                          "what is done."),
                io.Int.Input("interval", default=2, min=1, max=20,
                             tooltip="One step in this many is computed in full (M of the paper; 2 or 3)."),
                io.Combo.Input("score_mixing", options=list(MIXINGS), default="automatic",
                               tooltip="Between those: paper = early steps hold the last score, late ones reuse "
                                       "features; scores = held throughout, which is the same as fewer steps; "
                                       "features = reused throughout; automatic = scores, features where a sampler "
                                       "cannot hold scores, and nothing with samplers where fewer steps could be "
                                       "better."),
                advanced(io.Float.Input("bias", default=0.5, min=0.0, max=1.0, step=0.01,
                                        tooltip="Part of sampling at which held scores and reused features count "
                                                "the same (b of the paper).")),
                advanced(io.Float.Input("slope", default=30.0, min=0.0, max=1000.0, step=1.0,
                                        tooltip="How fast reused features take over (tau of the paper).")),
                advanced(io.Boolean.Input("other_model", default=False,
                                          tooltip="Use a policy that was found on another model. Its quality there "
                                                  "says nothing about this one.")),
                *window_inputs(),
                *storage_inputs(),
            ],
            outputs=[io.Model.Output("cached_model", display_name="model",
                                     tooltip="The model with FRDiff, for any sampler.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, interval, score_mixing, bias, slope, other_model, start_percent, end_percent,
                policy=None, **storage):
        choice(name_of(cls), "score_mixing", score_mixing, MIXINGS)
        kept = storage_settings(name_of(cls), **storage)
        span = window(name_of(cls), start_percent, end_percent)
        if policy is not None:
            refuse_other_model(name_of(cls), policy, model, other_model)
            settings = policy_settings(policy, kept)
        else:
            settings = frdiff_settings(MixSettings(interval, score_mixing, slope, bias, span), kept)
        return io.NodeOutput(attach(model, settings, cls.hidden.unique_id))

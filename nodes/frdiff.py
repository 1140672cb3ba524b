"""FRDiff on a MODEL: keyframes, and between them reused features, held outputs or a mix of both; or a policy."""

from dataclasses import replace
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..fastercache_core.calibration.policy import Policy
from ..fastercache_core.controllers.planned import MIXINGS, MixSettings, PolicySettings
from ..fastercache_core.features.reuse import planned_reuse
from ..fastercache_core.features.storage import StorageSettings
from ..fastercache_core.messages import policy_does_not_fit
from ..fastercache_core.settings import CacheSettings
from ..fastercache_core.signal import DifferenceSettings, OutputSettings
from .features import storage_inputs, storage_settings
from .host.fingerprint import model_fingerprint
from .host.wrappers import attach
from .inputs import advanced, fraction, model_input, model_output, window_inputs
from .kinds import CachePolicy
from .schema import WITH_ID, Node, schema, window, wrong


def frdiff_settings(mixing: MixSettings, storage: StorageSettings) -> CacheSettings:
    """FRDiff as published: outputs are held, features of keyframes are reused as they are."""
    label, reuse = f"FRDiff 1 in {mixing.every}, {mixing.mixing}", planned_reuse(storage, mixing.as_released)
    return CacheSettings(label, mixing, DifferenceSettings("hold"), OutputSettings("hold"), reuse)


def policy_settings(policy: Policy, storage: StorageSettings) -> CacheSettings:
    """What follows a policy: predictions are fitted to the run, or weighed as the policy says."""
    label, reuse = f"policy at cost {policy.cost:.2f}", planned_reuse(storage)
    return CacheSettings(label, PolicySettings(policy), DifferenceSettings(), OutputSettings(), reuse)


def checked_policy(node: Node, model: ModelPatcher, policy: Policy, other_model: bool = False) -> Policy:
    """The policy, if it was found on `model` or if another one will do. Raises ValueError where it was not."""
    own = model_fingerprint(model)
    if not (other_model or policy.matches(own)):
        raise wrong(node, policy_does_not_fit(policy.setup.model, own))
    return policy


class FasterCacheFRDiff(io.ComfyNode):
    """FRDiff: some steps are computed in full; between them early steps hold the last output, late ones take features
    from the cache, and those around the middle mix both. With a policy from FasterCache Auto-FR, every step does what
    was found best on your own model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        mixing = "What the other steps do: as in the paper, or hold outputs, or reuse features throughout."
        policy = "From FasterCache Auto-FR or a file; it replaces interval, mixing and window."
        interval = "One step in this many is computed in full (M of the paper; 2 or 3)."
        other = "Use a policy that was found on another model; its quality here is unknown."
        slope = "How fast reused features take over (tau of the paper)."
        last = "Treat the last step like any other, as the released code does. Off: it is computed."
        inputs = [
            model_input(),
            CachePolicy.Input("policy", optional=True, tooltip=policy),
            io.Int.Input("interval", default=2, min=1, max=20, tooltip=interval),
            io.Combo.Input("score_mixing", options=list(MIXINGS), default="paper", tooltip=mixing),
            fraction("bias", 0.5, "Part of the steps where held outputs and features weigh the same (paper: b)."),
            advanced(io.Float.Input("slope", default=30.0, min=0.0, max=1000.0, step=1.0, tooltip=slope)),
            advanced(io.Boolean.Input("other_model", default=False, tooltip=other)),
            *window_inputs(),
            *storage_inputs(),
            advanced(io.Boolean.Input("skip_last", default=False, optional=True, tooltip=last)),
        ]
        outputs = [model_output("The model with FRDiff, for any sampler.")]
        return schema(cls, "FasterCacheFRDiff", "FasterCache FRDiff", inputs, outputs, hidden=WITH_ID)

    @classmethod
    def execute(cls, model: ModelPatcher, policy: Policy | None = None, **inputs: Any) -> io.NodeOutput:
        mixing = inputs["score_mixing"]
        storage, span = storage_settings(cls, inputs), window(cls, inputs)
        if policy is None:
            shape = mixing, inputs["slope"], inputs["bias"], span, inputs.get("skip_last", False)
            settings = frdiff_settings(MixSettings(inputs["interval"], *shape), storage)
        else:
            settings = policy_settings(checked_policy(cls, model, policy, inputs["other_model"]), storage)
        settings = replace(settings, node="FasterCache FRDiff")
        return io.NodeOutput(attach(model, settings, cls.hidden.unique_id))

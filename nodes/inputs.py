"""Inputs and outputs that several nodes have."""

import comfy.samplers
from comfy_api.latest import io


def advanced(widget: io.WidgetInput) -> io.WidgetInput:
    """The same input, folded away under "advanced" by pages that know the word."""
    widget.extra_dict = {**(widget.extra_dict or {}), "advanced": True}
    return widget


def shown_with(widget: io.WidgetInput, methods: list[str]) -> io.WidgetInput:
    """The same input, which the page shows only with these values of the input `method`."""
    widget.extra_dict = {**(widget.extra_dict or {}), "shown_with": methods}
    return widget


def fraction(name: str, default: float, tooltip: str, high: float = 1.0) -> io.WidgetInput:
    """An advanced input from 0 to `high`."""
    return advanced(io.Float.Input(name, default=default, min=0.0, max=high, step=0.01, tooltip=tooltip))


def model_input(tooltip: str = "The model to sample faster. It is not changed itself.") -> io.Input:
    """The MODEL that a node takes."""
    return io.Model.Input("model", tooltip=tooltip)


def model_output(tooltip: str) -> io.Output:
    """The MODEL that a node gives."""
    return io.Model.Output("cached_model", display_name="model", tooltip=tooltip)


def window_inputs() -> list[io.Input]:
    """The two inputs that bound a window of sampling."""
    return [
        fraction("start_percent", 0.0, "Nothing is skipped before this part of sampling; higher is safer."),
        fraction("end_percent", 1.0, "Nothing is skipped after this part of sampling. The last step always runs."),
    ]


def prompt_inputs() -> list[io.Input]:
    """The conditionings of sampling."""
    return [
        io.Conditioning.Input("positive", tooltip="What you want to see."),
        io.Conditioning.Input("negative", tooltip="What you do not want to see."),
    ]


def cfg_input(default: float) -> io.Input:
    """The guidance scale."""
    tooltip = "Guidance scale. At 1.0 there is no negative pass to skip."
    return io.Float.Input("cfg", default=default, min=0.0, max=100.0, step=0.1, round=0.01, tooltip=tooltip)


def sampler_inputs(steps: tuple[int, int, int], cfg: float) -> list[io.Input]:
    """Seed, steps, cfg, sampler and scheduler, as a KSampler has them. steps: fewest, default, most."""
    low, default, high = steps
    seed, host = dict(max=2**64 - 1, control_after_generate=True), comfy.samplers.KSampler
    return [
        io.Int.Input("seed", default=0, min=0, **seed, tooltip="Seed of the noise."),
        io.Int.Input("steps", default=default, min=low, max=high, tooltip="Number of steps of full sampling."),
        cfg_input(cfg),
        io.Combo.Input("sampler_name", options=host.SAMPLERS, tooltip="The sampler. euler gains most."),
        io.Combo.Input("scheduler", options=host.SCHEDULERS, tooltip="How the noise levels are spaced."),
    ]


def denoise_input() -> io.Input:
    """How much noise sampling starts from."""
    tooltip = "1.0 = from pure noise; lower keeps more of the latent."
    return io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01, tooltip=tooltip)

"""One call of the host's network, with its arguments by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class ModelCall:
    """One batch of chunks on its way through the host's BaseModel.apply_model.

    executor: the rest of the host's chain of wrappers; x: [chunks * batch, ...]; t: sigmas [chunks * batch];
    control: ControlNet residuals by name, or None; options: the transformer's; rest, kwargs: whatever else came.
    """

    executor: Any
    x: torch.Tensor
    t: torch.Tensor
    c_concat: torch.Tensor | None
    c_crossattn: torch.Tensor | None
    control: dict[str, list[torch.Tensor | None]] | None
    options: dict[str, Any]
    rest: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> Any:
        """The host's BaseModel."""
        return self.executor.class_obj

    @property
    def network(self) -> torch.nn.Module:
        """The diffusion model itself, without torch.compile around it."""
        return uncompiled(self.model.diffusion_model)

    def run(self, control: Any = ..., options: Any = ...) -> torch.Tensor:
        """Run the network, with other control residuals or options where they are given."""
        control = self.control if control is ... else control
        options = self.options if options is ... else options
        run: Callable[..., torch.Tensor] = self.executor
        return run(self.x, self.t, self.c_concat, self.c_crossattn, control, options, *self.rest, **self.kwargs)


def uncompiled(module: torch.nn.Module) -> Any:
    """The module that torch.compile wrapped, or `module` itself."""
    return getattr(module, "_orig_mod", module)


@dataclass(frozen=True)
class BranchesCall:
    """All branches of one evaluation on their way through the host's calc_cond_batch.

    executor: the rest of the host's chain of wrappers; model: BaseModel; conds: a list of conditionings for each
    branch; x: the latent [batch, ...]; timestep: sigmas [batch]; options: the model's.
    """

    executor: Callable[..., list[torch.Tensor]]
    model: Any
    conds: list[Any]
    x: torch.Tensor
    timestep: torch.Tensor
    options: dict[str, Any]

    def run(self, conds: Sequence[Any], key: str | None = None, value: Any = None) -> list[torch.Tensor]:
        """Denoised latents of `conds`; `value` goes along in the transformer's options under `key`."""
        options = self.options
        if key is not None:
            options = {**options, "transformer_options": {**options["transformer_options"], key: value}}
        return self.executor(self.model, list(conds), self.x, self.timestep, options)

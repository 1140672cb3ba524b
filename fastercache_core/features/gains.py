"""Fitted gains of many features: how far each one went, of the way that was predicted for it.

The forecast is hold + g1 * (linear - hold) + g2 * (quadratic - linear), as `forecast.Fitted`. A large network has
hundreds of features of a few megabytes each, so time goes to small operations: a comparison takes four of them, on a
subsample, and all gains are fitted together when the first one is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..forecast import MEMORY, Fit, tensor_like, term_weights

# Ridge prior of the gains, which are the gains before anything was fitted; its weight is relative to the terms' own
# energy. A first gain below 1 makes every forecast lag behind, and such errors add up over a run: least squares alone
# would choose it so.
FEATURE_PRIOR, FEATURE_LEAN = (1.0, 1 / 3), 1.0
# Gains are fitted to about so many elements of a feature.
SUBSAMPLE = 2**14


class Gains:
    """Gains of every feature and picture, by keys of the caller's choice."""

    def __init__(self) -> None:
        self._products: dict[Hashable, Tensor] = {}  # normal equations, [pictures, 3, 3]
        self._fitted: dict[Hashable, Tensor] = {}  # [pictures, 2]

    def learn(
        self, key: Hashable, value: Tensor, past: Sequence[Tensor], sigmas: Sequence[float], sigma: float, axis: int
    ) -> None:
        """Compare `value`, computed at `sigma`, with its forecast from `past` (newest first, computed at `sigmas`).

        `axis` of these tensors counts the pictures. Earlier comparisons count half as much each time.
        """
        hold, *terms = term_weights(sigmas, sigma)
        rows = [[1.0, *(-w for w in hold)], *([0.0, *term] for term in terms)]
        outputs = torch.stack([picture_elements(t, axis) for t in (value, *past)])
        # [pictures, change and terms, elements]
        moved = torch.tensordot(tensor_like(rows, outputs), outputs, 1).movedim(1, 0)
        products, before = moved @ moved.mT, self._products.get(key)
        self._products[key] = products if before is None else torch.add(products, before, alpha=MEMORY)
        self._fitted.pop(key, None)

    def steps(self, key: Hashable, sigmas: Sequence[float], sigma: float, like: Tensor) -> Tensor:
        """What to add of each difference between outputs at `sigmas` (newest first) to the newest one, at `sigma`.

        Tensor [pictures or 1, outputs - 1] on the device of `like`.
        """
        if key in self._products and key not in self._fitted:
            self._fit()
        gains = self._fitted.get(key)
        if gains is None:
            gains = torch.tensor([FEATURE_PRIOR]).to(like.device)
        terms = [[-w for w in accumulate(reversed(term[1:]))][::-1] for term in term_weights(sigmas, sigma)[1:]]
        return gains[:, : len(terms)] @ tensor_like(terms, gains).reshape(len(terms), len(terms))

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        return [*self._products.values(), *self._fitted.values()]

    def forget(self, gone: Callable[[Any], bool]) -> None:
        """Drop the keys of which `gone` is true."""
        for held in (self._products, self._fitted):
            for key in [key for key in held if gone(key)]:
                del held[key]

    def _fit(self) -> None:
        """Fit the gains of all keys that were compared anew, those of equal shape together."""
        alike: dict[tuple[torch.Size, torch.device], list[Hashable]] = {}
        for key, products in self._products.items():
            if key not in self._fitted:
                alike.setdefault((products.shape, products.device), []).append(key)
        for keys in alike.values():
            p = torch.stack([self._products[key] for key in keys])
            fit = Fit(p[..., 1, 1], p[..., 1, 2], p[..., 2, 2], p[..., 0, 1], p[..., 0, 2])
            # Copies: a view would keep the memory of the others, too.
            gains: Any = torch.unbind_copy(fit.gains(FEATURE_PRIOR, FEATURE_LEAN)[..., 1:], 1)  # type: ignore[func-returns-value]
            self._fitted.update(zip(keys, gains, strict=True))


def gains_bytes(pictures: int) -> int:
    """Bytes held for one feature of so many pictures: normal equations and two gains, in float32."""
    return pictures * (3 * 3 + 2) * 4


def picture_elements(x: Tensor, axis: int) -> Tensor:
    """About SUBSAMPLE elements of `x`, spread evenly over those of each picture, in float32: [pictures, elements]."""
    return x.movedim(axis, 0).flatten(1)[:, :: x.numel() // SUBSAMPLE | 1].float()

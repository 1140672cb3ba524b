"""How far a guider's result moves with the branches it is made of: measured at every evaluation, never read from it.

A guider makes one denoised latent of its branches' and of those that other nodes add. Around one evaluation it is taken
as linear, and fitted by least squares:

    guided = cond + w * cond + sum_i s_i (branch_i - cond) + sum_j v_j (extra_j - cond).

An error of branch_i - cond counts s_i times in it, one of cond, on which the branches are built, 1 + w - sum_j v_j
times. What the fit leaves over counts as if it came from the differences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .readback import Readback

# What a weight that was not found counts as: few people guide more strongly.
LARGE = 16.0
# A weight is found where more than this part of what guidance adds is explained, or where it adds next to nothing.
EXPLAINED, NOTHING = 0.5, 0.02
# Weights that are so many times those of the last computed evaluation are a surprise.
ROSE, LITTLE = 1.5, 0.5
MOST_EXTRAS = 4


@dataclass(frozen=True)
class Weights:
    """How far the guided result moves for one unit of an error of the conditional output (`output`) and of each
    branch's difference to it, by index. found: False where they could not be measured and count as LARGE."""

    output: float = LARGE
    differences: Mapping[int, float] = field(default_factory=dict)
    found: bool = False

    def of(self, index: int) -> float:
        """That of a branch's difference."""
        return self.differences.get(index, LARGE)

    def exceed(self, other: Weights) -> bool:
        """True when one of them is much larger than in `other`."""
        pairs = [(self.output, other.output), *((self.of(i), other.of(i)) for i in self.differences)]
        return any(now > ROSE * before + LITTLE for now, before in pairs)


class Guidance:
    """The weights of a run, from evaluation to evaluation. lost: they could not be measured at least once."""

    def __init__(self, late: bool = False) -> None:
        """late: never let the host wait for the device, see `readback`."""
        self._readback = Readback(late)
        self._coming: tuple[Tensor, tuple[tuple[int, ...], bool]] | None = None
        self._now, self._computed, self.lost = Weights(), Weights(), False

    @property
    def weights(self) -> Weights:
        """Those of the last evaluation that was measured. Reads a few numbers from the device, once."""
        if self._coming is not None:
            (gram, about), self._coming = self._coming, None
            values, about = self._readback.read(gram.flatten(), about)
            if values is not None:
                self._take(values, *about)
        return self._now

    @property
    def rose(self) -> bool:
        """True when the weights are much larger than they were at the last computed evaluation."""
        return self.weights.exceed(self._computed)

    def measure(
        self, guided: Tensor, cond: Tensor, others: Mapping[int, Tensor], extras: Sequence[Tensor], computed: bool
    ) -> None:
        """One evaluation: the guider made `guided` of `cond`, `others` by index and `extras`, all [batch, ...].

        computed: the network ran for all branches.
        """
        extras = [extra for extra in extras if extra.shape == cond.shape][:MOST_EXTRAS]
        parts = [cond, *(part - cond for part in (*others.values(), *extras)), guided - cond]
        self._coming = gram(parts), (tuple(others), computed)

    def _take(self, values: Sequence[float], others: Sequence[int], computed: bool) -> None:
        self._now = solved(np.reshape(values, (round(len(values) ** 0.5), -1)), others)
        self.lost |= not self._now.found
        if computed:
            self._computed = self._now


def shares(guided: Tensor, branches: Sequence[Tensor]) -> list[float] | None:
    """The share of each of `branches` in `guided`, all [batch, ...], 1 in all; None where they do not explain it."""
    first, *others = branches
    weights, left = _fit(gram([*(other - first for other in others), guided - first]).cpu().double().numpy())
    return None if left > 1 - EXPLAINED else [1 - float(weights.sum()), *weights.tolist()]


def gram(parts: Sequence[Tensor]) -> Tensor:
    """All scalar products of `parts`, [n, n] in float32."""
    rows = torch.stack([part.flatten().float() for part in parts])
    return rows @ rows.T


def solved(products: np.ndarray, others: Sequence[int]) -> Weights:
    """Weights from the scalar products [n, n] of: cond, differences of `others`, those of extras, guided - cond."""
    if not np.isfinite(products).all():
        return Weights()
    sizes = np.sqrt(np.diag(products).clip(0.0))
    weights, left = _fit(products)
    if left > 1 - EXPLAINED and sizes[-1] > NOTHING * sizes[0]:
        return Weights()
    extras = weights[1 + len(others) :].sum()
    over = left**0.5 * sizes[-1]
    scales = [np.hypot(w, over / size) if size else LARGE for w, size in zip(weights[1:], sizes[1:], strict=False)]
    differences = {i: min(float(scale), LARGE) for i, scale in zip(others, scales, strict=False)}
    return Weights(min(abs(float(1 + weights[0] - extras)), LARGE), differences, found=True)


def _fit(products: np.ndarray) -> tuple[np.ndarray, float]:
    """Least-squares weights of all parts but the last, and the share of the last one's square that they leave over."""
    sizes = np.sqrt(np.diag(products).clip(0.0))
    scale = np.where(sizes > 0, sizes, 1.0)
    unit = products / np.outer(scale, scale)
    weights = np.linalg.lstsq(unit[:-1, :-1], unit[:-1, -1], rcond=1e-6)[0]
    left = 1.0 - float(weights @ unit[:-1, -1]) if sizes[-1] > 0 else 0.0
    return weights * scale[-1] / scale[:-1], min(max(left, 0.0), 1.0)

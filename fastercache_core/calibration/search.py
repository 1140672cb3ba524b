"""The best policy for every budget at once: exact dynamic programming over computed evaluations.

Between two computed evaluations nothing is refreshed, so the loss of skipping the ones between depends on the computed
ones before them and on nothing else. With `depth` 1 that is the last one (reuse, holding), with 2 or 3 the last two or
three (polynomials); states are told apart by those, the path-aware cost of DPCache (arXiv 2602.22654). Cost is an
integer dimension of the table, so the whole curve of least loss over cost is found, not only its hull.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import total_ordering
from typing import Any

import numpy as np

from ..actions import Action
from .losses import GAP, Choice, Keys, Losses, Reference, overall_rms, pareto
from .policy import DEPTH, Point, thinned


@total_ordering
class Worst:
    """Losses compared by their largest, then by the second largest, and so on.

    Adding one more loss to two of them keeps their order, so dynamic programming stays exact. As a float they are
    their sum.
    """

    def __init__(self, *losses: float) -> None:
        self.losses = sorted(losses, reverse=True)

    def __add__(self, other: Worst) -> Worst:
        return Worst(*self.losses, *other.losses)

    def __lt__(self, other: Worst) -> bool:
        return self.losses < other.losses

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Worst) and self.losses == other.losses

    def __float__(self) -> float:
        return float(sum(self.losses))


OBJECTIVES: dict[str, type[float] | type[Worst]] = {"sum": float, "minimax": Worst}


class Cell:
    """Least loss for every number of units, of all ways to one set of last computed evaluations."""

    def __init__(self, budget: int, worst: Any) -> None:
        self.loss = np.full(budget + 1, worst)
        self.via = np.zeros(budget + 1, dtype=int)
        self.links: list[tuple[Cell, Choice, int]] = []

    def offer(self, source: Cell, loss: Any, choice: Choice, units: int) -> None:
        """Take the way over `source`, which costs `units` and `loss` more, wherever it is better."""
        offered, here = source.loss[: len(self.loss) - units] + loss, self.loss[units:]
        better = offered < here
        here[better] = offered[better]
        self.via[units:][better] = len(self.links)
        self.links.append((source, choice, units))

    def actions(self, units: int, start: Cell) -> tuple[Action, ...]:
        """The action of every evaluation on the best way at `units`, back to the cell `start`."""
        cell, segments = self, []
        while cell is not start:
            source, choice, paid = cell.links[cell.via[units]]
            segments.append((*choice.actions, Action.COMPUTE))
            cell, units = source, units - paid
        actions = (Action.COMPUTE, *(action for segment in reversed(segments) for action in segment))
        return actions[:-1]  # without the end of the run


def search(
    count: int,
    choices: Callable[[Keys, int], list[Choice]],
    full_units: int = 1,
    gap: int = GAP,
    depth: int = 1,
    objective: str = "sum",
) -> list[Choice]:
    """The curve of least loss over cost, cheapest first, each entry with `count` actions.

    The first evaluation is computed, and of `gap` in a row at least one. choices(keys, following): the ways to skip the
    evaluations between keys[0] and `following`, `count` at the end; keys has up to `depth` ordinals. full_units: cost
    of COMPUTE. objective: what is least, "sum" of the losses, or "minimax", their largest and then the second largest
    and so on. The loss of the curve is the sum either way.
    """
    value = OBJECTIVES[objective]
    budget, worst = count * full_units, value(float("inf"))
    start = Cell(budget, worst)
    start.loss[full_units] = value()
    layers: list[dict[Keys, Cell]] = [{} for _ in range(count + 1)]
    layers[0][0,] = start
    for last, layer in enumerate(layers[:-1]):
        for keys, cell in layer.items():
            for following in range(last + 1, min(last + gap, count) + 1):
                target = layers[following].setdefault((following, *keys)[:depth], Cell(budget, worst))
                price = full_units if following < count else 0
                between = choices(keys, following) if following > last + 1 else [Choice(0.0, 0, ())]
                for choice in between:
                    target.offer(cell, value(choice.loss), choice, choice.units + price)
    return _curve(list(layers[-1].values()), start, worst)


def find_points(reference: Reference, losses: Losses, objective: str = "sum") -> list[Point]:
    """The curve of error over cost by exact search, cheapest first, without weights; objective: see `search`."""
    curve = search(losses.count, losses.choices, losses.full_units, GAP, DEPTH, objective)
    size = overall_rms(reference.final)
    return thinned([Point(c.loss**0.5 / size, losses.steps(c.actions)) for c in curve])


def _curve(cells: list[Cell], start: Cell, worst: Any) -> list[Choice]:
    best = [(units, min(cells, key=lambda cell: cell.loss[units])) for units in range(len(start.loss))]
    front = pareto((b for b in best if b[1].loss[b[0]] < worst), lambda b: b[1].loss[b[0]])
    return [Choice(float(cell.loss[units]), units, cell.actions(units, start)) for units, cell in front]

"""The best policy for every budget at once: exact dynamic programming over computed evaluations.

Between two computed evaluations nothing is refreshed, so what the ones between cost in quality
depends on the computed ones before them and on nothing else. With `depth` 1 that is the last one
(reuse, holding), with `depth` 2 or 3 the last two or three (polynomial forecasts): then states are
told apart by those, the path-aware cost of DPCache (arXiv 2602.22654). Cost is an integer
dimension of the table, so the whole curve of least loss over cost is found, not only its hull.
"""
from dataclasses import dataclass
from functools import total_ordering

import numpy as np


@dataclass(frozen=True)
class Choice:
    """One way to do some evaluations in a row: its loss, its cost in units and the action of each."""
    loss: float
    units: int
    actions: tuple


@total_ordering
class Worst:
    """Losses compared by their largest, then by the second largest, and so on.

    Adding one more loss to two of them keeps their order, so dynamic programming stays exact.
    As a float they are their sum.
    """

    def __init__(self, *losses):
        self.losses = sorted(losses, reverse=True)

    def __add__(self, other):
        return Worst(*self.losses, *other.losses)

    def __lt__(self, other):
        return self.losses < other.losses

    def __eq__(self, other):
        return self.losses == other.losses

    def __float__(self):
        return float(sum(self.losses))


class Cell:
    """Least loss for every number of units, of all ways to one set of last computed evaluations."""

    def __init__(self, budget, worst):
        self.loss = np.full(budget + 1, worst)
        self.via = np.zeros(budget + 1, dtype=int)
        self.links = []

    def offer(self, source, loss, choice, units):
        """Take the way over `source` (Cell), which costs `units` and `loss` more, wherever it is better."""
        offered, here = source.loss[:len(self.loss) - units] + loss, self.loss[units:]
        better = offered < here
        here[better] = offered[better]
        self.via[units:][better] = len(self.links)
        self.links.append((source, choice, units))

    def actions(self, units, start):
        """The action of every evaluation on the best way at `units`, back to the cell `start`."""
        cell, segments = self, []
        while cell is not start:
            source, choice, paid = cell.links[cell.via[units]]
            segments.append((*choice.actions, "FULL"))
            cell, units = source, units - paid
        return ("FULL", *(action for segment in reversed(segments) for action in segment))


def search(count, choices, full_units=1, gap=6, depth=1, objective="sum"):
    """The curve of least loss over cost: a list of Choice, cheapest first, each with `count` actions.

    The first and the last evaluation are FULL, and of `gap` in a row at least one.
    choices(keys, following) -> list of Choice for the evaluations between keys[0] and `following`,
    not empty; keys: ordinals of the last computed evaluations, newest first, up to `depth` of them.
    full_units: cost of FULL. objective: what is least, "sum" of the losses, or "minimax", their largest and
    then the second largest and so on. The loss of the curve is the sum either way.
    """
    value = {"sum": float, "minimax": Worst}[objective]
    budget, worst = count * full_units, value(float("inf"))
    start = Cell(budget, worst)
    start.loss[full_units] = value()
    layers = [{} for _ in range(count)]
    layers[0][0,] = start
    for last, layer in enumerate(layers):
        for keys, cell in layer.items():
            for following in range(last + 1, min(last + gap, count - 1) + 1):
                target = layers[following].setdefault((following, *keys)[:depth], Cell(budget, worst))
                between = choices(keys, following) if following > last + 1 else [Choice(0.0, 0, ())]
                for choice in between:
                    target.offer(cell, value(choice.loss), choice, choice.units + full_units)
    return _curve(list(layers[-1].values()), start, budget, worst)


def falling(choices):
    """Those of `choices` (cheapest first) whose loss is below that of every cheaper one."""
    kept = []
    for choice in choices:
        if not kept or choice.loss < kept[-1].loss:
            kept.append(choice)
    return kept


def _curve(cells, start, budget, worst):
    curve, best = [], worst
    for units in range(budget + 1):
        cell = min(cells, key=lambda c: c.loss[units])
        if cell.loss[units] < best:
            best = cell.loss[units]
            curve.append(Choice(float(best), units, cell.actions(units, start)))
    return curve

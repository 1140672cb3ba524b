"""A policy: the action of every evaluation, found by calibration, with the whole curve of cost and error.

It can be kept as JSON. A file may come from anybody, so reading it checks every field, with one
clear sentence for what is wrong, and runs nothing.
"""
import json
import math
from dataclasses import asdict, dataclass, fields, replace

import numpy as np

from .clock import GRID_TOLERANCE

FORMAT, VERSION = "fastercache policy", 1
ACTIONS = ("FULL", "REUSE", "MIX", "ESTIMATE", "JUMP")
MAX_BYTES = 8_000_000
MAX_EVALUATIONS = 1000
MAX_POINTS = 1000
MAX_WEIGHTS = 8
MAX_TEXT = 500
# A forecast without weights of its own asks for this many computed values.
KNOWN_VALUES = 3


class PolicyError(ValueError):
    """A policy that cannot be used, and why, in one sentence."""


@dataclass(frozen=True)
class Step:
    """What one evaluation does.

    action: one of ACTIONS. cost: what it computes over what FULL computes. mix: lambda of MIX.
    cond, difference: weights of the last computed values, newest first, that forecast the conditional
    output and uncond - cond; empty: the forecast that is measured during the run.
    """
    action: str
    cost: float = 0.0
    mix: float = 1.0
    cond: tuple = ()
    difference: tuple = ()


FULL = Step("FULL", 1.0)


@dataclass(frozen=True)
class Point:
    """One point of the curve: a Step per evaluation, and the foreseen `error` of the final latent,
    root mean square, relative to the latent's own."""
    error: float
    steps: tuple

    @property
    def cost(self):
        """Network rows over those of full sampling."""
        return sum(step.cost for step in self.steps) / len(self.steps)

    def actions(self):
        """One letter an evaluation: F, R, M, E or J."""
        return "".join(step.action[0] for step in self.steps)


@dataclass(frozen=True)
class Setup:
    """What a policy was found for. model: a fingerprint; resolution: a class of sizes, as the caller names it."""
    model: str
    sampler: str
    scheduler: str
    steps: int
    cfg: float
    shift: float | None = None
    resolution: str = ""

    def differs(self, other):
        """Names of the fields in which `other` (Setup) is different, steps aside: see Policy.for_sigmas."""
        return [f.name for f in fields(self)
                if f.name != "steps" and getattr(self, f.name) != getattr(other, f.name)]


@dataclass(frozen=True)
class Policy:
    """setup: what it was found for. sigmas: one an evaluation. points: the curve, cheapest first;
    chosen: which of them is meant."""
    setup: Setup
    sigmas: tuple
    points: tuple
    chosen: int = 0

    @property
    def steps(self):
        """The Step of every evaluation."""
        return self.points[self.chosen].steps

    @property
    def cost(self):
        """Network rows over those of full sampling."""
        return self.points[self.chosen].cost

    @property
    def error(self):
        """Foreseen error of the final latent, relative."""
        return self.points[self.chosen].error

    def matches(self, fingerprint):
        """True when the policy was found on the model with this fingerprint."""
        return self.setup.model == fingerprint

    def at(self, budget):
        """The same policy at the point of least error that costs at most `budget`, else at the cheapest."""
        allowed = [i for i, point in enumerate(self.points) if point.cost <= budget + 1e-9]
        return replace(self, chosen=min(allowed, key=lambda i: self.points[i].error) if allowed else 0)

    def without_weights(self):
        """The same actions, forecast as measured during the run."""
        return replace(self, points=tuple(replace(p, steps=_unweighted(p.steps)) for p in self.points))

    def for_sigmas(self, sigmas):
        """The policy for other evaluations, at about the same cost.

        The density of computed evaluations over log sigma is kept, the first and the last one are
        computed, the others do what the nearest one did. Weights belong to the grid they were fitted
        on and are dropped. sigmas: floats, one an evaluation. Raises PolicyError for none or too many.
        """
        _ask(0 < len(sigmas) <= MAX_EVALUATIONS and all(s > 0 for s in sigmas),
             f"A policy can be fitted to 1 to {MAX_EVALUATIONS} evaluations at sigmas above 0.")
        if len(sigmas) == len(self.sigmas) and np.allclose(sigmas, self.sigmas, rtol=GRID_TOLERANCE):
            return self
        points = tuple(sorted((_resample(p, self.sigmas, sigmas) for p in self.points), key=lambda p: p.cost))
        chosen = min(range(len(points)), key=lambda i: abs(points[i].cost - self.cost))
        return Policy(replace(self.setup, steps=len(sigmas)), tuple(sigmas), points, chosen)


def dumps(policy):
    """The policy as JSON text."""
    return json.dumps({
        "format": FORMAT, "version": VERSION, "setup": asdict(policy.setup), "sigmas": policy.sigmas,
        "chosen": policy.chosen,
        "points": [{"error": p.error, "steps": [_plain(step) for step in p.steps]} for p in policy.points],
    })


def loads(text):
    """The policy of a JSON text (str or bytes). Raises PolicyError saying what is wrong with it."""
    _ask(len(text) <= MAX_BYTES, f"The policy has {len(text)} bytes; at most {MAX_BYTES} are read.")
    try:
        data = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise PolicyError(f"The policy is not readable JSON: {str(error)[:100]}.") from None
    _ask(isinstance(data, dict) and data.get("format") == FORMAT, "This is not a policy of FasterCache.")
    version = _whole(data, "version", "the policy", 1, 10 ** 6)
    _ask(version <= VERSION, f"The policy has version {version}, this pack reads up to {VERSION}: update the pack.")
    _only(data, {"format", "version", "setup", "sigmas", "chosen", "points"}, "the policy")
    sigmas = _numbers(data, "sigmas", "the policy", 1, MAX_EVALUATIONS, 1e-9, 1e6)
    points = tuple(_point(p, len(sigmas), f"point {i}")
                   for i, p in enumerate(_list(data, "points", "the policy", 1, MAX_POINTS)))
    return Policy(_setup(data.get("setup")), sigmas, points, _whole(data, "chosen", "the policy", 0, len(points) - 1))


def _resample(point, old, new):
    full = [i for i, step in enumerate(point.steps) if step.action == "FULL"]
    rest = [i for i in range(len(old)) if i not in full]
    computed = _spread([old[i] for i in full], len(old), new)
    if any(step.action == "JUMP" for step in point.steps):
        computed |= set(range(min(KNOWN_VALUES, len(new))))
    steps = []
    for i, sigma in enumerate(new):
        if i in computed or not rest:
            steps.append(FULL)
        else:
            nearest = min(rest, key=lambda r: abs(math.log(old[r] / sigma)))
            steps.append(point.steps[nearest])
    return Point(point.error, _unweighted(steps))


def _unweighted(steps):
    return tuple(replace(step, cond=(), difference=()) for step in steps)


def _spread(keys, count, new):
    """Ordinals in `new` to compute: as the sigmas `keys` of `count` evaluations lie, in proportion."""
    wanted = min(max(round(len(keys) * len(new) / count), 2), len(new))
    places = np.interp(np.linspace(0, len(keys) - 1, wanted), range(len(keys)), np.log(keys))
    chosen = [0]
    for k, place in enumerate(places[1:-1], start=1):
        free = range(chosen[-1] + 1, len(new) - wanted + k + 1)
        chosen.append(min(free, key=lambda i: abs(math.log(new[i]) - place)))
    return {*chosen, len(new) - 1}


def _plain(step):
    default = Step(step.action)
    return {f.name: getattr(step, f.name) for f in fields(step)
            if f.name == "action" or getattr(step, f.name) != getattr(default, f.name)}


def _setup(data):
    where = "setup"
    _ask(isinstance(data, dict), "In the policy, `setup` must be an object.")
    _only(data, {f.name for f in fields(Setup)}, where)
    shift = None if data.get("shift") is None else _number(data, "shift", where, 0.0, 1e6)
    return Setup(_text(data, "model", where), _text(data, "sampler", where), _text(data, "scheduler", where),
                 _whole(data, "steps", where, 1, 10 ** 6), _number(data, "cfg", where, -1e6, 1e6), shift,
                 _text(data, "resolution", where))


def _point(data, evaluations, where):
    _ask(isinstance(data, dict), f"In the policy, {where} must be an object.")
    _only(data, {"error", "steps"}, where)
    steps = [_step(step, f"evaluation {i} of {where}")
             for i, step in enumerate(_list(data, "steps", where, evaluations, evaluations))]
    _ask(steps[0].action == "FULL", f"In the policy, {where} does not compute its first evaluation.")
    known = 0
    for i, step in enumerate(steps):
        _ask(max(len(step.cond), len(step.difference)) <= known,
             f"In the policy, evaluation {i} of {where} weighs more values than are known by then.")
        known += step.action == "FULL"
    return Point(_number(data, "error", where, 0.0, 1e6), tuple(steps))


def _step(data, where):
    _ask(isinstance(data, dict), f"In the policy, {where} must be an object.")
    _only(data, {f.name for f in fields(Step)}, where)
    action = _text(data, "action", where)
    _ask(action in ACTIONS, f"In the policy, the action of {where} is unknown; it must be one of {', '.join(ACTIONS)}.")
    data = {"cost": 0.0, "mix": 1.0, "cond": [], "difference": [], **data}
    cond, difference = (_numbers(data, name, where, 0, MAX_WEIGHTS, -1e3, 1e3) for name in ("cond", "difference"))
    return Step(action, _number(data, "cost", where, 0.0, 1.0), _number(data, "mix", where, 0.0, 1.0), cond, difference)


def _ask(condition, sentence):
    if not condition:
        raise PolicyError(sentence)


def _no_constant(name):
    raise ValueError(f"it contains {name}")


def _only(data, known, where):
    unknown = sorted(set(data) - known)
    _ask(not unknown, f"In the policy, {where} has a field that is not known: {str(unknown[:1])[:60]}.")


def _text(data, name, where):
    value = data.get(name)
    _ask(isinstance(value, str) and len(value) <= MAX_TEXT,
         f"In the policy, `{name}` of {where} must be a text of at most {MAX_TEXT} characters.")
    return value


def _number(data, name, where, low, high):
    value = data.get(name)
    _ask(type(value) in (int, float) and low <= value <= high,
         f"In the policy, `{name}` of {where} must be a number from {low} to {high}.")
    return float(value)


def _whole(data, name, where, low, high):
    value = data.get(name)
    _ask(type(value) is int and low <= value <= high,
         f"In the policy, `{name}` of {where} must be a whole number from {low} to {high}.")
    return value


def _list(data, name, where, least, most):
    value = data.get(name)
    count = least if least == most else f"{least} to {most}"
    _ask(isinstance(value, list) and least <= len(value) <= most,
         f"In the policy, `{name}` of {where} must be a list of {count} entries.")
    return value


def _numbers(data, name, where, least, most, low, high):
    values = _list(data, name, where, least, most)
    return tuple(_number({name: value}, name, where, low, high) for value in values)

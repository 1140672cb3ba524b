"""A policy as JSON. A file may come from anybody: every field is checked, and nothing is run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields
from typing import Any, TypeVar

from ..actions import Action, Step
from ..forecast import BANDS, KEPT
from .policy import MAX_EVALUATIONS, MAX_POINTS, MAX_STEPS, Point, Policy, PolicyError, Setup

FORMAT, VERSION = "fastercache policy", 3
MAX_BYTES = 8_000_000
MAX_WEIGHTS = KEPT * BANDS
MAX_TEXT = 500
ACTIONS = {action.value: action for action in Action}
SETUP_FIELDS = {f.name for f in fields(Setup)}
DEFAULTS: dict[str, Any] = {"cost": 0.0, "mix": 1.0, "cond": (), "difference": ()}
STEP_FIELDS = {"action", *DEFAULTS}

T = TypeVar("T")


def dumps(policy: Policy) -> str:
    """The policy as JSON text."""
    points = [{"error": p.error, "steps": [_plain(step) for step in p.steps]} for p in policy.points]
    head = {"format": FORMAT, "version": VERSION, "setup": asdict(policy.setup), "sigmas": policy.sigmas}
    return json.dumps(head | {"chosen": policy.chosen, "points": points})


def loads(text: str | bytes) -> Policy:
    """The policy of a JSON text. Raises PolicyError, one sentence on what is wrong with it."""
    if len(text) > MAX_BYTES:
        raise PolicyError(f"The policy has {len(text)} bytes; at most {MAX_BYTES} are read.")
    try:
        data = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise PolicyError(f"The policy is not readable JSON: {str(error)[:100]}.") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise PolicyError("This is not a policy of FasterCache.")
    try:
        return _policy(data)
    except PolicyError as error:
        raise PolicyError(f"The policy cannot be used: {error}.") from None


def _plain(step: Step) -> dict[str, Any]:
    values = {name: getattr(step, name) for name, default in DEFAULTS.items() if getattr(step, name) != default}
    return {"action": step.action.value, **values}


def _policy(data: dict[str, Any]) -> Policy:
    version = _whole(data, "version", 1, 10**6)
    if version != VERSION:
        advice = "update the pack" if version > VERSION else "find it again with FasterCache Auto-FR"
        raise PolicyError(f"it has version {version}, this pack reads version {VERSION}: {advice}")
    _object(data, {"format", "version", "setup", "sigmas", "chosen", "points"})
    sigmas = _floats(data, "sigmas", 1, MAX_EVALUATIONS, 1e-9, 1e6)
    entries = _list(data, "points", 1, MAX_POINTS)
    if len(sigmas) * len(entries) > MAX_STEPS:
        raise PolicyError(f"it has {len(entries)} points of {len(sigmas)} steps; at most {MAX_STEPS} steps are read")
    chosen = _whole(data, "chosen", 0, len(entries) - 1)
    points = _each("point", lambda p: _point(p, len(sigmas)), entries)
    return Policy(_setup(data.get("setup")), sigmas, points, chosen)


def _setup(data: Any) -> Setup:
    _object(data, SETUP_FIELDS, "`setup`")
    model, sampler, scheduler, resolution = (_text(data, n) for n in ("model", "sampler", "scheduler", "resolution"))
    shift = None if data.get("shift") is None else _number(data, "shift", 0.0, 1e6)
    cfg = _number(data, "cfg", -1e6, 1e6)
    return Setup(model, sampler, scheduler, _whole(data, "steps", 1, 10**6), cfg, shift, resolution)


def _point(data: Any, evaluations: int) -> Point:
    _object(data, {"error", "steps"})
    steps = _each("evaluation", _step, _list(data, "steps", evaluations, evaluations))
    if steps[0].action is not Action.COMPUTE:
        raise PolicyError("its first evaluation is not computed")
    computed = 0
    for i, step in enumerate(steps):
        computed += step.action is Action.COMPUTE
        if max(len(step.cond), len(step.difference)) > computed * BANDS:
            raise PolicyError(f"evaluation {i} weighs more values than are computed by then")
        if len(step.cond) % BANDS or len(step.difference) % BANDS:
            raise PolicyError(f"evaluation {i} does not weigh {BANDS} bands of every value")
    return Point(_number(data, "error", 0.0, 1e6), steps)


def _step(data: Any) -> Step:
    _object(data, STEP_FIELDS)
    name = data.get("action")
    if not isinstance(name, str) or name not in ACTIONS:
        raise PolicyError(f"`action` must be one of {', '.join(ACTIONS)}")
    data = DEFAULTS | data
    cond, difference = (_floats(data, n, 0, MAX_WEIGHTS, -1e3, 1e3) for n in ("cond", "difference"))
    return Step(ACTIONS[name], _number(data, "cost", 0.0, 1.0), _number(data, "mix", 0.0, 1.0), cond, difference)


def _each(noun: str, parse: Callable[[Any], T], entries: Iterable[Any]) -> tuple[T, ...]:
    """`parse` of every entry; a PolicyError says which one it was."""
    parsed: list[T] = []
    try:
        for entry in entries:
            parsed.append(parse(entry))
    except PolicyError as error:
        raise PolicyError(f"{noun} {len(parsed)}: {error}") from None
    return tuple(parsed)


def _no_constant(name: str) -> None:
    raise ValueError(f"it contains {name}")


def _object(data: Any, names: set[str], noun: str = "it") -> None:
    if not isinstance(data, dict):
        raise PolicyError(f"{noun} must be an object")
    if not data.keys() <= names:
        raise PolicyError(f"a field is not known: {str(sorted(data.keys() - names)[:1])[:60]}")


def _text(data: dict[str, Any], name: str) -> str:
    value = data.get(name)
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise PolicyError(f"`{name}` must be a text of at most {MAX_TEXT} characters")
    return value


def _number(data: dict[str, Any], name: str, low: float, high: float) -> float:
    value: Any = data.get(name)
    if type(value) not in (int, float) or not low <= value <= high:
        raise PolicyError(f"`{name}` must be a number from {low} to {high}")
    return float(value)


def _whole(data: dict[str, Any], name: str, low: int, high: int) -> int:
    value = data.get(name)
    if type(value) is not int or not low <= value <= high:
        raise PolicyError(f"`{name}` must be a whole number from {low} to {high}")
    return value


def _list(data: dict[str, Any], name: str, least: int, most: int) -> list[Any]:
    value = data.get(name)
    if not isinstance(value, list | tuple) or not least <= len(value) <= most:
        count = least if least == most else f"{least} to {most}"
        raise PolicyError(f"`{name}` must be a list of {count} entries")
    return list(value)


def _floats(data: dict[str, Any], name: str, least: int, most: int, low: float, high: float) -> tuple[float, ...]:
    return tuple(_number({name: value}, name, low, high) for value in _list(data, name, least, most))

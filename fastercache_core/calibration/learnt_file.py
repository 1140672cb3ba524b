"""What pictures of one model showed about its errors, as JSON. A file may come from anybody: every field is checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FORMAT, VERSION = "fastercache learnt", 1
MAX_BYTES, MAX_KINDS, MAX_TEXT = 1_000_000, 1000, 500
KEPT = 64  # of the newest pictures of one kind
LARGEST = 300.0  # dB, of a constant
CLASSES = ((12, "up to 12"), (24, "13 to 24"))  # most steps, and their name


class LearntError(ValueError):
    """Why a file cannot be used, as the end of a sentence."""


@dataclass(frozen=True)
class Learnt:
    """model: its fingerprint; constants: of `Law`, in dB, one for each picture, oldest first, by `kind`."""

    model: str
    constants: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def of(self, kind: str) -> tuple[float, ...]:
        """The constants of one kind of runs."""
        return self.constants.get(kind, ())

    def adding(self, kind: str, constants: list[float]) -> Learnt:
        """The same with more pictures of one kind."""
        newest = (*self.of(kind), *(round(value, 2) for value in constants))[-KEPT:]
        return Learnt(self.model, {**self.constants, kind: newest})


def kind(sampler: str, steps: int) -> str:
    """Name of the runs that teach something about each other: by sampler (name of its function) and class of steps."""
    name = next((name for most, name in CLASSES if steps <= most), "25 and more")
    return f"{sampler.removeprefix('sample_')}, {name} steps"


def dumps(learnt: Learnt) -> str:
    """As JSON text, a line for each kind."""
    head = {"format": FORMAT, "version": VERSION, "model": learnt.model}
    lines = [f'  "{name}": {json.dumps(value)}' for name, value in head.items()]
    kinds = [f"    {json.dumps(name)}: {json.dumps(values)}" for name, values in learnt.constants.items()]
    return "{\n" + ",\n".join([*lines, '  "constants": {\n' + ",\n".join(kinds) + "\n  }"]) + "\n}\n"


def loads(text: str | bytes, model: str) -> Learnt:
    """What a JSON text says of `model`. Raises LearntError."""
    if len(text) > MAX_BYTES:
        raise LearntError(f"it has more than {MAX_BYTES} bytes")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        raise LearntError("it is not readable JSON") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise LearntError("FasterCache did not write it")
    if data.get("version") != VERSION:
        raise LearntError(f"it has version {str(data.get('version'))[:20]}, this pack reads version {VERSION}")
    if data.get("model") != model:
        raise LearntError(f"it is about another model, {str(data.get('model'))[:MAX_TEXT]}")
    return Learnt(model, _constants(data.get("constants")))


def _constants(data: Any) -> dict[str, tuple[float, ...]]:
    if not isinstance(data, dict) or len(data) > MAX_KINDS:
        raise LearntError(f"`constants` must be an object of at most {MAX_KINDS} lists")
    for name, values in data.items():
        right = isinstance(values, list) and len(values) <= KEPT and all(map(_is_constant, values))
        if not right or len(name) > MAX_TEXT:
            raise LearntError(f"{name[:MAX_TEXT]!r} must be at most {KEPT} numbers from -{LARGEST:g} to {LARGEST:g}")
    return {name: tuple(map(float, values)) for name, values in data.items()}


def _is_constant(value: Any) -> bool:
    return type(value) in (int, float) and -LARGEST <= value <= LARGEST

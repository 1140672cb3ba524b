"""What one sampling run did: as JSON, as one line for the log, as text for a person."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, Protocol

from torch import Tensor

from .actions import Action

VERSION = 2


class Holder(Protocol):
    """What holds tensors during a run."""

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""


@dataclass
class EvaluationRecord:
    """One evaluation: `actions` by branch name; `rows` that entered the network, `probe_rows` of them to probe
    features, and `rows_full` of full sampling."""

    ordinal: int
    sigma: float
    actions: dict[str, str]
    rows: int = 0
    rows_full: int = 0
    seconds: float = 0.0
    probe_rows: int = 0


@dataclass
class RunReport:
    """Everything that is told about a run. `run` describes it; `notes` say why something was not skipped, see
    `messages`; `cache_bytes`: the peak by device."""

    run: dict[str, Any] = field(default_factory=dict)
    evaluations: list[EvaluationRecord] = field(default_factory=list)
    seconds: float = 0.0
    cache_bytes: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def note(self, sentence: str) -> None:
        """Add a sentence, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def add(self, other: RunReport) -> None:
        """Go on with the report of a run that sampled the next steps of the same picture."""
        for record in other.evaluations:
            self.evaluations.append(replace(record, ordinal=len(self.evaluations)))
        self.seconds += other.seconds
        for device, size in other.cache_bytes.items():
            self.cache_bytes[device] = max(self.cache_bytes.get(device, 0), size)
        for sentence in other.notes:
            self.note(sentence)
        self.run["runs"] = self.run.get("runs", 1) + 1
        self.run["steps"] += other.run["steps"]
        self.run["last"] = other.run["sigmas"]

    def note_memory(self, holders: Iterable[Holder]) -> None:
        """Count the bytes that `holders` hold now, per device; the peak is kept."""
        held: Counter[str] = Counter()
        for tensor in (t for holder in holders for t in holder.tensors()):
            held[str(tensor.device)] += tensor.numel() * tensor.element_size()
        for device, size in held.items():
            self.cache_bytes[device] = max(self.cache_bytes.get(device, 0), size)

    def totals(self) -> dict[str, Any]:
        """Evaluations by action, rows run (and those of probes), rows of the full run, seconds, peak cache bytes."""
        rows, probe_rows, rows_full = (
            sum(getattr(record, name) for record in self.evaluations) for name in ("rows", "probe_rows", "rows_full")
        )
        return {
            "evaluations": dict(Counter(action_of(record) for record in self.evaluations)),
            "rows": rows,
            "probe_rows": probe_rows,
            "rows_full": rows_full,
            "cost": rows / rows_full if rows_full else 1.0,
            "seconds": self.seconds,
            "peak_cache_bytes": self.cache_bytes,
        }

    def as_dict(self) -> dict[str, Any]:
        """The report as plain JSON data, version field first."""
        evaluations = [vars(record) for record in self.evaluations]
        head = {"version": VERSION, "run": self.run, "evaluations": evaluations}
        return {**head, "totals": self.totals(), "notes": self.notes}


def action_of(record: EvaluationRecord) -> str:
    """The one word for an evaluation: the action of the branch that skipped most."""
    actions = {Action(action) for action in record.actions.values()}
    if {Action.ESTIMATE, Action.REUSE} <= actions:
        return f"{Action.ESTIMATE.value}+{Action.REUSE.value}"
    return max(actions, key=list(Action).index, default=Action.COMPUTE).value


def short_line(report: Mapping[str, Any]) -> str:
    """What was skipped, short enough to stand on a node; from a report's JSON data."""
    totals = report["totals"]
    evaluations: dict[str, int] = totals["evaluations"]
    counts = ", ".join(f"{n} {action}" for action, n in sorted(evaluations.items()))
    reused = sum(n for action, n in evaluations.items() if any(a.value in action for a in Action if a.reuses))
    partly = f", in part at {reused} of {sum(evaluations.values())} evaluations" if reused else ""
    return f"{totals['cost']:.0%} of the network rows run{partly} ({counts or 'no evaluation'})"


def summary_line(report: Mapping[str, Any]) -> str:
    """One line for the log, from a report's JSON data."""
    totals = report["totals"]
    megabytes = sum(totals["peak_cache_bytes"].values()) / 1e6
    rows = f"{totals['rows']} of {totals['rows_full']} rows, {totals['seconds']:.2f} s, cache {megabytes:.1f} MB"
    return "; ".join([f"FasterCache [{report['run'].get('settings')}]: {short_line(report)}, {rows}", *report["notes"]])


def full_text(report: Mapping[str, Any]) -> str:
    """The report as text for a person: totals, the run, notes, then one line an evaluation."""
    run = report["run"]
    head = [f"{key}: {run[key]}" for key in ("model", "sampler", "steps", "runs", "cfg") if key in run]
    head += [f"features: {features_text(run['features'])}"] if run.get("features", {}).get("sites") else []
    head += closeness(run)
    notes = [f"note: {note}" for note in report["notes"]]
    lines = [f"{r['ordinal']:4d}  sigma {r['sigma']:8.4f}  {_actions(r)}" for r in report["evaluations"]]
    return "\n".join([summary_line({**report, "notes": []}), *head, *notes, *lines])


def closeness(run: Mapping[str, Any]) -> list[str]:
    """Lines on how close a run is to full sampling: as its errors let expect, and as measured where that was done."""
    lines = []
    if "expected" in run:
        typical, low = run["expected"]
        lines.append(f"expected: about {typical:.0f} dB PSNR to full sampling, in nine of ten pictures above {low:.0f}")
    if run.get("psnr"):
        lines.append(f"measured: {fmean(run['psnr']):.1f} dB PSNR to full sampling, of the latent")
    return lines


def features_text(plan: Mapping[str, Any]) -> str:
    """Which features have room and where, from the `features` of a report's run."""
    where = "; ".join(
        f"{kind}: " + ", ".join(f"{blocks} {numbers}" for blocks, numbers in lists.items())
        for kind, lists in plan["blocks"].items()
    )
    memory = f"{plan['bytes'] / 1e6:.1f} MB of {plan['budget'] / 1e6:.1f} MB on {plan['device']}, {plan['dtype']}"
    return f"{plan['sites']} of {plan['of']} sites ({where}): {memory}"


def _actions(record: Mapping[str, Any]) -> str:
    return ", ".join(f"{branch} {action}" for branch, action in record["actions"].items())

"""What one sampling run did: as JSON, as one line for the log, as text for a person."""
from collections import Counter
from dataclasses import dataclass, field

VERSION = 1


@dataclass
class EvaluationRecord:
    """One evaluation: `actions` by branch name, `rows` run and `rows_full` of full sampling."""
    ordinal: int
    sigma: float
    actions: dict
    rows: int = 0
    rows_full: int = 0
    seconds: float = 0.0


@dataclass
class RunReport:
    """Everything told about a run. `run` describes it, `notes` give every refusal's reason."""
    run: dict = field(default_factory=dict)
    evaluations: list = field(default_factory=list)
    seconds: float = 0.0
    cache_bytes: dict = field(default_factory=dict)
    notes: list = field(default_factory=list)

    def note(self, reason):
        """Add a refusal's reason, once."""
        if reason not in self.notes:
            self.notes.append(reason)

    def note_memory(self, holders):
        """Count the bytes that `holders` (objects with `tensors()`) hold now, per device; keep the peak."""
        held = Counter()
        for tensor in (t for holder in holders for t in holder.tensors()):
            held[str(tensor.device)] += tensor.numel() * tensor.element_size()
        for device, size in held.items():
            self.cache_bytes[device] = max(self.cache_bytes.get(device, 0), size)

    def totals(self):
        """Evaluations by action, rows run and rows of the full run, seconds, peak cache bytes."""
        counts = Counter(action_of(record) for record in self.evaluations)
        rows = sum(record.rows for record in self.evaluations)
        rows_full = sum(record.rows_full for record in self.evaluations)
        return {"evaluations": dict(counts), "rows": rows, "rows_full": rows_full,
                "cost": rows / rows_full if rows_full else 1.0,
                "seconds": self.seconds, "peak_cache_bytes": self.cache_bytes}

    def as_dict(self):
        """The report as plain JSON data, version field first."""
        return {"version": VERSION, "run": self.run,
                "evaluations": [vars(record) for record in self.evaluations],
                "totals": self.totals(), "notes": self.notes}


def action_of(record):
    """The one word for an evaluation: the action of the branch that skipped most."""
    actions = set(record.actions.values())
    for action in ("JUMP", "ESTIMATE", "MIX", "REUSE"):
        if action in actions:
            return "ESTIMATE+REUSE" if {"ESTIMATE", "REUSE"} <= actions else action
    return "FULL"


def short_line(report):
    """What was skipped, short enough to stand on a node; from a report's JSON data."""
    totals = report["totals"]
    counts = ", ".join(f"{n} {action}" for action, n in sorted(totals["evaluations"].items()))
    reused = sum(n for action, n in totals["evaluations"].items() if "REUSE" in action or action == "MIX")
    partly = f", in part at {reused} of {sum(totals['evaluations'].values())} evaluations" if reused else ""
    return f"{totals['cost']:.0%} of the network rows run{partly} ({counts or 'no evaluation'})"


def summary_line(report):
    """One line for the log, from a report's JSON data."""
    totals = report["totals"]
    megabytes = sum(totals["peak_cache_bytes"].values()) / 1e6
    line = (f"FasterCache [{report['run'].get('settings')}]: {short_line(report)}, {totals['rows']} of "
            f"{totals['rows_full']} rows, {totals['seconds']:.2f} s, cache {megabytes:.1f} MB")
    return "; ".join([line, *report["notes"]])


def full_text(report):
    """The report as text for a person: totals, the run, notes, then one line an evaluation."""
    run = report["run"]
    head = [f"{key}: {run[key]}" for key in ("model", "sampler", "steps", "cfg") if key in run]
    head += [f"features: {features_text(run['features'])}"] if run.get("features", {}).get("sites") else []
    notes = [f"note: {note}" for note in report["notes"]]
    lines = [f"{r['ordinal']:4d}  sigma {r['sigma']:8.4f}  {_actions(r)}" for r in report["evaluations"]]
    return "\n".join([summary_line({**report, "notes": []}), *head, *notes, *lines])


def features_text(plan):
    """Which features have room and where, from the `features` of a report's run."""
    where = "; ".join(f"{kind}: " + ", ".join(f"{blocks} {numbers}" for blocks, numbers in lists.items())
                      for kind, lists in plan["blocks"].items())
    return (f"{plan['sites']} of {plan['of']} sites ({where}): {plan['bytes'] / 1e6:.1f} MB of "
            f"{plan['budget'] / 1e6:.1f} MB on {plan['device']}, {plan['dtype']}")


def _actions(record):
    return ", ".join(f"{branch} {action}" for branch, action in record["actions"].items())

"""What a run did, and how far latents are apart."""

from typing import Any

from fastercache_pack.nodes.host.wrappers import last_report
from torch import Tensor


def relative(a: Tensor, b: Tensor) -> float:
    """Distance of `a` to `b`, relative to the norm of `b`."""
    return ((a - b).norm() / b.norm()).item()


def totals(model: Any) -> dict[str, Any]:
    """The totals of a MODEL's last run."""
    return last_report(model)["totals"]


def evaluations(model: Any) -> dict[str, int]:
    """How many evaluations of a MODEL's last run there were of each action."""
    return totals(model)["evaluations"]


def actions(model: Any, branch: str = "cond") -> list[str]:
    """What each evaluation of a MODEL's last run did for a branch."""
    return [record["actions"][branch] for record in last_report(model)["evaluations"]]


def estimated(model: Any) -> list[bool]:
    """For every evaluation of a MODEL's last run: was a branch estimated?"""
    return ["estimated" in record["actions"].values() for record in last_report(model)["evaluations"]]


def estimates(model: Any) -> int:
    """At how many evaluations of a MODEL's last run a branch was estimated."""
    return sum(estimated(model))


def notes(model: Any) -> list[str]:
    """The notes of a MODEL's last run."""
    return last_report(model)["notes"]

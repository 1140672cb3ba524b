"""Where a run's report goes: to whoever has the MODEL, to the log and to the page.

Nodes that sample one or two steps at a time make many runs of one picture: those are told together.
"""

from __future__ import annotations

import logging
from typing import Any

from ...fastercache_core.clock import GRID_TOLERANCE
from ...fastercache_core.messages import NO_STEPS
from ...fastercache_core.report import RunReport, summary_line
from .announce import announce

LOGGER = logging.getLogger("fastercache")
if LOGGER.isEnabledFor(logging.INFO):
    # Some nodes silence the host's own logger while they sample.
    LOGGER.setLevel(logging.INFO)


class ReportBox:
    """Holds the last run's report, plain JSON data, for whoever has the MODEL; before: that of the node before."""

    def __init__(self, node_id: str | None = None, before: ReportBox | None = None) -> None:
        self.node_id, self.before = node_id, before
        self.report: dict[str, Any] | None = None
        self._parts: RunReport | None = None  # of a picture that is sampled a step at a time
        self._told = True

    def deliver(self, report: RunReport) -> None:
        """Keep the report of a run that has ended, and tell it; one without evaluations has nothing to tell."""
        if not report.evaluations:
            return
        follows = self._parts is not None and is_part(report) and continues(self._parts, report)
        if not follows:
            self._tell()
            self._parts, self._told = report, False
        elif self._parts:
            self._parts.add(report)
        if self._parts and not (is_part(report) and report.run["sigmas"][-1] > 0):
            self._tell()
        self._keep()

    def _keep(self) -> None:
        assert self._parts is not None
        report = self._parts.as_dict()
        box: ReportBox | None = self
        while box is not None:
            box.report = report
            announce(box.node_id, report)
            box = box.before

    def _tell(self) -> None:
        """One line in the log, once."""
        if self._parts is not None and not self._told:
            LOGGER.info(summary_line(self._parts.as_dict()))
            self._told = True


def is_part(report: RunReport) -> bool:
    """True for a run of one or two steps."""
    return len(report.run["sigmas"]) - 1 <= NO_STEPS


def continues(before: RunReport, report: RunReport) -> bool:
    """True where a run goes on where the last part ended, or once more over the same steps."""
    first, *_, last = before.run.get("last", before.run["sigmas"])
    if last == 0 and "last" not in before.run:
        return False  # a picture in a step or two
    start = report.run["sigmas"][0]
    return any(abs(start - sigma) <= GRID_TOLERANCE * start for sigma in (first, last) if start > 0)

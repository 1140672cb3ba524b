"""Tells the web page what a run skipped, so that it stands on the node itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server import PromptServer

from ...fastercache_core.report import short_line

EVENT = "fastercache.report"


def announce(node_id: str | None, report: Mapping[str, Any]) -> None:
    """Send a run's summary and what it is calibrated by for node `node_id`; without a page or a node, do nothing."""
    server = getattr(PromptServer, "instance", None)
    if server is not None and node_id is not None:
        text = "\n".join([short_line(report), *filter(None, [report["run"].get("calibration")])])
        server.send_sync(EVENT, {"node": node_id, "text": text}, server.client_id)

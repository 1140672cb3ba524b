"""FasterCacheReport: what happened in the last run, as a chart, a text and JSON."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui

from ..fastercache_core.actions import Action
from ..fastercache_core.report import full_text, short_line
from .drawing import GRID, PAPER, Canvas
from .host.wrappers import last_report
from .schema import schema, wrong

COLOURS = {
    Action.COMPUTE.value: "#d9534f",
    Action.REUSE.value: "#f0ad4e",
    Action.MIX.value: "#f7e49a",
    Action.ESTIMATE.value: "#5bc0de",
    Action.PREDICT.value: "#5cb85c",
}
WIDTH, MARGIN, ROW = 960, 90, 34

Record = Mapping[str, Any]  # of one evaluation, as in a report's JSON data


class FasterCacheReport(io.ComfyNode):
    """Shows what was skipped in the last run of a model with FasterCache: a chart of every evaluation, a text with the
    reason for everything that was not skipped, and JSON."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [
            io.Model.Input("model", tooltip="The model that came out of a FasterCache node."),
            io.Latent.Input("latent", tooltip="The sampler's result: the report is made after it."),
        ]
        outputs = [
            io.Image.Output("chart", tooltip="One column per evaluation, one row per branch."),
            io.String.Output("text", tooltip="The same as text, for people."),
            io.String.Output("json", tooltip="The same as JSON, for programs."),
        ]
        return schema(cls, "FasterCacheReport", "FasterCache Report", inputs, outputs, is_output_node=True)

    @classmethod
    def execute(cls, model: ModelPatcher, latent: dict[str, Any]) -> io.NodeOutput:
        report = last_report(model)
        if report is None:
            source = "the model that comes out of a FasterCache node and that the sampler used"
            raise wrong(cls, f"the input `model` has no run to report; connect {source}.")
        picture, text, data = chart(report), full_text(report), json.dumps(report)
        shown = {"text": [text], "fastercache_report": [data], **ui.PreviewImage(picture, cls=cls).as_dict()}
        return io.NodeOutput(picture, text, data, ui=shown)


def chart(report: Mapping[str, Any]) -> torch.Tensor:
    """Draw a report: a coloured cell per evaluation and branch. IMAGE [1, height, width, 3] in 0..1."""
    evaluations = report["evaluations"]
    branches = list(dict.fromkeys(branch for record in evaluations for branch in record["actions"]))
    height = 190 + ROW * len(branches)
    canvas = Canvas(WIDTH, height)
    canvas.text((16, 14), short_line(report), 20)
    canvas.text((16, 46), " | ".join(report["notes"]) or "nothing was refused")
    for i, branch in enumerate(branches):
        _branch(canvas, 90 + ROW * i, branch, evaluations)
    _axis(canvas, 90 + ROW * len(branches), evaluations)
    _legend(canvas, height - 30)
    return canvas.image()


def _branch(canvas: Canvas, top: int, branch: str, evaluations: Sequence[Record]) -> None:
    canvas.text((16, top + 8), branch, 15)
    for left, right, record in _columns(evaluations):
        colour = COLOURS.get(record["actions"].get(branch), PAPER)
        canvas.draw.rectangle((left, top, right - 2, top + ROW - 6), fill=colour, outline=GRID)


def _axis(canvas: Canvas, top: int, evaluations: Sequence[Record]) -> None:
    canvas.text((16, top + 2), "sigma")
    columns = list(_columns(evaluations))
    for left, _, record in columns[:: max(len(columns) // 10, 1)]:
        canvas.text((left, top + 2), f"{record['sigma']:.3g}")


def _legend(canvas: Canvas, top: int) -> None:
    for i, (action, colour) in enumerate(COLOURS.items()):
        left = MARGIN + 120 * i
        canvas.draw.rectangle((left, top, left + 14, top + 14), fill=colour, outline=GRID)
        canvas.text((left + 20, top - 1), action)


def _columns(evaluations: Sequence[Record]) -> Iterator[tuple[float, float, Record]]:
    """(left, right, record) of every evaluation."""
    width = (WIDTH - MARGIN - 16) / max(len(evaluations), 1)
    for i, record in enumerate(evaluations):
        yield MARGIN + i * width, MARGIN + (i + 1) * width, record

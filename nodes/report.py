"""FasterCacheReport: what happened in the last run, as a chart, a text and JSON."""
import json

import numpy as np
import torch
from comfy_api.latest import io, ui
from PIL import Image, ImageDraw, ImageFont

from ..fastercache_core.report import full_text, short_line
from .host.attach import last_report
from .schema import schema

COLOURS = {"FULL": "#d9534f", "REUSE": "#f0ad4e", "MIX": "#f7e49a", "ESTIMATE": "#5bc0de", "JUMP": "#5cb85c"}
INK, PAPER, GRID = "#222222", "#ffffff", "#dddddd"
WIDTH, MARGIN, ROW = 960, 90, 34


class FasterCacheReport(io.ComfyNode):
    """Shows what a patched model skipped in its last run."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="FasterCacheReport",
            display_name="FasterCache Report",
            description="Shows what was skipped in the last run of a model with FasterCache: a chart of "
                        "every evaluation, a text with the reason for each refusal, and JSON.",
            inputs=[
                io.Model.Input("model", tooltip="The model that came out of a FasterCache node."),
                io.Latent.Input("latent", tooltip="The sampler's result: the report is made after it."),
            ],
            outputs=[
                io.Image.Output("chart", tooltip="One column per evaluation, one row per branch."),
                io.String.Output("text", tooltip="The same as text, for people."),
                io.String.Output("json", tooltip="The same as JSON, for programs."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, latent):
        report = last_report(model)
        if report is None:
            raise ValueError("FasterCacheReport: the input `model` has no run to report; connect the model "
                             "that comes out of a FasterCache node and that the sampler used.")
        picture, text, data = chart(report), full_text(report), json.dumps(report)
        shown = {"text": [text], "fastercache_report": [data], **ui.PreviewImage(picture, cls=cls).as_dict()}
        return io.NodeOutput(picture, text, data, ui=shown)


def chart(report):
    """Draw a report: a coloured cell per evaluation and branch. IMAGE [1, height, width, 3] in 0..1."""
    branches = list(dict.fromkeys(b for r in report["evaluations"] for b in r["actions"]))
    height = 100 + ROW * len(branches) + 90
    canvas = Image.new("RGB", (WIDTH, height), PAPER)
    draw = ImageDraw.Draw(canvas)
    _text(draw, (16, 14), short_line(report), 20)
    _text(draw, (16, 46), " | ".join(report["notes"]) or "nothing was refused", 13)
    for i, branch in enumerate(branches):
        _branch(draw, 90 + ROW * i, branch, report["evaluations"])
    _axis(draw, 90 + ROW * len(branches), report["evaluations"])
    _legend(draw, height - 30)
    return torch.from_numpy(np.array(canvas, dtype=np.float32) / 255)[None]


def _branch(draw, top, branch, evaluations):
    _text(draw, (16, top + 8), branch, 15)
    for left, right, record in _columns(evaluations):
        colour = COLOURS.get(record["actions"].get(branch), PAPER)
        draw.rectangle((left, top, right - 2, top + ROW - 6), fill=colour, outline=GRID)


def _axis(draw, top, evaluations):
    _text(draw, (16, top + 2), "sigma", 13)
    columns = list(_columns(evaluations))
    for left, _, record in columns[::max(len(columns) // 10, 1)]:
        _text(draw, (left, top + 2), f"{record['sigma']:.3g}", 13)


def _legend(draw, top):
    left = MARGIN
    for action, colour in COLOURS.items():
        draw.rectangle((left, top, left + 14, top + 14), fill=colour, outline=GRID)
        _text(draw, (left + 20, top - 1), action, 13)
        left += 120


def _columns(evaluations):
    width = (WIDTH - MARGIN - 16) / max(len(evaluations), 1)
    for i, record in enumerate(evaluations):
        yield MARGIN + i * width, MARGIN + (i + 1) * width, record


def _text(draw, where, text, size):
    draw.text(where, text, fill=INK, font=ImageFont.load_default(size))

"""What the nodes' schemas have in common, fields that only newer hosts know, and errors that name their node."""

import inspect
from collections.abc import Mapping
from functools import wraps
from reprlib import repr as shortened
from typing import Any

from comfy_api.latest import io

from ..fastercache_core.clock import Window
from .kinds import lacks

ALIASES = ["cache", "speed", "faster", "teacache", "easycache", "wavespeed", "magcache", "deepcache", "frdiff"]
ALIASES += ["first block cache", "cfg cache"]
WITH_ID = [io.Hidden.unique_id]

Node = type[io.ComfyNode]
Inputs = Mapping[str, Any]  # values of a node's inputs, by id


def schema(
    node: Node, node_id: str, display_name: str, inputs: list[io.Input], outputs: list[io.Output], **fields: Any
) -> io.Schema:
    """The schema of a node, with its docstring as description, and search words where the host has them.

    Nodes that are told their own id, to show there what their run skipped, are marked not idempotent: that puts the id
    into the host's cache key, so that no other node's MODEL, with its id, is handed on.
    """
    if "search_aliases" in io.Schema.__dataclass_fields__:
        fields["search_aliases"] = ALIASES
    for output in outputs:
        output.display_name = output.display_name or output.id
    description = " ".join((inspect.getdoc(node) or "").split())
    fields |= dict(category="FasterCache", description=description, not_idempotent="hidden" in fields)
    return io.Schema(node_id, display_name, inputs=inputs, outputs=outputs, **fields)


def wrong(node: Node, sentence: str) -> ValueError:
    """The error for wrong inputs. It names the node by its id: the host runs a clone of the class, of another name."""
    return ValueError(f"{node.define_schema().node_id}: {sentence}")


def checked(node: Node) -> Node:
    """`node`, which now refuses inputs that are not what its schema says with one sentence, before it does anything.

    The host checks less: no choices up to 0.3.75, nothing that comes over a link, no NaN. A node with a
    `validate_inputs` of its own is left alone.
    """
    if "validate_inputs" in vars(node):
        return node
    execute = vars(node)["execute"].__func__

    @wraps(execute)
    def refusing(cls: Node, *args: Any, **inputs: Any) -> io.NodeOutput:
        for entry in cls.define_schema().inputs:
            allowed = lacks(entry, inputs[entry.id]) if entry.id in inputs else None
            if allowed:
                raise wrong(cls, f"{entry.id} is {shortened(inputs[entry.id])}; it must be {allowed}.")
        return execute(cls, *args, **inputs)

    node.execute = classmethod(refusing)
    return node


def window(node: Node, inputs: Inputs) -> Window:
    """The Window between start_percent and end_percent. Raises ValueError when they are the wrong way round."""
    start, end = inputs["start_percent"], inputs["end_percent"]
    if start > end:
        raise wrong(node, f"start_percent is {start}, after end_percent {end}; it must be the same or smaller.")
    return Window(start, end)

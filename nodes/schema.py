"""What the nodes' schemas have in common, and fields that only newer hosts know."""
from comfy_api.latest import io

from ..fastercache_core.clock import Window
from ..fastercache_core.gate import GateSettings

CATEGORY = "FasterCache"
ALIASES = ["cache", "speed", "faster", "teacache", "easycache", "wavespeed", "first block cache",
           "magcache", "deepcache", "cfg cache", "frdiff"]


def schema(**fields):
    """An `io.Schema` in the pack's category, with search words where the host has them.

    Nodes that are told what their run skipped are marked not idempotent: that puts the node's own
    id into the host's cache key, so that no other node's MODEL, with its id, is handed on.
    """
    if "search_aliases" in io.Schema.__dataclass_fields__:
        fields.setdefault("search_aliases", ALIASES)
    for output in fields["outputs"]:
        output.display_name = output.display_name or output.id
    told = io.Hidden.unique_id in fields.get("hidden", ())
    return io.Schema(category=CATEGORY, not_idempotent=told, **fields)


def name_of(node):
    """The id of a node class; the host runs a clone of it, with another name."""
    return node.define_schema().node_id


def advanced(widget):
    """The same input, folded away under "advanced" by pages that know the word."""
    widget.extra_dict = {**(widget.extra_dict or {}), "advanced": True}
    return widget


def choice(node, name, value, allowed):
    """`value`, if it is one of `allowed`. Raises ValueError naming node, input and choices if not.

    The host checks choices typed on its page, but not those posted over its API.
    """
    if value not in allowed:
        raise ValueError(f"{node}: {name} is {value!r}; it must be one of: {', '.join(allowed)}.")
    return value


def tolerance_input():
    """The input that says how good a forecast must be."""
    return advanced(io.Float.Input(
        "tolerance", default=0.016, min=0.0, max=1.0, step=0.001, round=0.0001,
        tooltip="Skipping begins when the foreseen effect of one skipped step on the picture is smaller than "
                "this fraction of it. Smaller is safer. 0 = do not ask, follow the interval."))


def gate(tolerance):
    """The gate that the input asks for, None for 0."""
    return GateSettings(tolerance) if tolerance else None


def window_inputs(start=0.0, end=1.0):
    """The two inputs that bound a window of sampling."""
    return [
        advanced(io.Float.Input("start_percent", default=start, min=0.0, max=1.0, step=0.01,
                                tooltip="Nothing is skipped before this part of sampling. "
                                        "Higher is safer: the first steps decide the layout.")),
        advanced(io.Float.Input("end_percent", default=end, min=0.0, max=1.0, step=0.01,
                                tooltip="Nothing is skipped after this part of sampling. The very "
                                        "last step is always computed.")),
    ]


def window(node, start_percent, end_percent):
    """The Window of the two inputs. Raises ValueError naming `node` when they are the wrong way round."""
    if start_percent > end_percent:
        raise ValueError(f"{node}: start_percent is {start_percent}, which is after end_percent "
                         f"{end_percent}; it must be the same or smaller.")
    return Window(start_percent, end_percent)

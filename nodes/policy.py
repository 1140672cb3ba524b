"""Policies as files: FasterCachePolicySave and FasterCachePolicyLoad."""

import os
import re
import unicodedata

from comfy_api.latest import io, ui

from ..fastercache_core.calibration.policy import Policy, PolicyError
from ..fastercache_core.calibration.policy_file import MAX_BYTES, dumps, loads
from .host.user_files import FOLDER, folders, write_whole
from .kinds import CachePolicy
from .schema import Node, schema, wrong

ENDING = ".json"
# Letters of any language, digits, and a few signs that mean nothing to any file system.
SAFE_NAME = re.compile(r"\w[\w .+()-]{0,99}")
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # devices on Windows


class FasterCachePolicySave(io.ComfyNode):
    """Writes a policy to a small JSON file in output/fastercache, to use it again or to give it to somebody with the
    same model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        name = "Name of the file, without folders. A file of that name is replaced."
        inputs = [
            CachePolicy.Input("policy", tooltip="A policy, for example from FasterCache Auto-FR."),
            io.String.Input("filename", default="policy", tooltip=name),
        ]
        outputs = [io.String.Output("path", tooltip="The file that was written.")]
        return schema(cls, "FasterCachePolicySave", "FasterCache Policy Save", inputs, outputs, is_output_node=True)

    @classmethod
    def execute(cls, policy: Policy, filename: str) -> io.NodeOutput:
        path = inside(cls, folders()[0], filename)
        try:
            write_whole(path, dumps(policy))
        except OSError as error:
            raise wrong(cls, f"filename is {filename!r}, which cannot be written: {error.strerror}.") from error
        return io.NodeOutput(path, ui=ui.PreviewText(f"{path}\n{summary(policy)}"))


class FasterCachePolicyLoad(io.ComfyNode):
    """Reads a policy from output/fastercache or input/fastercache. The file is checked and nothing in it is run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        tooltip = "A file in output/fastercache or input/fastercache."
        inputs = [io.Combo.Input("filename", options=policy_files(), tooltip=tooltip)]
        outputs = [
            CachePolicy.Output("policy", tooltip="For FasterCache FRDiff."),
            io.String.Output("text", tooltip="What the policy was found for, its cost and its error."),
        ]
        return schema(cls, "FasterCachePolicyLoad", "FasterCache Policy Load", inputs, outputs)

    @classmethod
    def validate_inputs(cls, filename: str) -> bool | str:
        try:
            find(cls, filename)  # a file may be newer than the list of choices
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, filename: str) -> float:
        return os.path.getmtime(find(cls, filename))

    @classmethod
    def execute(cls, filename: str) -> io.NodeOutput:
        try:
            with open(find(cls, filename), "rb") as file:
                policy = loads(file.read(MAX_BYTES + 1))
        except (OSError, PolicyError) as error:
            raise wrong(cls, f"filename is {filename!r}. {error}") from error
        return io.NodeOutput(policy, summary(policy))


def summary(policy: Policy) -> str:
    """What a policy was found for, its cost and its expected error, as text."""
    found = policy.setup
    return (
        f"{found.model}, {found.sampler}, {found.scheduler}, {found.steps} steps, cfg {found.cfg:g}\n"
        f"cost {policy.cost:.2f}, expected error {policy.error:.2%} of the latent\n"
        f"{policy.points[policy.chosen].actions()}"
    )


def policy_files() -> list[str]:
    """Names of all policy files there are."""
    there = filter(os.path.isdir, folders())
    return sorted({name for folder in there for name in os.listdir(folder) if name.endswith(ENDING)})


def find(node: Node, name: str) -> str:
    """Path of the policy file `name`. Raises ValueError when there is none."""
    for folder in folders():
        path = inside(node, folder, name)
        if os.path.isfile(path):
            return path
    raise wrong(node, f"there is no file {name!r} in output/{FOLDER} or input/{FOLDER}.")


def inside(node: Node, folder: str, name: str) -> str:
    """Path of the file `name` right inside `folder`. Raises ValueError for any other name."""
    name = unicodedata.normalize("NFC", str(name).removesuffix(ENDING))
    reserved = RESERVED.fullmatch(unicodedata.normalize("NFKC", name))  # Windows reads a raised digit as a digit
    if not SAFE_NAME.fullmatch(name) or name != name.strip(" .") or reserved:
        allowed = "a plain name of letters, digits, spaces and _ . + ( ) -, without folders"
        raise wrong(node, f"filename must be {allowed}; it is {name[:100]!r}.")
    path = os.path.join(folder, name + ENDING)
    if os.path.realpath(path) != os.path.join(os.path.realpath(folder), name + ENDING):
        only = f"only files inside {FOLDER} folders are read and written"
        raise wrong(node, f"{name + ENDING} is a link to somewhere else; {only}.")
    return path

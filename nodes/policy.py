"""Policies as files: FasterCachePolicySave and FasterCachePolicyLoad."""
import os
import re

import folder_paths
from comfy_api.latest import io, ui

from ..fastercache_core.policy import MAX_BYTES, dumps, loads
from .schema import name_of, schema

CachePolicy = io.Custom("CACHE_POLICY")
FOLDER, ENDING = "fastercache", ".json"
# Letters of any language, digits, and a few signs that mean nothing to any file system.
SAFE_NAME = re.compile(r"\w[\w .+()-]{0,99}")
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # devices on Windows


class FasterCachePolicySave(io.ComfyNode):
    """Writes a policy to a JSON file."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="FasterCachePolicySave",
            display_name="FasterCache Policy Save",
            description="Writes a policy to a small JSON file in output/fastercache, to use it again or to give "
                        "it to somebody with the same model.",
            inputs=[
                CachePolicy.Input("policy", tooltip="A policy, for example from FasterCache Auto-FR."),
                io.String.Input("filename", default="policy",
                                tooltip="Name of the file, without folders. A file of that name is replaced."),
            ],
            outputs=[io.String.Output("path", tooltip="The file that was written.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, policy, filename):
        folder = os.path.join(folder_paths.get_output_directory(), FOLDER)
        os.makedirs(folder, exist_ok=True)
        path = inside(name_of(cls), folder, filename)
        with open(f"{path}.part", "w", encoding="utf-8") as file:
            file.write(dumps(policy))
        os.replace(f"{path}.part", path)  # never half a file
        return io.NodeOutput(path, ui=ui.PreviewText(f"{path}\n{summary(policy)}"))


class FasterCachePolicyLoad(io.ComfyNode):
    """Reads a policy from a JSON file."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="FasterCachePolicyLoad",
            display_name="FasterCache Policy Load",
            description="Reads a policy from output/fastercache or input/fastercache. The file is checked and "
                        "nothing in it is run.",
            inputs=[io.Combo.Input("filename", options=policy_files(),
                                   tooltip="A file in output/fastercache or input/fastercache.")],
            outputs=[CachePolicy.Output("policy", tooltip="For FasterCache FRDiff."),
                     io.String.Output("text", tooltip="What the policy was found for, what it costs and its error.")],
        )

    @classmethod
    def validate_inputs(cls, filename):
        try:
            find(name_of(cls), filename)  # a file may be newer than the list of choices
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, filename):
        return os.path.getmtime(find(name_of(cls), filename))

    @classmethod
    def execute(cls, filename):
        with open(find(name_of(cls), filename), "rb") as file:
            policy = loads(file.read(MAX_BYTES + 1))
        return io.NodeOutput(policy, summary(policy))


def summary(policy):
    """What a policy was found for, what it costs and what error it foresees, as text."""
    found = policy.setup
    return (f"{found.model}, {found.sampler}, {found.scheduler}, {found.steps} steps, cfg {found.cfg:g}\n"
            f"cost {policy.cost:.2f}, foreseen error {policy.error:.2%} of the latent\n"
            f"{policy.points[policy.chosen].actions()}")


def policy_folders():
    """The folders that policies are read from, first choice first."""
    return [os.path.join(root, FOLDER)
            for root in (folder_paths.get_output_directory(), folder_paths.get_input_directory())]


def policy_files():
    """Names of all policy files there are."""
    return sorted({name for folder in policy_folders() if os.path.isdir(folder)
                   for name in os.listdir(folder) if name.endswith(ENDING)})


def find(node, name):
    """Path of the policy file `name`. Raises ValueError naming `node` when there is none."""
    for folder in policy_folders():
        path = inside(node, folder, name)
        if os.path.isfile(path):
            return path
    raise ValueError(f"{node}: there is no file {name!r} in output/{FOLDER} or input/{FOLDER}.")


def inside(node, folder, name):
    """Path of the file `name` right inside `folder`. Raises ValueError naming `node` for any other name."""
    name = str(name).removesuffix(ENDING)
    if not SAFE_NAME.fullmatch(name) or name != name.strip(" .") or RESERVED.fullmatch(name):
        raise ValueError(f"{node}: filename must be a plain name of letters, digits, spaces and _ . + ( ) -, "
                         f"without folders; it is {name[:100]!r}.")
    path = os.path.join(folder, name + ENDING)
    if os.path.realpath(path) != os.path.join(os.path.realpath(folder), name + ENDING):
        raise ValueError(f"{node}: {name + ENDING} is a link to somewhere else; only files inside "
                         f"{FOLDER} folders are read and written.")
    return path

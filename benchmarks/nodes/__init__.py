"""Nodes that measure: how many network rows and FLOPs a run costs, its seconds, and its pictures unrounded."""

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import folder_paths
import numpy as np
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import ComfyExtension, io
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

KEY = "fastercache_benchmark"
CATEGORY = "FasterCache/benchmark"
# The first projection of each family. Every pass through the network begins with it, and a cache that
# skips anywhere above - a step, a branch, or inside the network's own forward, as the host's EasyCache
# does below APPLY_MODEL - never reaches it. So this one place counts every method alike.
FIRST_PROJECTION = ("x_embedder", "img_in", "patch_embedding", "patchify_proj", "input_blocks.0.0")
# Fused attention on the CPU, which torch's counter does not know.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda query, key, value, *_, **__: sdpa_flop_count(
        query, key, value
    )
}


class Counter:
    """Counts the rows (pictures x branches) that enter the network while a model samples, and its FLOPs if asked.

    FLOPs are those of every matrix product, convolution and attention that torch really runs, the cache's
    own among them. Counting slows a run down by a half or so.
    """

    def __init__(self, with_flops: bool) -> None:
        self.rows, self.flops, self.seconds = 0, 0, 0.0
        self.with_flops = with_flops

    def count(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of the first projection."""
        self.rows += args[0].shape[0]

    def outer_sample(self, executor: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """OUTER_SAMPLE: one run, counted and timed."""
        hook = first_projection(executor.class_obj.model_patcher).register_forward_pre_hook(self.count)
        mode = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) if self.with_flops else nullcontext()
        start = time.perf_counter()
        try:
            with mode:
                return executor(*args, **kwargs)
        finally:
            self.seconds += time.perf_counter() - start
            self.flops += mode.get_total_flops() if self.with_flops else 0
            hook.remove()


def first_projection(patcher: Any) -> torch.nn.Module:
    """The module through which every row enters this model."""
    modules = dict(patcher.model.diffusion_model.named_modules())
    for name in FIRST_PROJECTION:
        if name in modules:
            return modules[name]
    raise ValueError(f"CountRows does not know where rows enter a {type(patcher.model.diffusion_model).__name__}.")


class CountRows(io.ComfyNode):
    """Makes a model count what it samples."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CountRows",
            category=CATEGORY,
            description="Counts what sampling with this model costs. Put it first, before any cache.",
            inputs=[
                io.Model.Input("model", tooltip="The model to watch."),
                io.Int.Input(
                    "run",
                    default=0,
                    min=0,
                    max=2**31,
                    tooltip="Any number; a new one starts a new count and samples again.",
                ),
                io.Boolean.Input(
                    "flops",
                    default=False,
                    optional=True,
                    tooltip="Count FLOPs too. The seconds of such a run mean nothing.",
                ),
            ],
            outputs=[io.Model.Output("counted", tooltip="The same model, counting.")],
        )

    @classmethod
    def execute(cls, model: Any, run: int, flops: bool = False) -> io.NodeOutput:
        model, counter = model.clone(), Counter(flops)
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, counter.outer_sample)
        model.set_attachments(KEY, counter)
        return io.NodeOutput(model)


class RowCount(io.ComfyNode):
    """Shows what a counting model has counted."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RowCount",
            category=CATEGORY,
            is_output_node=True,
            description="Shows the network rows, FLOPs and seconds of a run whose model came through CountRows.",
            inputs=[
                io.Model.Input("model", tooltip="The model that was sampled."),
                io.Latent.Input("latent", tooltip="The sampler's result: the count is read after it."),
            ],
            outputs=[io.Int.Output("rows", tooltip="Rows that went through the network.")],
        )

    @classmethod
    def execute(cls, model: Any, latent: Any) -> io.NodeOutput:
        counter = model.get_attachment(KEY)
        shown = {"rows": [counter.rows], "flops": [counter.flops], "seconds": [counter.seconds]}
        return io.NodeOutput(counter.rows, ui=shown)


class SaveArray(io.ComfyNode):
    """Saves pictures without rounding them to 8 bits."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SaveArray",
            category=CATEGORY,
            is_output_node=True,
            description="Saves pictures as a NumPy file, so that close ones can be told apart.",
            inputs=[io.Image.Input("images", tooltip="The pictures.")],
            outputs=[],
        )

    @classmethod
    def execute(cls, images: torch.Tensor) -> io.NodeOutput:
        output = folder_paths.get_output_directory()
        folder, stem, counter, subfolder, _ = folder_paths.get_save_image_path("array", output)
        name = f"{stem}_{counter:05}_.npy"
        np.save(Path(folder, name), images.cpu().numpy())
        return io.NodeOutput(ui={"arrays": [{"filename": name, "subfolder": subfolder, "type": "output"}]})


class Benchmark(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [CountRows, RowCount, SaveArray]


def comfy_entrypoint() -> Benchmark:
    """The host's entry."""
    return Benchmark()

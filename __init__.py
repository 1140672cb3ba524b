"""FasterCache and FRDiff for ComfyUI: fewer network passes, the same picture, and a report of both."""

from .nodes import comfy_entrypoint

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]

"""The nodes of the pack: one file per node family, host knowledge under `host`."""

from comfy_api.latest import ComfyExtension, io

from .auto_fr import FasterCacheAutoFR
from .cfg_cache import FasterCacheCFG, FasterCacheGuider
from .compare import FasterCacheCompare
from .fastercache import FasterCache
from .frdiff import FasterCacheFRDiff
from .ksampler import FasterCacheKSampler
from .policy import FasterCachePolicyLoad, FasterCachePolicySave
from .report import FasterCacheReport
from .schema import checked

# fmt: off
NODES: list[type[io.ComfyNode]] = [checked(node) for node in (
    FasterCache, FasterCacheCFG, FasterCacheGuider, FasterCacheKSampler, FasterCacheFRDiff, FasterCacheAutoFR,
    FasterCachePolicySave, FasterCachePolicyLoad, FasterCacheReport, FasterCacheCompare,
)]
# fmt: on


class FasterCacheExtension(ComfyExtension):
    """Hands the nodes to ComfyUI."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> FasterCacheExtension:
    """What ComfyUI calls when it loads the pack."""
    return FasterCacheExtension()

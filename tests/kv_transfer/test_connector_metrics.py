import functools
import types
from typing import Any

import msgspec
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from kv_transfer.errors import FAILURE_REASONS
from kv_transfer.lease import LeaseCounts
from tests.kv_transfer.with_vllm import Counter, Gauge, Histogram, connector, connector_metrics

TransferStats = connector_metrics.TransferStats


def test_nothing_happened() -> None:
    stats = TransferStats()
    assert stats.is_empty()
    stats.record_leases(LeaseCounts(), 3)
    assert stats.is_empty()
    assert stats.reduce() == {"KV loads": 0, "KV MB": 0, "KV MB/s": 0, "KV load failures": 0}


@pytest.mark.parametrize(
    "record",
    [
        lambda stats: stats.record_load(1, 1, 0.1),
        lambda stats: stats.record_failure("deadline"),
        lambda stats: stats.record_leases(LeaseCounts(expired=1), 0),
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
    stats.record_load(3_000_000, 2, 0.5)
    stats.record_load(1_000_000, 1, 1.5)
    stats.record_failure("deadline")
    stats.record_failure("deadline")
    stats.record_leases(LeaseCounts(granted=2, expired=1), 4)
    return stats


def test_reduce() -> None:
    assert example().reduce() == {"KV loads": 2, "KV MB": 4.0, "KV MB/s": 2.0, "KV load failures": 2}


def test_aggregation_adds_up_and_takes_the_newest_gauge() -> None:
    """A worker's and the scheduler's half."""
    total, other = example(), TransferStats()
    other.record_load(5, 1, 2.0)
    other.record_failure("lease_ended")
    other.record_leases(LeaseCounts(released=1, granted=1), 3)
    assert total.aggregate(other) is total
    assert total.data == {
        "bytes": 4_000_005,
        "blocks": 4,
        "seconds": [0.5, 1.5, 2.0],
        "failures": {"deadline": 2, "lease_ended": 1},
        "leases": {"granted": 3, "expired": 1, "released": 1},
        "open_leases": 3,
    }
    total.aggregate(TransferStats())
    assert total.data["open_leases"] == 3


def test_stats_do_not_share_their_data() -> None:
    one, other = TransferStats(), TransferStats()
    one.record_load(1, 1, 1.0)
    one.record_failure("other")
    assert other.is_empty()


def test_stats_cross_vllms_pipe() -> None:
    data = msgspec.msgpack.decode(msgspec.msgpack.encode(example().to_dict()))
    assert connector.OmniConnector.build_kv_connector_stats(data).data == example().data
    assert connector.OmniConnector.build_kv_connector_stats().is_empty()


def test_prometheus_shows_every_engine_and_every_reason() -> None:
    registry = CollectorRegistry()
    metrics = connector.OmniConnector.build_prom_metrics(
        types.SimpleNamespace(kv_transfer_config=None),
        {kind: functools.partial(kind, registry=registry) for kind in (Gauge, Counter, Histogram)},
        ["model_name", "engine"],
        {0: ["m", "0"], 1: ["m", "1"]},
    )
    metrics.observe(example().data, 1)
    metrics.observe(example().data, 1)
    metrics.observe(TransferStats().data, 1)
    text = generate_latest(registry).decode()
    labels = '{engine="1",model_name="m"}'
    for line in [
        f"vllm:omni_kv_loaded_bytes_total{labels} 8e+06",
        f"vllm:omni_kv_loaded_blocks_total{labels} 6.0",
        f"vllm:omni_kv_load_seconds_count{labels} 4.0",
        f"vllm:omni_kv_load_seconds_sum{labels} 4.0",
        f"vllm:omni_kv_failures_deadline_total{labels} 4.0",
        f"vllm:omni_kv_leases_granted_total{labels} 4.0",
        f"vllm:omni_kv_leases_released_total{labels} 0.0",
        f"vllm:omni_kv_leases_expired_total{labels} 2.0",
        f"vllm:omni_kv_leases_open{labels} 4.0",
        'vllm:omni_kv_loaded_bytes_total{engine="0",model_name="m"} 0.0',
        *(f'vllm:omni_kv_failures_{reason}_total{{engine="0",model_name="m"}} 0.0' for reason in FAILURE_REASONS),
    ]:
        assert line in text.splitlines()

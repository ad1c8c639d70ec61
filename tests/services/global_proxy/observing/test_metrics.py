"""What /metrics says, read by Prometheus' own parser."""

import os
from dataclasses import dataclass

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from services.global_proxy import errors, rules
from services.global_proxy.observing import labels
from services.global_proxy.observing.cells import Cells
from services.global_proxy.observing.metrics import Metrics

# What dashboards and tests relied on before this package.
NAMES_KEPT = {
    "omni_proxy_requests_total": {"endpoint", "code"},
    "omni_proxy_request_seconds_count": set(),
    "omni_proxy_ttft_seconds_count": set(),
    "omni_proxy_prefill_seconds_count": set(),
    "omni_proxy_active_requests": {"role", "instance"},
    "omni_proxy_upstream_failures_total": {"role", "instance", "reason"},
    "omni_proxy_decode_only_total": {"reason"},
}


@dataclass
class Load:
    role: str = "decode"
    name: str = "d1:8000"
    num_requests: int = 0
    num_tokens: int = 0
    kv_tokens: tuple[int, int] | None = None


def value(metrics: Metrics, name: str, **label_values: str) -> float | None:
    return metrics.registry.get_sample_value(f"omni_proxy_{name}", label_values)


def test_every_metric_is_rendered_with_its_labels() -> None:
    metrics = Metrics()
    metrics.requests.labels("/v1/completions", 200).inc()
    metrics.decode_only.labels("batch").inc()
    metrics.retries.labels("prefill", "died").inc()
    metrics.refused.labels("rate_limited").inc()
    metrics.instances.add("decode", "d1:8000", 0).failed("status_503")
    metrics.instances.read_loads = lambda: [Load()]

    text, content_type = metrics.render()
    samples = [sample for family in parse(text.decode()) for sample in family.samples]
    found = {sample.name: set(sample.labels) for sample in samples}
    assert found.items() >= NAMES_KEPT.items()
    assert content_type.startswith("text/plain")
    new = ("itl_seconds_bucket", "tpot_seconds_bucket", "queue_seconds_bucket", "requests_in_flight", "requests_queued")
    assert {f"omni_proxy_{name}" for name in new} <= found.keys()
    assert found["omni_proxy_retries_total"] == {"role", "reason"}
    assert all(sample.value == 1 for sample in samples if sample.name in NAMES_KEPT and "code" in sample.labels)


def test_speaks_openmetrics_when_asked() -> None:
    metrics = Metrics()
    metrics.sent_bytes.inc(12)
    text, content_type = metrics.render("application/openmetrics-text; version=1.0.0")
    families = {family.name: family for family in parse_openmetrics(text.decode())}  # type: ignore[no-untyped-call]
    assert content_type.startswith("application/openmetrics-text")
    assert families["omni_proxy_sent_bytes"].samples[0].value == 12


def test_a_histogram_counts_up_to_each_bound() -> None:
    metrics = Metrics()
    for seconds in (0.0005, 0.001, 0.0011, 0.02, 1000.0):
        metrics.itl_seconds.observe(seconds)
    up_to = {bound: value(metrics, "itl_seconds_bucket", le=bound) for bound in ("0.001", "0.0025", "30.0", "+Inf")}
    assert up_to == {"0.001": 2, "0.0025": 3, "30.0": 4, "+Inf": 5}
    assert value(metrics, "itl_seconds_count") == 5
    assert value(metrics, "itl_seconds_sum") == pytest.approx(1000.0226)


def test_values_that_are_not_listed_make_no_series() -> None:
    metrics = Metrics()
    instance = metrics.instances.add("decode", "d1:8000", 0)
    for number in range(1000):
        metrics.requests.labels(f"/{number}", 200).inc()
        metrics.requests.labels("/v1/completions", 600 + number).inc()
        instance.failed(f"reason {number}")
    assert value(metrics, "requests_total", endpoint=labels.OTHER, code="200") == 1000
    assert value(metrics, "requests_total", endpoint="/v1/completions", code=labels.OTHER) == 1000
    assert value(metrics, "upstream_failures_total", role="decode", instance="d1:8000", reason=labels.OTHER) == 1000
    assert len(list(parse(metrics.render()[0].decode()))) < 40
    assert metrics.render()[0].count(b"omni_proxy_requests_total{") == 2


def test_only_listed_values_are_kept() -> None:
    requests = Metrics().requests
    assert requests.labels("/v1/completions", 200) is requests.labels("/v1/completions", 200)
    assert requests.labels("/no-such-path", 200) is not requests.labels("/no-such-path", 200)


def test_the_proxys_own_reasons_are_listed() -> None:
    given = {reason for reason, _ in rules.DECODE_ONLY_RULES} | {rules.SEVERAL_CHOICES, rules.NO_HANDOFF}
    assert given <= set(labels.DECODE_ONLY_REASONS)
    given = {error.reason for error in errors.UpstreamError.__subclasses__() if hasattr(error, "reason")}
    assert given <= set(labels.FAILURE_REASONS)


def test_every_pair_of_labels_has_a_cell_of_its_own() -> None:
    metrics = Metrics()
    pairs = [(role, reason) for role in labels.ROLES for reason in labels.RETRY_REASONS]
    for amount, pair in enumerate(pairs, 1):
        metrics.retries.labels(*pair).inc(amount)
    counted = [value(metrics, "retries_total", role=role, reason=reason) for role, reason in pairs]
    assert counted == list(range(1, len(pairs) + 1))


def test_any_worker_shows_the_sum_of_all() -> None:
    cells = Cells(3)
    here = Metrics(cells, worker=0)
    here.sent_bytes.inc(5)
    here.in_flight.inc()
    child = os.fork()
    if child == 0:  # another process, as the workers are
        try:
            there = Metrics(cells, worker=1)
            there.sent_bytes.inc(7)
            there.in_flight.inc()
            there.requests.labels("/v1/completions", 200).inc()
            there.itl_seconds.observe(0.02)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    for metrics in (here, Metrics(cells, worker=2)):
        assert value(metrics, "sent_bytes_total") == 12
        assert value(metrics, "requests_in_flight") == 2
        assert value(metrics, "requests_total", endpoint="/v1/completions", code="200") == 1
        assert value(metrics, "itl_seconds_count") == 1


def test_a_worker_started_anew_goes_on_counting_but_has_nothing_in_flight() -> None:
    cells = Cells(2)
    before = Metrics(cells, worker=1)
    before.sent_bytes.inc(5)
    before.in_flight.inc()
    before.instances.add("decode", "d1:8000", 3).ejections.inc()
    before.instances.add("decode", "d1:8000", 3).ejected.set(1)
    other = Metrics(cells, worker=0)
    other.instances.add("decode", "d1:8000", 3)
    assert value(other, "instance_ejected", role="decode", instance="d1:8000") == 1
    after = Metrics(cells, worker=1)
    assert value(other, "instance_ejected", role="decode", instance="d1:8000") == 0
    after.instances.add("decode", "d1:8000", 3)
    assert value(other, "sent_bytes_total") == 5
    assert value(other, "requests_in_flight") == 0
    assert value(other, "ejections_total", role="decode", instance="d1:8000") == 1


def test_an_instance_that_left_leaves_no_series() -> None:
    cells = Cells(2)
    metrics, other_worker = Metrics(cells, worker=0), Metrics(cells, worker=1)
    for worker in (metrics, other_worker):
        worker.instances.add("decode", "old:8000", 0).failed("died")
    metrics.instances.remove(0)
    assert b"old:8000" not in metrics.render()[0]
    # Its slot's next owner inherits nothing, although the other worker has not heard of the change.
    metrics.instances.add("decode", "new:8000", 0)
    assert value(metrics, "upstream_failures_total", role="decode", instance="new:8000", reason="died") is None
    other_worker.instances.remove(0)
    other_worker.instances.add("decode", "new:8000", 0).failed("died")
    assert value(metrics, "upstream_failures_total", role="decode", instance="new:8000", reason="died") == 1


def test_what_comes_late_is_not_blamed_on_a_successor() -> None:
    metrics = Metrics()
    gone = metrics.instances.add("decode", "old:8000", 0)
    metrics.instances.remove(0)
    metrics.instances.add("decode", "new:8000", 0)
    gone.failed("died")  # a request that was on its way
    gone.ejections.inc()
    gone.ejected.set(1)
    new = {"role": "decode", "instance": "new:8000"}
    assert value(metrics, "upstream_failures_total", reason="died", **new) is None
    assert value(metrics, "ejections_total", **new) == 0
    assert value(metrics, "instance_ejected", **new) == 0


def test_an_instance_is_up_for_all_workers_and_ejected_for_any() -> None:
    cells = Cells(3)  # the third has not started
    workers = [Metrics(cells, worker) for worker in (0, 1)]
    instances = [worker.instances.add("prefill", "p1:8000", 7) for worker in workers]
    states = ("instance_up", "instance_ejected", "instance_draining")

    def seen() -> list[list[float | None]]:
        return [[value(worker, state, role="prefill", instance="p1:8000") for state in states] for worker in workers]

    assert seen() == [[1, 0, 0]] * 2
    instances[1].down.set(1)
    instances[1].ejected.set(1)
    instances[0].draining.set(1)
    assert seen() == [[0, 1, 1]] * 2


def test_loads_are_read_when_asked_for() -> None:
    metrics = Metrics()
    load = Load(num_requests=1)
    metrics.instances.read_loads = lambda: [load]
    load.num_requests, load.num_tokens = 3, 700
    assert value(metrics, "active_requests", role="decode", instance="d1:8000") == 3
    assert value(metrics, "active_tokens", role="decode", instance="d1:8000") == 700
    assert value(metrics, "kv_tokens", role="decode", instance="d1:8000", part="used") is None
    load.kv_tokens = (30, 100)
    assert value(metrics, "kv_tokens", role="decode", instance="d1:8000", part="used") == 30
    assert value(metrics, "kv_tokens", role="decode", instance="d1:8000", part="total") == 100


def test_slots_beyond_the_memory_are_refused() -> None:
    with pytest.raises(ValueError, match="slot 4 is outside the metrics' 4 slots"):
        Metrics(num_slots=4).instances.add("decode", "d1:8000", 4)
    with pytest.raises(ValueError, match="ask for fewer slots"):
        Metrics(num_slots=1 << 20)

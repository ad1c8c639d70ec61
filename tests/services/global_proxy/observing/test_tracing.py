"""Traces, as a collector gets them and as engines are told of them."""

import re
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from services.global_proxy.observing.metrics import Metrics
from services.global_proxy.observing.request_log import RequestRecord
from services.global_proxy.observing.tracing import Tracing, TracingSettings
from tests.services.global_proxy.observing.otlp_receiver import OtlpReceiver

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT_ID = "00f067aa0ba902b7"
SAMPLED = f"00-{TRACE_ID}-{PARENT_ID}-01".encode()
NOT_SAMPLED = f"00-{TRACE_ID}-{PARENT_ID}-00".encode()
NOWHERE = "http://127.0.0.1:9"
MALFORMED = [
    b"",
    b"nonsense",
    SAMPLED.upper(),
    SAMPLED + b"-more",
    SAMPLED[:-1],
    b"ff" + SAMPLED[2:],
    f"00-{'0' * 32}-{PARENT_ID}-01".encode(),
    f"00-{TRACE_ID}-{'0' * 16}-01".encode(),
]


class Collector:
    """Tracing whose spans stay in memory."""

    def __init__(self, sample_ratio: float = 1.0) -> None:
        self.metrics = Metrics()
        self._spans = InMemorySpanExporter()
        settings = TracingSettings(endpoint=NOWHERE, sample_ratio=sample_ratio)
        self.tracing = Tracing(settings, self.metrics.traces, self._spans)

    async def spans(self) -> list[ReadableSpan]:
        await self.tracing.close()
        return list(self._spans.get_finished_spans())


def outcomes(metrics: Metrics) -> dict[str, float | None]:
    names = ("recorded", "exported", "failed")
    return {n: metrics.registry.get_sample_value("omni_proxy_traces_total", {"outcome": n}) for n in names}


def record(status: int = 200, **fields: Any) -> RequestRecord:
    return RequestRecord("id1", "/v1/chat/completions", status=status, **fields)


def ids_sent(headers: bytes) -> tuple[str, str, str]:
    """Trace id, span id and flags, which must be well-formed and followed by nothing else."""
    match = re.fullmatch(rb"traceparent: 00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})\r\n", headers)
    assert match is not None, headers
    trace_id, span_id, flags = (group.decode() for group in match.groups())
    return trace_id, span_id, flags


def span_id(span: ReadableSpan) -> str:
    assert span.context is not None
    return f"{span.context.span_id:016x}"


@pytest.mark.parametrize("traceparent", [None, SAMPLED, NOT_SAMPLED, *MALFORMED])
async def test_without_an_endpoint_the_clients_headers_go_on(traceparent: bytes | None) -> None:
    tracing = Tracing(TracingSettings(), Metrics().traces)
    request = tracing.begin(traceparent, b"vendor=x")
    leg = request.start_leg("prefill", "p1:8000")
    sent = b"" if traceparent is None else b"traceparent: %b\r\ntracestate: vendor=x\r\n" % traceparent
    assert leg.headers == sent
    assert request.trace_id is None
    leg.end(200)
    request.finish(record())
    await tracing.close()


async def test_a_client_that_does_not_trace_is_heeded() -> None:
    collector = Collector(sample_ratio=1.0)
    request = collector.tracing.begin(NOT_SAMPLED, None)
    assert request.start_leg("prefill", "p1:8000").headers == b"traceparent: %b\r\n" % NOT_SAMPLED
    request.finish(record())
    assert await collector.spans() == []


@pytest.mark.parametrize("traceparent", [None, *MALFORMED])
async def test_engines_are_told_not_to_trace_what_is_not_sampled(traceparent: bytes | None) -> None:
    collector = Collector(sample_ratio=0.0)
    request = collector.tracing.begin(traceparent, b"vendor=x")
    first, second = (request.start_leg(role, "e1:8000").headers for role in ("prefill", "decode"))
    assert first == second
    assert ids_sent(first)[2] == "00"
    request.finish(record())
    assert await collector.spans() == []


@pytest.mark.parametrize("traceparent", [None, *MALFORMED])
async def test_chance_decides_where_the_client_does_not(traceparent: bytes | None) -> None:
    collector = Collector(sample_ratio=1.0)
    request = collector.tracing.begin(traceparent, b"vendor=x")
    trace_id, _, flags = ids_sent(request.start_leg("decode", "d1:8000").headers)
    request.finish(record())
    server, decode = await collector.spans()
    assert flags == "01"
    assert server.parent is None
    assert server.context is not None
    assert decode.context is not None
    assert f"{server.context.trace_id:032x}" == f"{decode.context.trace_id:032x}" == trace_id == request.trace_id


async def test_about_as_many_are_sampled_as_wished() -> None:
    collector = Collector(sample_ratio=0.25)
    traced = sum(collector.tracing.begin(None, None).trace_id is not None for _ in range(4000))
    assert 800 < traced < 1200
    await collector.tracing.close()


async def test_spans_of_a_request_hang_together() -> None:
    collector = Collector(sample_ratio=0.0)  # the client's word counts
    request = collector.tracing.begin(SAMPLED, b"vendor=x,other=y")
    request.admitted()
    prefill = request.start_leg("prefill", "p1:8000")
    decode = request.start_leg("decode", "[::1]:8001")  # both at once
    prefill.end(200)
    decode.end(200)
    sent = {}
    for name, leg in (("prefill", prefill), ("decode", decode)):
        parent_line, state_line = leg.headers.splitlines(keepends=True)
        assert state_line == b"tracestate: vendor=x,other=y\r\n"
        sent[name] = ids_sent(parent_line)
    request.finish(record(prompt_tokens=7, ttft_s=0.5), model="m", stream=True, max_new_tokens=9)
    spans = {span.name: span for span in await collector.spans()}

    server = spans["POST /v1/chat/completions"]
    assert server.parent is not None
    assert (f"{server.parent.span_id:016x}", server.parent.is_remote) == (PARENT_ID, True)
    assert (server.kind, server.status.status_code) == (SpanKind.SERVER, StatusCode.UNSET)
    children = {"queue": SpanKind.INTERNAL, "prefill": SpanKind.CLIENT, "decode": SpanKind.CLIENT}
    assert spans.keys() == {server.name, *children}
    for name, kind in children.items():
        span = spans[name]
        assert span.parent is not None
        assert (f"{span.parent.span_id:016x}", span.kind) == (span_id(server), kind)
        assert server.start_time is not None
        assert server.end_time is not None
        assert span.start_time is not None
        assert span.end_time is not None
        assert server.start_time <= span.start_time <= span.end_time <= server.end_time
    for name, (trace_id, leg_span_id, flags) in sent.items():
        assert (trace_id, leg_span_id, flags) == (TRACE_ID, span_id(spans[name]), "01")
    assert len({span_id(span) for span in spans.values()}) == 4

    assert server.attributes is not None
    assert server.attributes.items() >= {
        ("http.request.method", "POST"),
        ("http.route", "/v1/chat/completions"),
        ("http.response.status_code", 200),
        ("gen_ai.operation.name", "chat"),
        ("gen_ai.request.model", "m"),
        ("gen_ai.request.stream", True),
        ("gen_ai.request.max_tokens", 9),
        ("gen_ai.usage.input_tokens", 7),
        ("gen_ai.response.time_to_first_chunk", 0.5),
        ("omni.request.id", "id1"),
    }
    assert spans["decode"].attributes is not None
    assert spans["decode"].attributes.items() >= {("server.address", "[::1]"), ("server.port", 8001)}
    assert outcomes(collector.metrics) == {"recorded": 1, "exported": 1, "failed": None}


async def test_failures_are_marked() -> None:
    collector = Collector()
    request = collector.tracing.begin(None, None)
    request.start_leg("prefill", "p1:8000").end(error="unreachable")
    request.start_leg("prefill", "p2:8000").end(503)
    request.start_leg("decode", "d1:8000")  # still open when the request ends
    request.finish(record(502, error="died"))
    server, first, second, third = await collector.spans()
    found = [(span.status.status_code, (span.attributes or {}).get("error.type")) for span in (server, first, second)]
    assert found == [(StatusCode.ERROR, "died"), (StatusCode.ERROR, "unreachable"), (StatusCode.ERROR, "503")]
    assert third.status.status_code == StatusCode.UNSET
    assert third.end_time == server.end_time


async def test_a_clock_that_jumps_changes_no_duration(monkeypatch: pytest.MonkeyPatch) -> None:
    collector = Collector()
    request = collector.tracing.begin(None, None)
    monkeypatch.setattr("time.time_ns", lambda: 0)
    request.start_leg("decode", "d1:8000").end(200)
    request.finish(record())
    monkeypatch.undo()
    for span in await collector.spans():
        assert span.start_time is not None
        assert span.end_time is not None
        assert 0 <= span.end_time - span.start_time < 60e9
        assert span.start_time > 1.7e18


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    receiver = OtlpReceiver()
    yield receiver
    receiver.close()


def serve_one(tracing: Tracing) -> None:
    request = tracing.begin(SAMPLED, None)
    request.start_leg("decode", "d1:8000").end(200)
    request.finish(record())


async def test_a_collector_gets_them_by_otlp(receiver: OtlpReceiver) -> None:
    metrics = Metrics()
    tracing = Tracing(TracingSettings(endpoint=receiver.url, service_name="front"), metrics.traces)
    serve_one(tracing)
    await tracing.close()
    ((path, message),) = receiver.requests
    (of_resource,) = message.resource_spans
    resource = {attribute.key: attribute.value.string_value for attribute in of_resource.resource.attributes}
    ((server, decode),) = [scope.spans for scope in of_resource.scope_spans]
    assert path == "/v1/traces"
    assert resource["service.name"] == "front"
    assert (server.trace_id.hex(), server.parent_span_id.hex()) == (TRACE_ID, PARENT_ID)
    assert (decode.name, decode.parent_span_id) == ("decode", server.span_id)
    assert outcomes(metrics)["exported"] == 1


async def test_a_collector_that_is_away_costs_traces_and_nothing_else() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        metrics = Metrics()
        endpoint = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        tracing = Tracing(TracingSettings(endpoint=endpoint), metrics.traces)
        for _ in range(3000):  # more than are kept
            serve_one(tracing)
        await tracing.close(timeout_s=0.2)
    assert outcomes(metrics)["recorded"] == 3000
    assert outcomes(metrics)["exported"] is None


async def test_a_collector_that_says_nothing_does_not_hold_up_the_end() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        tracing = Tracing(TracingSettings(endpoint=endpoint), Metrics().traces)
        serve_one(tracing)
        await tracing.close(timeout_s=0.2)  # pytest's own limit would tell


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sample_ratio": 1.5}, "sample_ratio: must be between 0 and 1, got 1.5"),
        ({"sample_ratio": float("nan")}, "sample_ratio: must be between 0 and 1, got nan"),
        (
            {"endpoint": "collector:4318"},
            "endpoint 'collector:4318': must be http://HOST:PORT of an OTLP/HTTP collector",
        ),
        ({"endpoint": "http://"}, "endpoint 'http://': must be"),
    ],
)
def test_wrong_settings_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TracingSettings(**fields)


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        ("http://c:4318", "http://c:4318/v1/traces"),
        ("http://c:4318/", "http://c:4318/v1/traces"),
        ("https://c/otlp/v1/traces", "https://c/otlp/v1/traces"),
    ],
)
def test_the_usual_path_is_filled_in(endpoint: str, url: str) -> None:
    assert TracingSettings(endpoint=endpoint).traces_url == url

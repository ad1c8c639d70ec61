"""A real engine's spans join the proxy's: W3C trace context is understood alike on both sides."""

import sys
from collections.abc import Callable, Iterator

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from omni.deployment.embedded_model import ensure_embedded_model
from services.global_proxy.observing.metrics import Metrics
from services.global_proxy.observing.request_log import RequestRecord
from services.global_proxy.observing.tracing import Tracing, TracingSettings
from tests.e2e.deployments import Server, engine_arguments, eventually, running
from tests.services.global_proxy.observing.otlp_receiver import OtlpReceiver

pytestmark = pytest.mark.engine

ENGINE_SPAN = "llm_request"


@pytest.fixture(scope="module")
def collector() -> Iterator[OtlpReceiver]:
    collector = OtlpReceiver()
    yield collector
    collector.close()


@pytest.fixture(scope="module")
def engine(
    tmp_path_factory: pytest.TempPathFactory, free_ports: Callable[[int], int], collector: OtlpReceiver
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("traced")
    port = free_ports(1)
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *engine_arguments(port, ensure_embedded_model("tiny"), 256),
        *("--kv-cache-memory-bytes", str(1 << 28)),
        *("--otlp-traces-endpoint", f"{collector.url}/v1/traces"),
    ]
    env = {
        "VLLM_CPU_OMP_THREADS_BIND": "0",
        "TORCH_COMPILE_DISABLE": "1",
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
    }
    with running(command, port, folder / "engine.log", env) as until_ready:
        yield until_ready()


async def test_an_engines_span_is_the_legs_child(engine: Server, collector: OtlpReceiver) -> None:
    leg_ids = await ask(engine, collector, sample_ratio=1.0)
    assert eventually(lambda: len(engine_spans(collector)) == 2, timeout_s=20)
    parents = {span.parent_span_id for span in engine_spans(collector)}
    trace_ids = {span.trace_id for span in collector.spans if span.name in (ENGINE_SPAN, "prefill", "decode")}
    assert parents == leg_ids
    assert len(trace_ids) == 1


async def test_an_engine_traces_nothing_of_its_own_accord(engine: Server, collector: OtlpReceiver) -> None:
    num_before = len(engine_spans(collector))
    assert await ask(engine, collector, sample_ratio=0.0) == set()
    leg_ids = await ask(engine, collector, sample_ratio=1.0)  # what comes after it has come: it is in order
    assert eventually(lambda: len(engine_spans(collector)) >= num_before + 2, timeout_s=20)
    assert {span.parent_span_id for span in engine_spans(collector)[num_before:]} == leg_ids


async def ask(engine: Server, collector: OtlpReceiver, sample_ratio: float) -> set[bytes]:
    """Both legs of a request, as the proxy sends them; the ids of their spans, once these are at the collector."""
    settings = TracingSettings(endpoint=collector.url, sample_ratio=sample_ratio)
    tracing = Tracing(settings, Metrics().traces)
    num_before = len(collector.spans)
    trace = tracing.begin(None, None)
    for role in ("prefill", "decode"):
        leg = trace.start_leg(role, engine.url.removeprefix("http://"))
        headers = dict(line.split(": ", 1) for line in leg.headers.decode().splitlines())
        body = {"model": "test-model", "prompt": "Hello", "max_tokens": 2}
        with engine.open("/v1/completions", body, headers) as answer:
            leg.end(answer.status)
    trace.finish(RequestRecord("id", "/v1/completions", status=200))
    await tracing.close(timeout_s=10)
    return {span.span_id for span in collector.spans[num_before:] if span.name in ("prefill", "decode")}


def engine_spans(collector: OtlpReceiver) -> list[Span]:
    return [span for span in collector.spans if span.name == ENGINE_SPAN]

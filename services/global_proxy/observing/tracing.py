"""OpenTelemetry traces: a span per request, with children for its wait and its legs, which the engines' spans join.

    POST /v1/chat/completions      server; child of the client's span, if it sent one
    ├── queue
    ├── prefill                    client; parent of P's llm_request
    └── decode                     client; parent of D's llm_request

One that a plain engine does whole has one leg, `mixed`, in place of these two.

A request that is traced notes moments and ids; its spans are made of them in the exporter's thread. One that is not
costs its headers: what the client sent goes on to the engines as it is. Where the client sent nothing, they are told
that the request is not sampled, or each of them would begin a trace of its own.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

from services.global_proxy.observing.families import LabelledCounterFamily
from services.global_proxy.observing.request_log import RequestRecord
from services.global_proxy.observing.trace_context import (
    header_lines,
    new_span_id,
    new_trace_id,
    parse_traceparent,
    traceparent_line,
)
from services.global_proxy.observing.traced_request import TracedRequest

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

    from services.global_proxy.observing.trace_exporter import TraceExporter

_RATIO_MASK = (1 << 64) - 1  # of a trace id: what OpenTelemetry's TraceIdRatioBased looks at


@dataclass(frozen=True, kw_only=True)
class TracingSettings:
    """Where traces go, and how many.

    OpenTelemetry's own variables (OTEL_EXPORTER_OTLP_HEADERS, _CERTIFICATE, OTEL_RESOURCE_ATTRIBUTES …) hold too.

    Raises:
        ValueError: naming the field and what to do.
    """

    endpoint: str | None = None  # of an OTLP/HTTP collector: http://HOST:4318, or with another path than /v1/traces
    sample_ratio: float = 0.01  # of the requests whose client does not say itself whether they are traced
    service_name: str = "omni-global-proxy"

    def __post_init__(self) -> None:
        if not 0.0 <= self.sample_ratio <= 1.0:
            raise ValueError(f"sample_ratio: must be between 0 and 1, got {self.sample_ratio:g}")
        if self.endpoint is None:
            return
        parts = urlsplit(self.endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"endpoint {self.endpoint!r}: must be http://HOST:PORT of an OTLP/HTTP collector")

    @property
    def traces_url(self) -> str:
        assert self.endpoint is not None
        parts = urlsplit(self.endpoint)
        return self.endpoint if parts.path.strip("/") else parts._replace(path="/v1/traces").geturl()


class Leg(Protocol):
    """One request to one engine."""

    @property
    def headers(self) -> bytes:
        """Trace context for the engine: whole header lines, or nothing."""

    def end(self, status: int | None = None, error: str | None = None) -> None:
        """The engine's answer is complete, or the leg has failed with `error` (a word of labels.FAILURE_REASONS)."""


class RequestTrace(Protocol):
    """A request on its way, whether it is traced or not."""

    @property
    def trace_id(self) -> str | None:
        """As it stands in the log; None: not traced."""

    def admitted(self) -> None:
        """It leaves the queue."""

    def start_leg(self, role: str, instance: str) -> Leg:
        """It is about to be sent to an engine ("HOST:PORT"). There may be several, one after the other or at once."""

    def finish(
        self, record: RequestRecord, model: str | None = None, stream: bool = False, max_new_tokens: int | None = None
    ) -> None:
        """The request is over. The record must not change afterwards."""


class Untraced:
    """A request that is not sampled, and its legs."""

    __slots__ = ("headers",)
    trace_id = None

    def __init__(self, headers: bytes) -> None:
        self.headers = headers

    def admitted(self) -> None:
        return

    def start_leg(self, role: str, instance: str) -> Leg:
        return self

    def end(self, status: int | None = None, error: str | None = None) -> None:
        return

    def finish(
        self, record: RequestRecord, model: str | None = None, stream: bool = False, max_new_tokens: int | None = None
    ) -> None:
        return


_NO_CONTEXT = Untraced(b"")


class Tracing:
    """Decides which requests are traced.

    A client's own decision is followed; otherwise chance decides. With an endpoint it starts a thread, so make it in
    the process that serves, after any fork. Close it.

    Args:
        outcomes: counts traces; see labels.TRACE_OUTCOMES.
        span_exporter: instead of one that sends to the endpoint.
    """

    def __init__(
        self,
        settings: TracingSettings,
        outcomes: LabelledCounterFamily,
        span_exporter: "SpanExporter | None" = None,
    ) -> None:
        self._sampled_below = round(settings.sample_ratio * (_RATIO_MASK + 1))
        self._exporter: TraceExporter | None = None
        if settings.endpoint is not None:
            # OpenTelemetry takes 0.2 s to import.
            from services.global_proxy.observing import trace_exporter

            spans = span_exporter or trace_exporter.otlp_exporter(settings.traces_url)
            self._exporter = trace_exporter.TraceExporter(spans, settings.service_name, outcomes)

    def begin(self, traceparent: bytes | None, tracestate: bytes | None) -> RequestTrace:
        """A request has come in with these headers; both are checked to be header values, no more."""
        if self._exporter is None:
            return _NO_CONTEXT if traceparent is None else Untraced(header_lines(traceparent, tracestate))
        parent = None if traceparent is None else parse_traceparent(traceparent)
        if parent is not None:
            if not parent.sampled:
                return Untraced(header_lines(traceparent, tracestate))
            return TracedRequest(self._exporter.queue, int(parent.trace_id, 16), int(parent.span_id, 16), tracestate)
        trace_id = new_trace_id()
        if trace_id & _RATIO_MASK >= self._sampled_below:
            return Untraced(traceparent_line(trace_id, new_span_id(), sampled=False))
        return TracedRequest(self._exporter.queue, trace_id)

    async def close(self, timeout_s: float = 2.0) -> None:
        """Send what is left, if the collector takes it in time."""
        if self._exporter is not None:
            await self._exporter.close(timeout_s)

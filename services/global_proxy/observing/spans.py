"""A traced request as OpenTelemetry spans.

Attributes go by the semantic conventions for HTTP and GenAI where these have a name; ours start with "omni.".
Source: https://opentelemetry.io/docs/specs/semconv/ (http/http-spans, gen-ai/gen-ai-spans).
"""

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState
from opentelemetry.util.types import AttributeValue

from services.global_proxy.observing.request_log import RequestRecord
from services.global_proxy.observing.traced_request import TracedLeg, TracedRequest

_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_SCOPE = InstrumentationScope("services.global_proxy")
_FAILED = Status(StatusCode.ERROR)
_UNSET = Status(StatusCode.UNSET)
_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}


def make_spans(request: TracedRequest, resource: Resource) -> list[ReadableSpan]:
    """The request's own span and its children."""
    return _Maker(request, resource).make()


class _Maker:
    """What a request's spans have in common."""

    def __init__(self, request: TracedRequest, resource: Resource) -> None:
        self._request = request
        self._resource = resource
        self._wall_offset_ns = request.start_wall_ns - request.start_ns
        state = request.tracestate
        self._state = TraceState() if state is None else TraceState.from_header([state.decode("latin-1")])
        self._own = self._context(request.span_id)

    def make(self) -> list[ReadableSpan]:
        request, record = self._request, self._request.record
        assert record is not None, "only finished requests are exported"
        parent = None if request.parent_span_id is None else self._context(request.parent_span_id, is_remote=True)
        error = record.error or (str(record.status) if record.status >= 500 else None)
        attributes = self._of_request(record)
        spans = [
            self._span(
                f"POST {record.path}",
                self._own,
                parent,
                SpanKind.SERVER,
                (request.start_ns, request.end_ns),
                attributes,
                error,
            )
        ]
        if request.admitted_ns is not None:
            queue = self._context(request.span_id ^ 1)  # nobody else's: ids are random in 63 bits
            times = (request.start_ns, request.admitted_ns)
            spans.append(self._span("queue", queue, self._own, SpanKind.INTERNAL, times, {}))
        spans.extend(self._of_leg(leg) for leg in request.legs)
        return spans

    def _of_request(self, record: RequestRecord) -> dict[str, AttributeValue | None]:
        request = self._request
        return {
            "http.request.method": "POST",
            "http.route": record.path,
            "http.response.status_code": record.status,
            "gen_ai.provider.name": "vllm",
            "gen_ai.operation.name": _OPERATIONS.get(record.path),
            "gen_ai.request.model": request.model,
            "gen_ai.request.stream": request.stream,
            "gen_ai.request.max_tokens": request.max_new_tokens,
            "gen_ai.usage.input_tokens": record.prompt_tokens,
            "gen_ai.response.time_to_first_chunk": record.ttft_s,
            "omni.request.id": record.id,
            "omni.client_request.id": record.client_id,
            "omni.decode_only.reason": record.decode_only,
            "omni.retries": record.retries,
            "omni.continued": record.continued,
            "omni.chunks": record.chunks,
        }

    def _of_leg(self, leg: TracedLeg) -> ReadableSpan:
        host, _, port = leg.instance.rpartition(":")
        attributes: dict[str, AttributeValue | None] = {
            "http.request.method": "POST",
            "http.response.status_code": leg.status,
            "server.address": host,
            "server.port": int(port),
        }
        error = leg.error or (str(leg.status) if leg.status is not None and leg.status >= 400 else None)
        times = (leg.start_ns, leg.end_ns or self._request.end_ns)
        return self._span(leg.role, self._context(leg.span_id), self._own, SpanKind.CLIENT, times, attributes, error)

    def _span(
        self,
        name: str,
        context: SpanContext,
        parent: SpanContext | None,
        kind: SpanKind,
        times_ns: tuple[int, int],
        attributes: dict[str, AttributeValue | None],
        error: str | None = None,
    ) -> ReadableSpan:
        """The SDK's live spans cost a lock and fourteen microseconds each, on the way of a request; this does not."""
        if error is not None:
            attributes["error.type"] = error
        start_ns, end_ns = times_ns
        return ReadableSpan(
            name,
            context=context,
            parent=parent,
            resource=self._resource,
            attributes={key: value for key, value in attributes.items() if value is not None},
            kind=kind,
            status=_UNSET if error is None else _FAILED,
            start_time=start_ns + self._wall_offset_ns,
            end_time=end_ns + self._wall_offset_ns,
            instrumentation_scope=_SCOPE,
        )

    def _context(self, span_id: int, is_remote: bool = False) -> SpanContext:
        return SpanContext(self._request.trace_number, span_id, is_remote, _SAMPLED, self._state)

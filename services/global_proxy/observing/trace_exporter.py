"""Finished traces on their way to a collector, on OpenTelemetry's own batching thread."""

import asyncio
import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import cast

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import SpanContext, TraceFlags

from services.global_proxy.observing.families import LabelledCounterFamily
from services.global_proxy.observing.spans import make_spans
from services.global_proxy.observing.traced_request import TracedRequest

_MAX_QUEUED = 2048  # traces; more are dropped while the collector is slow or away
_BATCH = 32  # traces; encoding that many takes the interpreter for some milliseconds
_SCHEDULE_MS = 5000.0  # how long a trace may wait for others; also how often the idle thread looks
_TIMEOUT_S = 5.0  # for a batch, with what is tried again

# These would log each trace that is dropped, on the event loop, and each of several attempts to reach the collector.
# What is left is one line per batch that was lost.
_CHATTY = ("opentelemetry.sdk._shared_internal", "opentelemetry.exporter.otlp.proto.http.trace_exporter")


def otlp_exporter(traces_url: str) -> SpanExporter:
    """Sends spans by OTLP over HTTP."""
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    return OTLPSpanExporter(traces_url, timeout=_TIMEOUT_S)


class TraceExporter:
    """Takes traces without waiting; whatever the collector does, serving does not notice.

    Args:
        exporter: where spans go.
        outcomes: counts traces; see labels.TRACE_OUTCOMES.
    """

    def __init__(self, exporter: SpanExporter, service_name: str, outcomes: LabelledCounterFamily) -> None:
        self._spans = _SpanMaker(exporter, Resource.create({"service.name": service_name}), outcomes)
        self._batches = BatchSpanProcessor(
            self._spans,
            max_queue_size=_MAX_QUEUED,
            schedule_delay_millis=_SCHEDULE_MS,
            max_export_batch_size=_BATCH,
        )
        self._recorded = outcomes.labels("recorded")

    def queue(self, trace: TracedRequest) -> None:
        self._recorded.inc()
        self._batches.on_end(cast(ReadableSpan, _Finished(trace)))

    async def close(self, timeout_s: float) -> None:
        """Send what is queued; whatever is not sent after `timeout_s` is lost."""
        done: Future[None] = Future()
        done.set_running_or_notify_cancel()  # or the deadline would cancel it, and the thread find it so

        def shut_down() -> None:
            self._batches.shutdown()  # type: ignore[no-untyped-call]
            done.set_result(None)

        # Not the loop's own executor: the interpreter would wait for its threads at exit, and this one may take 30 s.
        threading.Thread(target=shut_down, daemon=True).start()
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.wrap_future(done)
        except TimeoutError:
            self._spans.shutdown()


class _Finished:
    """What BatchSpanProcessor wants to know of a span before it queues it; the rest is for `_SpanMaker`."""

    __slots__ = ("trace",)
    context = SpanContext(1, 1, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))

    def __init__(self, trace: TracedRequest) -> None:
        self.trace = trace


class _SpanMaker(SpanExporter):
    """Makes spans of traces, on the thread that exports them."""

    def __init__(self, exporter: SpanExporter, resource: Resource, outcomes: LabelledCounterFamily) -> None:
        self._exporter = exporter
        self._resource = resource
        self._exported = outcomes.labels("exported")  # counted on this thread alone
        self._failed = outcomes.labels("failed")
        self._stopped = threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        finished = cast(Sequence[_Finished], spans)
        result = SpanExportResult.FAILURE
        try:
            result = self._exporter.export([s for one in finished for s in make_spans(one.trace, self._resource)])
        finally:
            (self._exported if result is SpanExportResult.SUCCESS else self._failed).inc(len(finished))
        return result

    def shutdown(self) -> None:
        if not self._stopped.is_set():
            self._stopped.set()
            self._exporter.shutdown()

"""A request that is traced: moments and ids, noted as cheaply as can be."""

import time
from collections.abc import Callable

from services.global_proxy.observing.request_log import RequestRecord
from services.global_proxy.observing.trace_context import new_span_id, traceparent_line


class TracedLeg:
    """One request to one engine. Times are time.monotonic_ns()."""

    __slots__ = ("end_ns", "error", "headers", "instance", "role", "span_id", "start_ns", "status")

    def __init__(self, trace_id: int, tracestate: bytes | None, role: str, instance: str) -> None:
        self.role = role
        self.instance = instance
        self.span_id = new_span_id()
        self.start_ns = time.monotonic_ns()
        self.end_ns: int | None = None
        self.status: int | None = None
        self.error: str | None = None
        self.headers = traceparent_line(trace_id, self.span_id, sampled=True)
        if tracestate is not None:
            self.headers += b"tracestate: %b\r\n" % tracestate

    def end(self, status: int | None = None, error: str | None = None) -> None:
        self.end_ns = time.monotonic_ns()
        self.status = status
        self.error = error


class TracedRequest:
    """What the request's spans will be made of.

    Args:
        finished: takes it once it is complete.
        parent_span_id: the client's, if it sent one.
    """

    __slots__ = (
        "admitted_ns",
        "end_ns",
        "finished",
        "legs",
        "max_new_tokens",
        "model",
        "parent_span_id",
        "record",
        "span_id",
        "start_ns",
        "start_wall_ns",
        "stream",
        "trace_number",
        "tracestate",
    )

    def __init__(
        self,
        finished: "Callable[[TracedRequest], None]",
        trace_number: int,
        parent_span_id: int | None = None,
        tracestate: bytes | None = None,
    ) -> None:
        self.finished = finished
        self.trace_number = trace_number
        self.parent_span_id = parent_span_id
        self.tracestate = tracestate
        self.span_id = new_span_id()
        self.start_wall_ns = time.time_ns()  # the only look at the wall clock: it may jump while the request runs
        self.start_ns = time.monotonic_ns()
        self.admitted_ns: int | None = None
        self.end_ns = self.start_ns
        self.legs: list[TracedLeg] = []
        self.record: RequestRecord | None = None
        self.model: str | None = None
        self.stream = False
        self.max_new_tokens: int | None = None

    @property
    def trace_id(self) -> str:
        return f"{self.trace_number:032x}"

    def admitted(self) -> None:
        self.admitted_ns = time.monotonic_ns()

    def start_leg(self, role: str, instance: str) -> TracedLeg:
        leg = TracedLeg(self.trace_number, self.tracestate, role, instance)
        self.legs.append(leg)
        return leg

    def finish(
        self, record: RequestRecord, model: str | None = None, stream: bool = False, max_new_tokens: int | None = None
    ) -> None:
        self.end_ns = time.monotonic_ns()
        self.record = record
        self.model = model
        self.stream = stream
        self.max_new_tokens = max_new_tokens
        self.finished(self)

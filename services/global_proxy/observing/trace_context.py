"""W3C Trace Context: the headers by which spans of several programs join into one trace.

Source: https://www.w3.org/TR/trace-context/ (level 1; flags of level 2 are passed over).
"""

import random
import re
from typing import NamedTuple

_TRACEPARENT = re.compile(rb"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_SAMPLED = 0x01


class Parent(NamedTuple):
    """The client's span; ids in hexadecimal."""

    trace_id: bytes
    span_id: bytes
    sampled: bool


def parse_traceparent(value: bytes) -> Parent | None:
    """The client's span; None when the header is malformed: then it counts as absent."""
    match = _TRACEPARENT.fullmatch(value)
    if match is None:
        return None
    version, trace_id, span_id, flags, more = match.groups()
    if more is not None and version == b"00":
        return None
    return Parent(trace_id, span_id, bool(int(flags, 16) & _SAMPLED))


def header_lines(traceparent: bytes | None, tracestate: bytes | None) -> bytes:
    """Lines of an HTTP/1.1 head, as they go to an engine. Without a traceparent, a tracestate means nothing."""
    if traceparent is None:
        return b""
    if tracestate is None:
        return b"traceparent: %b\r\n" % traceparent
    return b"traceparent: %b\r\ntracestate: %b\r\n" % (traceparent, tracestate)


def traceparent_line(trace_id: int, span_id: int, sampled: bool) -> bytes:
    return b"traceparent: 00-%032x-%016x-%02x\r\n" % (trace_id, span_id, sampled)


def new_trace_id() -> int:
    return random.getrandbits(128) | 1 << 127  # never 0; that bit is not part of what is sampled by


def new_span_id() -> int:
    return random.getrandbits(64) | 1 << 63  # never 0

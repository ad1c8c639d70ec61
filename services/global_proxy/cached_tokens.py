"""The number of cached tokens that a client is told, where P and D work at once.

A plain server would have found in its prefix cache what P found in its own. D, asked before P knew, reports what it
loaded from P.
"""

import re

from services.global_proxy.http.engine_connection import Sink
from services.global_proxy.http.framing import LAST_CHUNK, as_chunk, payloads

_NAME = b'"cached_tokens":'  # in a JSON string the quotes would be escaped
_FIELD = re.compile(_NAME + rb"(?:\d+|null)")


def with_cached_tokens(body: bytes, num_cached_tokens: int) -> bytes:
    """JSON with this number in its usage, if it has any."""
    return _FIELD.sub(b"%b%d" % (_NAME, num_cached_tokens), body) if _NAME in body else body


class CachedTokensSink:
    """Before another sink."""

    def __init__(self, sink: Sink, num_cached_tokens: int) -> None:
        self._sink = sink
        self._num_cached_tokens = num_cached_tokens

    def take(self, data: bytes, done: bool) -> None:
        if _NAME in data:
            chunks = [as_chunk(with_cached_tokens(payload, self._num_cached_tokens)) for payload in payloads(data)]
            data = b"".join(chunks) + (LAST_CHUNK if done else b"")
        self._sink.take(data, done)

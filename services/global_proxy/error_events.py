"""Errors that an engine reports inside of a stream: its 200 is long gone then.

One that says that the engine has failed never reaches a client: it counts as the engine's loss, and the client is told
of that in our words. One about the request passes as it is.
"""

import msgspec

ERROR_EVENT = b'data: {"error"'  # in a JSON string the quotes would be escaped
_MAX_TEXT_BYTES = 500


class _Error(msgspec.Struct):
    code: int = 500


class _Event(msgspec.Struct):
    error: _Error


_decode = msgspec.json.Decoder(_Event).decode


def error_at(data: bytes, start: int = 0) -> tuple[int, int] | None:
    """Where the first error event in `data` begins, from `start` on, and its code; None if there is none."""
    start = data.find(ERROR_EVENT, start)
    if start < 0:
        return None
    try:
        return start, _decode(data[start + len(b"data: ") : data.find(b"\n", start)]).error.code
    except msgspec.DecodeError:
        return start, 500


def loss_in(data: bytes) -> str | None:
    """What the engine says of its own failure, for the log; None if it speaks of none."""
    found = error_at(data)
    while found is not None:
        start, code = found
        if code >= 500:
            return data[start : start + _MAX_TEXT_BYTES].partition(b"\n")[0].decode(errors="replace")
        found = error_at(data, start + len(ERROR_EVENT))
    return None

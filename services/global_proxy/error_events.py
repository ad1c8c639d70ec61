"""Errors that an engine reports inside of a stream: its 200 is long gone then."""

import msgspec

_ERROR = b'data: {"error"'  # in a JSON string the quotes would be escaped


class _Error(msgspec.Struct):
    code: int = 500


class _Event(msgspec.Struct):
    error: _Error


_decode = msgspec.json.Decoder(_Event).decode


def error_at(data: bytes) -> tuple[int, int] | None:
    """Where the first error event in `data` begins, and its code; None if there is none."""
    start = data.find(_ERROR)
    if start < 0:
        return None
    end = data.find(b"\n", start)
    try:
        return start, _decode(data[start + len(b"data: ") : end]).error.code
    except msgspec.DecodeError:
        return start, 500


def is_lost(data: bytes) -> bool:
    """Whether the engine says that it has failed, and not the request."""
    found = error_at(data)
    return found is not None and found[1] >= 500

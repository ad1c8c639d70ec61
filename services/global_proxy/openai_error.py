"""Errors in OpenAI's shape, field for field as vLLM writes them."""

import msgspec

from services.global_proxy.errors import ProxyError


def error_json(message: str, kind: str, status: int, param: str | None = None) -> bytes:
    return msgspec.json.encode({"error": {"message": message, "type": kind, "param": param, "code": status}})


def to_json(error: ProxyError) -> bytes:
    return error_json(error.message, error.kind, error.status, error.param)


def to_event(error: ProxyError) -> bytes:
    """The error as one server-sent event, for a stream whose status line is long gone."""
    return b"data: " + to_json(error) + b"\n\n"

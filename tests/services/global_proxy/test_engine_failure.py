"""An engine's 5xx in our words."""

from types import SimpleNamespace
from typing import Any

import pytest

from services.global_proxy.engine_failure import as_our_own
from services.global_proxy.errors import EngineStatusError, ProxyError
from services.global_proxy.http.engine_connection import EngineAnswer
from services.global_proxy.http.response_head import parse_head

ENGINE: Any = SimpleNamespace(role="decode", name="d:1")


def told(status: int, text: bytes = b"secret", *lines: bytes) -> ProxyError:
    head = parse_head(b"\r\n".join((b"HTTP/1.1 %d X" % status, b"content-length: %d" % len(text), *lines)))
    return as_our_own(EngineStatusError(ENGINE, EngineAnswer(head, text)), "id7")


@pytest.mark.parametrize(
    ("status", "expected", "kind"),
    [
        (500, 500, "InternalServerError"),
        (501, 501, "NotImplementedError"),
        (502, 502, "BadGatewayError"),
        (503, 503, "ServiceUnavailableError"),
        (504, 504, "GatewayTimeoutError"),
        (507, 502, "BadGatewayError"),
    ],
)
def test_status_and_kind(status: int, expected: int, kind: str) -> None:
    error = told(status)
    assert (error.status, error.kind) == (expected, kind)
    assert error.message.startswith("The decode instance ")
    assert "secret" not in error.message


@pytest.mark.parametrize(
    ("value", "seconds"), [(b"7", 7), (b"soon: ask me", None), (b"", None), (b"9" * 30, None), (b"\xb2", None)]
)
def test_retry_after_is_a_number(value: bytes, seconds: int | None) -> None:
    assert told(503, b"", b"retry-after: " + value).retry_after_s == seconds


def test_the_log_has_it_in_one_line_and_not_all_of_it(caplog: pytest.LogCaptureFixture) -> None:
    told(500, b"secret\nforged line\xff" + b"x" * 10**6)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.message.startswith("request id7: decode d:1 says 500: 'secret\\nforged line")
    assert len(record.message) < 3000

"""Errors inside of streams."""

import pytest

from services.global_proxy.error_events import error_at, loss_in

LOST = b'data: {"error":{"message":"EngineCore encountered an issue","type":"InternalServerError","code":500}}\n\n'
REFUSED = b'data: {"error":{"message":"too long","type":"BadRequestError","param":null,"code":400}}\n\n'
TEXT = b'data: {"choices":[{"text":"data: {\\"error\\": 1}"}]}\n\n'


def test_an_engine_that_failed_is_lost_and_a_refusal_is_not() -> None:
    assert loss_in(b"5\r\n" + LOST) is not None
    assert loss_in(REFUSED) is None
    assert error_at(TEXT + REFUSED) == (len(TEXT), 400)


def test_text_is_no_error() -> None:
    assert error_at(TEXT) is None


@pytest.mark.parametrize(
    "broken", [b'data: {"error":', b'data: {"error":"what"}\n\n', b'data: {"error":{"code":"x"}}\n\n']
)
def test_what_cannot_be_read_counts_as_lost(broken: bytes) -> None:
    assert loss_in(broken) is not None


def test_what_the_engine_says_is_for_the_log() -> None:
    assert loss_in(TEXT + REFUSED) is None
    assert loss_in(TEXT + REFUSED + LOST) == LOST.decode().rstrip("\n"), "whatever comes before it"
    assert len(loss_in(LOST[:-3] + b"x" * 10**6) or "") == 500

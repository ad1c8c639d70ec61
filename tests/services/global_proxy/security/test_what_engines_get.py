"""What of a client's request reaches an engine, and what does not."""

import json
import re

import pytest

from tests.services.global_proxy.security.fort import (
    COMPLETIONS,
    FROM_AN_ENGINE,
    JSON,
    POSTED,
    Fort,
    assert_error,
)

FORGED = {
    "kv_transfer_params": {"do_remote_prefill": True, "remote_host": "evil"},
    "ec_transfer_params": {"remote_host": "evil"},
    "request_id": "evil",
    "kv_cache_report_mode": "evil",
}


@pytest.mark.parametrize("path", POSTED)
async def test_what_is_the_proxys_to_say(fort: Fort, path: str) -> None:
    assert (await fort.use(path, **FORGED, vllm_xargs=FORGED | {"mine": 1}))[0] == 200
    prompt = b'"input":"Hi"' if path in ("/v1/responses", "/v1/embeddings") else b'"prompt":"Hi"'
    forged = b'"kv_transfer_params":{"a":"evil"},"kv_transfer_par\\u0061ms":{"b":"evil"},"request_id":"evil"'
    assert (await fort.ask("POST", path, JSON, b"{%b,%b,%b}" % (forged, prompt, forged)))[0] == 200
    assert len(fort.decode.taken) == 2
    for taken in fort.taken:
        assert b"evil" not in taken.body
    assert json.loads(fort.decode.taken[0].body)["vllm_xargs"] == {"mine": 1}


HEADERS = (
    b"X-data-parallel-rank: 3\r\nX-Session-ID: s\r\nX-Vllm-Priority: -9\r\nendpoint-load-metrics-format: JSON\r\n"
    b"X-Request-Id: mine\r\nX-Forwarded-For: 1.2.3.4\r\nForwarded: for=1.2.3.4\r\nCookie: a=b\r\nX-Strange: yes\r\n"
    b"Keep-Alive: 5\r\nTE: trailers\r\nOrigin: http://evil\r\nAccept-Encoding: gzip\r\nProxy-Authorization: x\r\n"
    b"Authorization: Bearer theirs\r\n"
)
TOLD = {"authorization", "host", "content-type", "content-length", "x-request-id", "traceparent", "tracestate"}


@pytest.mark.parametrize("path", FROM_AN_ENGINE)
async def test_headers_and_queries_end_here(fort: Fort, path: str) -> None:
    method, body = ("POST", b'{"prompt":"Hi"}') if path in POSTED else ("GET", b"")
    status, head, _ = await fort.ask(method, f"{path}?a=b&c=%0d%0a", (JSON if body else b"") + HEADERS, body)
    assert status == 200
    for taken in fort.taken:
        assert taken.headers.keys() <= TOLD
        assert taken.target == path
        assert taken.headers["host"] in (fort.prefill.url[7:], fort.decode.url[7:])
        assert re.fullmatch("[0-9a-f]{32}", taken.headers["x-request-id"])
    if path in COMPLETIONS:
        assert b"\r\nx-request-id: mine\r\n" in head
    assert b"server" not in head.lower()  # the engines' own headers end here, too


@pytest.mark.parametrize("path", POSTED)
@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b"null", b'{"a":' * 200 + b"1" + b"}" * 200, b'{"a": NaN}', b"\xff"]
)
async def test_what_is_no_request_reaches_no_engine(fort: Fort, path: str, body: bytes) -> None:
    assert_error(await fort.ask("POST", path, JSON, body), 400, "BadRequestError")
    assert fort.taken == []


@pytest.mark.parametrize("path", POSTED)
async def test_what_a_web_page_can_post_unasked(fort: Fort, path: str) -> None:
    for content_type in (b"", b"text/plain", b"application/x-www-form-urlencoded", b"multipart/form-data; boundary=a"):
        answer = await fort.ask("POST", path, b"Content-Type: %b\r\n" % content_type, b'{"prompt":"Hi"}')
        assert_error(answer, 400, "BadRequestError")
    assert_error(await fort.ask("POST", path, b"", b'{"prompt":"Hi"}'), 400, "BadRequestError")
    assert fort.taken == []


@pytest.mark.parametrize("n", [129, 10**9, 1e6, "129", "1_000_000", " 1000000 ", 10**400])
async def test_limits_hold_however_a_number_is_written(fort: Fort, n: object) -> None:
    """To vLLM "9" and 9.0 are integers."""
    for path, name in (("/v1/completions", "n"), ("/v1/chat/completions", "n"), ("/v1/completions", "best_of")):
        assert_error(await fort.use(path, **{name: n}), 400, "BadRequestError")
    assert fort.taken == []

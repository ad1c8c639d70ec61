"""What strangers try, from outside, and what they are told."""

import re
import socket

import pytest

from kv_transfer.auth import load_or_make_key
from services.global_proxy.membership.admin_route import admin_token
from tests.services.global_proxy.any_engine import AnyEngine
from tests.services.global_proxy.conftest import Deploy
from tests.services.global_proxy.security.fort import (
    COMPLETIONS,
    FROM_AN_ENGINE,
    JSON,
    Fort,
    assert_error,
)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/completions/",
        "//v1/completions",
        "/v1//completions",
        "/V1/completions",
        "/v1%2Fcompletions",
        "/v1%2fcompletions",
        "/%76%31/completions",
        "/v1/./completions",
        "/v1/../v1/completions",
        "/v1/%2e%2e/v1/completions",
        "/v1/completions;a=b",
        "/v1/completions%00",
        "/v1\\completions",
        "/v1/completions%3F",
        "http://x/v1/completions",
        "/inference/v1/generate",
        "/v1/models/../../reset_prefix_cache",
        "/version/../collective_rpc",
        "/v1/load_lora_adapter",
        "/invocations",
        "/pause",
        "/sleep",
        "/v1/responses/resp_1/cancel",
        "/",
        "*",
    ],
)
async def test_no_spelling_gets_past_the_routes(fort: Fort, path: str) -> None:
    answer = await fort.ask("POST", path, JSON, b'{"prompt": "Hi"}')
    assert answer[0] in (400, 404)  # 400: not a target that HTTP has
    assert_error(answer, answer[0], "NotFoundError" if answer[0] == 404 else "BadRequestError")
    assert fort.taken == []


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "HEAD", "PROPFIND"])
async def test_other_methods(fort: Fort, method: str) -> None:
    for path in COMPLETIONS:
        answer = await fort.ask(method, path, b"X-HTTP-Method-Override: POST\r\n")
        assert answer[0] == 405
        assert b"\r\nallow: POST\r\n" in answer[1]
        if method != "HEAD":
            assert_error(answer, 405, "MethodNotAllowedError")
    assert fort.taken == []


async def test_paths_do_not_make_series_of_metrics(fort: Fort) -> None:
    _, _, before = await fort.ask("GET", "/metrics")
    for number in range(5):
        await fort.ask("GET", f"/secret-{number}")
    _, _, after = await fort.ask("GET", "/metrics")
    assert b"secret" not in after
    assert after.count(b"\n") - before.count(b"\n") < 10


async def test_admin_paths_do_not_leave_the_admin_api(fort: Fort) -> None:
    token = admin_token(load_or_make_key(fort.pd.proxy.settings.key_file))
    up = ("../../metrics", "%2e%2e/%2e%2e/docs", "..%2f..%2fdocs")
    for path in (*(f"/admin/v1/{path}" for path in up), "/admin/v1//state", "/admin/v1/state/", "/admin/v1/State"):
        answer = await fort.ask("GET", path, f"Authorization: Bearer {token}\r\n".encode())
        assert_error(answer, 404, "NotFoundError")


async def test_names_in_admin_paths_may_be_encoded(fort: Fort) -> None:
    token = admin_token(load_or_make_key(fort.pd.proxy.settings.key_file))
    name = fort.decode.url.removeprefix("http://").replace(":", "%3A")
    status, _, instance = await fort.ask(
        "POST", f"/admin/v1/instances/{name}/drain", f"Authorization: Bearer {token}\r\n".encode()
    )
    assert (status, instance["state"]) == (200, "draining")


@pytest.mark.parametrize("host", ["[", "a/../b", "x@y", "a b", "\xff", "a\\b", "x:99999999"])
async def test_strange_hosts(fort: Fort, host: str) -> None:
    for path in ("/admin/v1/nothing", "/live", "/v1/models", "/docs"):
        head = f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode("latin-1")
        reader, writer = await fort.pd.raw(head)
        answer = await reader.read()
        writer.close()
        assert int(answer[9:12]) in (200, 400, 404), answer
        assert host.encode("latin-1") not in answer.partition(b"\r\n\r\n")[0]
    assert all(host not in taken.headers["host"] for taken in fort.taken)


@pytest.mark.parametrize(
    "version", ["1.0.x", "1.0", "x", "\xc6.0.0", "1..0", "9" * 5000 + ".0.0", "1.0.0.x", "\xb2.0.0"]
)
async def test_strange_versions_of_metrics(fort: Fort, version: str) -> None:
    """prometheus_client compares numbers with whatever it finds."""
    for kind in ("application/openmetrics-text", "text/plain"):
        headers = f"Accept: {kind};version={version};q=1,text/plain\r\n".encode("latin-1")
        status, head, _ = await fort.ask("GET", "/metrics", headers)
        assert status == 200
        assert b"\r\ncontent-type: text/plain; version=0.0.4;" in head


async def test_prometheus_gets_the_format_that_it_asks_for(fort: Fort) -> None:
    accept = b"application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,text/plain;version=1.0.0;q=0.4,*/*"
    _, head, _ = await fort.ask("GET", "/metrics", b"Accept: " + accept + b"\r\n")
    assert b"\r\ncontent-type: application/openmetrics-text; version=1.0.0;" in head


# What they are told


@pytest.mark.parametrize(
    "value",
    [b"a\rb: c", b"a\nb: c", b"a\x00b", b"a\r\n b", b"a\r\n\tSet-Cookie: x", b"\x7f", b"\x01"],
)
async def test_headers_cannot_be_injected(fort: Fort, value: bytes) -> None:
    for name in (b"X-Request-Id", b"X-Session-Id", b"Authorization", b"traceparent"):
        answer = await fort.ask("POST", "/v1/completions", JSON + name + b": " + value + b"\r\n", b'{"prompt":"Hi"}')
        assert_error(answer, 400, "BadRequestError")
        assert re.search(rb"\r\nx-request-id: [0-9a-f]{32}\r\n", answer[1]), "one of our own"
    assert fort.taken == []


HEADER_NAMES = {b"date", b"content-type", b"content-length", b"connection", b"x-request-id", b"x-omni-path"}


async def test_what_looks_like_an_injection_stays_one_value(fort: Fort) -> None:
    value = b"a%0d%0aSet-Cookie:x\\r\\n\xc3\xa9\"'<"
    for path in FROM_AN_ENGINE:
        status, head, _ = await fort.use(path, b"X-Request-Id: " + value + b"\r\n")
        assert status == 200
        names = [line.partition(b":")[0] for line in head.split(b"\r\n")[1:]]
        assert set(names) <= HEADER_NAMES
        if path in COMPLETIONS:
            assert b"\r\nx-request-id: " + value + b"\r\n" in head


async def test_failures_tell_nothing_of_the_inside(fort: Fort, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError(f"secret of {fort.decode.url}")

    for method in ("_receive", "_open_once"):
        with monkeypatch.context() as patch:
            patch.setattr(f"services.global_proxy.serving.Serving.{method}", fail)
            assert assert_error(await fort.use("/v1/completions"), 500, "InternalServerError") == "Internal error"
    with monkeypatch.context() as patch:
        patch.setattr("services.global_proxy.one_engine._ask", fail)
        assert assert_error(await fort.use("/v1/models"), 500, "InternalServerError") == "Internal error"
    with monkeypatch.context() as patch:
        patch.setattr("services.global_proxy.app.api_docs.page", fail)
        assert assert_error(await fort.ask("GET", "/docs"), 500, "InternalServerError") == "Internal error"


async def test_engines_that_are_gone_are_not_named(deploy: Deploy) -> None:
    with socket.socket() as one, socket.socket() as another:  # bound, so that nobody else listens there
        for sock in (one, another):
            sock.bind(("127.0.0.1", 0))
        urls = [f"http://127.0.0.1:{sock.getsockname()[1]}" for sock in (one, another)]
        pd = await deploy(0, 0, (urls[0],), (urls[1],), max_retries=0, health_misses=10**6)
        fort = Fort(pd, AnyEngine(), AnyEngine())
        for path in FROM_AN_ENGINE:
            answer = await fort.use(path)
            message = assert_error(answer, 503, "ServiceUnavailableError")
            assert not re.search(r"127\.|:\d|rror|refused|Traceback", message), message
            assert re.search(rb"\r\nretry-after: \d+", answer[1]), path

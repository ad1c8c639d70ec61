"""The OpenAPI description, and the proxy held to it: whatever is sent, answers are as described."""

import asyncio
import contextlib
import os
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.specs.openapi.checks import ignored_auth, positive_data_acceptance

from kv_transfer.auth import load_or_make_key
from services.global_proxy.membership.admin_route import admin_token
from services.global_proxy.security.routes import ROUTES
from tests.services.global_proxy.any_engine import AnyEngine
from tests.services.global_proxy.conftest import Deploy, Deployment

COUNTS = ("n", "best_of", "logprobs", "top_logprobs", "prompt_logprobs")
FEW = settings(
    max_examples=int(os.environ.get("OMNI_TEST_EXAMPLES", "20")),  # good ones, and bad ones, of each operation
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


async def test_every_route_is_described(pd: Deployment) -> None:
    schema = await _schema_of(pd)
    described = {(method.upper(), path) for path, operations in schema["paths"].items() for method in operations}
    assert {(method, path) for method, path in described if not path.startswith("/admin/")} == {
        (method, route.path) for route in ROUTES for method in route.methods if route.path != "/openapi.json"
    }
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            assert "default" in operation["responses"], path
            assert "422" not in operation["responses"], path
            assert operation["summary"]
    assert schema["paths"]["/v1/completions"]["post"]["security"] == [{"ApiKey": []}, {}]


async def test_keys_are_described(deploy: Deploy, tmp_path: Any) -> None:
    (tmp_path / "keys").write_bytes(b"")
    pd = await deploy(api_keys_file=tmp_path / "keys")
    paths = (await _schema_of(pd))["paths"]
    with_key = {path for path, operations in paths.items() for o in operations.values() if "security" in o}
    assert {path for path in with_key if not path.startswith("/admin/")} == {r.path for r in ROUTES if r.needs_key}
    assert paths["/v1/models"]["get"]["security"] == [{"ApiKey": []}]


async def test_other_methods_are_told_which_there_are(pd: Deployment) -> None:
    token = admin_token(load_or_make_key(pd.proxy.settings.key_file))
    for path, operations in (await _schema_of(pd))["paths"].items():
        url = pd.url + path.format(name="a:1", role="decode")
        for method in ("OPTIONS", "PATCH", "TRACE"):
            async with pd.client.request(method, url, headers={"Authorization": f"Bearer {token}"}) as response:
                assert response.status == 405, (method, path)
                assert (await response.json())["error"]["type"] == "MethodNotAllowedError"
                assert response.headers["Allow"] == ", ".join(sorted(method.upper() for method in operations))


TAGS = ("html", "meta", "title", "style", "h1", "h2", "p", "a", "code", "dl", "dt", "dd")


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


async def test_docs_need_no_other_server(pd: Deployment) -> None:
    async with pd.client.get(pd.url + "/docs") as response:
        assert response.status == 200
        assert response.headers["content-type"] == "text/html; charset=utf-8"
        assert response.headers["content-security-policy"].startswith("default-src 'none'")
        page = await response.text()
    tags = _Tags()
    tags.feed(page)
    assert {tag for tag, _ in tags.seen} <= set(TAGS)
    assert [attributes for _, attributes in tags.seen if {"src", "href"} & attributes.keys()] == [
        {"href": "/openapi.json"}
    ]
    for path in (*(route.path for route in ROUTES if route.path != "/openapi.json"), "/admin/v1/instances/{name}"):
        assert f" {path}</code>" in page
    assert "max_completion_tokens" in page
    assert "x-omni-path" in page
    assert "bootstrap_url" in page  # of a body that is described elsewhere


@pytest.fixture
async def described(deploy: Deploy) -> Any:
    """A proxy with the admin API, whose D takes everything; and its description for schemathesis."""
    async with AnyEngine() as prefill, AnyEngine() as decode:
        pd = await deploy(0, 0, (prefill.url,), (decode.url,), health_misses=10**6)
        schema = schemathesis.openapi.from_dict(await _schema_of(pd))
        schema.config.update(base_url=pd.url)
        yield pd, schema


async def test_limits_are_as_described(described: tuple[Deployment, Any]) -> None:
    pd, _ = described
    tried = set()
    for path, operations in (await _schema_of(pd))["paths"].items():
        body = operations.get("post", {}).get("requestBody", {}).get("content", {}).get("application/json", {})
        for name, limits in body.get("schema", {}).get("properties", {}).items():
            for most, fill in ((limits.get("maximum"), int), (limits.get("maxItems"), lambda n: ["x"] * n)):
                if most is None:
                    continue
                tried.add(name)
                status, _, _ = await pd.complete(path, **{name: fill(most)})
                assert status == 200, (path, name)
                status, answer, _ = await pd.complete(path, **{name: fill(most + 1)})
                assert (status, answer["error"]["param"]) == (400, name), path
    assert tried == {*COUNTS, "stop"}


async def test_answers_are_as_described(described: tuple[Deployment, Any]) -> None:
    """Good data and bad, for every operation; a stand-in D takes all that the proxy lets through."""
    pd, schema = described
    token = admin_token(load_or_make_key(pd.proxy.settings.key_file))
    seen: dict[str, set[int]] = {}
    await asyncio.to_thread(_try_all, schema, token, seen)
    assert len(seen) == 18
    assert seen["POST /v1/completions"] == {200, 400}
    assert seen["GET /admin/v1/state"] == {200, 401}  # bad data may be a bad token
    assert 400 in seen["POST /admin/v1/instances"]
    await pd.idle()


def _try_all(schema: Any, token: str, seen: dict[str, set[int]]) -> None:
    """schemathesis has its own client, which blocks."""
    for result in schema.get_all_operations():
        operation = result.ok()
        statuses = seen.setdefault(operation.label, set())
        check = _check_of(token if operation.path.startswith("/admin/") else None, statuses)
        for mode in schemathesis.GenerationMode:
            with contextlib.suppress(Unsatisfiable):  # nothing of it can be wrong
                FEW(given(operation.as_strategy(generation_mode=mode))(check))()


def _check_of(admin: str | None, statuses: set[int]) -> Callable[[Any], None]:
    """Which instances there can be is more than the description says. Keys are for test_security.py."""
    headers = {"Authorization": f"Bearer {admin}"} if admin else {}
    excluded = [ignored_auth, positive_data_acceptance] if admin else [ignored_auth]

    def check(case: Any) -> None:
        response = case.call(headers=headers, timeout=30)
        statuses.add(response.status_code)
        counts = [case.body.get(name) for name in COUNTS] if isinstance(case.body, dict) else []
        # A count may be in a string, as vLLM has it: no description of numbers says how large that is.
        beyond_words = [positive_data_acceptance] if any(isinstance(count, str) for count in counts) else []
        case.validate_response(response, excluded_checks=excluded + beyond_words)
        if response.status_code >= 400:
            error = response.json()["error"]
            assert error.keys() == {"message", "type", "param", "code"}
            assert error["code"] == response.status_code

    return check


async def _schema_of(pd: Deployment) -> Any:
    async with pd.client.get(pd.url + "/openapi.json") as response:
        assert response.status == 200
        return await response.json()

"""The admin API, as its clients see it."""

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi import FastAPI

from kv_transfer.auth import DeploymentKey
from services.global_proxy.membership.admin import admin_token, make_admin_router
from services.global_proxy.membership.load_table import LoadTable
from services.global_proxy.membership.member import LoadReport
from services.global_proxy.membership.registry import Registry
from services.global_proxy.membership.registry_client import DirectClient
from tests.services.global_proxy.membership.conftest import spec, until

KEY = DeploymentKey(bytes(32))
NAME = "10.0.0.1:8000"
URL = f"/admin/v1/instances/{NAME}"


def make_app(registry: Registry, table: LoadTable) -> FastAPI:
    app = FastAPI()
    app.include_router(make_admin_router(DirectClient(registry), table, admin_token(KEY)))
    return app


@pytest.fixture
async def client(registry: Registry, table: LoadTable) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(make_app(registry, table))
    headers = {"authorization": f"bearer {admin_token(KEY)}"}  # RFC 9110: in whatever case
    async with httpx.AsyncClient(transport=transport, base_url="http://proxy", headers=headers) as client:
        yield client


def error_of(answer: httpx.Response) -> tuple[int, str, str]:
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == answer.status_code
    return answer.status_code, error["type"], error["message"]


async def test_an_instance_from_first_to_last(client: httpx.AsyncClient, registry: Registry, table: LoadTable) -> None:
    new = {"role": "prefill", "url": "http://10.0.0.1:8000/", "kv_address": "10.0.0.1:9000"}
    answer = await client.post("/admin/v1/instances", json=new)
    assert answer.status_code == 201
    expected = {
        "name": NAME,
        "role": "prefill",
        "url": "http://10.0.0.1:8000",
        "kv_address": "10.0.0.1:9000",
        "bootstrap_url": None,
        "kv_events": None,
        "state": "active",
        "source": "admin",
        "is_up": True,
        "num_requests": 0,
        "num_tokens": 0,
        "num_leases": 0,
        "report": None,
    }
    assert answer.json() == expected
    assert (await client.post("/admin/v1/instances", json=new)).status_code == 200

    table.writer(1).add(0, 2, 30)
    table.writer(1).set_down(0, 60.0)
    answer = await client.post(f"{URL}/drain")
    expected |= {"state": "draining", "is_up": False, "num_requests": 2, "num_tokens": 30}
    assert (answer.status_code, answer.json()) == (200, expected)
    registry.report(NAME, LoadReport(1, 2, 3, 4, 0.001))
    (listed,) = (await client.get("/admin/v1/instances")).json()["instances"]
    report = listed.pop("report")
    assert report.pop("age_s") > 0
    assert report == {"num_running": 1, "num_waiting": 2, "kv_used_tokens": 3, "kv_total_tokens": 4}
    assert listed == {name: value for name, value in expected.items() if name != "report"}

    assert error_of(await client.delete(URL, params={"wait_s": 0}))[:2] == (409, "ConflictError")
    removing = asyncio.create_task(client.delete(URL, params={"wait_s": 20}))
    table.writer(1).add(0, -2, -30)
    answer = await removing
    assert (answer.status_code, answer.content) == (204, b"")
    assert registry.members() == ()
    assert error_of(await client.delete(URL))[:2] == (404, "NotFoundError")


async def test_a_plain_engine_is_an_instance_like_others(client: httpx.AsyncClient, registry: Registry) -> None:
    new = {"role": "mixed", "url": "http://10.0.0.1:8000", "kv_events": "10.0.0.1:9000"}
    assert (await client.post("/admin/v1/instances", json=new)).json()["role"] == "mixed"
    assert (await client.put("/admin/v1/policies/mixed", json={"policy": "least_active"})).json()["mixed"] == (
        "least_active"
    )
    assert registry.state.mixed_policy == "least_active"
    assert (await client.post(f"{URL}/drain")).json()["state"] == "draining"
    assert (await client.delete(URL)).status_code == 204
    answer = await client.post("/admin/v1/instances", json=new | {"kv_address": "10.0.0.1:9"})
    assert error_of(answer)[2].startswith("kv_address: only a prefill instance has one, got '10.0.0.1:9'")


async def test_by_force(client: httpx.AsyncClient, registry: Registry, table: LoadTable) -> None:
    registry.add(spec(1), "file")
    table.writer(0).add(0, 1, 1)
    assert (await client.delete(URL, params={"wait_s": 0, "force": True})).status_code == 204
    assert registry.members() == ()


async def test_policies_and_state(client: httpx.AsyncClient, registry: Registry, table: LoadTable) -> None:
    registry.add(spec(1), "file")
    table.writer(0).add_in_flight(3)
    table.writer(1).add_queued(2)
    answer = await client.put("/admin/v1/policies/decode", json={"policy": "least_active"})
    policies = {"prefill": "round_robin", "decode": "least_active", "mixed": "round_robin"}
    assert answer.json() == policies
    state = (await client.get("/admin/v1/state")).json()
    assert [instance["name"] for instance in state.pop("instances")] == [NAME]
    assert state == {
        "version": 3,
        "policies": policies,
        "num_workers": 2,
        "num_in_flight": 3,
        "num_queued": 2,
    }


@pytest.mark.parametrize(
    "authorization",
    ["", "Bearer ", "Bearer x", f"Basic {admin_token(KEY)}", admin_token(KEY), f"Bearer {admin_token(KEY)}\xe9"],
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/state"),
        ("GET", "/instances"),
        ("POST", "/instances"),
        ("DELETE", f"/instances/{NAME}"),
        ("POST", f"/instances/{NAME}/drain"),
        ("PUT", "/policies/decode"),
    ],
)
async def test_nothing_without_the_token(
    client: httpx.AsyncClient, registry: Registry, method: str, path: str, authorization: str
) -> None:
    registry.add(spec(1), "file")
    before = registry.state
    answer = await client.request(
        method,
        "/admin/v1" + path,
        content=b"{not read",
        headers={b"authorization": authorization.encode("latin-1")},
    )
    assert error_of(answer)[:2] == (401, "AuthenticationError")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert registry.state == before


def test_the_token_is_its_own() -> None:
    token = admin_token(KEY)
    assert len(token) == 64
    assert token == admin_token(KEY)
    assert token != admin_token(DeploymentKey(bytes(31) + b"\x01"))
    assert bytes(32).hex() not in token


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "message"),
    [
        ("POST", "/instances", b"{", 400, "body.1: JSON decode error"),
        ("POST", "/instances", b"\xff\x00", 400, ""),
        ("POST", "/instances", b'{"role": "prefill"}', 400, "body.url: Field required"),
        ("POST", "/instances", b'{"role": "prefill", "url": "h:1"}', 400, "url: must be http://HOST:PORT"),
        ("POST", "/instances", b'{"role": "prefill", "url": 7}', 400, "body.url: Input should be a valid string"),
        ("POST", "/instances", b'{"role": "x", "url": "http://h:1"}', 400, "body.role: Input should be"),
        ("POST", "/instances", b'{"role": "decode", "url": "http://h:1", "slot": 3}', 400, "body.slot: Extra inputs"),
        ("POST", "/instances", b" " * 70_000, 413, "The body must have 65536 bytes at most"),
        ("POST", "/instances/nobody:1/drain", b"", 404, "name: no instance is called 'nobody:1'; must be one of: "),
        ("DELETE", f"/instances/{NAME}?wait_s=nan", b"", 400, "query.wait_s: "),
        ("DELETE", f"/instances/{NAME}?wait_s=-1", b"", 400, "query.wait_s: "),
        ("PUT", "/policies/decode", b'{"policy": "best"}', 400, "decode policy: must be one of round_robin"),
        ("PUT", "/policies/nobody", b'{"policy": "least_active"}', 400, "path.role: "),
    ],
)
async def test_what_is_wrong_is_named(
    client: httpx.AsyncClient, registry: Registry, method: str, path: str, content: bytes, status: int, message: str
) -> None:
    registry.add(spec(1), "file")
    before = registry.state
    headers = {"content-type": "application/json"}
    answer = await client.request(method, "/admin/v1" + path, content=content, headers=headers)
    got_status, _, got_message = error_of(answer)
    assert got_status == status
    assert got_message.startswith(message)
    assert registry.state == before


async def test_the_schema_shows_every_route(registry: Registry, table: LoadTable) -> None:
    schema = make_app(registry, table).openapi()
    operations = [operation for path in schema["paths"].values() for operation in path.values()]
    assert len(operations) == 6
    assert all(operation["security"] == [{"HTTPBearer": []}] for operation in operations)
    assert all("422" not in operation["responses"] for operation in operations)


async def test_other_methods(client: httpx.AsyncClient) -> None:
    answer = await client.patch("/admin/v1/instances")
    assert error_of(answer) == (405, "MethodNotAllowedError", "PATCH: must be one of GET, POST")
    assert answer.headers["allow"] == "GET, POST"


async def test_many_wait_at_once(client: httpx.AsyncClient, registry: Registry, table: LoadTable) -> None:
    """Two who remove the same instance: one does, and neither is told that it failed."""
    registry.add(spec(1), "file")
    table.writer(0).add(0, 1, 1)
    removals = [asyncio.create_task(client.delete(URL, params={"wait_s": 20})) for _ in range(2)]
    await until(lambda: registry.members()[0].state == "draining")
    await asyncio.sleep(0.05)
    table.writer(0).add(0, -1, -1)
    assert [(await removal).status_code for removal in removals] == [204, 204]

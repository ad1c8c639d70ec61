"""The real proxy on a real socket, in front of stand-in engines."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from kv_transfer.auth import load_or_make_key
from services.global_proxy.membership.load_table import LoadTable
from services.global_proxy.membership.registry import Registry
from services.global_proxy.membership.registry_client import DirectClient
from services.global_proxy.processes import make_registry
from services.global_proxy.proxy import Proxy
from services.global_proxy.server import ProxyServer
from services.global_proxy.settings import Settings
from tests.standins.engine import StandinEngine
from tests.standins.lease_holder import LeaseHolder

FOREVER_S = 3600.0


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something in the server that announces itself to nobody."""
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


@dataclass
class Deployment:
    """Stand-in engines, the proxy in front of them, and a client."""

    prefill: list[StandinEngine]
    decode: list[StandinEngine]
    mixed: list[StandinEngine]
    registry: Registry
    proxy: Proxy
    server: ProxyServer
    port: int
    client: aiohttp.ClientSession
    prompt: dict[str, Any] = field(default_factory=lambda: {"model": "m", "prompt": "Hello", "max_tokens": 9})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def engines(self) -> list[StandinEngine]:
        return self.prefill + self.decode + self.mixed

    async def complete(
        self, path: str = "/v1/completions", headers: dict[str, str] | None = None, **fields: Any
    ) -> tuple[int, Any, Any]:
        """Post a completion; returns (status, JSON body, headers)."""
        async with self.client.post(self.url + path, json=self.prompt | fields, headers=headers) as response:
            return response.status, json.loads(await response.read()), response.headers

    def complete_soon(self, **fields: Any) -> "asyncio.Task[tuple[int, Any, Any]]":
        """The same, begun."""
        return asyncio.create_task(self.complete(**fields))

    async def stream(self, path: str = "/v1/completions", **fields: Any) -> tuple[int, str, Any]:
        """Post a streamed completion; returns (status, all text, headers)."""
        body = self.prompt | {"stream": True} | fields
        async with self.client.post(self.url + path, json=body) as response:
            return response.status, await response.text(), response.headers

    async def metric(self, name: str, **labels: str) -> float:
        return self.proxy.metrics.registry.get_sample_value(name, labels) or 0.0

    async def idle(self) -> None:
        """Until the proxy has no request in flight; fails unless every counter is back at its baseline."""
        await until(lambda: not len(self.proxy.in_flight))
        assert len(self.proxy.ledger) == 0
        for pool in self.proxy.members.pools:
            for instance in pool.instances:
                active = await self.metric("omni_proxy_active_requests", role=instance.role, instance=instance.name)
                assert active == 0, instance.name

    async def checked(self) -> None:
        """Until every instance has been asked for its health once; with `health_interval_s=FOREVER_S` only once."""
        await self.proxy.members.missing_roles()

    @property
    def num_connections(self) -> int:
        """To engines, idle or not."""
        return sum(len(i.endpoint._open) for pool in self.proxy.members.pools for i in pool.instances)

    async def failures(self, engine: StandinEngine, reason: str) -> float:
        """How often `engine` let a request down so."""
        roles = (("prefill", self.prefill), ("decode", self.decode), ("mixed", self.mixed))
        role = next(role for role, engines in roles if engine in engines)
        return await self.metric(
            "omni_proxy_upstream_failures_total", role=role, instance=engine.url[7:], reason=reason
        )

    async def raw(self, data: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A bare connection to the proxy with `data` sent."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(data)
        await writer.drain()
        return reader, writer


Deploy = Callable[..., Awaitable[Deployment]]
Logged = Callable[[int], Awaitable[list[dict[str, Any]]]]


@pytest.fixture
def logged(capfd: pytest.CaptureFixture[str]) -> Logged:
    """logged(n): the first n lines of the request log. Ask for this fixture before any of those that deploy."""
    text = ""

    def lines() -> list[dict[str, Any]]:
        nonlocal text
        text += capfd.readouterr().err
        return [json.loads(line) for line in text.splitlines() if line.startswith('{"id"')]

    async def wait(num_lines: int) -> list[dict[str, Any]]:
        await until(lambda: len(lines()) >= num_lines)
        return lines()

    return wait


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    """Where the proxies of `deploy` keep the deployment key."""
    return tmp_path / "deployment.key"


@pytest.fixture
def lease_holder(key_file: Path) -> Iterator[LeaseHolder]:
    """A P's leases, under the key of the proxies of `deploy`."""
    holder = LeaseHolder(load_or_make_key(key_file))
    yield holder
    holder.close()


@pytest.fixture
async def deploy(key_file: Path) -> AsyncIterator[Deploy]:
    """deploy(num_prefill, num_decode, extra_prefill_urls=(), extra_decode_urls=(), num_mixed=0, extra_mixed_urls=(),
    **settings): closed at the end.

    A stand-in P is its own bootstrap server.
    """
    async with AsyncExitStack() as stack:

        async def start(
            num_prefill: int = 1,
            num_decode: int = 1,
            extra_prefill_urls: tuple[str, ...] = (),
            extra_decode_urls: tuple[str, ...] = (),
            num_mixed: int = 0,
            extra_mixed_urls: tuple[str, ...] = (),
            **settings: Any,
        ) -> Deployment:
            prefill = [await stack.enter_async_context(StandinEngine(f"p{i}")) for i in range(num_prefill)]
            decode = [await stack.enter_async_context(StandinEngine(f"d{i}")) for i in range(num_decode)]
            mixed = [await stack.enter_async_context(StandinEngine(f"m{i}")) for i in range(num_mixed)]
            prefill_urls = (*extra_prefill_urls, *(e.url for e in prefill))
            policies = dict.fromkeys(("prefill_policy", "decode_policy", "mixed_policy"), "round_robin")
            predictable = policies | {"min_prefill_tokens": 0}
            settings = predictable | settings
            told = Settings(
                prefill_urls=prefill_urls,
                decode_urls=(*extra_decode_urls, *(e.url for e in decode)),
                mixed_urls=(*extra_mixed_urls, *(e.url for e in mixed)),
                bootstrap_urls=prefill_urls if settings.get("connector") == "mooncake" else (),
                key_file=key_file,
                **settings,
            )
            sock = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            table = LoadTable.create()
            key = load_or_make_key(key_file)
            stack.callback(table.close)
            registry = make_registry(told, table)
            proxy = await stack.enter_async_context(Proxy(told, key, table, DirectClient(registry)))
            server = await stack.enter_async_context(ProxyServer(proxy, sock))
            client = await stack.enter_async_context(aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)))
            return Deployment(prefill, decode, mixed, registry, proxy, server, sock.getsockname()[1], client)

        yield start


@pytest.fixture
async def pd(deploy: Deploy) -> Deployment:
    """One P and one D."""
    return await deploy()


@pytest.fixture
def refused_urls() -> Iterator[tuple[str, str]]:
    """Addresses on which nothing listens."""
    with socket.socket() as first, socket.socket() as second:
        for sock in (first, second):
            sock.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{first.getsockname()[1]}", f"http://127.0.0.1:{second.getsockname()[1]}"


@pytest.fixture
def refused_url(refused_urls: tuple[str, str]) -> str:
    return refused_urls[0]

"""The real command in processes of its own, with several workers, and engines that come and go."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from kv_transfer.auth import load_or_make_key
from services.global_proxy.membership.admin_route import admin_token
from tests.services.global_proxy.faults.processes import EngineProcess, ProxyProcess, ServerProcess, stopped, until

_LIMIT_S = 60


class Client:
    """One connection, so one worker of a proxy."""

    def __init__(self, url: str, token: str) -> None:
        self.url = url
        self._headers = {"Authorization": f"Bearer {token}"}
        connector = aiohttp.TCPConnector(limit=1, keepalive_timeout=600)
        self.session = aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=_LIMIT_S))

    async def call(self, method: str, path: str, content: object = None) -> tuple[int, Any]:
        """With the admin API's token; the answer's status and JSON."""
        async with self.session.request(method, self.url + path, json=content, headers=self._headers) as answer:
            return answer.status, await answer.json() if answer.content_type == "application/json" else None

    async def text(self, path: str) -> str:
        async with self.session.get(self.url + path) as answer:
            return await answer.text()


class LiveProxy(ProxyProcess):
    """`python -m services.global_proxy`, and its workers one by one."""

    def __init__(self, port: int, engines: list[EngineProcess], folder: Path, *options: str) -> None:
        super().__init__(port, engines, folder, *options)
        self.token = admin_token(load_or_make_key(folder / "deployment.key"))
        self._clients: list[Client] = []

    async def is_ready(self) -> bool:
        """It listens; one that instances join has none yet."""
        assert self.process is not None
        assert self.process.returncode is None, self.log_file.read_text()
        try:
            return (await self.call("GET", "/live"))[0] == 200
        except aiohttp.ClientError:
            return False

    async def client(self) -> Client:
        """Of whichever worker takes the connection."""
        self._clients.append(Client(self.url, self.token))
        assert (await self._clients[-1].call("GET", "/live"))[0] == 200
        return self._clients[-1]

    async def client_of(self, worker: int) -> Client:
        """Of this worker: while the others are stopped, only it can take the connection."""
        with stopped(*(pid for pid in self.workers() if pid != worker)):
            return await self.client()

    async def kill(self) -> None:
        for client in self._clients:
            await client.session.close()
        await super().kill()


@dataclass
class Stage:
    """Engines and proxies; they end with the test."""

    folder: Path
    free_port: Callable[[], int]
    processes: list[ServerProcess] = field(default_factory=list)

    async def engines(self, num_prefill: int, num_decode: int) -> tuple[list[EngineProcess], list[EngineProcess]]:
        first = len(self.processes)
        prefill = [EngineProcess("prefill", first + number, self.folder, None) for number in range(num_prefill)]
        decode = [EngineProcess("decode", first + number, self.folder, None) for number in range(num_decode)]
        self.processes += prefill + decode
        await asyncio.gather(*(engine.start() for engine in prefill + decode))
        return prefill, decode

    async def proxy(self, engines: list[EngineProcess], *options: str) -> LiveProxy:
        usual = ("--connector", "nixl", "--min-prefill-tokens", "0", "--health-interval-s", "0.2")
        proxy = LiveProxy(self.free_port(), engines, self.folder, *usual, *options)
        self.processes.append(proxy)
        await proxy.start()
        return proxy


@pytest.fixture
async def stage(tmp_path: Path, free_ports: Callable[[int], int]) -> AsyncIterator[Stage]:
    stage = Stage(tmp_path, lambda: free_ports(1))
    yield stage
    await asyncio.gather(*(process.kill() for process in stage.processes))


async def num_running(engines: list[EngineProcess]) -> list[int]:
    """Completions that each has under way."""
    return [len(await engine.seen("running")) for engine in engines]


async def eventually(look: Callable[[], Awaitable[object]], wanted: object) -> None:
    """Wait until another process shows what is wanted."""
    seen: list[object] = []

    async def is_there() -> bool:
        seen.append(await look())
        return seen[-1] == wanted

    try:
        await until(is_there, f"{wanted}", _LIMIT_S)
    except AssertionError as error:
        raise AssertionError(f"{error}; seen: {Counter(map(str, seen)).most_common(5)}") from None

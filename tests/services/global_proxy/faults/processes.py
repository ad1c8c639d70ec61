"""The processes that break: stand-in engines and the real proxy, each with what can be seen of it from outside."""

import asyncio
import json
import os
import re
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import aiohttp

from omni.process import parent_environment, start_ticks
from tests.standins.fast_engine import Knobs

_START_S = 60
_SOON_S = 20  # for what happens at once on a machine that has nothing else to do
_HOST = "127.0.0.1"


async def until(condition: Callable[[], Awaitable[bool] | bool], what: str, limit_s: float = _SOON_S) -> None:
    """Wait for another process, which announces itself to nobody."""
    end_s = time.monotonic() + limit_s
    while True:
        result = condition()
        if result if isinstance(result, bool) else await result:
            return
        assert time.monotonic() < end_s, f"not within {limit_s:g} s: {what}"
        await asyncio.sleep(0.02)


@contextmanager
def stopped(*pids: int) -> Iterator[None]:
    """SIGSTOP; SIGCONT at the end."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


class ServerProcess:
    """A program that listens on `port`."""

    def __init__(self, log_file: Path) -> None:
        self.port = 0
        self.log_file = log_file
        self.process: asyncio.subprocess.Process | None = None

    @property
    def name(self) -> str:
        return f"{_HOST}:{self.port}"

    @property
    def url(self) -> str:
        return f"http://{self.name}"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    async def run(self, *arguments: str, environment: dict[str, str] | None = None, pipe: bool = False) -> None:
        with self.log_file.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *(sys.executable, *arguments),
                stdout=asyncio.subprocess.PIPE if pipe else log,
                stderr=log,
                env=os.environ | parent_environment() | (environment or {}),
            )

    async def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
            await self.process.wait()

    async def call(self, method: str, path: str, content: object = None) -> tuple[int, dict[str, str], bytes]:
        """Status, headers in lower case, body; on a connection of its own."""
        timeout = aiohttp.ClientTimeout(total=_SOON_S)
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True), timeout=timeout) as session,
            session.request(method, self.url + path, json=content) as answer,
        ):
            return answer.status, {k.lower(): v for k, v in answer.headers.items()}, await answer.read()


class EngineProcess(ServerProcess):
    """A stand-in engine. After `kill`, `start` has it listen on the same port again.

    Args:
        control_port: of the proxy that it joins, if any.
    """

    def __init__(self, role: str, number: int, folder: Path, control_port: int | None) -> None:
        super().__init__(folder / f"{role}{number}.log")
        self.role = role
        self._joins: tuple[str, ...] = ()
        if control_port is not None:
            self._joins = (role, f"{_HOST}:{control_port}", str(folder / "deployment.key"))

    async def start(self) -> None:
        await self.run("-m", "tests.standins.fast_engine", self.log_file.stem, str(self.port), *self._joins, pipe=True)
        assert self.process is not None
        assert self.process.stdout is not None
        async with asyncio.timeout(_START_S):
            self.port = int(await self.process.stdout.readline())

    def stopped(self) -> AbstractContextManager[None]:
        """SIGSTOP; SIGCONT at the end."""
        return stopped(self.pid)

    async def set(self, **knobs: Any) -> None:
        assert (await self.call("POST", "/standin/knobs", asdict(Knobs(**knobs))))[0] == 200

    async def seen(self, *outcomes: str) -> list[dict[str, Any]]:
        """The completions that it was asked for; those with one of these outcomes, if any is given."""
        seen: list[dict[str, Any]] = json.loads((await self.call("GET", "/standin/state"))[2])["seen"]
        return [one for one in seen if not outcomes or one["outcome"] in outcomes]


class ProxyProcess(ServerProcess):
    """`python -m services.global_proxy`, in front of these engines."""

    def __init__(
        self, port: int, engines: list[EngineProcess], folder: Path, *options: str, **environment: str
    ) -> None:
        super().__init__(folder / f"proxy{port}.log")
        self.port = port
        self._key_file = folder / "deployment.key"
        self._engines = engines
        self._options = options
        self._environment = environment

    async def start(self) -> None:
        """Returns when it is ready."""
        urls = [word for engine in self._engines for word in (f"--{engine.role}", engine.url)]
        place = ("--port", str(self.port), "--key-file", str(self._key_file))
        await self.run("-m", "services.global_proxy", *place, *urls, *self._options, environment=self._environment)
        await until(self.is_ready, "the proxy is ready", _START_S)

    async def is_ready(self) -> bool:
        assert self.process is not None
        assert self.process.returncode is None, self.log_file.read_text()
        try:
            return (await self.call("GET", "/health"))[0] == 200
        except aiohttp.ClientError:
            return False

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    @property
    def num_fds(self) -> int:
        """With those of its workers."""
        return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in (self.pid, *self.workers()))

    def workers(self) -> list[int]:
        """Their pids; one worker is the proxy itself, and is not among them."""
        pids = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return [pid for pid in map(int, pids) if start_ticks(pid) is not None]

    async def each_is_ready(self) -> None:
        """Until every worker has looked at all instances: while the others are stopped, it answers."""
        workers = self.workers()
        for worker in workers:
            with stopped(*(pid for pid in workers if pid != worker)):
                await until(self.is_ready, f"worker {worker} is ready", _START_S)

    async def metrics(self) -> dict[str, float]:
        """By name and labels as Prometheus writes them, with the prefix left out."""
        text = (await self.call("GET", "/metrics"))[2].decode()
        return {name: float(value) for name, value in re.findall(r"^omni_proxy_(\S+) (\S+)$", text, re.MULTILINE)}

    async def metric(self, name: str, **labels: str) -> float:
        """Summed over the series that have these labels."""
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        found = [
            (series, value) for series, value in (await self.metrics()).items() if series.partition("{")[0] == name
        ]
        return sum(value for series, value in found if all(label in series for label in wanted))

    async def of(self, engine: EngineProcess, name: str, **labels: str) -> float:
        """A metric of one instance."""
        return await self.metric(name, role=engine.role, instance=engine.name, **labels)

    async def is_without(self, *engines: EngineProcess) -> None:
        """Until its health checks have told it that these are gone."""

        async def knows() -> bool:
            return not any([await self.of(engine, "instance_up") for engine in engines])

        await until(knows, "the proxy knows that they are gone")

    def log_lines(self, *words: str) -> list[str]:
        """Those of the log's lines that have all of these words; request records are none of them."""
        lines = self.log_file.read_text(errors="replace").splitlines()
        return [line for line in lines if not line.startswith("{") and all(word in line for word in words)]


def seconds_of(line: str) -> float:
    """When a log line was written, on the wall clock."""
    return datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f").timestamp()

"""A proxy with engines to break, and a report of what breaking them cost."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.services.global_proxy.faults.load import REQUEST_TIMEOUT_S, Load
from tests.services.global_proxy.faults.processes import EngineProcess, ProxyProcess, seconds_of, until

_TABLE: list[str] = []


@dataclass
class Fault:
    """One fault under load. Its times are seconds after it happened."""

    load: Load
    proxy: ProxyProcess
    began_s: float = 0.0
    _began_wall_s: float = 0.0

    def happens_now(self) -> None:
        self.began_s, self._began_wall_s = time.monotonic(), time.time()

    def noticed_s(self, *words: str, num_workers: int = 1) -> float:
        """When the log said so first; every worker must have done so once."""
        lines = self.proxy.log_lines(*words)
        assert len(lines) == num_workers, lines
        return min(map(seconds_of, lines)) - self._began_wall_s

    def report(self, row: str, noticed_s: float | None = None) -> None:
        noticed = "-" if noticed_s is None else f"{max(noticed_s, 0):.2f} s"
        first = f"{self.load.first_success_s(self.began_s):.2f} s"
        failed, all_ = len(self.load.failed_since(self.began_s)), len(self.load.outcomes)
        _TABLE.append(f"| {row} | {noticed} | {first} | {failed} of {all_} |")


@dataclass
class Fleet:
    """Two P and two D, unless told otherwise, and proxies in front of them."""

    prefill: list[EngineProcess]
    decode: list[EngineProcess]
    folder: Path
    free_port: Callable[[], int]
    control_port: int | None = None  # of the one proxy that they join; else every proxy is told of them
    proxies: list[ProxyProcess] = field(default_factory=list)

    @property
    def engines(self) -> list[EngineProcess]:
        return [*self.prefill, *self.decode]

    async def start_proxy(self, *options: str, **environment: str) -> ProxyProcess:
        """A proxy that notices within about two seconds that an engine has stopped."""
        usual = (
            *("--health-interval-s", "0.2", "--health-timeout-s", "0.6", "--health-misses", "3"),
            *("--request-timeout-s", str(REQUEST_TIMEOUT_S), "--connect-timeout-s", "0.5"),
            *("--connector", "nixl", "--min-prefill-tokens", "0"),
            *("--prefill-policy", "round_robin", "--decode-policy", "round_robin"),
        )
        told = self.engines
        if self.control_port is not None:
            told, options = [], ("--control-port", str(self.control_port), *options)
        proxy = ProxyProcess(self.free_port(), told, self.folder, *usual, *options, **environment)
        self.proxies.append(proxy)
        await proxy.start()
        await proxy.each_is_ready()
        return proxy

    @asynccontextmanager
    async def under_load(
        self, proxy: ProxyProcess, num_clients: int = 20, *, spare_fds: int = 0
    ) -> AsyncIterator[Fault]:
        """Clients come, the fault happens inside the block, and is over; then nothing of it may be left.

        Afterwards load counters and file descriptors are as they were, every engine takes requests again, and no
        request is still running anywhere.

        Args:
            spare_fds: that a proxy may have more afterwards, if it is another process.
        """
        num_fds = proxy.num_fds  # with a connection to each engine, for its health
        async with Load(proxy.url, num_clients) as load:
            await load.successes(num_clients)
            assert not load.failed_since()
            yield Fault(load, proxy)
            await load.successes(num_clients)
        await self._is_calm(proxy, num_fds + spare_fds)

    async def _is_calm(self, proxy: ProxyProcess, num_fds: int) -> None:
        async def is_idle() -> bool:
            metrics = await proxy.metrics()
            counters = ("active_requests", "active_tokens", "open_leases", "requests_in_flight", "requests_queued")
            return not any(value for name, value in metrics.items() if name.partition("{")[0] in counters)

        await until(is_idle, "the load counters are back at 0")
        for engine in self.engines:
            assert not await engine.seen("running")
        for engine in self.engines:
            await engine.call("POST", "/standin/close_idle")
        await until(lambda: proxy.num_fds <= num_fds, f"file descriptors are back at {num_fds}")


StartFleet = Callable[..., Awaitable[Fleet]]


@pytest.fixture
async def start_fleet(tmp_path: Path, free_ports: Callable[[int], int]) -> AsyncIterator[StartFleet]:
    """start_fleet(num_prefill=2, num_decode=2, joins=False): their processes end with the test."""
    fleets: list[Fleet] = []

    async def start(num_prefill: int = 2, num_decode: int = 2, joins: bool = False) -> Fleet:
        control_port = free_ports(1) if joins else None
        prefill = [EngineProcess("prefill", number, tmp_path, control_port) for number in range(num_prefill)]
        decode = [EngineProcess("decode", number, tmp_path, control_port) for number in range(num_decode)]
        fleets.append(Fleet(prefill, decode, tmp_path, lambda: free_ports(1), control_port))
        await asyncio.gather(*(engine.start() for engine in fleets[-1].engines))
        return fleets[-1]

    yield start
    await asyncio.gather(*(process.kill() for fleet in fleets for process in (*fleet.proxies, *fleet.engines)))


@pytest.fixture
async def fleet(start_fleet: StartFleet) -> Fleet:
    return await start_fleet()


@pytest.fixture(scope="session", autouse=True)
def _print_table() -> Iterator[None]:
    """With `pytest -s`."""
    yield
    if _TABLE:
        print("\n\n| fault | noticed after | first success | failed requests |\n|---|---|---|---|")
        print("\n".join(_TABLE))

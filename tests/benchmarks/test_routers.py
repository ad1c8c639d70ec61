"""nginx and vllm-router are started as both benchmarks that have them need it."""

import asyncio
import os
from pathlib import Path

import aiohttp
import pytest

from benchmarks import routers
from benchmarks.bench_serving.processes import running, wait_until_healthy
from benchmarks.servers import free_port
from tests.standins.engine import StandinEngine

NAMED = {"x-request-id": "r"}  # the stand-in asks for it
CORES = tuple(sorted(os.sched_getaffinity(0)))


@pytest.mark.skipif(routers.nginx() is None, reason="needs nginx: make system-deps")
class TestNginx:
    async def test_servers_take_turns_and_it_answers_for_its_own_health(self, tmp_path: Path) -> None:
        async with StandinEngine() as first, StandinEngine() as second, aiohttp.ClientSession() as client:
            first.healthy = second.healthy = False
            ports = [int(engine.url.rpartition(":")[2]) for engine in (first, second)]
            port = free_port()
            command = routers.nginx_command(port, ports, tmp_path, answers_health=True)
            url = f"http://127.0.0.1:{port}"
            with running(command, tmp_path / "log", CORES) as process:
                await asyncio.to_thread(wait_until_healthy, [url], [process], 30.0)
                for number in range(4):
                    body = {"model": "m", "prompt": str(number), "max_tokens": 1}
                    async with client.post(
                        f"{url}/v1/completions", json=body, headers={"x-request-id": "r"}
                    ) as response:
                        assert response.status == 200
                assert [len(engine.received) for engine in (first, second)] == [2, 2]

    def test_a_servers_own_health_unless_told_otherwise(self, tmp_path: Path) -> None:
        routers.nginx_command(1, [2], tmp_path)
        assert "/health" not in (tmp_path / "nginx.conf").read_text()


def test_vllm_router_knows_its_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routers, "vllm_router", lambda: "/bin/vllm-router")
    command = routers.vllm_router_command(5, "http://p", "http://d")
    assert command[0] == "/bin/vllm-router"
    options = dict(zip(command[2::2], command[3::2], strict=True))
    assert options.items() >= {"--prefill": "http://p", "--decode": "http://d", "--port": "5"}.items()
    assert options["--prometheus-port"] not in ("", "0", "5")
    assert options["--policy"] == "round_robin"
    assert "--policy" not in routers.vllm_router_command(5, "http://p", "http://d", at_its_fastest=False)

"""`omni_cli status`, `bench` and `restart` of real engines with the tiny model."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from tests.e2e.deployments import Deployment, deployed
from tests.e2e.equality import COMPLETIONS, completion

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory, free_ports: Callable[[int], int]) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("cli")
    with deployed(folder, free_ports, model="embedded:tiny", prefill_groups=1, decode_groups=2) as running:
        yield running


def status(deployment: Deployment) -> dict[str, Any]:
    done = deployment.cli("status", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    shown: dict[str, Any] = json.loads(done.stdout)
    return shown


def test_status(deployment: Deployment) -> None:
    shown = status(deployment)
    urls = [f"http://{process['host']}:{process['port']}" for process in shown["processes"]]
    assert urls == [server.url for server in (*deployment.prefill, *deployment.decode, deployment.proxy)]
    assert all(instance["report"]["kv_total_tokens"] > 0 for instance in shown["instances"])
    completion = shown["completion"]
    assert (completion["problem"], completion["path"], completion["num_tokens"]) == (None, "disaggregated", 8)


def test_bench(deployment: Deployment, tmp_path: Path) -> None:
    out = tmp_path / "out"
    load = ("--rates", "inf", "--num-requests", "6", "--input-len", "64", "--output-len", "8")
    done = deployment.cli("bench", *load, "--slo-ttft-ms", "60000", "--output", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    for one in json.loads((out / "bench.json").read_text())["rates"]:
        assert (one["num_completed"], one["num_failed"]) == (6, 0)
        assert one["goodput_per_s"] == pytest.approx(one["requests_per_s"])
        assert one["output_tokens_per_s"] == pytest.approx(8 * one["requests_per_s"], rel=0.01)
    assert (out / "bench.png").exists()


def test_restart(deployment: Deployment) -> None:
    """One of two D, under load: no request fails, and its answer stays the same."""
    before = {process["name"]: process["pid"] for process in status(deployment)["processes"]}
    expected = deployment.proxy.post(COMPLETIONS, completion("to be asked again"))["choices"]
    done = Event()

    def ask() -> int:
        number = 0
        while not done.is_set():
            assert deployment.proxy.post(COMPLETIONS, completion("to be asked again"))["choices"] == expected
            number += 1
        return number

    with ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(ask) for _ in range(2)]
        restarted = deployment.cli("restart", "decode.group1.rank0")
        done.set()
        numbers = [future.result() for future in asking]
    assert restarted.returncode == 0, restarted.stdout + restarted.stderr
    assert min(numbers) > 0
    shown = status(deployment)["processes"]
    assert {one["name"] for one in shown if one["pid"] != before[one["name"]]} == {"decode.group1.rank0"}
    assert {one["name"] for one in shown if one["restarts"]} == {"decode.group1.rank0"}


def test_the_only_one_is_not_restarted_without_a_word(deployment: Deployment) -> None:
    done = deployment.cli("restart", "prefill.group1.rank0")
    assert done.returncode == 2
    assert "nobody else of this role is up" in done.stderr

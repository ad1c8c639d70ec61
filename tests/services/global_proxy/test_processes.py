"""What each of the proxy's processes is given; tests/services/global_proxy/live has them run."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest

from kv_transfer.auth import load_key
from services.global_proxy import processes
from services.global_proxy.membership.load_table import LoadTable
from services.global_proxy.membership.member import InstanceSpec
from services.global_proxy.membership.registry_client import DirectClient
from services.global_proxy.processes import deployment_key, make_registry
from services.global_proxy.settings import Connector, Settings

P, D = "http://127.0.0.1:1", "http://127.0.0.1:2"


def settings(**fields: Any) -> Settings:
    return Settings(**({"prefill_urls": (P,), "decode_urls": (D,)} | fields))


@pytest.mark.parametrize("connector", ["omni", "nixl"])
def test_with_any_connector_there_is_a_key(connector: Connector, tmp_path: Path) -> None:
    key = deployment_key(settings(connector=connector, key_file=tmp_path / "key"))
    assert key.mac("a") == load_key(tmp_path / "key").mac("a")


def test_instances_that_this_way_of_handing_off_cannot_use() -> None:
    table = LoadTable.create()
    layerwise = make_registry(settings(mode="layerwise", kv_addresses=("127.0.0.1:3",)), table)
    assert [member.spec.kv_address for member in layerwise.members()] == ["127.0.0.1:3", None]
    with pytest.raises(ValueError, match=r"kv_address: 10\.0\.0\.1:1 has none"):
        layerwise.add(InstanceSpec("prefill", "http://10.0.0.1:1"), "admin")
    layerwise.add(InstanceSpec("decode", "http://10.0.0.1:1"), "admin")
    mooncake = make_registry(settings(connector="mooncake", bootstrap_urls=("http://127.0.0.1:3",)), table)
    with pytest.raises(ValueError, match=r"bootstrap_url: 10\.0\.0\.1:1 has none"):
        mooncake.add(InstanceSpec("prefill", "http://10.0.0.1:1"), "joined")
    table.close()


def test_policies_of_one_role_are_for_that_role() -> None:
    table = LoadTable.create()
    registry = make_registry(settings(), table)
    registry.set_policy("prefill", "prefill_score_balance")
    with pytest.raises(ValueError, match="decode policy: must be one of"):
        registry.set_policy("decode", "prefill_score_balance")
    table.close()


class _Anything:
    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        return


async def test_a_worker_leaves_connections_to_those_that_have_fewer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: list[tuple[Callable[[], bool], Callable[[int], None]]] = []

    class Server(_Anything):
        def __init__(self, proxy: object, sock: object, tls: object, is_ahead: Any, count: Any) -> None:
            given.append((is_ahead, count))

    monkeypatch.setattr(processes, "Proxy", _Anything)
    monkeypatch.setattr(processes, "ProxyServer", Server)
    told = settings(key_file=tmp_path / "key")
    table = LoadTable.create(num_workers=2)
    client = DirectClient(make_registry(told, table))
    with socket.socket() as sock:
        for worker in range(2):
            async with processes._serving(told, deployment_key(told), table, client, sock, None, worker):
                pass
    (first_is_ahead, _), (second_is_ahead, second_count) = given
    second_count(1)
    assert second_is_ahead()
    assert not first_is_ahead()
    second_count(-1)
    assert not second_is_ahead()
    table.close()


def test_a_worker_that_no_parent_started() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "services.global_proxy", "--prefill", P, "--decode", D],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=os.environ | {"OMNI_PROXY_WORKER": "0:999:998:997"},
    )
    assert run.returncode == 2
    assert "only the parent of workers sets it" in run.stderr
    assert "Traceback" not in run.stderr

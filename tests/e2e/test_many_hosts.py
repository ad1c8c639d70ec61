"""Real engines on two "hosts" (two loopback addresses): a P that spans both, a D with a rank on each."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import yaml

from kv_transfer.auth import load_or_make_key
from tests.e2e.deployments import READY_TIMEOUT_S, REPOSITORY, Server, eventually, omni_cli
from tests.e2e.equality import COMPLETIONS, choices, completion

pytestmark = pytest.mark.engine

HOSTS = ("127.0.0.1", "127.0.0.2")
TEXTS = [f"{number} green bottles hanging on the wall, " * 6 for number in range(4)]


@dataclass(frozen=True)
class Host:
    """One launcher's view of the machine: what it starts is kept apart from the other's."""

    address: str
    env: dict[str, str]

    def states(self) -> dict[str, dict[str, Any]]:
        shown = json.loads(omni_cli(self.env, "status", "--json", "--no-completion").stdout)
        return {process["name"]: process for process in shown["processes"]}


@dataclass(frozen=True)
class TwoHosts:
    hosts: tuple[Host, Host]
    proxy: Server
    decode: tuple[Server, Server]


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory: pytest.TempPathFactory, free_ports: Callable[[int], int]) -> Iterator[TwoHosts]:
    folder = tmp_path_factory.mktemp("hosts2")
    port = free_ports(9)
    load_or_make_key(folder / "key")
    role = {"kv_cache_gib": 0.5, "max_model_len": 2048}
    content = {
        "name": folder.name,
        "backend": "ansible",  # as on real hosts, whose part of the work is all that is started here
        "platform": "cpu",
        "deployment": {
            "prefill": {
                "p1": {
                    "hosts": ",".join(HOSTS),
                    "base_api_port": port,
                    "base_kv_port": port + 1,
                    "master_port": port + 2,  # and port + 3
                    "tensor_parallel_size": 2,
                }
            },
            "decode": {
                "d1": {
                    "hosts": ",".join(HOSTS),
                    "base_api_port": port + 4,
                    "master_port": port + 5,
                    "data_parallel_size": 2,
                }
            },
            "proxy": {
                "host": HOSTS[0],
                "listen_port": port + 6,
                "decode_policy": "round_robin",
                "extra_args": ["--min-prefill-tokens", "0"],
            },
        },
        "services": {
            "model_path": "embedded:tiny",
            "served_model_name": "test-model",
            "dtype": "float32",
            "log_path": str(folder / "logs"),
            "prefill": role,
            "decode": role,
            "kv_transfer": {"key_file": str(folder / "key")},
        },
    }
    config = folder / "deployment.yaml"
    config.write_text(yaml.safe_dump(content))
    hosts = tuple(Host(address, {**os.environ, "OMNI_STATE_DIR": str(folder / address)}) for address in HOSTS)
    command = [sys.executable, "-m", "omni.cli.main", "serve", str(config), "--detach", "--on"]
    starting = [
        subprocess.Popen(
            [*command, host.address],
            cwd=REPOSITORY,
            env=host.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for host in hosts
    ]
    try:
        for launcher in starting:
            said, _ = launcher.communicate(timeout=READY_TIMEOUT_S)
            assert launcher.returncode == 0, said
        decode = tuple(Server(f"http://{address}:{port + 4}") for address in HOSTS)
        yield TwoHosts(hosts, Server(f"http://{HOSTS[0]}:{port + 6}"), decode)  # type: ignore[arg-type]
    finally:
        for host in hosts:
            omni_cli(host.env, "stop")
        for launcher in starting:
            launcher.kill()
            launcher.communicate(timeout=30)


def test_each_host_runs_its_own_part(two_hosts: TwoHosts) -> None:
    first, second = (host.states() for host in two_hosts.hosts)
    assert set(first) == {"prefill.p1.rank0", "decode.d1.rank0", "proxy"}
    assert set(second) == {"prefill.p1.rank0.node1", "decode.d1.rank1"}
    assert {state["state"] for state in (*first.values(), *second.values())} == {"ready"}


def test_kv_comes_from_both_hosts_of_p(two_hosts: TwoHosts, plain_tiny: Server) -> None:
    for text in TEXTS:
        body = completion(text)
        assert choices(two_hosts.proxy.post(COMPLETIONS, body)) == choices(plain_tiny.post(COMPLETIONS, body))
    computed = sum(d.metric("vllm:prompt_tokens_by_source_total", source="local_compute") for d in two_hosts.decode)
    assert computed == len(TEXTS)  # the last token of each prompt; all else came from P
    assert all(d.metric("vllm:omni_kv_load_seconds_count") > 0 for d in two_hosts.decode)


def test_hosts_of_a_rank_start_again_together(two_hosts: TwoHosts, plain_tiny: Server) -> None:
    first, second = two_hosts.hosts
    before = first.states()["prefill.p1.rank0"]["pid"]
    os.kill(second.states()["prefill.p1.rank0.node1"]["pid"], signal.SIGKILL)

    def is_back() -> bool:
        leader, node = first.states()["prefill.p1.rank0"], second.states()["prefill.p1.rank0.node1"]
        return leader["pid"] != before and leader["state"] == node["state"] == "ready"

    assert eventually(is_back, READY_TIMEOUT_S)
    body = completion("a prompt that nobody has seen before, " * 5)
    assert eventually(two_hosts.proxy.is_ready, 60)
    assert choices(two_hosts.proxy.post(COMPLETIONS, body)) == choices(plain_tiny.post(COMPLETIONS, body))

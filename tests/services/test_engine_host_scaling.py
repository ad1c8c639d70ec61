"""What the engine host does when `omni_cli scale` has asked, and what its engines' agents say they are."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from omni.deployment.engines_file import write_engines
from omni.deployment.run_state import RunFolder
from services import engine_host
from tests.omni.deployment.samples import content, planned, put


class _Supervisor:
    def __init__(self, *names: str) -> None:
        self.names = names
        self.calls: list[tuple[str, str]] = []

    def add(self, child: Any) -> None:
        assert child.is_optional  # one that does not start takes nobody with it
        self.calls.append(("add", child.name))

    def stop(self, name: str) -> None:
        self.calls.append(("stop", name))


def test_engines_become_those_of_the_file(tmp_path: Path) -> None:
    plan, folder = planned(tmp_path, content(prefill=2)), RunFolder(tmp_path / "run")
    supervisor: Any = _Supervisor("prefill.group1.rank0", "decode.group1.rank0", "decode.group2.rank0")
    engine_host._scale(plan, folder, supervisor)  # nobody has written anything
    assert not supervisor.calls
    write_engines(folder, plan.processes[:-1])
    engine_host._scale(plan, folder, supervisor)
    assert supervisor.calls == [("stop", "decode.group2.rank0"), ("add", "prefill.group2.rank0")]


def test_what_an_engine_joins_as(tmp_path: Path) -> None:
    data = put(content(), "deployment/proxy/control_port", 7001)
    put(data, "deployment/proxy/other_control_addresses", ["10.0.0.2:7001"])
    put(data, "services/kv_transfer", {"mode": "layerwise"})
    plan = planned(tmp_path, data)
    prefill, decode = (engine_host._agent_settings(plan, engine) for engine in plan.processes[:-1])
    assert prefill.proxies == decode.proxies == ("127.0.0.1:7001", "10.0.0.2:7001")
    assert (prefill.role, prefill.url, prefill.kv_address) == ("prefill", "http://127.0.0.1:9000", "127.0.0.1:11000")
    assert (decode.role, decode.kv_address, decode.bootstrap_url) == ("decode", None, None)
    assert prefill.facts == decode.facts
    assert prefill.facts["model"] == "smollm2"
    assert prefill.facts["mode"] == "layerwise"
    mooncake = engine_host._agent_settings(replace(plan, connector="mooncake", mode="pull"), plan.processes[0])
    assert (mooncake.kv_address, mooncake.bootstrap_url) == (None, "http://127.0.0.1:11000")

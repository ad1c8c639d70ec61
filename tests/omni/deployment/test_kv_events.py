"""services.prefill.kv_events: who publishes where, and who is told."""

import json
from pathlib import Path
from typing import Any

import pytest

from omni.deployment.errors import ConfigError
from omni.deployment.plan_types import ProcessPlan
from tests.omni.deployment.samples import content, model, planned, put


def events_config(process: ProcessPlan) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(process.command[process.command.index("--kv-events-config") + 1])
    return config


def test_off_unless_asked_for(tmp_path: Path) -> None:
    plan = planned(tmp_path, content())
    assert all("--kv-events" not in part for process in plan.processes for part in process.command)
    assert plan.processes[0].event_address is None


def test_each_prefill_rank_has_two_ports_and_the_proxy_knows(tmp_path: Path) -> None:
    data = put(content(2), "services/prefill", {"kv_events": True, "data_parallel_size": 2})
    put(data, "deployment/prefill/group2/base_event_port", 5000)
    plan = planned(tmp_path, data)
    prefill = [process for process in plan.processes if process.role == "prefill"]
    assert [process.event_port for process in prefill] == [12000, 12002, 5000, 5002]
    assert prefill[1].ports == (9001, 12002, 12003)
    assert events_config(prefill[3]) == {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": "tcp://127.0.0.1:5002",
        "replay_endpoint": "tcp://127.0.0.1:5003",
    }
    assert "--kv-events-config" not in plan.instance("decode", "group1")[0].command
    told = [
        after for part, after in zip(plan.proxy.command, plan.proxy.command[1:], strict=False) if part == "--kv-events"
    ]
    assert told == [process.event_address for process in prefill]


def test_vllm_adds_the_rank_of_ranks_in_step(tmp_path: Path) -> None:
    data = put(content(), "services/prefill", {"kv_events": True, "data_parallel_size": 2})
    zero, one = planned(tmp_path, data, of=model(is_moe=True)).instance("prefill", "group1")
    assert events_config(zero)["endpoint"] == "tcp://127.0.0.1:12000"
    assert events_config(one)["endpoint"] == "tcp://127.0.0.1:12001"  # and binds 12002


def test_ports_that_overlap(tmp_path: Path) -> None:
    data = put(content(), "services/prefill", {"kv_events": True, "data_parallel_size": 2})
    put(data, "deployment/prefill/group1/base_event_port", 9498)
    with pytest.raises(ConfigError, match=r"9500.*overlaps deployment\.prefill\.group1\.base_event_port"):
        planned(tmp_path, put(data, "deployment/prefill/group1/base_event_port", 9497))
    planned(tmp_path, put(data, "deployment/prefill/group1/base_event_port", 9496))

"""Where engines join the proxy, unless the file says."""

import random
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from omni.deployment.deployment_file import load_deployment
from omni.deployment.errors import ConfigError
from omni.deployment.model import Deployment
from omni.deployment.ports import PortClaim, control_port, port_claims, port_problems
from omni.deployment.scaling import scale_engines

from .samples import FIELD_FILE, content, lines, loaded, machine, model_folder, planned, put

CONFIGS = sorted(Path(__file__).parents[3].glob("configs/*.yaml"))
P1, D1, PROXY = "deployment/prefill/group1", "deployment/decode/group1", "deployment/proxy"
DEFAULT = 7001


@pytest.mark.parametrize(
    ("changes", "port"),
    [
        ({}, DEFAULT),
        ({f"{PROXY}/host": "0.0.0.0"}, DEFAULT),
        ({f"{PROXY}/control_port": "8050"}, 8050),
        ({f"{PROXY}/control_port": 0}, None),
        ({f"{PROXY}/control_port": "0"}, None),
        # The first that nothing else in the file has.
        ({f"{P1}/base_api_port": 7001}, 7002),
        ({f"{P1}/base_api_port": 7001, "services/prefill/data_parallel_size": 3}, 7004),
        ({f"{P1}/base_api_port": 7001, f"{D1}/master_port": 7002}, 7003),
        ({f"{P1}/base_api_port": 7002, f"{D1}/master_port": 7003}, DEFAULT),
        ({f"{P1}/base_kv_port": 7001, "services/kv_transfer/mode": "layerwise"}, 7002),
        ({f"{P1}/base_kv_port": 7001}, DEFAULT),  # which nobody listens on
        ({f"{P1}/base_event_port": 7001, "services/prefill/kv_events": True}, 7003),
        ({f"{P1}/base_api_port": 7001, f"{PROXY}/host": "0.0.0.0"}, 7002),
        ({f"{P1}/base_api_port": 7001, f"{P1}/hosts": "10.0.0.1"}, DEFAULT),
        ({f"{PROXY}/other_control_addresses": ["127.0.0.1:7001", "10.0.0.2:7002"]}, 7003),
    ],
)
def test_where_engines_join(tmp_path: Path, changes: dict[str, Any], port: int | None) -> None:
    data = content()
    for path, value in changes.items():
        put(data, path, value)
    assert control_port(loaded(tmp_path, data)) == port


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {f"{PROXY}/control_port": 7000},
            "deployment.proxy.control_port: port 7000 on 127.0.0.1 overlaps deployment.proxy.listen_port (7000); "
            "give each its own ports",
        ),
        (
            {f"{PROXY}/control_port": 9500},
            "deployment.proxy.control_port: port 9500 on 127.0.0.1 overlaps deployment.decode.group1.base_api_port "
            "(9500); give each its own ports",
        ),
    ],
)
def test_a_port_that_cannot_be(tmp_path: Path, changes: dict[str, Any], line: str) -> None:
    data = content()
    for path, value in changes.items():
        put(data, path, value)
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, data)
    assert lines(caught.value) == [line]


def _meet(one: PortClaim, other: PortClaim) -> bool:
    hosts = {claim.host.replace("localhost", "127.0.0.1") for claim in (one, other)}
    return (len(hosts) == 1 or "0.0.0.0" in hosts) and one.first <= other.last and other.first <= one.last


@pytest.mark.parametrize("seed", range(20))
def test_every_pair_that_shares_a_port_is_named_in_order(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    data = content(chance.randint(1, 6), chance.randint(1, 6))
    for group in (*data["deployment"]["prefill"].values(), *data["deployment"]["decode"].values()):
        group["hosts"] = chance.choice(["127.0.0.1", "localhost", "10.0.0.1", "10.0.0.2"])
        group["base_api_port"] = chance.randint(9000, 9030)
        group["master_port"] = chance.randint(9000, 9030)
    proxy = {"host": chance.choice(["0.0.0.0", "localhost", "10.0.0.1"]), "listen_port": chance.randint(9000, 9030)}
    data["deployment"]["proxy"] = proxy | chance.choice([{}, {"control_port": chance.randint(9000, 9030)}])
    put(data, "services/kv_transfer/connector", chance.choice(["omni", "nixl"]))
    sizes = {"data_parallel_size": chance.randint(1, 6)}
    put(put(data, "services/prefill", sizes), "services/decode", sizes)
    data["services"]["model_path"] = "/m"
    deployment = Deployment.model_validate({"name": "x"} | data)
    expected = [
        f"{other.field}: port {other} on {other.host} overlaps {one.field} ({one}); give each its own ports"
        for one, other in combinations(port_claims(deployment), 2)
        if _meet(one, other)
    ]
    assert list(map(str, port_problems(deployment))) == expected


def test_only_hosts_with_an_api_server_claim_its_port(tmp_path: Path) -> None:
    data = put(content(), f"{P1}/hosts", "10.0.0.1,10.0.0.2,10.0.0.3,10.0.0.4")
    put(put(data, f"{P1}/tensor_parallel_size", 4), f"{P1}/data_parallel_size", 2)
    claims = [(claim.host, str(claim), claim.field) for claim in port_claims(loaded(tmp_path, data))]
    assert claims[:4] == [
        ("10.0.0.1", "9000", "deployment.prefill.group1.base_api_port"),
        ("10.0.0.3", "9000", "deployment.prefill.group1.base_api_port"),
        ("10.0.0.1", "10000-10001", "deployment.prefill.group1.master_port"),
        ("10.0.0.3", "10000-10001", "deployment.prefill.group1.master_port"),
    ]
    assert claims[4][0] == "127.0.0.1"


def test_a_group_without_a_layout_claims_its_ports_all_the_same(tmp_path: Path) -> None:
    data = put(put(content(), f"{P1}/hosts", "127.0.0.1,10.0.0.2"), f"{P1}/tensor_parallel_size", 3)
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, put(data, f"{D1}/base_api_port", 9000))
    assert [problem.field for problem in caught.value.problems] == [
        "deployment.prefill.group1.tensor_parallel_size",
        "deployment.decode.group1.base_api_port",
        "deployment.decode.group1.master_port",
    ]


def test_above_the_highest_listen_port_there_is_none(tmp_path: Path) -> None:
    assert control_port(loaded(tmp_path, put(content(), f"{PROXY}/listen_port", 65535))) == 65534


def test_the_proxy_listens_there_and_the_engines_are_told(tmp_path: Path) -> None:
    plan = planned(tmp_path, put(content(), f"{PROXY}/other_control_addresses", ["10.0.0.2:7001"]))
    assert plan.proxy.control_port == 7002
    assert plan.proxy.ports == (7000, 7002)
    assert plan.proxy.command[plan.proxy.command.index("--control-port") + 1] == "7002"
    assert plan.control_addresses == ("127.0.0.1:7002", "10.0.0.2:7001")
    everywhere = planned(tmp_path, put(content(), f"{PROXY}/host", "0.0.0.0"))
    assert everywhere.control_addresses == ("127.0.0.1:7001",), "nobody can connect to 0.0.0.0"


def test_nobody_joins_the_same_proxy_twice(tmp_path: Path) -> None:
    data = put(content(), f"{PROXY}/control_port", 7001)
    plan = planned(tmp_path, put(data, f"{PROXY}/other_control_addresses", ["127.0.0.1:7001", "127.0.0.1:7001"]))
    assert plan.control_addresses == ("127.0.0.1:7001",)


def test_nowhere(tmp_path: Path) -> None:
    data = put(content(), f"{PROXY}/control_port", 0)
    plan = planned(tmp_path, data)
    assert (plan.proxy.control_port, plan.proxy.ports, plan.control_addresses) == (None, (7000,), ())
    assert "--control-port" not in plan.proxy.command
    others = planned(tmp_path, put(data, f"{PROXY}/other_control_addresses", ["10.0.0.2:7001"]))
    assert others.control_addresses == ("10.0.0.2:7001",)


def test_the_field_s_own_form() -> None:
    assert control_port(load_deployment(FIELD_FILE)) == DEFAULT


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_our_examples(config: Path) -> None:
    assert control_port(load_deployment(config)) == DEFAULT


def test_engines_that_are_added_live_leave_it_alone(tmp_path: Path) -> None:
    data = put(content(), f"{PROXY}/listen_port", 9009)  # engines join on 9010, where the next group would be
    data["services"]["model_path"] = str(model_folder(tmp_path / "model"))
    present = planned(tmp_path, data).processes[:-1]
    new = scale_engines(tmp_path / "trial.yaml", present, {"prefill": 2}, machine())[-1]
    assert (new.group, new.port) == ("group2", 9020)

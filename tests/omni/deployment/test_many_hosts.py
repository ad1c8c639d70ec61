"""Plans over several hosts: the field's own file and its growth, ranks that span hosts, mixed groups, a host's part."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from omni.deployment.engine_env import rank_table_folder
from omni.deployment.errors import ConfigError
from omni.deployment.plan import make_plan
from omni.deployment.plan_types import LaunchPlan, ProcessPlan

from .samples import FIELD_FILE, content, lines, loaded, machine, model, planned, put

LARGE = model(max_position_embeddings=163840)
DEVICES = ",".join(map(str, range(16)))


def field(**changes: Any) -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load(FIELD_FILE.read_text())
    for path, value in changes.items():
        put(data, path.replace("__", "/"), value)
    return data


def spanning(role: str = "prefill") -> dict[str, Any]:
    """One CPU group of two TP ranks, each on a host of its own."""
    data = put(content(), "backend", "ansible")
    group = {"hosts": "198.51.100.7,198.51.100.8", "base_api_port": 9000, "tensor_parallel_size": 2}
    return put(data, f"deployment/{role}/group1", group)


def named(plan: LaunchPlan, name: str) -> ProcessPlan:
    return next(process for process in plan.processes if process.name == name)


def value(process: ProcessPlan, flag: str) -> str | None:
    command = process.command
    return command[command.index(flag) + 1] if flag in command else None


def test_the_field_s_file_with_a_fifth_p_and_more_d_hosts(tmp_path: Path) -> None:
    data = field(deployment__decode__group1__hosts=",".join(f"192.0.2.{n}" for n in (5, 6, 7, 8, 10, 11)))
    fifth = copy.deepcopy(data["deployment"]["prefill"]["group4"])
    data["deployment"]["prefill"]["group5"] = fifth | {"hosts": "192.0.2.9"}
    plan = planned(tmp_path, data, of=LARGE)
    prefill = [process for process in plan.engines if process.role == "prefill"]
    decode = [process for process in plan.engines if process.role == "decode"]
    assert [process.url for process in prefill] == [f"http://192.0.2.{n}:9000" for n in (1, 2, 3, 4, 9)]
    assert {value(process, "--tensor-parallel-size") for process in prefill} == {"16"}
    assert {process.env["ASCEND_RT_VISIBLE_DEVICES"] for process in prefill} == {DEVICES}
    assert len(decode) == 96
    assert [process.url for process in decode[::16]] == [
        "http://192.0.2.5:9000",
        "http://192.0.2.6:9100",  # its own base_api_port
        "http://192.0.2.7:9000",
        "http://192.0.2.8:9000",
        "http://192.0.2.10:9000",
        "http://192.0.2.11:9000",
    ]
    last = decode[-1]
    assert last.url == "http://192.0.2.11:9015"
    assert last.env["ASCEND_RT_VISIBLE_DEVICES"] == "15"
    assert (last.env["VLLM_DP_RANK"], last.env["VLLM_DP_RANK_LOCAL"], last.env["VLLM_DP_SIZE"]) == ("95", "15", "96")
    assert last.env["VLLM_DP_MASTER_IP"] == "192.0.2.5"
    assert last.env["VLLM_HOST_IP"] == "192.0.2.11"
    assert value(last, "--max-model-len") == "16384"
    assert plan.proxy.command.count("--prefill") == 5
    assert plan.proxy.command.count("--decode") == 96


def test_a_mixture_of_experts_runs_in_step_over_hosts(tmp_path: Path) -> None:
    data = field(services__decode__max_model_len=4096, services__prefill__max_model_len=4096)
    plan = planned(tmp_path, data, of=model(is_moe=True))
    rank = named(plan, "decode.group1.rank17")
    assert value(rank, "--data-parallel-rank") == "17"
    assert value(rank, "--data-parallel-size") == "64"
    assert value(rank, "--data-parallel-address") == "192.0.2.5"
    assert value(rank, "--data-parallel-rpc-port") == "8080"


def test_ascend_engines_find_their_rank_tables(tmp_path: Path) -> None:
    env = named(planned(tmp_path, field(), of=LARGE), "prefill.group2.rank0").env
    assert env["RANK_TABLE_FILE_PATH"] == "/data/omniinfer/log/ranktable/prefill.group2.json"
    assert env["GLOBAL_RANK_TABLE_FILE_PATH"] == "/data/omniinfer/log/ranktable/global.json"
    assert (env["ROLE"], env["PREFILL_POD_NUM"], env["DECODE_POD_NUM"]) == ("prefill", "4", "1")
    assert "RANK_TABLE_FILE_PATH" not in planned(tmp_path, content()).engines[0].env
    here = field(backend="local")
    assert rank_table_folder(loaded(tmp_path, here)) is None  # nobody makes them
    assert rank_table_folder(loaded(tmp_path, put(here, "services/rank_table_path", "/tables"))) == "/tables"


def test_a_rank_that_spans_hosts(tmp_path: Path) -> None:
    plan = planned(tmp_path, spanning())
    first, second = plan.instance("prefill", "group1")
    assert (first.name, second.name) == ("prefill.group1.rank0", "prefill.group1.rank0.node1")
    assert (first.host, second.host) == ("198.51.100.7", "198.51.100.8")
    for node, process in enumerate((first, second)):
        assert value(process, "--nnodes") == "2"
        assert value(process, "--node-rank") == str(node)
        assert value(process, "--master-addr") == "198.51.100.7"
        assert value(process, "--master-port") == "10000"
        assert process.link_address == "198.51.100.7:10001"
    assert "--headless" in second.command
    assert "--headless" not in first.command
    assert (second.port, second.ports, second.is_headless) == (0, (), True)
    assert second.leader_url == first.url
    assert plan.proxy.command.count("--prefill") == 1
    assert second.kv_bytes == first.kv_bytes == 0  # each host decides


def test_its_link_port_is_claimed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"overlaps deployment\.prefill\.group1\.master_port"):
        loaded(tmp_path, put(spanning(), "deployment/proxy", {"host": "198.51.100.7", "listen_port": 10001}))


def test_ranks_in_step_do_not_span_hosts(tmp_path: Path) -> None:
    data = spanning("decode")
    data["deployment"]["decode"]["group1"] |= {"hosts": "10.0.0.1,10.0.0.2,10.0.0.3,10.0.0.4", "data_parallel_size": 2}
    with pytest.raises(ConfigError) as caught:
        planned(tmp_path, data, of=model(is_moe=True))
    assert lines(caught.value) == [
        "deployment.decode.group1.data_parallel_size: 2 ranks in step, each spread over several hosts, are not "
        "supported; write 1, or a tensor_parallel_size that a host holds"
    ]


def test_a_host_plans_its_own_share(tmp_path: Path) -> None:
    deployment = loaded(tmp_path, spanning())
    whole = make_plan(deployment, model(), machine(cores=4), config_file=tmp_path / "x", on="198.51.100.7")
    part = whole.part("198.51.100.7", "engines")
    assert [process.name for process in part.processes] == ["prefill.group1.rank0"]
    (engine,) = part.processes
    assert engine.cpu_cores == (0, 1, 2, 3)  # its one worker there has all
    assert engine.kv_bytes > 0
    assert value(engine, "--kv-cache-memory-bytes") == str(engine.kv_bytes)
    assert part.proxy == whole.proxy  # known, though it runs elsewhere
    assert not part.runs_proxy
    assert part.folder_name == "trial.engines"
    assert whole.part("198.51.100.7").folder_name == "trial"
    assert not whole.part("198.51.100.8", "proxy").processes


def test_another_host_s_share_is_unknown_here(tmp_path: Path) -> None:
    engine = named(planned(tmp_path, spanning()), "decode.group1.rank0")
    assert engine.cpu_cores == ()
    assert "--kv-cache-memory-bytes" not in engine.command
    assert "VLLM_CPU_OMP_THREADS_BIND" not in engine.env


def test_mixed_groups_are_plain_engines(tmp_path: Path) -> None:
    data = content()
    data["deployment"] = {"mixed": {"group2": {"base_api_port": 9010}, "m1": {"base_api_port": 9000}}}
    plan = planned(tmp_path, data)
    assert [process.name for process in plan.processes] == ["mixed.group2.rank0", "mixed.m1.rank0", "proxy"]
    assert "--kv-transfer-config" not in plan.engines[0].command
    assert "--long-prefill-token-threshold" not in plan.engines[0].command
    assert value(plan.engines[0], "--max-model-len") == "8192"
    assert plan.proxy.command.count("--mixed") == 2
    assert value(plan.proxy, "--max-active-per-decode") == "64"


def test_mixed_beside_p_and_d(tmp_path: Path) -> None:
    plan = planned(tmp_path, put(content(), "deployment/mixed/group1", {"base_api_port": 9900}))
    assert [process.role for process in plan.processes] == ["prefill", "decode", "mixed", "proxy"]


def test_mixed_groups_take_all_devices(tmp_path: Path) -> None:
    group = {"base_api_port": 9900, "ascend_rt_visible_devices": "0,1,2,3"}
    data = put(content(), "deployment/mixed/group1", group)
    assert value(planned(tmp_path, data).engines[-1], "--tensor-parallel-size") == "4"


@pytest.mark.parametrize(
    ("pools", "words"),
    [
        ({"prefill": {"p1": {"base_api_port": 9000}}}, "deployment: has no decode group; add decode:"),
        ({"decode": {"d1": {"base_api_port": 9000}}}, "deployment: has no prefill group; add prefill:"),
        ({}, "deployment: has no groups of engines; add prefill: and decode:, or mixed:"),
        (
            {"mixed": {"m1": {"base_api_port": 9000}}, "c0": {}, "proxy": {}},
            "deployment: names the proxy twice; keep one of proxy and c0",
        ),
        ({"mixed": {"d1": {"base_api_port": 9000}}}, "deployment.mixed.d1: 'd1' is not a group name"),
    ],
)
def test_which_pools_there_must_be(tmp_path: Path, pools: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, content() | {"deployment": pools})
    assert lines(caught.value)[0].startswith(words)


def test_c0_is_the_proxy(tmp_path: Path) -> None:
    data = content()
    data["deployment"]["c0"] = data["deployment"].pop("proxy") | {"listen_port": 7777}
    assert planned(tmp_path, data).proxy.port == 7777


def test_http_proxy_reaches_every_process_but_not_the_deployment_s_own_hosts(tmp_path: Path) -> None:
    plan = planned(tmp_path, put(content(), "services/http_proxy", "http://10.1.1.1:3128"))
    for process in plan.processes:
        assert process.env["https_proxy"] == process.env["HTTPS_PROXY"] == "http://10.1.1.1:3128"
        assert process.env["no_proxy"] == "localhost,127.0.0.1"


def test_a_host_s_own_address_is_the_plan_s_where_there_are_several(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        planned(tmp_path, put(spanning(), "deployment/prefill/group1/env", {"VLLM_HOST_IP": "10.0.0.1"}))
    assert lines(caught.value) == ["deployment.prefill.group1.env.VLLM_HOST_IP: is set by the plan; delete it"]
    planned(tmp_path, put(content(), "deployment/prefill/group1/env", {"VLLM_HOST_IP": "127.0.0.1"}))

"""The launch plan: what each process gets, what is refused, and what holds for any deployment."""

import dataclasses
import json
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kv_transfer.auth import load_or_make_key
from kv_transfer.connector.settings import ConnectorSettings
from omni.deployment.errors import ConfigError
from omni.deployment.memory import GIB
from omni.deployment.model_info import ModelInfo
from omni.deployment.plan_types import ProcessPlan
from services.global_proxy.__main__ import parse_arguments

from .samples import content, lines, machine, model, planned, put

MOE = model(is_moe=True)


def value(process: ProcessPlan, flag: str) -> str:
    return process.command[process.command.index(flag) + 1]


def kv_config(process: ProcessPlan) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(value(process, "--kv-transfer-config"))
    return config


def test_one_prefill_one_decode(tmp_path: Path) -> None:
    plan = planned(tmp_path, content())
    prefill, decode, proxy = plan.processes
    assert (plan.name, plan.dtype, plan.served_model_name) == ("trial", "bfloat16", "smollm2")
    assert [process.name for process in plan.processes] == ["prefill.group1.rank0", "decode.group1.rank0", "proxy"]
    assert prefill.command[:3] == (sys.executable, "-m", "omni.adaptors.vllm.api_server")
    assert value(prefill, "--model") == "/models/smollm2"
    assert value(prefill, "--served-model-name") == "smollm2"
    assert (value(prefill, "--host"), value(prefill, "--port")) == ("127.0.0.1", "9000")
    assert value(decode, "--dtype") == "bfloat16"
    assert value(decode, "--tensor-parallel-size") == "1"
    assert value(decode, "--max-num-seqs") == "64"
    assert value(decode, "--long-prefill-token-threshold") == "16"
    assert "--long-prefill-token-threshold" not in prefill.command
    assert int(value(decode, "--shutdown-timeout")) > 0
    assert "--enforce-eager" in decode.command
    assert not [part for part in decode.command if part.startswith("--data-parallel")]
    assert prefill.log_file == Path.cwd() / "logs/trial/prefill.group1.rank0.log"
    assert (prefill.cpu_cores, decode.cpu_cores, proxy.cpu_cores) == ((0,), (1,), ())
    assert proxy.command == (
        *(sys.executable, "-m", "services.global_proxy", "--host", "127.0.0.1", "--port", "7000"),
        *("--prefill", "http://127.0.0.1:9000", "--decode", "http://127.0.0.1:9500"),
        *("--control-port", "7001", "--max-active-per-decode", "64"),
    )
    assert (proxy.kv_bytes, proxy.memory_bytes) == (0, int(0.2 * GIB))


def test_kv_transfer(tmp_path: Path) -> None:
    settings = {"lease_s": 5, "load_timeout_s": "2.5", "load_failure_policy": "fail", "checksum": True}
    settings |= {"max_lease_s": 50, "transport": "tcp", "num_connections": "4", "key_file": "/etc/omni/key"}
    prefill, decode, _ = planned(tmp_path, put(content(), "services/kv_transfer", settings)).processes
    assert kv_config(prefill) == {
        "kv_connector": "OmniConnector",
        "kv_connector_module_path": "kv_transfer.connector",
        "kv_role": "kv_producer",
        "engine_id": "trial.prefill.group1.rank0",
        "kv_load_failure_policy": "fail",
        "kv_connector_extra_config": {
            "listen_host": "127.0.0.1",
            "transport": "tcp",
            "mode": "pull",
            "num_connections": 4,
            "lease_s": 5.0,
            "max_lease_s": 50.0,
            "load_timeout_s": 2.5,
            "checksum": True,
            "key_file": "/etc/omni/key",
        },
    }
    assert kv_config(decode)["kv_role"] == "kv_consumer"
    assert kv_config(decode)["engine_id"] == "trial.decode.group1.rank0"


def test_what_the_plan_says_our_connector_understands(tmp_path: Path) -> None:
    load_or_make_key(tmp_path / "key")
    for kv_transfer in ({}, {"mode": "layerwise", "key_file": str(tmp_path / "key")}):
        for process in planned(tmp_path, put(content(), "services/kv_transfer", kv_transfer)).processes[:2]:
            config = kv_config(process)
            vllm_config: Any = SimpleNamespace(
                kv_transfer_config=SimpleNamespace(
                    engine_id="e",
                    is_kv_producer=config["kv_role"] == "kv_producer",
                    is_kv_consumer=config["kv_role"] == "kv_consumer",
                    kv_connector_extra_config=config["kv_connector_extra_config"],
                ),
                parallel_config=SimpleNamespace(
                    tensor_parallel_size=1, pipeline_parallel_size=1, decode_context_parallel_size=1
                ),
                cache_config=SimpleNamespace(block_size=16),
            )
            of = ConnectorSettings.of(vllm_config)
            assert (of.mode, of.listen_port) == (kv_transfer.get("mode", "pull"), process.kv_port or 0)


def test_our_connector_needs_no_planned_port_to_pull(tmp_path: Path) -> None:
    prefill, decode, proxy = planned(tmp_path, content()).processes
    assert (prefill.kv_port, decode.kv_port, prefill.kv_address) == (None, None, None)
    assert "listen_port" not in kv_config(prefill)["kv_connector_extra_config"]
    assert not {"--connector", "--key-file", "--mode"} & set(proxy.command)


def test_layer_by_layer_the_proxy_knows_where_prefill_is_asked(tmp_path: Path) -> None:
    data = put(content(2), "services/kv_transfer", {"mode": "layerwise", "key_file": "/etc/omni/key"})
    put(data, "services/prefill/data_parallel_size", 2)
    put(data, "deployment/prefill/group2/base_kv_port", 5000)
    plan = planned(tmp_path, data)
    prefill = [process for process in plan.processes if process.role == "prefill"]
    assert [process.kv_port for process in prefill] == [11000, 11001, 5000, 5001]
    assert [kv_config(p)["kv_connector_extra_config"]["listen_port"] for p in prefill] == [11000, 11001, 5000, 5001]
    assert plan.instance("decode", "group1")[0].kv_port is None
    assert plan.proxy.command[-12:] == (
        *("--key-file", "/etc/omni/key", "--mode", "layerwise"),
        *("--kv-address", "127.0.0.1:11000", "--kv-address", "127.0.0.1:11001"),
        *("--kv-address", "127.0.0.1:5000", "--kv-address", "127.0.0.1:5001"),
    )


def test_nixl(tmp_path: Path) -> None:
    data = put(content(), "services/kv_transfer", {"connector": "nixl", "lease_s": 60})
    plan = planned(tmp_path, put(data, "services/prefill/data_parallel_size", 2))
    zero, one, decode = plan.processes[:3]
    assert kv_config(one) == {
        "kv_connector": "NixlConnector",
        "kv_role": "kv_producer",
        "engine_id": "trial.prefill.group1.rank1",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"kv_lease_duration": 60},
    }
    assert kv_config(decode)["kv_role"] == "kv_consumer"
    assert [p.env["VLLM_NIXL_SIDE_CHANNEL_PORT"] for p in (zero, one, decode)] == ["11000", "11001", "11500"]
    assert [p.env["VLLM_NIXL_SIDE_CHANNEL_HOST"] for p in (zero, one, decode)] == ["127.0.0.1"] * 3
    assert plan.proxy.command[-2:] == ("--connector", "nixl")


def test_vllm_adds_the_rank_to_nixl_s_port_where_ranks_run_in_step(tmp_path: Path) -> None:
    data = put(content(), "services/kv_transfer/connector", "nixl")
    plan = planned(tmp_path, put(data, "services/prefill/data_parallel_size", 2), of=MOE)
    _, one, decode = plan.processes[:3]
    assert (one.kv_port, one.env["VLLM_NIXL_SIDE_CHANNEL_PORT"]) == (11001, "11000")
    assert (decode.kv_port, decode.env["VLLM_NIXL_SIDE_CHANNEL_PORT"]) == (11500, "11500")


def test_mooncake(tmp_path: Path) -> None:
    plan = planned(tmp_path, put(content(2), "services/kv_transfer/connector", "mooncake"))
    one, two, decode, proxy = plan.processes
    assert kv_config(two) == {
        "kv_connector": "MooncakeConnector",
        "kv_role": "kv_producer",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"mooncake_protocol": "tcp"},
    }
    assert value(two, "--worker-extension-cls").startswith("omni.adaptors.vllm.mooncake_on_cpu.")
    assert {p.env["VLLM_HOST_IP"] for p in (one, two, decode)} == {"127.0.0.1"}
    assert [p.env.get("VLLM_MOONCAKE_BOOTSTRAP_PORT") for p in (one, two, decode)] == ["11000", "11010", None]
    assert proxy.command[-6:] == (
        *("--connector", "mooncake"),
        *("--bootstrap", "http://127.0.0.1:11000", "--bootstrap", "http://127.0.0.1:11010"),
    )
    npu = planned(tmp_path, put(put(content(), "platform", "npu"), "services/kv_transfer/connector", "mooncake"))
    assert kv_config(npu.processes[0])["kv_connector_extra_config"] == {}


def test_the_proxy_understands_its_arguments(tmp_path: Path) -> None:
    for kv_transfer in ({}, {"connector": "nixl"}, {"connector": "mooncake"}, {"key_file": "/k"}):
        proxy = planned(tmp_path, put(content(2), "services/kv_transfer", kv_transfer)).proxy
        parse_arguments(proxy.arguments)


def test_dense_dp_ranks_are_on_their_own(tmp_path: Path) -> None:
    plan = planned(tmp_path, put(content(), "deployment/prefill/group1/data_parallel_size", 2))
    zero, one = plan.instance("prefill", "group1")
    assert (zero.port, one.port) == (9000, 9001)
    assert one.env == {
        "VLLM_DP_SIZE": "2",
        "VLLM_DP_RANK": "1",
        "VLLM_DP_RANK_LOCAL": "1",
        "VLLM_DP_MASTER_IP": "127.0.0.1",
        "VLLM_DP_MASTER_PORT": "10000",
        "VLLM_CPU_OMP_THREADS_BIND": "1",
    }
    assert not [part for part in one.command if part.startswith("--data-parallel")]
    assert plan.proxy.command.count("--prefill") == 2


def test_moe_dp_ranks_run_in_step(tmp_path: Path) -> None:
    plan = planned(tmp_path, put(content(), "deployment/prefill/group1/data_parallel_size", 2), of=MOE)
    _, one = plan.instance("prefill", "group1")
    assert value(one, "--data-parallel-size") == "2"
    assert value(one, "--data-parallel-rank") == "1"
    assert value(one, "--data-parallel-address") == "127.0.0.1"
    assert value(one, "--data-parallel-rpc-port") == "10000"
    assert {"--data-parallel-external-lb", "--enable-expert-parallel"} <= set(one.command)
    assert not [part for part in plan.instance("decode", "group1")[0].command if part.startswith("--data-parallel")]


def test_tensor_parallel(tmp_path: Path) -> None:
    data = put(put(content(), "services/decode/tensor_parallel_size", 3), "services/decode/kv_cache_gib", 3)
    decode = planned(tmp_path, data, on=machine(cores=8)).processes[1]
    assert value(decode, "--tensor-parallel-size") == "3"
    assert decode.env["VLLM_CPU_OMP_THREADS_BIND"] == "2,3|4,5|6,7"
    assert decode.cpu_cores == (2, 3, 4, 5, 6, 7)
    assert decode.kv_bytes == 3 * GIB
    assert value(decode, "--kv-cache-memory-bytes") == str(GIB)


def test_pipeline_parallel(tmp_path: Path) -> None:
    data = put(put(content(), "services/prefill/pipeline_parallel_size", 2), "services/prefill/kv_cache_gib", 4)
    prefill, decode, _ = planned(tmp_path, put(data, "services/prefill/tensor_parallel_size", 2)).processes
    assert value(prefill, "--pipeline-parallel-size") == "2"
    assert prefill.env["VLLM_CPU_OMP_THREADS_BIND"].count("|") == 3, "cores for each of four workers"
    assert value(prefill, "--kv-cache-memory-bytes") == str(GIB)
    assert "--enforce-eager" not in prefill.command, "vLLM's stages on a CPU need the warm-up that it leaves out"
    assert json.loads(value(prefill, "--compilation-config"))["backend"] == "eager"
    assert "--pipeline-parallel-size" not in decode.command
    assert "--enforce-eager" in decode.command


def test_lengths_default_to_what_the_model_can_do(tmp_path: Path) -> None:
    prefill, decode, _ = planned(tmp_path, content()).processes
    assert (value(prefill, "--max-model-len"), value(decode, "--max-model-len")) == ("8192", "8192")
    unlimited = model(max_position_embeddings=None)
    prefill, decode, _ = planned(tmp_path, content(), of=unlimited).processes
    assert (value(prefill, "--max-model-len"), value(decode, "--max-model-len")) == ("32000", "16384")


def test_kv_cache_sizes(tmp_path: Path) -> None:
    data = put(content(), "services/decode/max_model_len", 2048)
    decode = planned(tmp_path, data).processes[1]
    assert decode.kv_bytes == (4 * 16 + 1) * 128 * 23040
    assert decode.memory_bytes == int(1.3 * GIB) + 270_000_000 + decode.kv_bytes
    put(data, "services/decode/extra_args", ["--block-size=64"])
    assert planned(tmp_path, data).processes[1].kv_bytes == (4 * 32 + 1) * 64 * 23040
    small = planned(tmp_path, data, on=machine(gib=1)).processes[1]
    assert small.kv_bytes == (32 + 1) * 64 * 23040, "one sequence at least, whatever there is"
    assert planned(tmp_path, data, of=model(mla_width=8)).processes[1].kv_bytes == 129 * 64 * 30 * 8 * 2


def test_dtypes(tmp_path: Path) -> None:
    old = machine(flags=())
    assert planned(tmp_path, content(), on=old).dtype == "float32"
    assert planned(tmp_path, put(content(), "services/dtype", "float16"), on=old).dtype == "float16"
    npu = put(content(), "platform", "npu")
    assert planned(tmp_path, npu, of=model(stored_dtype="float16")).dtype == "float16"
    assert planned(tmp_path, npu, of=model(stored_dtype="float32")).dtype == "bfloat16"


def test_npu_ranks_get_their_devices(tmp_path: Path) -> None:
    data = put(content(), "deployment/prefill/group1/ascend_rt_visible_devices", "0,1,2,3")
    put(data, "deployment/prefill/group1/tensor_parallel_size", 2)
    put(data, "deployment/decode/group1/ascend_rt_visible_devices", "7")
    zero, one, decode, _ = planned(tmp_path, data).processes
    assert [p.env["ASCEND_RT_VISIBLE_DEVICES"] for p in (zero, one, decode)] == ["0,1", "2,3", "7"]
    assert not {"--kv-cache-memory-bytes", "--enforce-eager", "--max-num-seqs"} & set(one.command)
    assert value(decode, "--long-prefill-token-threshold") == "256"
    assert "VLLM_CPU_OMP_THREADS_BIND" not in one.env
    assert (one.kv_bytes, one.cpu_cores) == (0, ())


def test_cuda_engines_get_gpus_in_turn(tmp_path: Path) -> None:
    data = put(put(content(), "platform", "cuda"), "services/prefill/tensor_parallel_size", 2)
    assert [p.env["CUDA_VISIBLE_DEVICES"] for p in planned(tmp_path, data).processes[:2]] == ["0,1", "2"]
    put(data, "services/decode/env", {"CUDA_VISIBLE_DEVICES": 5})
    assert planned(tmp_path, data).processes[1].env["CUDA_VISIBLE_DEVICES"] == "5"


def test_users_arguments_and_environment(tmp_path: Path) -> None:
    extra = ["--max-num-seqs", 8, "--no-enforce-eager", "--long_prefill_token_threshold=512", "--swap-space", "-1"]
    data = put(
        put(content(), "services/decode/extra_args", extra), "services/decode/env", {"OMP_WAIT_POLICY": "passive"}
    )
    decode = planned(tmp_path, data).processes[1]
    assert decode.command[-6:] == tuple(map(str, extra))
    assert decode.command.count("--max-num-seqs") == 1
    assert "--long-prefill-token-threshold" not in decode.command
    assert "--enforce-eager" not in decode.command
    assert decode.env["OMP_WAIT_POLICY"] == "passive"


@pytest.mark.parametrize(
    ("argument", "rest"),
    [
        ("--max-model-len", "delete it and write max_model_len"),
        ("--max_model_len=3", "delete it and write max_model_len"),
        ("--dtype", "delete it and write services.dtype"),
        ("--dty", "delete it"),  # argparse takes abbreviations
        ("--kv-transfer-config.kv_role", "delete it and write services.kv_transfer"),
        ("-tp=2", "delete it and write tensor_parallel_size"),
        ("-dp", "delete it and write data_parallel_size"),
        ("--data-parallel-rank", "delete it"),
        ("--enable-expert-parallel", "delete it"),
        ("--config", "delete it"),
        ("--", "delete it"),
    ],
)
def test_arguments_that_the_plan_sets(tmp_path: Path, argument: str, rest: str) -> None:
    with pytest.raises(ConfigError) as caught:
        planned(tmp_path, put(content(2), "services/prefill/extra_args", [argument]))
    assert str(caught.value) == f"services.prefill.extra_args: {argument!r} is set by the plan; {rest}"
    with pytest.raises(ConfigError, match=r"^deployment\.decode\.group1\.extra_args: "):
        planned(tmp_path, put(content(), "deployment/decode/group1/extra_args", [argument]))


@pytest.mark.parametrize(
    ("path", "setting", "line"),
    [
        (
            "services/prefill/max_model_len",
            8193,
            "services.prefill.max_model_len: 8193 is more than the model's 8192 tokens; "
            "write at most 8192, or delete the line",
        ),
        (
            "services/decode/kv_cache_gib",
            0.01,
            "services.decode.kv_cache_gib: 0.01 GiB holds less than one sequence of 8192 tokens, which takes 0.179 GiB"
            "; raise it, delete it, or lower services.decode.max_model_len",
        ),
        (
            "services/decode/env",
            {"VLLM_DP_SIZE": 3},
            "services.decode.env.VLLM_DP_SIZE: is set by the plan; delete it",
        ),
        (
            "services/decode/env",
            {"OMNI_STATE_DIR": "/tmp/x"},  # noqa: S108
            "services.decode.env.OMNI_STATE_DIR: is set by the plan; delete it",
        ),
        (
            "deployment/decode/group1/env",
            {"VLLM_CPU_KVCACHE_SPACE": 3},
            "deployment.decode.group1.env.VLLM_CPU_KVCACHE_SPACE: is set by the plan; delete it",
        ),
        (
            "services",
            content()["services"]
            | {"kv_transfer": {"connector": "nixl"}, "decode": {"env": {"VLLM_NIXL_SIDE_CHANNEL_PORT": 1}}},
            "services.decode.env.VLLM_NIXL_SIDE_CHANNEL_PORT: is set by the plan; delete it",
        ),
        (
            "deployment/prefill/group1/hosts",
            "10.9.9.9",
            "deployment.prefill.group1.hosts: 10.9.9.9: not this machine; write 127.0.0.1, or backend: ansible for "
            "processes on other machines",
        ),
        (
            "deployment/prefill/group1",
            {"base_api_port": 9000, "hosts": "127.0.0.1,198.51.100.7", "data_parallel_size": 2},
            "deployment.prefill.group1.hosts: 127.0.0.1, 198.51.100.7: several names for this machine; "
            "write one of them",
        ),
        (
            "deployment/proxy/host",
            "10.9.9.9",
            "deployment.proxy.host: 10.9.9.9: not this machine; write 127.0.0.1, or backend: ansible for processes on "
            "other machines",
        ),
    ],
)
def test_refusals(tmp_path: Path, path: str, setting: Any, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        planned(tmp_path, put(content(), path, setting))
    assert lines(caught.value) == [line]


def test_refusals_come_together(tmp_path: Path) -> None:
    data = put(put(content(2, 2), "services/prefill/max_model_len", 9999), "services/decode/extra_args", ["--port"])
    with pytest.raises(ConfigError) as caught:
        planned(tmp_path, data)
    assert len(caught.value.problems) == 2, "each once, although two groups share it"


@pytest.mark.parametrize(("prefill", "decode"), [*product([1, 2, 5], [1, 3]), (9, 9)])
@pytest.mark.parametrize("dp", [1, 3])
@pytest.mark.parametrize("cores", [1, 2, 5, 64])
@pytest.mark.parametrize("of", [model(), MOE], ids=["dense", "moe"])
def test_any_number_of_groups(tmp_path: Path, prefill: int, decode: int, dp: int, cores: int, of: ModelInfo) -> None:
    data = put(content(prefill, decode), "services/prefill/data_parallel_size", dp)
    plan = planned(tmp_path, data, on=machine(cores=cores), of=of)
    assert len(plan.processes) == prefill * dp + decode + 1
    for process in plan.processes[:-1]:
        assert set(process.cpu_cores) <= set(range(cores))
        assert process.cpu_cores
    for distinct in ("port", "name", "log_file"):
        assert len({getattr(process, distinct) for process in plan.processes}) == len(plan.processes)
    assert len({kv_config(process)["engine_id"] for process in plan.processes[:-1]}) == len(plan.processes) - 1
    if cores >= prefill * dp + decode:
        used = [core for process in plan.processes for core in process.cpu_cores]
        assert len(used) == len(set(used)) == cores
    urls = {process.url for process in plan.processes[:-1]}
    assert urls <= set(plan.proxy.command)


def test_the_plan_is_pure(tmp_path: Path) -> None:
    assert dataclasses.asdict(planned(tmp_path, content(3, 2))) == dataclasses.asdict(planned(tmp_path, content(3, 2)))


def test_tensor_parallel_ranks_have_equally_many_heads(tmp_path: Path) -> None:
    data = put(put(content(), "services/decode/tensor_parallel_size", 3), "services/prefill/tensor_parallel_size", 2)
    with pytest.raises(ConfigError) as caught:
        planned(tmp_path, data, of=model(num_heads=9))
    assert lines(caught.value) == [
        "services.prefill.tensor_parallel_size: 2 does not divide the model's 9 attention heads; "
        "write a number that divides 9"
    ]
    planned(tmp_path, data, of=model(num_heads=6))

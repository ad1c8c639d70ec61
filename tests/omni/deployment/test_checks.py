"""The machine's side: ports, memory, the model's folder, the environment."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kv_transfer.auth import load_or_make_key
from omni.deployment.checks import check_machine
from omni.deployment.errors import ConfigError, MachineError
from omni.deployment.plan_types import LaunchPlan

from .samples import content, lines, machine, model, model_folder, planned, put


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def plan(folder: Path, data: dict[str, Any], **changes: Any) -> LaunchPlan:
    """A plan on free ports, with a model folder that exists."""
    with socket.socket() as one, socket.socket() as two, socket.socket() as three, socket.socket() as four:
        free = []
        for probe in (one, two, three, four):
            probe.bind(("127.0.0.1", 0))
            free.append(probe.getsockname()[1])
    data["deployment"]["prefill"]["group1"] = {"base_api_port": free[0], "master_port": 2001} | changes
    data["deployment"]["decode"]["group1"] = {"base_api_port": free[1], "master_port": 2002}
    if data["deployment"]["proxy"]["listen_port"] == 7000:
        data["deployment"]["proxy"]["listen_port"] = free[2]
    data["deployment"]["proxy"].setdefault("control_port", free[3])
    return planned(folder, data, of=model(path=model_folder(folder / "model")))


def test_a_free_machine(tmp_path: Path) -> None:
    check_machine(plan(tmp_path, content()), machine())


def test_a_taken_port(tmp_path: Path, taken_port: int) -> None:
    with pytest.raises(MachineError) as caught:
        check_machine(plan(tmp_path, content(), base_api_port=taken_port), machine())
    (line,) = lines(caught.value)
    start = f"deployment.prefill.group1.base_api_port: port {taken_port} on 127.0.0.1 for prefill.group1.rank0 is taken"
    assert line.startswith(start)
    assert f" by process {os.getpid()} (" in line
    assert line.endswith("; end that process or write another port")
    assert isinstance(caught.value, ConfigError)


def test_the_proxy_s_port(tmp_path: Path, taken_port: int) -> None:
    data = put(content(), "deployment/proxy/listen_port", taken_port)
    text = rf"line \d+: deployment\.proxy\.listen_port: port {taken_port} on 127\.0\.0\.1 for proxy"
    with pytest.raises(MachineError, match=text):
        check_machine(plan(tmp_path, data), machine())


def test_the_control_port(tmp_path: Path, taken_port: int) -> None:
    data = put(content(), "deployment/proxy/control_port", taken_port)
    with pytest.raises(MachineError) as caught:
        check_machine(plan(tmp_path, data), machine())
    (line,) = lines(caught.value)
    assert line.startswith(f"deployment.proxy.control_port: port {taken_port} on 127.0.0.1 for proxy is taken")
    assert line.endswith("; end that process or write another port, or 0 for none")
    check_machine(plan(tmp_path, put(content(), "deployment/proxy/control_port", 0)), machine())


def test_the_master_port_counts_where_somebody_listens(tmp_path: Path, taken_port: int) -> None:
    dense = plan(tmp_path, content(), master_port=taken_port, data_parallel_size=2)
    check_machine(dense, machine())
    data = content()
    group = dense.processes[0]
    put(data, "deployment/prefill/group1", {"base_api_port": group.port, "master_port": taken_port})
    put(data, "services/prefill/data_parallel_size", 2)
    moe = planned(tmp_path, data, of=model(path=tmp_path / "model", is_moe=True))
    with pytest.raises(MachineError, match=rf"deployment\.prefill\.group1\.master_port: port {taken_port} "):
        check_machine(moe, machine())


def test_a_taken_port_for_kv(tmp_path: Path, taken_port: int) -> None:
    data = put(content(), "services/kv_transfer/mode", "layerwise")
    with pytest.raises(MachineError, match=rf": deployment\.prefill\.group1\.base_kv_port: port {taken_port} on "):
        check_machine(plan(tmp_path, data, base_kv_port=taken_port), machine())
    check_machine(plan(tmp_path, content(), base_kv_port=taken_port), machine())


def test_this_user_s_key_is_made(tmp_path: Path, state_folder: Path) -> None:
    unchecked = plan(tmp_path, content())
    assert not state_folder.exists(), "to plan changes nothing"
    check_machine(unchecked, machine())
    made = (state_folder / "deployment.key").read_text()
    check_machine(unchecked, machine())
    assert (state_folder / "deployment.key").read_text() == made
    (state_folder / "deployment.key").chmod(0o644)
    with pytest.raises(MachineError, match=r": services\.kv_transfer\.key_file: .* is open to other users"):
        check_machine(unchecked, machine())


def test_a_key_that_the_file_names_must_be_there(tmp_path: Path, state_folder: Path) -> None:
    named = plan(tmp_path, put(content(), "services/kv_transfer/key_file", str(tmp_path / "key")))
    with pytest.raises(MachineError) as caught:
        check_machine(named, machine())
    assert lines(caught.value) == [
        f"services.kv_transfer.key_file: the deployment key {tmp_path / 'key'} cannot be read (No such file or "
        "directory): name one that this user can read; or write the path of another key"
    ]
    load_or_make_key(tmp_path / "key")
    check_machine(named, machine())
    assert not state_folder.exists()


def test_the_proxy_needs_a_key_with_vllm_s_own_connectors_too(tmp_path: Path, state_folder: Path) -> None:
    """Its admin API's token is made from it."""
    check_machine(plan(tmp_path, put(content(), "services/kv_transfer/connector", "nixl")), machine())
    assert state_folder.exists()


def test_experts_over_dp_ranks_on_a_cpu(tmp_path: Path) -> None:
    data = put(content(), "services/decode/data_parallel_size", 2)
    moe = planned(tmp_path, data, of=model(path=tmp_path / "model", is_moe=True))
    with pytest.raises(MachineError, match=r"deployment\.decode\.group1\.data_parallel_size: 2: .*; write 1"):
        check_machine(moe, machine())


def test_too_little_memory(tmp_path: Path) -> None:
    with pytest.raises(MachineError) as caught:
        check_machine(plan(tmp_path, content()), machine(gib=3))
    (line,) = lines(caught.value)
    assert line == (
        f"{tmp_path / 'trial.yaml'}: needs 4.7 GiB of memory, 3.0 GiB is available; in GiB: "
        "prefill.group1.rank0 2.3 (0.7 of it KV cache), decode.group1.rank0 2.3 (0.7 of it KV cache), proxy 0.2; "
        "lower max_model_len or kv_cache_gib, take out a group, or end other programs"
    )


def test_all_at_once(tmp_path: Path, taken_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    unready = plan(tmp_path, content(), base_api_port=taken_port)
    (tmp_path / "model/config.json").unlink()
    with pytest.raises(MachineError) as caught:
        check_machine(unready, machine(gib=1))
    assert [problem.field for problem in caught.value.problems] == [
        "services.model_path",
        "environment variable VLLM_CPU_KVCACHE_SPACE",
        "deployment.prefill.group1.base_api_port",
        str(tmp_path / "trial.yaml"),
    ]
    assert "holds no config.json; write the path of a Hugging Face model folder" in str(caught.value)
    assert "instead of by the plan; unset VLLM_CPU_KVCACHE_SPACE" in str(caught.value)

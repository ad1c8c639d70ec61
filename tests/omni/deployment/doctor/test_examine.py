"""A deployment file on this machine: its hosts' own part, the controller's, and the machine alone."""

import os
import socket
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from kv_transfer.auth import default_key_path, load_or_make_key
from omni.deployment.doctor import controller, examine
from omni.deployment.doctor.examine import examine_deployment, examine_machine
from omni.deployment.doctor.finding import Finding
from omni.deployment.embedded_model import ensure_embedded_model
from omni.deployment.errors import ConfigError, DeploymentError
from omni.deployment.machine import Machine
from omni.deployment.run_state import DeploymentState, RunFolder
from omni.process import start_ticks
from tests.omni.deployment.samples import content, machine, model_folder, put

from .tools import only_tools

Write = Callable[[dict[str, Any]], Path]


def a_machine(gib: float = 24.0) -> Machine:
    return machine(gib=gib, flags=("avx512f", "avx512_bf16"))


@pytest.fixture(autouse=True)
def a_good_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions have tests of their own, and this machine's memory is the machine's."""
    monkeypatch.setattr(examine, "version_findings", lambda extras: [])
    monkeypatch.setattr(examine, "this_machine", a_machine)


@pytest.fixture
def write(tmp_path: Path, free_ports: Callable[[int], int]) -> Write:
    """Writes a deployment file with the tiny model, on free ports."""
    ensure_embedded_model("tiny")

    def file(data: dict[str, Any]) -> Path:
        first = free_ports(8)
        pools = data["deployment"]
        groups = [group for role in ("prefill", "decode") for group in pools[role].values()]
        for index, group in enumerate(groups):
            if group.get("base_api_port", 9000) in range(9000, 9999):
                group |= {"base_api_port": first + index, "master_port": first + 4 + index}
        pools["proxy"] |= {"listen_port": first + 6, "control_port": first + 7}
        data["services"] |= {"model_path": "embedded:tiny", "log_path": str(tmp_path / "logs")}
        path = tmp_path / "trial.yaml"
        path.write_text(yaml.safe_dump(data))
        return path

    return file


def wrong(findings: Sequence[Finding] | Any) -> list[tuple[str, str]]:
    """What is not well, beyond this machine's own limits."""
    return [(f.level, f.subject) for f in findings if f.level != "ok" and f.area not in ("host", "disk")]


def test_a_local_deployment(write: Write) -> None:
    findings = list(examine_deployment(write(content()), None))
    assert wrong(findings) == []
    found = {finding.subject: finding.found for finding in findings}
    assert found["ports"] == "4 free, for 3 processes"
    assert found["memory"].endswith("24.0 GiB available")
    assert found["addresses"].endswith("of the file's hosts: 127.0.0.1")
    assert found[str(default_key_path())] == "is made when first needed"
    assert not default_key_path().exists(), "a doctor changes nothing"


def test_a_file_that_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(put(content(), "deployment/proxy/listen_port", 5)))
    with pytest.raises(ConfigError, match=r"deployment\.proxy\.listen_port"):
        list(examine_deployment(path, None))


def test_a_taken_port(write: Write) -> None:
    path = write(content())
    port = yaml.safe_load(path.read_text())["deployment"]["proxy"]["listen_port"]
    with socket.create_server(("127.0.0.1", port)):
        (finding,) = [f for f in examine_deployment(path, None) if f.level == "problem"]
    assert finding.area == "network"
    assert finding.subject.endswith("deployment.proxy.listen_port")
    assert "trial.yaml, line " in finding.subject
    assert f"by process {os.getpid()}" in finding.found


def test_its_own_ports_are_no_problem(write: Write) -> None:
    path = write(content())
    port = yaml.safe_load(path.read_text())["deployment"]["proxy"]["listen_port"]
    with subprocess.Popen(["/bin/sleep", "1000"]) as launcher, socket.create_server(("127.0.0.1", port)):
        state = DeploymentState(
            name="trial",
            config_file=str(path),
            log_folder="",
            proxy_url="",
            served_model_name="",
            process_names=(),
            launcher_pid=launcher.pid,
            launcher_start_ticks=start_ticks(launcher.pid),
        )
        RunFolder.of("trial").write_deployment(state)
        findings = list(examine_deployment(path, None))
        launcher.kill()
    assert wrong(findings) == []
    assert ("ports and memory", "trial runs and has them") in [(f.subject, f.found) for f in findings]


def test_too_little_memory(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examine, "this_machine", lambda: a_machine(gib=1.0))
    assert [(f.area, f.level) for f in examine_deployment(write(content()), None) if f.level == "problem"] == [
        ("memory", "problem")
    ]


def test_the_model_s_limit(write: Write) -> None:
    path = write(put(content(), "services/decode/max_model_len", 10**6))
    (finding,) = [f for f in examine_deployment(path, None) if f.level == "problem"]
    assert finding.subject.endswith("services.decode.max_model_len")


def test_a_model_that_is_not_made_yet(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(content())
    monkeypatch.setenv("OMNI_CACHE_DIR", str(tmp_path / "cache"))
    assert wrong(examine_deployment(path, None)) == [("warning", "plan")]
    assert not (tmp_path / "cache").exists()


def test_keys_and_files(write: Write, tmp_path: Path) -> None:
    load_or_make_key(tmp_path / "key").mac("")
    (tmp_path / "key").chmod(0o640)
    data = put(content(), "services/kv_transfer/key_file", str(tmp_path / "key"))
    put(data, "deployment/proxy/api_keys_file", str(tmp_path / "missing"))
    findings = [f for f in examine_deployment(write(data), None) if f.level == "problem"]
    assert [(f.area, f.subject) for f in findings] == [
        ("key", str(tmp_path / "key")),
        ("file", "deployment.proxy.api_keys_file"),
    ]
    assert findings[0].mend == f"chmod 600 {tmp_path}/key"


class TestOn:
    """One host of several, which is this machine."""

    @pytest.fixture
    def path(self, write: Write) -> Path:
        data = put(content(), "deployment/prefill/group1/hosts", "127.0.0.1")
        put(data, "deployment/decode/group1/hosts", "192.0.2.9")
        put(data, "deployment/proxy/host", "127.0.0.1")
        return write(put(data, "backend", "ansible"))

    def test_its_part_alone(self, path: Path) -> None:
        findings = list(examine_deployment(path, "127.0.0.1"))
        assert wrong(findings) == []
        assert "3 free, for 2 processes" in [f.found for f in findings]

    def test_the_proxy_s_files_are_its_host_s(self, path: Path, write: Write, tmp_path: Path) -> None:
        data = yaml.safe_load(path.read_text())
        put(data, "deployment/proxy/api_keys_file", str(tmp_path / "missing"))
        assert wrong(examine_deployment(write(data), "127.0.0.1")) == [("problem", "deployment.proxy.api_keys_file")]
        put(data, "deployment/proxy/host", "192.0.2.9")
        assert wrong(examine_deployment(write(data), "127.0.0.1")) == []

    @pytest.mark.parametrize(("host", "why"), [("192.0.2.9", "is not this machine"), ("198.51.100.7", "is not in ")])
    def test_another_host(self, host: str, why: str, path: Path) -> None:
        with pytest.raises(DeploymentError, match=rf"^--on: {host} {why}"):
            list(examine_deployment(path, host))


class TestController:
    @pytest.fixture
    def data(self) -> dict[str, Any]:
        data = put(content(), "deployment/prefill/group1/hosts", "192.0.2.8")
        put(data, "deployment/decode/group1/hosts", "192.0.2.9")
        put(data, "deployment/proxy/host", "192.0.2.8")
        return put(data, "backend", "ansible")

    def test_ansible(self, data: dict[str, Any], write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[tuple[str, ...]] = []
        monkeypatch.setattr(controller.network, "ssh_hosts", lambda hosts, port: asked.append(tuple(hosts)) or [])
        only_tools(tmp_path / "bin", monkeypatch, {"ssh": ""})
        put(data, "deployment/prefill/group1/private_key", str(tmp_path / "missing"))
        put(data, "deployment/decode/group1/password", "very secret")
        put(data, "deployment/decode/group1/host 192.0.2.9", {"private_key": str(tmp_path / "other")})
        findings = list(examine_deployment(write(data), None))
        assert asked == [("192.0.2.8", "192.0.2.9")]
        assert [(f.level, f.subject) for f in findings if f.level != "ok"] == [
            ("problem", "sshpass"),
            ("problem", f"private_key {tmp_path}/missing"),
            ("problem", f"private_key {tmp_path}/other"),
        ]
        assert "plans 3 processes on 2 hosts" in [f.found for f in findings]
        assert "very secret" not in str(findings)

    def test_a_plan_that_cannot_be(self, data: dict[str, Any], write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(controller.network, "ssh_hosts", lambda hosts, port: [])
        path = write(put(data, "services/prefill/extra_args", ["--port", "1"]))
        findings = [f for f in examine_deployment(path, None) if f.area == "file"]
        assert [f.level for f in findings] == ["problem"]

    @pytest.mark.parametrize("backend", ["kubernetes", "ray"])
    def test_others_log_in_nowhere(
        self, backend: str, data: dict[str, Any], write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        only_tools(tmp_path / "bin", monkeypatch, {})
        findings = list(examine_deployment(write(put(data, "backend", backend)), None))
        assert wrong(findings) == []
        assert ("kubectl" in [f.subject for f in findings]) == (backend == "kubernetes")


def test_npus_that_the_file_wants(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, bool]] = []
    monkeypatch.setattr(examine, "npu_findings", lambda wanted, *, is_needed: asked.append((wanted, is_needed)) or [])
    data = put(content(), "deployment/prefill/group1/ascend_rt_visible_devices", "0,1")
    put(data, "deployment/decode/group1/ascend_rt_visible_devices", "4")
    list(examine_deployment(write(data), None))
    list(examine_machine())
    assert asked[0] == ((0, 1, 4), True)


def test_gpus_that_the_file_wants(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, bool]] = []
    monkeypatch.setattr(examine, "gpu_findings", lambda number, *, is_needed: asked.append((number, is_needed)) or [])
    data = put(put(content(), "platform", "cuda"), "services/prefill/tensor_parallel_size", 4)
    list(examine_deployment(write(put(data, "services/decode/data_parallel_size", 2)), None))
    assert asked == [(6, True)]


def test_gpus_of_one_host_of_two(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(examine, "gpu_findings", lambda number, *, is_needed: asked.append(number) or [])
    data = put(put(content(), "platform", "cuda"), "services/prefill/tensor_parallel_size", 4)
    put(data, "deployment/decode/group1/hosts", "127.0.0.1,192.0.2.9")
    put(put(data, "services/decode/data_parallel_size", 2), "backend", "ansible")
    list(examine_deployment(write(data), "127.0.0.1"))
    assert asked == [4 + 1]


def test_the_machine_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(examine, "engine_build", lambda: None)
    only_tools(tmp_path / "bin", monkeypatch, {})
    findings = list(examine_machine())
    assert wrong(findings) == []
    assert {"host", "memory", "disk", "network", "key"} <= {f.area for f in findings}
    only_tools(tmp_path / "bin", monkeypatch, {"nvidia-smi": {}})
    assert ("problem", "nvidia-smi") in wrong(examine_machine())


def test_a_broken_model_folder(write: Write, tmp_path: Path) -> None:
    path = write(content())
    folder = model_folder(tmp_path / "model")  # 1000 zeros are no safetensors file
    path.write_text(path.read_text().replace("embedded:tiny", str(folder)))
    assert ("problem", str(folder / "model.safetensors")) in wrong(examine_deployment(path, None))

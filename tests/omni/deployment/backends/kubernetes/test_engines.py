"""A group's Deployment or LeaderWorkerSet."""

import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from omni.cli import scale

from ...samples import put
from .samples import engine, in_cluster, on_devices, rendered

# Of leaderworkerset.x-k8s.io/v1, as of its release 0.9: the fields below spec, and what some may be.
LWS_SPEC = {"replicas", "leaderWorkerTemplate", "rolloutStrategy", "startupPolicy", "networkConfig"}
LWS_TEMPLATE = {
    "leaderTemplate",
    "workerTemplate",
    "size",
    "restartPolicy",
    "subGroupPolicy",
    "volumeClaimTemplates",
    "persistentVolumeClaimRetentionPolicy",
}
STARTUP_POLICIES = {"LeaderCreated", "LeaderReady"}
RESTART_POLICIES = {"Default", "RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"}


def arguments(pod: dict[str, Any]) -> dict[str, str]:
    """The options of an engine's command."""
    command = [word for word in engine(pod)["command"] if word != "with-cann"]
    return dict(zip(command[3::2], command[4::2], strict=True))


def test_one_host_is_a_deployment(tmp_path: Path) -> None:
    result = rendered(tmp_path, in_cluster(2, 1))
    names = [manifest["metadata"]["name"] for manifest in result.of_kind("Deployment")]
    groups = ["omni-chat-prefill-group1", "omni-chat-prefill-group2", "omni-chat-decode-group1"]
    assert names == ["omni-chat-proxy", *groups]
    assert not result.of_kind("LeaderWorkerSet")
    pod = result.pod("prefill-group2")
    assert engine(pod)["command"][:3] == ["python3", "-m", "services.prefill"]
    assert arguments(pod) == {
        "--config": "/etc/omni/deployment.yaml",
        "--group": "group2",
        "--listen": "$(POD_IP)",
        "--join": "omni-chat-control:7001",
    }
    assert engine(pod)["image"] == "registry.example/omni:1"


def test_selectors_find_the_pods_of_one_group_alone(tmp_path: Path) -> None:
    deployments = rendered(tmp_path, put(in_cluster(2, 2), "name", "Chat.V2")).of_kind("Deployment")
    for deployment in deployments:
        wanted = deployment["spec"]["selector"]["matchLabels"].items()
        found = [d for d in deployments if wanted <= d["spec"]["template"]["metadata"]["labels"].items()]
        assert found == [deployment]


def test_mixed_groups(tmp_path: Path) -> None:
    data = in_cluster()
    data["deployment"] = {"mixed": {"group1": {"base_api_port": 9000}}, "proxy": {"listen_port": 7000}}
    result = rendered(tmp_path, data)
    assert [file.name for file in result.files] == ["make-secrets.sh", "config.yaml", "proxy.yaml", "mixed.yaml"]
    assert engine(result.pod("mixed-group1"))["command"][2] == "services.mixed"


def test_several_hosts_are_a_leader_worker_set(tmp_path: Path) -> None:
    """D: every host has DP ranks, and so api servers, of its own."""
    result = rendered(tmp_path, on_devices("10.0.0.1", "10.0.0.2,10.0.0.3,10.0.0.4"))
    (manifest,) = result.of_kind("LeaderWorkerSet")
    assert manifest["apiVersion"] == "leaderworkerset.x-k8s.io/v1"
    assert manifest["metadata"]["name"] == "omni-chat-decode-group1"
    spec = manifest["spec"]
    template = spec["leaderWorkerTemplate"]
    assert spec.keys() <= LWS_SPEC
    assert template.keys() <= LWS_TEMPLATE
    assert spec["startupPolicy"] in STARTUP_POLICIES
    assert template["restartPolicy"] in RESTART_POLICIES
    assert (spec["replicas"], template["size"]) == (1, 3)
    leader, worker = template["leaderTemplate"]["spec"], template["workerTemplate"]["spec"]
    assert (arguments(leader)["--node"], arguments(worker)["--node"]) == ("0", "$(LWS_WORKER_INDEX)")
    assert arguments(leader)["--master"] == arguments(worker)["--master"] == "$(LWS_LEADER_ADDRESS)"
    for pod in (leader, worker):
        assert [port["containerPort"] for port in engine(pod)["ports"]] == [9500, 9501, 9502, 9503]
        assert "readinessProbe" in engine(pod)


def test_nodes_without_an_api_server_are_not_asked(tmp_path: Path) -> None:
    """P: one rank, whose workers are on both hosts."""
    result = rendered(tmp_path, on_devices("10.0.0.1,10.0.0.3", "10.0.0.2"))
    (manifest,) = result.of_kind("LeaderWorkerSet")
    template = manifest["spec"]["leaderWorkerTemplate"]
    leader, worker = (engine(template[name]["spec"]) for name in ("leaderTemplate", "workerTemplate"))
    assert {"startupProbe", "readinessProbe", "livenessProbe", "ports", "lifecycle"} <= leader.keys()
    assert not {"startupProbe", "readinessProbe", "livenessProbe", "ports", "lifecycle"} & worker.keys()
    assert worker["resources"]["limits"] == {"huawei.com/Ascend910": "4"}


def test_hosts_without_a_rank_are_no_pods(tmp_path: Path) -> None:
    data = put(on_devices("10.0.0.1", "10.0.0.2,10.0.0.3"), "deployment/decode/group1/data_parallel_size", 1)
    result = rendered(tmp_path, data)
    assert result.pod("decode-group1")
    assert result.config()["deployment"]["decode"]["group1"]["hosts"] == "decode-group1-0"


def test_ports_that_a_single_host_has_mean_nothing(tmp_path: Path) -> None:
    data = on_devices("10.0.0.1", "10.0.0.2,10.0.0.3")
    put(data, "deployment/decode/group1/host 10.0.0.3", {"base_api_port": 9900})
    (manifest,) = rendered(tmp_path, data).of_kind("LeaderWorkerSet")
    worker = manifest["spec"]["leaderWorkerTemplate"]["workerTemplate"]["spec"]
    assert engine(worker)["ports"][0]["containerPort"] == 9500


def test_all_proxies_are_joined(tmp_path: Path) -> None:
    data = put(in_cluster(), "deployment/proxy/other_control_addresses", ["proxy.example:7009"])
    command = engine(rendered(tmp_path, data).pod("prefill-group1"))["command"]
    joined = [word for before, word in pairwise(command) if before == "--join"]
    assert joined == ["omni-chat-control:7001", "proxy.example:7009"]


def test_an_engine_that_starts_again_is_not_killed_meanwhile(tmp_path: Path) -> None:
    probes = engine(rendered(tmp_path, in_cluster()).pod("decode-group1"))
    patience_s = {
        name: probes[name]["periodSeconds"] * probes[name]["failureThreshold"] for name in probes if "Probe" in name
    }
    assert patience_s["startupProbe"] >= 3600, "a large model over a slow disk"
    assert patience_s["livenessProbe"] >= 1800
    assert patience_s["readinessProbe"] <= 60


def test_cann_s_variables_are_set_where_there_are_npus(tmp_path: Path) -> None:
    """By a program that the image must have; the proxy does without."""
    result = rendered(tmp_path, on_devices())
    assert engine(result.pod("prefill-group1"))["command"][:2] == ["with-cann", "python3"]
    assert engine(result.pod("proxy"))["command"][0] == "python3"
    script = Path(__file__).parents[5] / "docker/with-cann.sh"
    dockerfile = script.with_name("Dockerfile.ascend").read_text()
    assert script.is_file()
    assert "COPY docker/with-cann.sh /usr/local/bin/with-cann" in dockerfile


def test_engines_on_cpus_keep_apart(tmp_path: Path) -> None:
    result = rendered(tmp_path, in_cluster())
    labels = result.named("Deployment", "decode-group1")["spec"]["template"]["metadata"]["labels"]
    wish = result.pod("prefill-group1")["affinity"]["podAntiAffinity"][
        "preferredDuringSchedulingIgnoredDuringExecution"
    ]
    ((expression,),) = [w["podAffinityTerm"]["labelSelector"]["matchExpressions"] for w in wish]
    assert labels[expression["key"]] in expression["values"]
    assert "proxy" not in expression["values"]
    assert "affinity" not in rendered(tmp_path, on_devices()).pod("prefill-group1")


def test_models_and_rank_tables_of_the_node(tmp_path: Path) -> None:
    data = put(on_devices(), "services/rank_table_path", "/etc/tables")
    volumes = {volume["name"]: volume for volume in rendered(tmp_path, data).pod("prefill-group1")["volumes"]}
    assert volumes["model"]["hostPath"] == {"path": "/models/smollm2", "type": "Directory"}
    assert volumes["rank-tables"]["hostPath"]["path"] == "/etc/tables"
    put(data, "services/model_path", "embedded:tiny")
    names = [volume["name"] for volume in rendered(tmp_path, data).pod("prefill-group1")["volumes"]]
    assert "model" not in names


def test_the_drain_hook_is_a_command_that_omni_cli_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is run here, by a real shell, with a `python3` that notes how it is called; then omni_cli reads that."""
    pod = rendered(tmp_path, put(in_cluster(), "deployment/decode/group1/data_parallel_size", 3)).pod("decode-group1")
    noted = tmp_path / "noted"
    stand_in = tmp_path / "bin/python3"
    stand_in.parent.mkdir()
    stand_in.write_text(f'#!/bin/sh\necho "$@" >> {noted}\n')
    stand_in.chmod(0o755)
    hook = engine(pod)["lifecycle"]["preStop"]["exec"]["command"]
    env = {"PATH": f"{stand_in.parent}:/usr/bin:/bin", "POD_IP": "10.1.2.3"}
    subprocess.run(hook, check=True, timeout=20, env=env)
    calls = sorted(noted.read_text().splitlines())
    assert [call.split()[:5] for call in calls] == [
        ["-m", "omni.cli.main", "scale", "remove", f"10.1.2.3:{port}"] for port in (9500, 9501, 9502)
    ]
    asked: list[tuple[str, str, float]] = []

    class Client:
        def __init__(self, url: str) -> None:
            self._url = url

        def remove(self, name: str, wait_s: float, *, by_force: bool) -> None:
            asked.append((self._url, name, wait_s))

    monkeypatch.setattr(scale, "_client", lambda name, url, key_file: Client(url))
    for call in calls:
        result = CliRunner().invoke(scale.app, call.split()[3:])
        assert result.exit_code == 0, result.output
    assert asked == [("http://omni-chat-control:7000", f"10.1.2.3:{port}", 600.0) for port in (9500, 9501, 9502)]
    assert pod["terminationGracePeriodSeconds"] > 600


def test_with_tls_there_is_no_drain_hook(tmp_path: Path) -> None:
    data = in_cluster()
    data["deployment"]["proxy"].update(tls_certificate_file="/k/crt", tls_key_file="/k/key")
    assert "lifecycle" not in engine(rendered(tmp_path, data).pod("decode-group1"))

"""What all pods have in common, against the schemas that Kubernetes publishes."""

import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

from kv_transfer.auth import load_key

from ...samples import put
from .samples import Rendered, engine, in_cluster, on_devices, rendered, with_known_model
from .schemas import as_pod, check


@pytest.fixture(params=["cpu", "npu", "cuda", "known"])
def every_kind(request: pytest.FixtureRequest, tmp_path: Path) -> Rendered:
    data = on_devices("10.0.0.1,10.0.0.2", "10.0.0.3,10.0.0.4") if request.param == "npu" else in_cluster()
    if request.param == "cuda":
        put(data, "platform", "cuda")
    if request.param == "known":
        with_known_model(tmp_path, data)["backend"] = "local"
    files = {"api_keys_file": "/k/keys", "tls_certificate_file": "/k/crt", "tls_key_file": "/k/key"}
    data["deployment"]["proxy"].update(files)
    put(data, "services/http_proxy", "http://proxy:3128")
    return rendered(tmp_path, data)


def test_every_manifest_is_one_of_kubernetes(every_kind: Rendered) -> None:
    for manifest in every_kind.manifests:
        if manifest["kind"] != "LeaderWorkerSet":  # the API server asks its own resource: see test_engines
            check(manifest)
    for template in every_kind.templates():
        check(as_pod(template))


def test_the_schemas_notice_a_wrong_field(tmp_path: Path) -> None:
    template = rendered(tmp_path, in_cluster()).templates()[0]
    engine(template["spec"])["livenesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        check(as_pod(template))


def test_mounts_ports_and_volumes_are_there(every_kind: Rendered) -> None:
    for template in every_kind.templates():
        pod = template["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        used = [m["name"] for c in (*pod["initContainers"], *pod["containers"]) for m in c["volumeMounts"]]
        assert set(used) == volumes
        container = engine(pod)
        paths = [m["mountPath"] for m in container["volumeMounts"]]
        assert len(paths) == len(set(paths))
        assert container["workingDir"] in paths
        ports = {port["name"] for port in container.get("ports", ())}
        probes = [container[probe] for probe in container if probe.endswith("Probe")]
        assert {probe["httpGet"]["port"] for probe in probes} <= ports


def test_pods_may_do_as_little_as_they_can(every_kind: Rendered) -> None:
    for template in every_kind.templates():
        pod = template["spec"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in (*pod["initContainers"], *pod["containers"]):
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
        host_paths = [volume["name"] for volume in pod["volumes"] if "hostPath" in volume]
        read_only = [m["name"] for m in engine(pod)["volumeMounts"] if m.get("readOnly")]
        assert set(host_paths) <= set(read_only)


def security(pod: dict[str, Any]) -> tuple[bool, bool]:
    """Whether it is certainly not root's, and whether it has no capabilities."""
    has_none = engine(pod)["securityContext"].get("capabilities") == {"drop": ["ALL"]}
    return pod["securityContext"].get("runAsNonRoot", False), has_none


def test_without_ascend_devices_nobody_is_root(tmp_path: Path) -> None:
    assert {security(template["spec"]) for template in rendered(tmp_path, in_cluster()).templates()} == {(True, True)}


def test_beside_ascend_devices_the_proxy_is_as_everywhere(tmp_path: Path) -> None:
    result = rendered(tmp_path, on_devices())
    assert security(result.pod("proxy")) == (True, True)
    assert security(result.pod("prefill-group1")) == (False, False)
    assert {volume["name"] for volume in result.pod("prefill-group1")["volumes"]} >= {"driver", "dcmi", "hccn"}


def test_the_key_as_it_is_copied_is_one_that_is_taken(tmp_path: Path) -> None:
    """The command, run here on a file such as Kubernetes makes: root's, read by a group."""
    secret, state = tmp_path / "secret", tmp_path / "state"
    secret.mkdir()
    state.mkdir()
    (secret / "..data").mkdir()
    (secret / "..data/deployment.key").write_text("ab" * 32 + "\n")
    (secret / "..data/deployment.key").chmod(0o440)
    (secret / "deployment.key").symlink_to("..data/deployment.key")
    with pytest.raises(ValueError, match="open to other users"):
        load_key(secret / "deployment.key")
    pod = rendered(tmp_path, in_cluster()).pod("decode-group1")
    command = pod["initContainers"][0]["command"]
    paths = {mount["mountPath"]: mount["name"] for mount in pod["initContainers"][0]["volumeMounts"]}
    folders = {"key": secret, "state": state}
    for path, name in paths.items():
        command = [word.replace(path, str(folders[name])) for word in command]
    subprocess.run(command, check=True, timeout=20)
    load_key(state / "deployment.key")


def test_where_the_pod_looks_for_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kv_transfer.auth import default_key_path

    for template in rendered(tmp_path, in_cluster()).templates():
        env = {entry["name"]: entry.get("value") for entry in engine(template["spec"])["env"]}
        monkeypatch.setenv("OMNI_STATE_DIR", str(env["OMNI_STATE_DIR"]))
        assert str(default_key_path()) == template["spec"]["initContainers"][0]["command"][-1]

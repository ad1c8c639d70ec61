"""The deployment file as pods read it."""

from pathlib import Path

import pytest

from omni.deployment.deployment_file import load_deployment
from omni.deployment.errors import ConfigError

from ...samples import FIELD_FILE, put
from .samples import Rendered, deployment_file, in_cluster, on_devices, plan_of, rendered, with_known_model


def test_no_login_and_no_key_is_in_it(tmp_path: Path) -> None:
    data = on_devices("10.0.0.1,10.0.0.2", "10.0.0.3")
    put(data, "deployment/prefill/group1/user", "root")
    put(data, "deployment/prefill/group1/password", "hunter2")
    put(data, "deployment/prefill/group1/host 10.0.0.2", {"private_key": "/pem/hunter2"})
    put(data, "deployment/proxy/password", "hunter2")
    put(data, "deployment/proxy/api_keys_file", "/keys/hunter2")
    put(data, "services/kv_transfer", {"key_file": "/keys/hunter2", "lease_s": 20})
    result = rendered(tmp_path, data)
    for file in result.files:
        assert file.suffix == ".sh" or "hunter2" not in file.read_text()
    assert result.config()["services"]["kv_transfer"] == {"lease_s": 20}


def test_it_is_a_deployment_file_of_the_same_groups(tmp_path: Path) -> None:
    data = put(in_cluster(2, 3), "services/kv_transfer", {"mode": "layerwise"})
    again = load_deployment(deployment_file(tmp_path, rendered(tmp_path, data).config(), "other.yaml"))
    assert (again.name, again.backend) == ("chat", "kubernetes")
    assert [*again.deployment.prefill, *again.deployment.decode] == ["group1", "group2", "group1", "group2", "group3"]
    assert again.services.kv_transfer.mode == "layerwise"
    assert str(again.log_folder) == "/var/log/omni"
    proxy = again.deployment.proxy
    assert (proxy.host, proxy.listen_port, proxy.control_port) == ("omni-chat-control", 7000, 7001)


def test_hosts_and_devices_are_those_of_pods(tmp_path: Path) -> None:
    """Two groups share a host: 0-3 and 4-7. In their pods, both count from 0."""
    data = on_devices("10.0.0.1", "10.0.0.1", "0,1,2,3")
    put(data, "deployment/decode/group1/ascend_rt_visible_devices", "4,5,6,7")
    put(data, "deployment/decode/group1/host 10.0.0.1", {"base_api_port": 9700})
    config = rendered(tmp_path, data).config()
    groups = [config["deployment"][role]["group1"] for role in ("prefill", "decode")]
    assert [group["hosts"] for group in groups] == ["prefill-group1-0", "decode-group1-0"]
    assert {group["ascend_rt_visible_devices"] for group in groups} == {"0,1,2,3"}
    assert not any(key.startswith("host ") for group in groups for key in group)
    load_deployment(deployment_file(tmp_path, config, "again.yaml"))


def test_the_model_is_where_it_was(tmp_path: Path) -> None:
    data = with_known_model(tmp_path, in_cluster())
    services = rendered(tmp_path, data).config()["services"]
    assert (services["model_path"], services["served_model_name"]) == (str(tmp_path / "model"), "model")


def test_a_file_too_large_for_a_config_map(tmp_path: Path) -> None:
    data = put(in_cluster(), "deployment/prefill/group1/env", {"NOTES": "x" * (1 << 20)})
    with pytest.raises(ConfigError, match=r"chat\.yaml: 1049\d\d\d bytes without its comments, and a ConfigMap holds"):
        rendered(tmp_path, data)


def test_the_form_that_users_have(tmp_path: Path) -> None:
    file = tmp_path / "omni_infer_deployment.yml"
    file.write_text(f"backend: kubernetes\n{FIELD_FILE.read_text()}")
    from omni.deployment.load import load_plan

    config = Rendered(tmp_path / "out", load_plan(file)).config()
    assert config["deployment"]["decode"]["group1"]["hosts"].count(",") == 3
    load_deployment(deployment_file(tmp_path, config, "again.yaml"))


def digests(folder: Path, data: object) -> dict[str, str]:
    assert isinstance(data, dict)
    result = Rendered(folder / "out", plan_of(folder, data))
    return {
        manifest["metadata"]["name"].removeprefix("omni-chat-"): manifest["spec"]["template"]["metadata"][
            "annotations"
        ]["omni/config"]
        for manifest in result.of_kind("Deployment")
        if not manifest["metadata"]["name"].endswith("proxy")
    }


def test_a_group_starts_anew_for_what_concerns_it_alone(tmp_path: Path) -> None:
    before = digests(tmp_path, in_cluster(2))
    assert digests(tmp_path, in_cluster(3)).items() > before.items(), "a group more disturbs nobody"
    changed = digests(tmp_path, put(in_cluster(2), "deployment/prefill/group2/extra_args", ["--max-num-seqs", "9"]))
    assert {name for name in before if changed[name] != before[name]} == {"prefill-group2"}
    common = digests(tmp_path, put(in_cluster(2), "services/dtype", "float16"))
    assert not set(common.values()) & set(before.values())

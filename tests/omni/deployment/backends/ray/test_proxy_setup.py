from pathlib import Path
from typing import Any

import pytest

from omni.deployment.backends.ray.actors import proxy_command
from omni.deployment.backends.ray.proxy_setup import joined_proxies, proxy_setup
from omni.deployment.errors import ConfigError
from tests.omni.deployment.samples import content, planned, put


def _arguments(folder: Path, data: dict[str, Any]) -> tuple[str, ...]:
    return proxy_setup(planned(folder, data), "cafe").arguments


def test_it_has_no_instances_of_its_own_and_listens_everywhere(tmp_path: Path) -> None:
    arguments = _arguments(tmp_path, put(content(2, 2), "deployment/proxy/workers", 3))
    assert arguments[:6] == ("--host", "0.0.0.0", "--port", "7000", "--control-port", "7001")
    assert not {"--prefill", "--decode"} & set(arguments)
    assert not [part for part in arguments if part.startswith("http")]
    assert arguments[-2:] == ("--workers", "3")


def test_what_it_needs_to_know_of_the_connector_comes_with_joining(tmp_path: Path) -> None:
    data = put(content(), "services/kv_transfer/mode", "layerwise")
    data = put(data, "services/kv_transfer/key_file", str(tmp_path / "key"))
    data = put(data, "services/prefill/kv_events", True)
    arguments = _arguments(tmp_path, data)
    assert arguments[-2:] == ("--mode", "layerwise")
    assert not {"--kv-address", "--kv-events", "--key-file"} & set(arguments)


def test_it_gets_the_environment_of_the_plan(tmp_path: Path) -> None:
    plan = planned(tmp_path, put(content(), "services/http_proxy", "http://10.0.0.8:3128"))
    setup = proxy_setup(plan, "cafe")
    assert setup.env == plan.proxy.env
    assert setup.env["https_proxy"] == "http://10.0.0.8:3128"


def test_its_files_travel_with_it(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("hashed")
    setup = proxy_setup(planned(tmp_path, put(content(), "deployment/proxy/api_keys_file", str(keys))), "cafe")
    assert setup.secret_files == ("hashed",)
    assert "hashed" not in repr(setup)
    assert "cafe" not in repr(setup)
    command = proxy_command(setup, ["/node/file0"])
    assert command[:2] == ("-m", "services.global_proxy")
    assert command[command.index("--api-keys") + 1] == "/node/file0"


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    data = put(content(), "deployment/proxy/api_keys_file", str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match=r"deployment\.proxy\.api_keys_file: .*absent.*; name a text file"):
        _arguments(tmp_path, data)


def test_engines_join_it_on_the_head_node_and_others_where_they_are(tmp_path: Path) -> None:
    plan = planned(tmp_path, put(content(), "deployment/proxy/other_control_addresses", ["10.0.0.9:7005"]))
    assert joined_proxies(plan, "10.0.0.1") == ("10.0.0.1:7001", "10.0.0.9:7005")

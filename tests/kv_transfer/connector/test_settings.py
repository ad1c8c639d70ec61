import os
import socket
import types
from pathlib import Path
from typing import Any

import pytest

from kv_transfer.auth import DeploymentKey, load_or_make_key
from kv_transfer.connector.settings import ConnectorSettings

KEY = DeploymentKey(b"k" * 32)


@pytest.fixture(autouse=True)
def state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OMNI_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state"


def settings(**changes: Any) -> ConnectorSettings:
    fields: dict[str, Any] = {
        "engine_id": "engine",
        "is_producer": True,
        "is_consumer": False,
        "block_size": 16,
        "tp_size": 1,
        "pp_size": 1,
        "key": KEY,
    }
    return ConnectorSettings(**(fields | changes))


def vllm_config(extra: dict[str, Any], **parallel: int) -> Any:
    """Stand-in: the fields of vLLM's configuration that are read."""
    sizes = {"pipeline_parallel_size": 1, "decode_context_parallel_size": 1, "tensor_parallel_size": 2}
    return types.SimpleNamespace(
        kv_transfer_config=types.SimpleNamespace(
            engine_id=None, is_kv_producer=True, is_kv_consumer=False, kv_connector_extra_config=extra
        ),
        parallel_config=types.SimpleNamespace(**(sizes | parallel)),
        cache_config=types.SimpleNamespace(block_size=32),
    )


def test_defaults() -> None:
    of = ConnectorSettings.of(vllm_config({}))
    assert (of.block_size, of.tp_size, of.is_producer, of.is_consumer, of.engine_id) == (32, 2, True, False, "")
    assert (of.listen_host, of.listen_port, of.transport, of.mode) == ("127.0.0.1", 0, "auto", "pull")
    assert (of.lease_s, of.max_lease_s, of.load_timeout_s) == (30.0, 600.0, 30.0)
    assert (of.num_load_threads, of.num_connections, of.checksum) == (4, 1, False)


def test_each_field_is_read(tmp_path: Path) -> None:
    extra = {
        "listen_host": "localhost",
        "listen_port": 12345,
        "lease_s": 5,
        "max_lease_s": 50,
        "load_timeout_s": 2.5,
        "num_load_threads": 1,
        "transport": "tcp",
        "mode": "layerwise",
        "num_connections": 16,
        "checksum": True,
    }
    key = load_or_make_key(tmp_path / "key")
    of = ConnectorSettings.of(vllm_config({**extra, "key_file": str(tmp_path / "key")}))
    assert {name: getattr(of, name) for name in extra} == extra
    assert of.key.mac("x") == key.mac("x")


def test_the_user_s_own_key_is_made_when_none_is_named(state_folder: Path) -> None:
    first, second = ConnectorSettings.of(vllm_config({})), ConnectorSettings.of(vllm_config({}))
    assert first.key.mac("x") == second.key.mac("x")
    assert os.listdir(state_folder) == ["deployment.key"]


def test_a_named_key_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"kv_connector_extra_config\.key_file: the deployment key .* cannot be read"):
        ConnectorSettings.of(vllm_config({"key_file": str(tmp_path / "key")}))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("value", ["", 1, ["/k"], True])
def test_what_is_no_path(value: object) -> None:
    with pytest.raises(ValueError, match=r"kv_connector_extra_config\.key_file is .*; it must be the path of a file"):
        ConnectorSettings.of(vllm_config({"key_file": value}))


def test_the_key_does_not_show() -> None:
    assert "kkk" not in repr(settings())


def test_an_unknown_field_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown fields \['lease'\]; known are .*'lease_s'"):
        ConnectorSettings.of(vllm_config({"lease": 5}))


def test_ranks_are_counted_over_both_ways_to_split_a_model() -> None:
    of = ConnectorSettings.of(vllm_config({}, pipeline_parallel_size=3))
    assert (of.tp_size, of.pp_size, of.num_ranks) == (2, 3, 6)


def test_context_parallelism_is_refused() -> None:
    with pytest.raises(ValueError, match=r"decode_context_parallel_size is 2; OmniConnector moves KV .* leave it at 1"):
        ConnectorSettings.of(vllm_config({}, decode_context_parallel_size=2))


SECONDS = ("lease_s", "max_lease_s", "load_timeout_s")


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in SECONDS for value in (0, -1, "30", None, True, [])]
    + [(name, float(value)) for name in SECONDS for value in ("nan", "inf", "-inf")]
    + [("num_load_threads", value) for value in (0, -1, 1.5, 4.0, "4", None, True, 1025)]
    + [("num_connections", value) for value in (0, -1, 1.5, 4.0, "4", None, True, 17)]
    + [("listen_port", value) for value in (-1, 65536, "80", 80.0, None, True)]
    + [("transport", value) for value in ("", "rdma", None, 1, ["tcp"])]
    + [("mode", value) for value in ("push", None, True)]
    + [("checksum", value) for value in (0, 1, "true", None)]
    + [("listen_host", value) for value in ("", "0.0.0.0", "::", None, 7, ["127.0.0.1"])],
)
def test_a_wrong_value_is_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"kv_connector_extra_config\.{name} is .*; it must be "):
        settings(**{name: value})


@pytest.mark.parametrize("transport", ["mooncake", "shared_memory", "process_vm"])
def test_checksums_are_for_what_has_them(transport: str) -> None:
    with pytest.raises(ValueError, match=rf"checksum is True; it must be false with transport {transport}"):
        settings(checksum=True, transport=transport)
    settings(transport=transport)


@pytest.mark.parametrize("transport", ["auto", "tcp", "hccl"])
def test_transports_with_checksums(transport: str) -> None:
    settings(checksum=True, transport=transport)


def test_a_lease_lasts_at_least_as_long_as_one_without_heartbeats() -> None:
    settings(lease_s=5, max_lease_s=5)
    with pytest.raises(ValueError, match="max_lease_s is 4; it must be at least lease_s, which is 5"):
        settings(lease_s=5, max_lease_s=4)


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid", "x" * 100, "not a host"])
def test_an_address_of_another_host_is_refused_before_a_model_loads(host: str) -> None:
    with pytest.raises(ValueError, match=r"listen_host is .* where this host cannot listen"):
        settings(listen_host=host)


def test_a_taken_port_is_no_matter_of_the_settings() -> None:
    """Scheduler and workers all make them, and one of them listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        settings(listen_port=listener.getsockname()[1])


def test_who_only_reads_need_not_listen() -> None:
    settings(listen_host="192.0.2.1", is_producer=False, is_consumer=True)

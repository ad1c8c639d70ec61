import types
from typing import Any

import pytest

from kv_transfer.connector_settings import ConnectorSettings


def settings(**changes: Any) -> ConnectorSettings:
    fields: dict[str, Any] = {
        "engine_id": "engine",
        "is_producer": True,
        "is_consumer": False,
        "block_size": 16,
        "tp_size": 1,
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
    assert (of.listen_host, of.lease_s, of.load_timeout_s, of.num_load_threads, of.checksum) == (
        "127.0.0.1",
        30.0,
        30.0,
        4,
        False,
    )


def test_each_field_is_read() -> None:
    extra = {"listen_host": "localhost", "lease_s": 5, "load_timeout_s": 2.5, "num_load_threads": 1, "checksum": True}
    of = ConnectorSettings.of(vllm_config(extra))
    assert {name: getattr(of, name) for name in extra} == extra


def test_an_unknown_field_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown fields \['lease'\]; known are .*'lease_s'"):
        ConnectorSettings.of(vllm_config({"lease": 5}))


@pytest.mark.parametrize("parallel", [{"pipeline_parallel_size": 2}, {"decode_context_parallel_size": 2}])
def test_what_we_cannot_move_is_refused(parallel: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="without pipeline and context parallelism"):
        ConnectorSettings.of(vllm_config({}, **parallel))


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in ("lease_s", "load_timeout_s") for value in (0, -1, "30", None, True, [])]
    + [(name, float(value)) for name in ("lease_s", "load_timeout_s") for value in ("nan", "inf", "-inf")]
    + [("num_load_threads", value) for value in (0, -1, 1.5, 4.0, "4", None, True)]
    + [("checksum", value) for value in (0, 1, "true", None)]
    + [("listen_host", value) for value in ("", "0.0.0.0", "::", None, 7, ["127.0.0.1"])],
)
def test_a_wrong_value_is_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"kv_connector_extra_config\.{name} is "):
        settings(**{name: value})


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid", "x" * 100, "not a host"])
def test_an_address_of_another_host_is_refused_before_a_model_loads(host: str) -> None:
    with pytest.raises(ValueError, match=r"listen_host is .* where this host cannot listen"):
        settings(listen_host=host)


def test_who_only_reads_need_not_listen() -> None:
    settings(listen_host="192.0.2.1", is_producer=False, is_consumer=True)

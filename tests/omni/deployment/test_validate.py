"""Rules across the fields of a file."""

from pathlib import Path
from typing import Any

import pytest

from omni.deployment.deployment_file import load_deployment
from omni.deployment.errors import ConfigError

from .samples import FIELD_FILE, content, lines, loaded, put

P1, P2, D1 = "deployment/prefill/group1", "deployment/prefill/group2", "deployment/decode/group1"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {f"{P1}/host 10.0.0.9": {"user": "x"}},
            "deployment.prefill.group1.host 10.0.0.9: 10.0.0.9 is not one of the group's hosts (127.0.0.1); "
            "add it to hosts or delete the block",
        ),
        (
            {f"{P1}/private_key": "/k", f"{P1}/password": "pw"},
            "deployment.prefill.group1: has both a private_key and a password; keep one of them",
        ),
        (
            {"deployment/proxy/private_key": "/k", "deployment/proxy/password": "pw"},
            "deployment.proxy: has both a private_key and a password; keep one of them",
        ),
        (
            {f"{D1}/host 127.0.0.1": {"private_key": "/k", "password": "pw"}},
            "deployment.decode.group1.host 127.0.0.1: has both a private_key and a password; keep one of them",
        ),
        (
            {f"{P1}/ascend_rt_visible_devices": "0,1", f"{D1}/ascend_rt_visible_devices": "1,2"},
            "deployment.decode.group1.ascend_rt_visible_devices: 1 on 127.0.0.1 also in "
            "deployment.prefill.group1.ascend_rt_visible_devices; give each device to one group",
        ),
        (
            {
                f"{P1}/ascend_rt_visible_devices": "0,1,2",
                f"{P1}/tensor_parallel_size": 2,
                f"{P1}/data_parallel_size": 2,
            },
            "deployment.prefill.group1.data_parallel_size: 2 DP ranks with 2 devices each need 4, "
            "ascend_rt_visible_devices lists 3 on 1 host(s); "
            "change data_parallel_size, tensor_parallel_size or pipeline_parallel_size, or the hosts and their devices",
        ),
        (
            {f"{P1}/ascend_rt_visible_devices": "0", "services/prefill/data_parallel_size": 2},
            "services.prefill.data_parallel_size: 2 DP ranks with 1 devices each need 2, "
            "ascend_rt_visible_devices lists 1 on 1 host(s); "
            "change data_parallel_size, tensor_parallel_size or pipeline_parallel_size, or the hosts and their devices",
        ),
        (
            {f"{P1}/ascend_rt_visible_devices": "0,1,2", f"{P1}/hosts": "h1,h2", f"{P1}/tensor_parallel_size": 4},
            "deployment.prefill.group1.tensor_parallel_size: a DP rank with 4 workers spans hosts, which must list "
            "equally many devices that divide it; they list 3, 3; "
            "change data_parallel_size, tensor_parallel_size or pipeline_parallel_size, or the hosts and their devices",
        ),
        (
            {f"{P1}/hosts": "h1,h2"},
            "deployment.prefill.group1: 1 DP rank(s) with 1 worker(s) each do not spread evenly over 2 hosts; "
            "change data_parallel_size, tensor_parallel_size or pipeline_parallel_size, or the hosts and their devices",
        ),
        (
            {f"{P1}/data_parallel_size": 64, "services/prefill/tensor_parallel_size": 65},
            "deployment.prefill.group1.data_parallel_size: 4160 workers in one group are more than 4096; "
            "write smaller sizes",
        ),
        (
            {"deployment/proxy/tls_certificate_file": "/c"},
            "deployment.proxy.tls_certificate_file: stands without tls_key_file; write both or none",
        ),
        (
            {"deployment/proxy/tls_key_file": "/k"},
            "deployment.proxy.tls_key_file: stands without tls_certificate_file; write both or none",
        ),
        (
            {"deployment/mixed/m1": {"base_api_port": 9900}, "services/mixed/max_model_len": 4096},
            "services.mixed.max_model_len: 4096 is not decode's, which is 16384; write the same for both",
        ),
        (
            {f"{D1}/base_api_port": 9001, "services/prefill/data_parallel_size": 2},
            "deployment.decode.group1.base_api_port: port 9001 on 127.0.0.1 overlaps "
            "deployment.prefill.group1.base_api_port (9000-9001); give each its own ports",
        ),
        (
            {"deployment/proxy/listen_port": 9000},
            "deployment.proxy.listen_port: port 9000 on 127.0.0.1 overlaps "
            "deployment.prefill.group1.base_api_port (9000); give each its own ports",
        ),
        (
            {"deployment/proxy/listen_port": 9000, "deployment/proxy/host": "0.0.0.0"},
            "deployment.proxy.listen_port: port 9000 on 0.0.0.0 overlaps "
            "deployment.prefill.group1.base_api_port (9000); give each its own ports",
        ),
        (
            {"deployment/proxy/listen_port": 9000, "deployment/proxy/host": "localhost"},
            "deployment.proxy.listen_port: port 9000 on localhost overlaps "
            "deployment.prefill.group1.base_api_port (9000); give each its own ports",
        ),
        (
            {f"{D1}/master_port": 8000, f"{P1}/master_port": 8000},
            "deployment.decode.group1.master_port: port 8000 on 127.0.0.1 overlaps "
            "deployment.prefill.group1.master_port (8000); give each its own ports",
        ),
        (
            {f"{P1}/host 127.0.0.1": {"base_api_port": 9500}},
            "deployment.decode.group1.base_api_port: port 9500 on 127.0.0.1 overlaps "
            "deployment.prefill.group1.host 127.0.0.1.base_api_port (9500); give each its own ports",
        ),
        (
            {f"{P1}/base_api_port": 65535, f"{P1}/master_port": 2000, "services/prefill/data_parallel_size": 2},
            "deployment.prefill.group1.base_api_port: port 65535-65536 is above 65535; write a lower port",
        ),
        (
            {f"{P1}/base_api_port": 65000},
            "deployment.prefill.group1.master_port: port 66000 is above 65535; write a lower port",
        ),
        (
            {"services/kv_transfer/connector": "nixl", f"{D1}/base_api_port": 11000},
            "deployment.decode.group1.base_api_port: port 11000 on 127.0.0.1 overlaps "
            "deployment.prefill.group1.base_kv_port (11000); give each its own ports",
        ),
        (
            {"services/kv_transfer/mode": "layerwise", f"{P1}/base_kv_port": 7000},
            "deployment.proxy.listen_port: port 7000 on 127.0.0.1 overlaps "
            "deployment.prefill.group1.base_kv_port (7000); give each its own ports",
        ),
        (
            {"services/kv_transfer/connector": "mooncake", f"{P1}/host 127.0.0.1": {"base_kv_port": 9500}},
            "deployment.decode.group1.base_api_port: port 9500 on 127.0.0.1 overlaps "
            "deployment.prefill.group1.host 127.0.0.1.base_kv_port (9500); give each its own ports",
        ),
        (
            {"services/kv_transfer/mode": "layerwise", f"{P1}/base_api_port": 63999, f"{P1}/master_port": 2000},
            "deployment.prefill.group1.base_kv_port: port 65999 is above 65535; write a lower port",
        ),
        *(
            (
                {"services/kv_transfer": {"connector": connector, name: value}},
                f"services.kv_transfer.{name}: means nothing to connector {connector}; "
                "delete it, or write connector: omni",
            )
            for connector, name, value in [
                ("nixl", "transport", "auto"),
                ("nixl", "mode", "layerwise"),
                ("nixl", "key_file", "/k"),
                ("nixl", "num_connections", 1),
                ("nixl", "max_lease_s", 3),
                ("nixl", "load_timeout_s", 3),
                ("nixl", "checksum", False),
                ("mooncake", "lease_s", 30),
                ("mooncake", "transport", "mooncake"),
            ]
        ),
        *(
            (
                {"services/kv_transfer": {"connector": "nixl", "lease_s": lease_s}},
                f"services.kv_transfer.lease_s: {lease_s} is not a whole number of at least 6, as connector nixl wants "
                "it; write a number such as 30",
            )
            for lease_s in (5, 7.5)
        ),
        *(
            (
                {"services/kv_transfer": {"checksum": True, "transport": transport}},
                f"services.kv_transfer.checksum: true, and transport {transport} has no checksums; "
                "write false, or another transport",
            )
            for transport in ("mooncake", "shared_memory", "process_vm")
        ),
        (
            {"services/kv_transfer/max_lease_s": 29},
            "services.kv_transfer.max_lease_s: 29 is less than lease_s, which is 30; write at least as much",
        ),
        (
            {"services/kv_transfer/lease_s": 601},
            "services.kv_transfer.max_lease_s: 600 is less than lease_s, which is 601; write at least as much",
        ),
    ],
)
def test_a_broken_rule(tmp_path: Path, changes: dict[str, Any], line: str) -> None:
    data = content()
    for path, value in changes.items():
        put(data, path, value)
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, data)
    assert line in lines(caught.value)


def test_equal_ports_on_different_hosts_are_fine(tmp_path: Path) -> None:
    data = put(put(content(), f"{P1}/hosts", "10.0.0.1"), f"{D1}/base_api_port", 9000)
    loaded(tmp_path, data)


def test_the_highest_port(tmp_path: Path) -> None:
    data = put(content(), f"{P1}/base_api_port", 65534)
    loaded(tmp_path, put(put(data, f"{P1}/master_port", 2000), "services/prefill/data_parallel_size", 2))


@pytest.mark.parametrize(
    "kv_transfer",
    [
        {"connector": "nixl", "lease_s": 6, "load_failure_policy": "fail"},
        {"connector": "mooncake", "load_failure_policy": "fail"},
        {"checksum": True, "transport": "hccl"},
        {"checksum": True},
        {"lease_s": 30, "max_lease_s": 30},
        {"transport": "mooncake", "checksum": False},
    ],
)
def test_ways_to_transfer(tmp_path: Path, kv_transfer: dict[str, Any]) -> None:
    loaded(tmp_path, put(content(), "services/kv_transfer", kv_transfer))


def test_a_port_that_nobody_listens_on_is_free(tmp_path: Path) -> None:
    loaded(tmp_path, put(put(content(), f"{P1}/base_kv_port", 9500), f"{P1}/base_api_port", 64000))


def test_devices_of_several_groups(tmp_path: Path) -> None:
    data = content(3)
    for path, hosts, devices in (
        (P1, "10.0.0.1,10.0.0.2", "7,3,4,5"),
        (P2, "10.0.0.2,10.0.0.1", "7,3,0,1"),
        ("deployment/prefill/group3", "10.0.0.3,10.0.0.1", "3,8,9,10"),
        (D1, "10.0.0.1", "4,6"),
    ):
        put(put(data, f"{path}/hosts", hosts), f"{path}/ascend_rt_visible_devices", devices)
    put(data, f"{P2}/host 10.0.0.2", {"ascend_rt_visible_devices": "0,1,3,12"})
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, data)
    start, where = "deployment.prefill.group", "ascend_rt_visible_devices"
    assert [line for line in lines(caught.value) if f".{where}" in line] == [
        f"{start}2.{where}: 3 on 10.0.0.2 also in {start}1.{where}; give each device to one group",
        f"{start}2.{where}: 3,7 on 10.0.0.1 also in {start}1.{where}; give each device to one group",
        f"{start}3.{where}: 3 on 10.0.0.1 also in {start}1.{where}; give each device to one group",
        f"deployment.decode.group1.{where}: 4 on 10.0.0.1 also in {start}1.{where}; give each device to one group",
        f"{start}3.{where}: 3 on 10.0.0.1 also in {start}2.{where}; give each device to one group",
    ]


def test_devices_do_not_matter_on_a_cpu(tmp_path: Path) -> None:
    data = put(put(content(), f"{P1}/ascend_rt_visible_devices", 0), f"{D1}/ascend_rt_visible_devices", "0")
    loaded(tmp_path, put(data, "platform", "cpu"))


def test_all_broken_rules_together(tmp_path: Path) -> None:
    data = put(content(2), f"{P2}/base_api_port", 9000)
    put(data, "deployment/proxy/listen_port", 9500)
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, data)
    assert len(caught.value.problems) == 3  # the two groups' api and master ports, and the proxy's


def test_the_field_s_own_form_breaks_no_rule() -> None:
    load_deployment(FIELD_FILE)


def test_both_files_for_tls(tmp_path: Path) -> None:
    data = put(content(), "deployment/proxy/tls_certificate_file", "/c")
    loaded(tmp_path, put(data, "deployment/proxy/tls_key_file", "/k"))


def test_lengths_matter_where_there_are_groups_of_both(tmp_path: Path) -> None:
    loaded(tmp_path, put(content(), "services/mixed/max_model_len", 4096))
    both = put(put(content(), "services/mixed/max_model_len", 4096), "deployment/mixed/m1/base_api_port", 9900)
    loaded(tmp_path, put(both, "services/decode/max_model_len", 4096))

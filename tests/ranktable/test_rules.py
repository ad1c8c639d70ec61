import pytest

from ranktable.errors import TableError
from ranktable.model import Device, Group, RankTable, Server
from ranktable.rules import find_problems
from ranktable.table_file import load
from tests.ranktable.tables import a2_global, a2_local, a3_local, device_lists, put


def _problems(tmp_path, value) -> list[str]:
    path = put(tmp_path, "a.json", value)
    with pytest.raises(TableError) as caught:
        load(path)
    return [str(problem).replace(f"{path}: ", "") for problem in caught.value.problems]


def _device(value, index):
    return value["server_list"][0]["device"][index]


def test_an_initializing_table_is_no_table_yet(tmp_path):
    assert _problems(tmp_path, a2_local() | {"status": "initializing"}) == [
        "status: 'initializing': whoever writes this table is not done; wait for it, or generate the table again"
    ]


def test_nothing_is_empty(tmp_path):
    value = a2_global()
    value["server_group_list"][0] |= {"server_list": [], "server_count": "0"}
    value["server_group_list"][1]["server_list"][0]["device"] = []
    assert _problems(tmp_path, value) == [
        "server_group_list[0].server_list: has no server; add the group's servers, or drop the group",
        "server_group_list[1].server_list[0].device: has no device; add the server's devices, or drop the server",
    ]
    assert _problems(tmp_path, a2_global() | {"server_group_list": []}) == [
        "server_group_list: has no group; merge at least one local table into it"
    ]


def test_groups_have_ids_of_their_own(tmp_path):
    value = a2_global()
    value["server_group_list"][2]["group_id"] = "0"
    assert _problems(tmp_path, value) == [
        "server_group_list[2].group_id: '0' stands at server_group_list[0].group_id too; give every group an "
        "id of its own"
    ]


def test_a_server_stands_once_in_a_group(tmp_path):
    value = a2_local()
    other = a2_local(first_ip=20, num_devices=4)["server_list"][0]
    other["device"] = other["device"][2:]
    value |= {"server_list": [value["server_list"][0], other], "server_count": "2"}
    assert _problems(tmp_path, value) == [
        "server_list[1].server_id: '10.0.0.1' stands at server_list[0].server_id too; write each server once, with all "
        "of its devices",
        "server_list[1].server_ip: '10.0.0.1' stands at server_list[0].server_ip too; give each server its own address",
    ]


def test_an_address_is_of_one_server_in_all_groups(tmp_path):
    value = a2_global()
    value["server_group_list"][2]["server_list"][0]["server_ip"] = "10.0.0.1"
    assert _problems(tmp_path, value) == [
        "server_group_list[2].server_list[0].server_ip: '10.0.0.1' belongs to server '10.0.0.1' at "
        "server_group_list[0].server_list[0].server_ip; give each server its own address"
    ]


def test_a_host_may_have_devices_in_two_groups(tmp_path):
    value = a2_global()
    server = value["server_group_list"][1]["server_list"][0]
    server |= {"server_id": "10.0.0.1", "server_ip": "10.0.0.1"}
    for device in server["device"]:
        device["device_id"] = str(int(device["device_id"]) + 2)
    load(put(tmp_path, "a.json", value))


def test_but_no_device_is_in_both(tmp_path):
    value = a2_global()
    value["server_group_list"][1]["server_list"][0] |= {"server_id": "10.0.0.1", "server_ip": "10.0.0.1"}
    assert _problems(tmp_path, value) == [
        f"server_group_list[1].server_list[0].device[{i}].device_id: '{i}' stands at "
        f"server_group_list[0].server_list[0].device[{i}].device_id too; write each chip of a server once, in one group"
        for i in (0, 1)
    ]


def test_ranks_are_unique(tmp_path):
    value = a2_local()
    _device(value, 1)["rank_id"] = "0"
    assert _problems(tmp_path, value) == [
        "server_list[0].device[1].rank_id: '0' stands at server_list[0].device[0].rank_id too; give the group's "
        "devices the ranks 0 to 1, each once"
    ]


def test_ranks_are_dense(tmp_path):
    value = a2_local()
    _device(value, 0)["rank_id"] = "2"
    assert _problems(tmp_path, value) == [
        "server_list[0].device[0].rank_id: '2' is beyond the group's 2 devices: ranks are missing; give the group's "
        "devices the ranks 0 to 1, each once"
    ]


def test_device_addresses_are_unique_however_they_are_spelt(tmp_path):
    value = a2_local()
    _device(value, 0)["device_ip"] = "2001:db8::1"
    _device(value, 1)["device_ip"] = "2001:0DB8:0::1"
    assert _problems(tmp_path, value) == [
        "server_list[0].device[1].device_ip: '2001:db8::1' stands at server_list[0].device[0].device_ip too; give each "
        "device the address that hccn_tool shows for it"
    ]


def test_super_device_ids_are_unique_in_their_super_pod(tmp_path):
    value = a3_local()
    _device(value, 1)["super_device_id"] = _device(value, 0)["super_device_id"]
    assert _problems(tmp_path, value) == [
        "server_list[0].device[1].super_device_id: '100663296' stands at server_list[0].device[0].super_device_id too; "
        "give each device the SDID that npu-smi shows for it"
    ]


def _two_hosts(pods: tuple[str, str]):
    value, other = a3_local("10.0.0.1", pod=pods[0]), a3_local("10.0.0.2", pod=pods[1])
    for key in ("version", "status"):
        del value[key], other[key]
    groups = [value | {"group_id": "0"}, other | {"group_id": "1"}]
    return {"version": "1.2", "status": "completed", "server_group_list": groups}


def test_another_super_pod_may_have_the_same_addresses_and_ids(tmp_path):
    load(put(tmp_path, "a.json", _two_hosts(("0", "1"))))
    assert len(_problems(tmp_path, _two_hosts(("0", "0")))) == 4


def test_a_server_is_in_one_super_pod(tmp_path):
    value = _two_hosts(("0", "1"))
    second = value["server_group_list"][1]
    second["server_list"][0] |= {"server_id": "10.0.0.1", "server_ip": "10.0.0.1"}
    second["super_pod_list"][0]["server_list"][0]["server_id"] = "10.0.0.1"
    for device in second["server_list"][0]["device"]:
        device["device_id"] = str(int(device["device_id"]) + 2)
    assert _problems(tmp_path, value) == [
        "server_group_list[1].server_list[0].server_id: '10.0.0.1' is in super pod '1' here and in '0' at "
        "server_group_list[0].server_list[0]; give the server the super pod that npu-smi shows"
    ]


def test_a_device_of_a_super_pod_has_a_server_in_it():
    device = Device(device_id=0, device_ip="192.168.1.8", rank_id=0, super_device_id=5, where="d")
    group = Group(group_id="0", servers=(Server(server_id="10.0.0.1", devices=(device,)),))
    assert list(map(str, find_problems(RankTable(groups=(group,), scope="local")))) == [
        "d.super_device_id: is set, but the server is in no super pod; add the server to a super pod"
    ]


def test_an_id_that_stands_for_no_device(tmp_path):
    value = a3_local()
    _device(value, 0)["super_device_id"] = "4294967295"
    assert _problems(tmp_path, value) == [
        "server_list[0].device[0].super_device_id: '4294967295' stands for no device; write the SDID that npu-smi shows"
    ]


def test_a2_and_a3_do_not_mix(tmp_path):
    value = device_lists(super_pods=True)
    for device in value["decode_device_list"]:
        del device["super_pod_id"], device["super_device_id"]
    assert _problems(tmp_path, value) == [
        f"decode_device_list[{i}].super_device_id: is missing, other devices have one; use hosts of one generation, "
        "A2 or A3"
        for i in (0, 1)
    ]


def test_cluster_ids_are_unique(tmp_path):
    value = device_lists(super_pods=False)
    value["decode_device_list"][0]["cluster_id"] = "1"
    assert _problems(tmp_path, value) == [
        "decode_device_list[0].cluster_id: '1' stands at prefill_device_list[0].cluster_id too; number the devices of "
        "the whole table from 1, each once"
    ]

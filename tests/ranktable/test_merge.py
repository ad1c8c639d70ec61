import json

import pytest

from ranktable.errors import TableError
from ranktable.merge import merge_global, merge_instance, with_roles
from ranktable.rules import find_problems
from ranktable.table_file import load, render
from tests.ranktable.tables import a2_global, a2_local, a3_local, put


@pytest.fixture
def read(tmp_path):
    def read(value, name="a.json"):
        return load(put(tmp_path, name, value))[0]

    return read


def test_ranks_go_on_from_host_to_host(read):
    first = a2_local("10.0.0.2", 20, num_devices=3)
    for device, rank in zip(first["server_list"][0]["device"], "201", strict=True):
        device["rank_id"] = rank
    table = merge_instance([read(first), read(a2_local("10.0.0.1"))], "5")
    group = table.groups[0]
    assert (table.scope, group.group_id) == ("local", "5")
    assert [server.server_id for server in group.servers] == ["10.0.0.2", "10.0.0.1"]
    assert [[device.rank_id for device in server.devices] for server in group.servers] == [[2, 0, 1], [3, 4]]
    assert find_problems(table) == []


def test_an_a3_instance_over_two_super_pods(read):
    hosts = [a3_local("10.0.0.1"), a3_local("10.0.0.2", 2), a3_local("10.0.0.3", pod="1")]
    written = json.loads(render(merge_instance([read(host) for host in hosts]), "hccl"))
    assert written["super_pod_list"] == [
        {"super_pod_id": "0", "server_list": [{"server_id": "10.0.0.1"}, {"server_id": "10.0.0.2"}]},
        {"super_pod_id": "1", "server_list": [{"server_id": "10.0.0.3"}]},
    ]
    assert (written["version"], written["server_count"]) == ("1.2", "3")


def test_the_global_table_has_prefills_groups_first(read):
    prefill = [read(a2_local("10.0.0.1", 8, group_id="9")), read(a2_local("10.0.0.2", 10))]
    decode = [read(a2_local("10.0.0.3", 12))]
    table = merge_global(prefill, decode)
    assert json.loads(render(table, "hccl")) == a2_global()
    assert [group.role for group in table.groups] == ["prefill", "prefill", "decode"]


def test_what_two_files_both_have_is_named_by_both(read, tmp_path):
    tables = [read(a2_local("10.0.0.1"), "a.json"), read(a2_local("10.0.0.2"), "b.json")]
    field = "server_list[0].device[0].device_ip"
    for merged in (merge_instance(tables), merge_global(tables[:1], tables[1:])):
        assert str(find_problems(merged)[0]).startswith(
            f"{tmp_path}/b.json: {field}: '192.168.1.8' stands at {tmp_path}/a.json: {field} too; give each device"
        )


def test_a_file_that_is_merged_with_itself(read):
    table = read(a2_local())
    assert len(find_problems(merge_instance([table, table]))) == 6  # its id and address, and those of two devices


def test_cluster_ids_are_left_to_the_table_of_all(read):
    value = a2_local()
    for device in value["server_list"][0]["device"]:
        device["cluster_id"] = device["device_id"]
    table = merge_global([read(value)], [read(a2_local("10.0.0.2", 10))])
    assert all(device.cluster_id is None for _, _, device in table.devices)


def test_global_tables_are_not_merged(read, tmp_path):
    table = read(a2_global())
    for merge in (lambda: merge_instance([table]), lambda: merge_global([table], [table])):
        with pytest.raises(TableError, match=r"a.json: server_group_list: is of a global table; merge local ones"):
            merge()


@pytest.mark.parametrize("num_prefill_groups", [0, 3])
def test_each_role_has_a_group(read, num_prefill_groups):
    with pytest.raises(
        TableError, match=f"server_group_list: {num_prefill_groups} of 3 groups cannot be prefill's; leave"
    ):
        with_roles(read(a2_global()), num_prefill_groups)

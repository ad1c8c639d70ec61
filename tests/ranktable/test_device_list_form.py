import json
from dataclasses import replace

import pytest

from ranktable.errors import SourceError, TableError
from ranktable.merge import with_roles
from ranktable.table_file import load, render
from tests.ranktable.tables import a2_global, device_lists, put


@pytest.mark.parametrize("super_pods", [False, True])
def test_what_is_read_is_written_again(tmp_path, super_pods):
    value = device_lists(super_pods=super_pods)
    table, form = load(put(tmp_path, "a.json", value))
    assert form == "vllm-ascend"
    assert table.has_super_pods == super_pods
    assert json.loads(render(table, form)) == value
    assert list(json.loads(render(table, form))) == list(value)


def test_the_model_has_a_group_for_each_role_and_ranks_by_place(tmp_path):
    table, _ = load(put(tmp_path, "a.json", device_lists(super_pods=False)))
    assert [(group.role, len(group.servers)) for group in table.groups] == [("prefill", 2), ("decode", 1)]
    assert [device.rank_id for _, device in table.groups[0].by_rank] == [0, 1, 2, 3]
    assert table.groups[0].servers[1].devices[0].where == f"{tmp_path}/a.json: prefill_device_list[2]"


def test_ranks_and_numbers_may_be_json_numbers(tmp_path):
    value = device_lists(super_pods=False)
    for rank, device in enumerate(value["prefill_device_list"]):
        device |= {"rank_id": 3 - rank, "cluster_id": int(device["cluster_id"])}
    table, form = load(put(tmp_path, "a.json", value))
    written = json.loads(render(table, form))
    assert [device["cluster_id"] for device in written["prefill_device_list"]] == ["4", "3", "2", "1"]


def test_hosts_that_nobody_uses_may_be_counted(tmp_path):
    load(put(tmp_path, "a.json", device_lists(super_pods=False) | {"server_count": 5}))


def test_a_table_of_the_other_form_gets_cluster_ids_from_1(tmp_path):
    table = with_roles(load(put(tmp_path, "a.json", a2_global()))[0], 2)
    assert json.loads(render(table, "vllm-ascend")) == device_lists(super_pods=False)


def test_cluster_ids_are_numbered_anew_where_one_lacks(tmp_path):
    table, form = load(put(tmp_path, "a.json", device_lists(super_pods=False)))
    group = table.groups[1]
    server = group.servers[0]
    devices = (replace(server.devices[0], cluster_id=None), replace(server.devices[1], cluster_id=9))
    group = replace(group, servers=(replace(server, devices=devices),))
    written = json.loads(render(replace(table, groups=(table.groups[0], group)), form))
    assert [device["cluster_id"] for device in written["decode_device_list"]] == ["5", "6"]


def test_without_roles_it_cannot_be_written(tmp_path):
    table, _ = load(put(tmp_path, "a.json", a2_global()))
    with pytest.raises(SourceError, match=r"group '0': is of no role, prefill or decode; say how many"):
        render(table, "vllm-ascend")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(version="1.0"), "version: '1.0' is not this form's; write 1.2"),
        (lambda v: v.pop("decode_device_list"), 'decode_device_list: is missing; write "decode_device_list": [...]'),
        (
            lambda v: v.update(decode_device_list=[]),
            "decode_device_list: has no device; add the devices that do decode",
        ),
        (lambda v: v.update(server_count="2"), 'server_count: 2 is less than the 3 hosts in the lists; write "3"'),
        (
            lambda v: v["prefill_device_list"][1].pop("cluster_id"),
            "prefill_device_list[1].cluster_id: is missing; add it",
        ),
        (
            lambda v: v["decode_device_list"][0].update(cluster_id=True),
            "decode_device_list[0].cluster_id: True is not a number from 0",
        ),
        (
            lambda v: v["decode_device_list"][0].update(cluster_id=-1),
            "decode_device_list[0].cluster_id: -1 is not a number from 0",
        ),
        (lambda v: v.update(server_count=None), "server_count: None is not a number from 0"),
        (
            lambda v: v["prefill_device_list"][1].pop("super_pod_id"),
            "prefill_device_list[1].super_device_id: and super_pod_id belong together; write both (A3) or neither (A2)",
        ),
        (
            lambda v: v["prefill_device_list"][3].update(super_pod_id="1"),
            "prefill_device_list[3].super_pod_id: '1' is not what {path}: prefill_device_list[2] says of the same",
        ),
    ],
)
def test_a_fault_is_named_by_file_and_field(tmp_path, change, message):
    value = device_lists(super_pods=True)
    change(value)
    path = put(tmp_path, "a.json", value)
    with pytest.raises(TableError) as caught:
        load(path)
    assert any(
        str(problem).startswith(f"{path}: {message.replace('{path}', str(path))}") for problem in caught.value.problems
    ), caught.value

import json

import pytest

from ranktable.errors import TableError
from ranktable.table_file import load, render
from tests.ranktable.tables import a2_global, a2_local, a3_local, put


@pytest.mark.parametrize("value", [a2_local(), a2_global(), a3_local()], ids=["a2", "global", "a3"])
def test_what_is_read_is_written_again(tmp_path, value):
    table, form = load(put(tmp_path, "a.json", value))
    assert form == "hccl"
    written = json.loads(render(table, form))
    assert written == value
    assert list(written) == list(value)
    assert load(put(tmp_path, "b.json", json.loads(render(table, form))))[0] == table


def test_the_model_of_an_a3_table(tmp_path):
    table, _ = load(put(tmp_path, "a.json", a3_local(pod="7")))
    (server,) = table.groups[0].servers
    assert (table.scope, table.has_super_pods, server.super_pod_id, server.server_ip) == (
        "local",
        True,
        "7",
        "10.0.0.1",
    )
    assert [device.super_device_id for device in server.devices] == [100663296, 100663297]
    assert server.devices[1].where == f"{tmp_path}/a.json: server_list[0].device[1]"


def test_hccls_own_tables_have_neither_group_id_nor_server_ip(tmp_path):
    value = a2_local()
    del value["group_id"], value["server_list"][0]["server_ip"]
    table, _ = load(put(tmp_path, "a.json", value))
    assert (table.groups[0].group_id, table.groups[0].servers[0].server_ip) == ("0", None)
    assert "server_ip" not in render(table, "hccl")


def test_keys_that_mean_nothing_here_are_kept(tmp_path):
    value = a2_global()
    value["made_by"] = "operator"
    group = value["server_group_list"][0]
    group["deploy_server"] = "1"
    group["server_list"][0]["container_ip"] = "10.9.0.1"
    group["server_list"][0]["device"][0]["device_logical_id"] = "0"
    assert json.loads(render(load(put(tmp_path, "a.json", value))[0], "hccl")) == value


def test_a_cluster_id_is_kept(tmp_path):
    value = a2_local()
    for index, device in enumerate(value["server_list"][0]["device"]):
        device["cluster_id"] = str(index + 1)
    assert json.loads(render(load(put(tmp_path, "a.json", value))[0], "hccl")) == value


def _set(path: str, new: object):
    """A change of one field: "server_list.0.device.0.device_ip"."""

    def change(value):
        *parents, last = path.split(".")
        for key in parents:
            value = value[int(key) if key.isdigit() else key]
        if new is ...:
            del value[last]
        else:
            value[int(last) if last.isdigit() else last] = new

    return change


_A2_FAULTS = [
    ("version", "1.1", "version: '1.1' is not known; write 1.0 for A2 or 1.2 for A3"),
    ("version", ..., "version: is missing; add it"),
    ("version", 1.0, 'version: 1.0 is not printable text; write it so: "version": "..."'),
    ("status", "done", "status: 'done' is not known; write completed, or initializing while it is not"),
    ("status", ..., "status: is missing; add it"),
    ("server_count", "2", 'server_count: \'2\', but server_list has 1; write "server_count": "1"'),
    ("server_count", ..., "server_count: is missing; add it"),
    ("server_count", "\x1b", "server_count: '\\x1b' is not a number from 0"),
    ("group_id", "", 'group_id: \'\' is not printable text; write it so: "group_id": "..."'),
    ("super_pod_list", [], 'super_pod_list: is not for version 1.0; write "version": "1.2", or drop it'),
    ("server_list.0", 5, "server_list[0]: 5 is not an object; write {...}"),
    ("server_list.0.server_id", ..., "server_list[0].server_id: is missing; add it"),
    ("server_list.0.server_id", "a\x1bb", "server_list[0].server_id: 'a\\x1bb' is not printable text"),
    (
        "server_list.0.server_ip",
        "host",
        "server_list[0].server_ip: 'host' is not an IP address; write one, as 192.168.1.8",
    ),
    ("server_list.0.device", {}, 'server_list[0].device: {} is not a list; write "device": [...]'),
    ("server_list.0.device", ..., 'server_list[0].device: is missing; write "device": [...]'),
    ("server_list.0.device.1.device_ip", "1.2.3", "server_list[0].device[1].device_ip: '1.2.3' is not an IP address"),
    ("server_list.0.device.1.device_ip", "224.0.0.1", "server_list[0].device[1].device_ip: '224.0.0.1' is not an IP"),
    (
        "server_list.0.device.0.rank_id",
        0,
        'server_list[0].device[0].rank_id: 0 is a JSON number, HCCL reads text; write "rank_id": "0"',
    ),
    ("server_list.0.device.0.rank_id", True, "server_list[0].device[0].rank_id: True is not a number from 0"),
    ("server_list.0.device.0.device_id", "-1", "server_list[0].device[0].device_id: '-1' is not a number from 0"),
    ("server_list.0.device.0.device_id", "9" * 5000, "server_list[0].device[0].device_id: '9999"),
    ("server_list.0.device.0.device_id", "²", "server_list[0].device[0].device_id: '²' is not a number from 0"),
    ("server_list.0.device.0.super_device_id", "5", "server_list[0].device[0].super_device_id: is not for version 1.0"),
]
_A3_FAULTS = [
    ("version", "1.1", "version: '1.1' is not known; write 1.0 for A2 or 1.2 for A3"),
    (
        "super_pod_list.0.server_list.0.server_id",
        5,
        "super_pod_list[0].server_list[0].server_id: 5 is not printable text",
    ),
    ("super_pod_list", ..., 'super_pod_list: is missing; write "super_pod_list": [...]'),
    ("super_pod_list", [], "server_list[0].server_id: '10.0.0.1' is not in super_pod_list; add it to its super pod"),
    ("super_pod_list.0.super_pod_id", ..., "super_pod_list[0].super_pod_id: is missing; add it"),
    (
        "super_pod_list.0.server_list.0.server_id",
        "other",
        "super_pod_list[0].server_list[0].server_id: 'other' is not in server_list; drop it, or add the server",
    ),
    (
        "super_pod_list.0.server_list",
        [{"server_id": "10.0.0.1"}] * 2,
        "super_pod_list[0].server_list[1].server_id: '10.0.0.1' is in a super pod already; write each server once",
    ),
    ("server_list.0.device.0.super_device_id", ..., "server_list[0].device[0].super_device_id: is missing; add it"),
    ("server_list.0.server_id", ["x"], "server_list[0].server_id: ['x'] is not printable text"),
]


@pytest.mark.parametrize(
    ("value", "field", "new", "message"),
    [(a2_local(), *fault) for fault in _A2_FAULTS] + [(a3_local(), *fault) for fault in _A3_FAULTS],
)
def test_a_fault_is_named_by_file_and_field(tmp_path, value, field, new, message):
    value = json.loads(json.dumps(value))
    _set(field, new)(value)
    path = put(tmp_path, "a.json", value)
    with pytest.raises(TableError) as caught:
        load(path)
    assert any(str(problem).startswith(f"{path}: {message}") for problem in caught.value.problems), caught.value
    assert all(len(str(problem)) < len(str(path)) + 200 for problem in caught.value.problems)
    assert len(caught.value.problems) <= (2 if "10.0.0.1" in str(caught.value) else 1)  # a server and its super pod


def test_all_faults_are_told_at_once(tmp_path):
    value = a2_global()
    del value["server_group_list"][0]["group_id"]
    value["server_group_list"][2]["server_list"][0]["device"][1]["device_ip"] = "x"
    with pytest.raises(TableError) as caught:
        load(put(tmp_path, "a.json", value))
    assert [str(problem.where).partition(": ")[2] for problem in caught.value.problems] == [
        "server_group_list[0].group_id",
        "server_group_list[2].server_list[0].device[1].device_ip",
    ]

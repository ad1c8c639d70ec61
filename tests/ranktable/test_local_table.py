import pytest

from ranktable.errors import SourceError
from ranktable.local_table import Host, from_hccn_conf, from_source
from ranktable.rules import find_problems
from ranktable.sources import Recorded
from tests.ranktable.outputs import (
    A2_CONF,
    A2_IPS,
    A3_IPS,
    A3_MAP,
    A3_SDIDS,
    ip_output,
    super_pod_output,
    vnic_output,
    write,
)

HOST = Host(server_id="10.0.0.1", server_ip="10.0.0.1", group_id="3")


def _devices(table):
    (server,) = table.groups[0].servers
    return [(device.rank_id, device.device_id, device.device_ip) for device in server.devices]


@pytest.fixture
def a3(tmp_path):
    write(tmp_path, vnic="".join(map(vnic_output, A3_IPS)), map=A3_MAP, spod="".join(map(super_pod_output, A3_SDIDS)))
    return Recorded(tmp_path / "vnic", tmp_path / "map", tmp_path / "spod")


def test_an_a2_host(tmp_path):
    write(tmp_path, ip="".join(map(ip_output, A2_IPS)))
    table = from_source(HOST, Recorded(tmp_path / "ip"), "a2")
    assert _devices(table) == [(i, i, A2_IPS[i]) for i in range(8)]
    assert (table.scope, table.status, table.has_super_pods) == ("local", "completed", False)
    group = table.groups[0]
    assert (group.group_id, group.servers[0].server_id, group.servers[0].server_ip) == ("3", "10.0.0.1", "10.0.0.1")
    assert find_problems(table) == []


def test_an_a3_host(a3):
    table = from_source(HOST, a3, "a3")
    (server,) = table.groups[0].servers
    assert _devices(table) == [(i, i, A3_IPS[i]) for i in range(16)]
    assert (server.super_pod_id, tuple(device.super_device_id for device in server.devices)) == ("0", A3_SDIDS)
    assert find_problems(table) == []


def test_hccn_conf(tmp_path):
    write(tmp_path, conf=A2_CONF)
    assert _devices(from_hccn_conf(HOST, tmp_path / "conf")) == [(i, i, A2_IPS[i]) for i in range(8)]


def test_ranks_follow_the_order_in_which_devices_are_chosen(tmp_path, a3):
    host = Host(server_id="h", devices=(9, 4))
    table = from_source(host, a3, "a3")
    assert _devices(table) == [(0, 9, A3_IPS[9]), (1, 4, A3_IPS[4])]
    assert table.groups[0].servers[0].devices[0].super_device_id == A3_SDIDS[9]
    write(tmp_path, conf=A2_CONF)
    assert _devices(from_hccn_conf(Host(server_id="h", devices=(7, 0)), tmp_path / "conf")) == [
        (0, 7, A2_IPS[7]),
        (1, 0, A2_IPS[0]),
    ]


def test_a_device_that_is_not_there(a3):
    with pytest.raises(SourceError, match=r"--devices: device 16 is not on this host; choose from 0, 1, .*, 15"):
        from_source(Host(server_id="h", devices=(0, 16)), a3, "a3")


def test_a_link_that_is_down_matters_where_the_device_is_used(tmp_path, a3):
    texts = [vnic_output(ip, "DOWN" if i == 3 else "UP") for i, ip in enumerate(A3_IPS)]
    write(tmp_path, vnic="".join(texts))
    with pytest.raises(SourceError, match=r"vnic: line 11: the link of device 3 is down; bring it up, or leave"):
        from_source(HOST, a3, "a3")
    from_source(Host(server_id="h", devices=(2, 4)), a3, "a3")


def test_a_host_is_in_one_super_pod(tmp_path, a3):
    write(tmp_path, spod="".join(super_pod_output(sdid, i // 8) for i, sdid in enumerate(A3_SDIDS)))
    with pytest.raises(SourceError, match=r"spod: line 33: super pod 1, but .*spod: line 1 says 0; one host is in one"):
        from_source(HOST, a3, "a3")


def test_two_devices_with_one_address_are_named_by_their_lines(tmp_path):
    write(tmp_path, ip=ip_output("10.1.1.1") * 2)
    (problem,) = find_problems(from_source(HOST, Recorded(tmp_path / "ip"), "a2"))
    assert str(problem) == (
        f"{tmp_path}/ip: line 4 (device 1).device_ip: '10.1.1.1' stands at {tmp_path}/ip: line 1 (device 0).device_ip "
        "too; give each device the address that hccn_tool shows for it"
    )

from ranktable.merge import merge_global
from ranktable.table_file import load
from ranktable.text_view import text_view
from tests.ranktable.tables import a2_local, a3_local, put


def test_a2_by_rank_and_without_empty_columns(tmp_path):
    value = a2_local()
    value["server_list"][0]["device"].reverse()
    table, form = load(put(tmp_path, "a.json", value))
    assert text_view(table, form).splitlines() == [
        "local, 1 group, 1 server, 2 devices, A2, form hccl, completed",
        "group  rank  server    server ip  device  device ip",
        "0      0     10.0.0.1  10.0.0.1   0       192.168.1.8",
        "0      1     10.0.0.1  10.0.0.1   1       192.168.1.9",
    ]


def test_a3_with_roles(tmp_path):
    tables = [load(put(tmp_path, "a.json", a3_local(f"10.0.0.{i}", 2 * i, num_devices=1)))[0] for i in (1, 2)]
    assert text_view(merge_global(tables[:1], tables[1:]), "hccl").splitlines() == [
        "global, 2 groups, 2 servers, 2 devices, A3, form hccl, completed",
        "group      rank  server    server ip  device  device ip    super device  super pod",
        "0 prefill  0     10.0.0.1  10.0.0.1   0       192.168.2.3  100663298     0",
        "1 decode   0     10.0.0.2  10.0.0.2   0       192.168.2.5  100663300     0",
    ]


def test_a_table_without_devices(tmp_path):
    value = a2_local() | {"server_list": [], "server_count": "0", "status": "initializing"}
    table, form = load(put(tmp_path, "a.json", value), complete=False)
    assert text_view(table, form).splitlines()[0] == "local, 1 group, 0 servers, 0 devices, A2, form hccl, initializing"

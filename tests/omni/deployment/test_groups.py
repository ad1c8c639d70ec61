"""Which value counts where a key may stand in two places."""

from pathlib import Path

from omni.deployment.deployment_file import load_deployment
from omni.deployment.groups import GroupSettings, group_settings

from .samples import FIELD_FILE, content, loaded, put


def groups(folder: Path, **keys: object) -> tuple[GroupSettings, GroupSettings]:
    """Prefill group1 with `keys` and group2 without, both under the same services.prefill."""
    data = content(2)
    data["deployment"]["prefill"]["group1"] |= keys
    shared = {"data_parallel_size": 2, "tensor_parallel_size": 3, "extra_args": ["--a"], "kv_cache_gib": 1}
    put(data, "services/prefill", shared | {"env": {"A": "1", "B": 2}})
    one, two, _ = group_settings(loaded(folder, data))
    return one, two


def test_a_group_s_own_value_wins(tmp_path: Path) -> None:
    own = {"data_parallel_size": 4, "tensor_parallel_size": 1, "extra_args": ["--b", 1], "kv_cache_gib": 2}
    one, two = groups(tmp_path, **own, env={"A": "9"})
    assert (one.data_parallel_size, one.tensor_parallel_size, one.extra_args, one.kv_cache_gib) == (
        4,
        1,
        ("--b", "1"),
        2,
    )
    assert (two.data_parallel_size, two.tensor_parallel_size, two.extra_args, two.kv_cache_gib) == (2, 3, ("--a",), 1)
    assert one.env == {"A": "9", "B": "2"}
    assert two.env == {"A": "1", "B": "2"}
    assert one.field("kv_cache_gib") == "deployment.prefill.group1.kv_cache_gib"
    assert two.field("kv_cache_gib") == "services.prefill.kv_cache_gib"


def test_an_empty_list_is_a_value(tmp_path: Path) -> None:
    assert groups(tmp_path, extra_args=[])[0].extra_args == ()


def test_host_blocks(tmp_path: Path) -> None:
    block = {"base_api_port": 8000, "master_port": 8500, "base_kv_port": 8600}
    one, two = groups(tmp_path, **{"host 127.0.0.1": block})
    assert (one.base_api_port("127.0.0.1"), one.master_port) == (8000, 8500)
    assert (two.base_api_port("127.0.0.1"), two.master_port) == (9010, 10010)
    assert (one.base_kv_port("127.0.0.1"), two.base_kv_port("127.0.0.1")) == (8600, 11010)
    own, _ = groups(tmp_path, base_kv_port=8700)
    assert own.base_kv_port("127.0.0.1") == 8700


def test_ranks_follow_the_devices() -> None:
    *prefill, decode = group_settings(load_deployment(FIELD_FILE))
    assert [(group.data_parallel_size, group.tensor_parallel_size) for group in prefill] == [(1, 16)] * 4
    assert (decode.data_parallel_size, decode.tensor_parallel_size) == (64, 1)
    assert [decode.ranks_on_host(host) for host in decode.hosts] == [16] * 4
    assert decode.base_api_port("192.0.2.6") == 9100
    assert decode.base_api_port("192.0.2.7") == 9000


def test_uneven_ranks(tmp_path: Path) -> None:
    data = put(
        content(), "deployment/decode/group1", {"hosts": "h1, h2,h3", "base_api_port": 9, "data_parallel_size": 7}
    )
    data["deployment"]["decode"]["group1"]["base_api_port"] = 9500
    *_, decode = group_settings(loaded(tmp_path, data))
    assert [decode.ranks_on_host(host) for host in decode.hosts] == [3, 2, 2]


def test_default_ranks_have_their_devices_on_one_host(tmp_path: Path) -> None:
    group = {"hosts": "h1,h2", "base_api_port": 9500, "ascend_rt_visible_devices": "0,1,2", "tensor_parallel_size": 2}
    *_, decode = group_settings(loaded(tmp_path, put(content(), "deployment/decode/group1", group)))
    assert (decode.data_parallel_size, decode.layout_problem) == (2, None)
    large = group | {"tensor_parallel_size": 6, "hosts": "h1,h2,h3,h4"}
    *_, decode = group_settings(loaded(tmp_path, put(content(), "deployment/decode/group1", large)))
    assert (decode.data_parallel_size, decode.layout_problem) == (2, None)


def test_mixed_groups_take_what_d_beside_them_takes(tmp_path: Path) -> None:
    data = put(content(), "deployment/mixed/m1", {"base_api_port": 9900})
    assert [group.max_model_len for group in group_settings(loaded(tmp_path, data))] == [32000, 16384, 16384]
    put(data, "services/decode/max_model_len", 2048)
    assert [group.max_model_len for group in group_settings(loaded(tmp_path, data))] == [32000, 2048, 2048]
    del data["deployment"]["prefill"], data["deployment"]["decode"]
    assert [group.max_model_len for group in group_settings(loaded(tmp_path, data))] == [32000]

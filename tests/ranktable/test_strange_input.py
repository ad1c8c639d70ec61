"""Whatever a file holds, it is a table or it is refused in words; nothing else comes out."""

import copy
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ranktable import hccn_conf, hccn_tool, npu_smi
from ranktable.errors import SourceError, TableError
from ranktable.table_file import load, render
from tests.ranktable.outputs import A3_MAP, super_pod_output, vnic_output
from tests.ranktable.tables import a2_global, a3_local, device_lists

SLOW_MACHINE = [HealthCheck.too_slow]  # is no fault of ours

_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 2**33),
    st.sampled_from(["", "0", "1", "7", "10.0.0.1", "192.168.1.8", "1.2", "initializing", "4294967295", "\ud800", "²"]),
    st.lists(st.just({"server_id": "10.0.0.1"}), max_size=2),
    st.just({}),
)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every part with every key in it."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in [(value, key), *_places(value[key])]]


@settings(max_examples=200, deadline=None, database=None, suppress_health_check=SLOW_MACHINE)
@given(data=st.data())
def test_a_table_with_a_few_strange_values(tmp_path_factory, data):
    value = data.draw(st.sampled_from([a2_global, a3_local, lambda: device_lists(super_pods=True)]))()
    for _ in range(data.draw(st.integers(1, 3))):
        part, key = data.draw(st.sampled_from(_places(value)))
        part[key] = copy.deepcopy(data.draw(_VALUES))
    path = tmp_path_factory.getbasetemp() / "strange.json"
    path.write_text(json.dumps(value))
    try:
        table, form = load(path)
    except TableError as error:
        for line in str(error).splitlines():
            assert line.startswith(f"{path}: ")
            assert line.isprintable()
        return
    text = render(table, form)
    path.write_text(text)
    assert load(path)[0] == table
    assert render(*load(path)) == text


_LINES = st.lists(
    st.one_of(
        st.text(max_size=12),
        st.sampled_from(
            [*vnic_output("10.1.1.1").splitlines(), *super_pod_output(5).splitlines(), *A3_MAP.splitlines()[:4]]
        ),
        st.sampled_from(["ipaddr:10.1.1.1", "netmask:", "address_0=10.1.1.1", "address_1", "SDID : x", "0 0 0 0 x"]),
    ),
    max_size=6,
)


@pytest.mark.parametrize(
    "parse",
    [
        lambda text: hccn_tool.parse(text, "f", "a2"),
        lambda text: hccn_tool.parse(text, "f", "a3"),
        lambda text: hccn_conf.parse(text, "f"),
        lambda text: npu_smi.parse_map(text, "f"),
        lambda text: npu_smi.parse_super_pod(text, "f"),
    ],
    ids=["ip", "vnic", "hccn.conf", "map", "spod-info"],
)
@settings(max_examples=60, deadline=None, database=None, suppress_health_check=SLOW_MACHINE)
@given(lines=_LINES)
def test_output_of_several_kinds_at_once(parse, lines):
    said = "f: "
    try:
        parse("\n".join(lines))
    except SourceError as error:
        said = str(error)
    assert said.startswith("f: ")

"""The tools are shell scripts here that answer as ranktable's readers expect it of the real ones."""

import re
from pathlib import Path

import pytest

from ranktable import sources
from ranktable.errors import SourceError
from ranktable.npu_smi import Chip
from ranktable.sources import Recorded, Tools
from tests.ranktable.outputs import (
    A2_IPS,
    A2_MAP,
    A3_IPS,
    A3_MAP,
    A3_SDIDS,
    ip_output,
    map_output,
    super_pod_output,
    vnic_output,
    write,
)


def _script(folder: Path, name: str, body: str) -> str:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def a3_tools(tmp_path):
    """A host with 16 chips whose tools look their answers up by device, or NPU and chip."""
    answers = tmp_path / "answers"
    answers.mkdir()
    write(answers, map=A3_MAP)
    for i in range(16):
        write(answers, **{f"vnic-{i}": vnic_output(A3_IPS[i]), f"{i // 2}-{i % 2}": super_pod_output(A3_SDIDS[i], 5)})
    hccn = _script(tmp_path, "hccn_tool", f'[ "$1 $3 $4" = "-i -vnic -g" ] && cat {answers}/vnic-$2')
    smi = _script(
        tmp_path,
        "npu-smi",
        f'[ "$*" = "info -m" ] && exec cat {answers}/map\n'
        f'[ "$1 $2 $3 $4 $6" = "info -t spod-info -i -c" ] && cat {answers}/$5-$7',
    )
    return Tools(hccn, smi)


def test_tools_of_an_a3_host(a3_tools):
    chips = a3_tools.chips()
    assert len(chips) == 16
    some = [chips[15], chips[2]]
    assert [address.ip for address in a3_tools.addresses(some, "a3")] == [A3_IPS[15], A3_IPS[2]]
    pods = a3_tools.super_pod_chips(some)
    assert [(pod.super_device_id, pod.super_pod_id) for pod in pods] == [(A3_SDIDS[15], "5"), (A3_SDIDS[2], "5")]
    assert pods[0].where == "`npu-smi info -t spod-info -i 7 -c 1`: line 1"


def test_hccn_tool_is_asked_by_logical_id(tmp_path):
    tool = _script(tmp_path, "hccn_tool", 'echo "ipaddr:10.1.1.$2"')
    assert Tools(tool).addresses([Chip(4, 0, logic_id=3, device_id=7)], "a2")[0].ip == "10.1.1.3"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "echo busy; echo really >&2; exit 3",
            "`npu-smi info -m`: ended with status 3: 'busy really'; mend what it says",
        ),
        ("kill -9 $$", "`npu-smi info -m`: ended with status -9: ''; mend what it says"),
        ("true", "`npu-smi info -m`: is empty; see what `npu-smi info -m` says"),
    ],
)
def test_a_tool_that_fails(tmp_path, body, message):
    with pytest.raises(SourceError) as caught:
        Tools(npu_smi=_script(tmp_path, "npu-smi", body)).chips()
    assert str(caught.value) == message


def test_a_tool_that_does_not_end(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "TOOL_TIMEOUT_S", 0.1)
    with pytest.raises(SourceError) as caught:
        Tools(npu_smi=_script(tmp_path, "npu-smi", "exec sleep 20")).chips()
    assert str(caught.value) == "`npu-smi info -m`: did not end within 0.1 s; see whether the driver is well"


def test_a_tool_that_is_not_there(tmp_path):
    with pytest.raises(
        SourceError, match=r"`npu-smi info -m`: '.*npu-smi' is not installed; name its path, or give files"
    ):
        Tools(npu_smi=str(tmp_path / "npu-smi")).chips()


def test_a_tool_that_is_no_program(tmp_path):
    tool = tmp_path / "npu-smi"
    tool.write_text("what?")
    tool.chmod(0o755)
    with pytest.raises(SourceError, match=r"`npu-smi info -m`: cannot be run \(Exec format error\); name another path"):
        Tools(npu_smi=str(tool)).chips()


def test_the_drivers_folder_is_looked_in(tmp_path, monkeypatch):
    _script(tmp_path, "hccn_tool_for_tests", "echo ipaddr:10.1.1.1")
    monkeypatch.setattr(sources, "DRIVER_TOOLS", str(tmp_path))
    assert Tools("hccn_tool_for_tests").addresses([Chip(0, 0, 0, 0)], "a2")[0].ip == "10.1.1.1"


def test_a_tool_tells_of_one_device_each_time(tmp_path):
    tool = _script(tmp_path, "hccn_tool", "echo ipaddr:10.1.1.1; echo ipaddr:10.1.1.2")
    with pytest.raises(SourceError) as caught:
        Tools(tool).addresses([Chip(0, 0, 0, 0)], "a2")
    assert str(caught.value) == (
        "`hccn_tool -i 0 -ip -g`: tells of 2 devices, not of 1; ask for every device, once each"
    )


def test_recorded_a2(tmp_path):
    write(tmp_path, ip="".join(map(ip_output, A2_IPS)), map=A2_MAP)
    for recorded in (Recorded(tmp_path / "ip"), Recorded(tmp_path / "ip", tmp_path / "map")):
        chips = recorded.chips()
        assert [chip.device_id for chip in chips] == list(range(8))
        assert [address.ip for address in recorded.addresses(chips[6:3:-1], "a2")] == list(A2_IPS[6:3:-1])


def test_recorded_a3(tmp_path):
    write(
        tmp_path,
        vnic="".join(map(vnic_output, A3_IPS)),
        map=A3_MAP,
        spod="".join(map(super_pod_output, A3_SDIDS)),
    )
    recorded = Recorded(tmp_path / "vnic", tmp_path / "map", tmp_path / "spod")
    chips = recorded.chips()
    assert [pod.super_device_id for pod in recorded.super_pod_chips(chips[8:])] == list(A3_SDIDS[8:])


def test_recorded_outputs_are_in_the_order_of_device_ids(tmp_path):
    write(tmp_path, ip=ip_output("10.1.1.8") + ip_output("10.1.1.9"), map=map_output([(0, 0, 0, 9), (1, 0, 1, 8)]))
    recorded = Recorded(tmp_path / "ip", tmp_path / "map")
    assert [(chip.device_id, recorded.addresses([chip], "a2")[0].ip) for chip in recorded.chips()] == [
        (8, "10.1.1.8"),
        (9, "10.1.1.9"),
    ]


def test_a_device_that_lacks_in_a_recorded_file_shifts_no_other(tmp_path):
    write(tmp_path, ip="".join(map(ip_output, A2_IPS[1:])), map=A2_MAP)
    recorded = Recorded(tmp_path / "ip", tmp_path / "map")
    with pytest.raises(SourceError, match=r"ip: tells of 7 devices, not of 8; ask for every device, once each"):
        recorded.addresses(recorded.chips()[:1], "a2")


def test_recorded_files_that_say_nothing(tmp_path):
    write(tmp_path, ip="")
    (tmp_path / "bytes").write_bytes(b"\xff")
    for name, message in (
        ("ip", "tells of no device; name a file with hccn_tool's output"),
        ("none", "cannot be read (No such file or directory); name a file with the tool's output"),
        ("bytes", "is not UTF-8 text; name a file with the tool's output"),
    ):
        with pytest.raises(SourceError, match=re.escape(f"{tmp_path / name}: {message}")):
            Recorded(tmp_path / name).chips()

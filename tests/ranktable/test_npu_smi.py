import pytest

from ranktable import npu_smi
from ranktable.errors import SourceError
from ranktable.npu_smi import Chip
from tests.ranktable.outputs import A2_MAP, A3_MAP, A3_SDIDS, map_output, super_pod_output


def test_a2_has_a_chip_on_each_npu_and_no_physical_ids():
    assert npu_smi.parse_map(A2_MAP, "f") == [Chip(n, 0, n, n) for n in range(8)]


def test_a3_has_two_chips_on_each_npu():
    chips = npu_smi.parse_map(A3_MAP, "f")
    assert [(chip.npu_id, chip.chip_id, chip.device_id) for chip in chips] == [(n // 2, n % 2, n) for n in range(16)]


def test_the_physical_id_is_the_devices_and_gives_the_order():
    text = map_output([(4, 0, 0, 9), (5, 0, 1, 8), (5, 1, "-", "-")])
    assert npu_smi.parse_map(text, "f") == [Chip(5, 0, 1, 8), Chip(4, 0, 0, 9)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "f: is empty; see what `npu-smi info -m` says"),
        (
            "dcmi model initialized failed, because the device is used. ret is -8020\n",
            "f: 'dcmi model initialized failed, because the device is used. ret is -8020' is not the heading NPU ID, "
            "Chip ID, ...; see what `npu-smi info -m` says",
        ),
        (
            map_output([(0, 0, 0, 0)]) + "device is busy\n",
            "f: line 3: 'device is busy' is not a chip's row; see what `npu-smi info -m` says",
        ),
        (
            map_output([(0, 0, 0, "Ascend")]),
            "f: line 2: '0                              0                              0                 ' is not",
        ),
        (map_output([(0, 0, 0)]) + f"1 0 {'9' * 5000}\n", "f: line 3: '1 0 9999"),
        (map_output([(0, 0, 0)]) + "\t1 0\n", "f: line 3: '1 0' is not a chip's row; see what `npu-smi info -m` says"),
        (map_output([(0, 0, "-", "-")]), "f: has no chip that computes; see what `npu-smi info` says of them"),
        (
            map_output([(0, 0, 0, 5), (1, 0, 1, 5)]),
            "f: line 3: device 5 stands twice; keep the output of one host",
        ),
    ],
)
def test_a_map_of_another_kind_is_refused(text, message):
    with pytest.raises(SourceError) as caught:
        npu_smi.parse_map(text, "f")
    assert str(caught.value).startswith(message)


def test_super_pods_of_chips_one_after_the_other():
    text = "\n".join(super_pod_output(sdid, pod=3) for sdid in A3_SDIDS)
    found = npu_smi.parse_super_pod(text, "f")
    assert tuple(chip.super_device_id for chip in found) == A3_SDIDS
    assert {chip.super_pod_id for chip in found} == {"3"}
    assert found[1].where == "f: line 6"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("This device does not support it\n", "f: line 1: 'This device does not support it' is not key : value"),
        ("SDID : 1\nSDID : 2\n", "f: line 1: is an SDID without a Super Pod ID; ask npu-smi again"),
        ("SDID : 1\n", "f: line 1: is an SDID without a Super Pod ID; ask npu-smi again"),
        ("Super Pod ID : 0\n", "f: line 1: is a Super Pod ID without an SDID before it; ask npu-smi again"),
        ("SDID : NA\n", "f: line 1: SDID 'NA' is no chip of a super pod; use this on A3 hosts in super pods"),
        ("SDID : 4294967295\n", "f: line 1: SDID '4294967295' is no chip of a super pod"),
        ("SDID : 99999999999999999999\n", "f: line 1: SDID '99999999999999999999' is no chip of a super pod"),
        ("SDID : 1\nSuper Pod ID : -1\n", "f: line 2: Super Pod ID '-1' is no chip of a super pod"),
    ],
)
def test_super_pod_output_of_another_kind_is_refused(text, message):
    with pytest.raises(SourceError) as caught:
        npu_smi.parse_super_pod(text, "f")
    assert str(caught.value).startswith(message)

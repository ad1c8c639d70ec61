import pytest

from ranktable import hccn_tool
from ranktable.errors import SourceError
from tests.ranktable.outputs import A2_IPS, A3_IPS, ip_output, vnic_output


def test_a2_devices_one_after_the_other():
    found = hccn_tool.parse("".join(map(ip_output, A2_IPS)), "ip.txt", "a2")
    assert tuple(address.ip for address in found) == A2_IPS
    assert found[1].where == "ip.txt: line 4"


def test_a3_devices_one_after_the_other():
    found = hccn_tool.parse("".join(map(vnic_output, A3_IPS)), "vnic.txt", "a3")
    assert tuple(address.ip for address in found) == A3_IPS
    assert all(address.is_up for address in found)


def test_a_link_that_is_down_is_of_its_own_device_alone():
    text = vnic_output("10.1.1.1") + vnic_output("10.1.1.2", link="DOWN") + "vnic ipaddr: 10.1.1.3\n"
    assert [address.is_up for address in hccn_tool.parse(text, "f", "a3")] == [True, False, True]


@pytest.mark.parametrize(
    ("text", "generation", "message"),
    [
        (
            f"{ip_output('10.1.1.1')}Cmd execute failed!\n",
            "a2",
            "f: line 4: 'Cmd execute failed!' is not an address; mend that device, then ask again",
        ),
        ("ipaddr:\n", "a2", "f: line 1: 'ipaddr:' is not an address; mend that device, then ask again"),
        ("ipaddr:10.1.1.256\n", "a2", "f: line 1: '10.1.1.256' is not an IP address; give the device one"),
        ("ipaddr:0.0.0.0\n", "a2", "f: line 1: '0.0.0.0' is not an IP address; give the device one"),
        (vnic_output("10.1.1.1"), "a2", "is not for A2; ask with `hccn_tool -i N -ip -g`"),
        (ip_output("10.1.1.1"), "a3", "is not for A3; ask with `hccn_tool -i N -vnic -g`"),
    ],
)
def test_anything_else_is_refused(text, generation, message):
    with pytest.raises(SourceError) as caught:
        hccn_tool.parse(text, "f", generation)
    assert str(caught.value).endswith(message)
    assert str(caught.value).startswith("f: line ")


def test_an_empty_text_has_no_addresses():
    assert hccn_tool.parse("\n\n", "f", "a2") == []

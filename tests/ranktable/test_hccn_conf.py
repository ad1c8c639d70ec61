import pytest

from ranktable import hccn_conf
from ranktable.errors import SourceError
from tests.ranktable.outputs import A2_CONF, A2_IPS


def test_every_device_has_its_address():
    found = hccn_conf.parse(A2_CONF, "hccn.conf")
    assert {device_id: address.ip for device_id, address in found.items()} == dict(enumerate(A2_IPS))
    assert found[2].where == "hccn.conf: line 9"


def test_devices_are_in_order_whatever_the_file_says_first():
    text = "# roce\n\naddress_10 = 10.1.1.10 # spare\naddress_2=10.1.1.2\n"
    assert [(n, address.ip) for n, address in hccn_conf.parse(text, "f").items()] == [
        (2, "10.1.1.2"),
        (10, "10.1.1.10"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("address_0\n", "f: line 1: 'address_0' is not key=value; mend the line; the driver reads this file, too"),
        ("address_0=ten\n", "f: line 1: address_0: 'ten' is not an IP address; write one, as 192.168.1.8"),
        ("address_0=\n", "f: line 1: address_0: '' is not an IP address; write one, as 192.168.1.8"),
        (
            "address_0=10.1.1.1\naddress_0=10.1.1.2\n",
            "f: line 2: address_0 stands twice; keep one; the other is f: line 1",
        ),
        (
            "netmask_0=255.255.255.0\n",
            "f: has no line address_N=IP; configure the devices' addresses, or ask hccn_tool",
        ),
        ("", "f: has no line address_N=IP; configure the devices' addresses, or ask hccn_tool"),
    ],
)
def test_anything_else_is_refused(text, message):
    with pytest.raises(SourceError) as caught:
        hccn_conf.parse(text, "f")
    assert str(caught.value) == message

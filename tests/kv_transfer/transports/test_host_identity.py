"""Who is on this host, and since when."""

import ctypes
import os
from collections.abc import Iterator

import psutil

from kv_transfer.protocol import Offer, TcpOffer
from kv_transfer.transports.host_identity import host_id, start_time
from tests.kv_transfer.transports.same_host import prefill_process


def test_a_host_is_its_boot_its_pids_and_its_user() -> None:
    boot, namespace, uid = (host_id() or "").split("/")
    assert len(boot) == 36
    assert os.readlink("/proc/self/ns/pid") == f"pid:[{namespace}]"
    assert int(uid) == os.getuid()


def test_the_start_of_a_process_whatever_its_name() -> None:
    def renamed() -> Iterator[Offer | None]:
        yield TcpOffer()
        ctypes.CDLL(None).prctl(15, b"a) b (c 1 2", 0, 0, 0)  # PR_SET_NAME
        yield None

    with prefill_process(renamed) as (process, _):
        started = start_time(process.pid)
        assert started is not None
        ticks_per_s = os.sysconf("SC_CLK_TCK")
        assert abs(psutil.boot_time() + started / ticks_per_s - psutil.Process(process.pid).create_time()) < 2
        process.go_on()
        assert start_time(process.pid) == started
    assert start_time(process.pid) is None
    assert start_time(1 << 40) is None

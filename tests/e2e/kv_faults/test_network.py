"""The network between P and D: cut, slow, lossy, corrupting. P is in a namespace of its own; KV comes over TCP."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e.deployments import eventually
from tests.e2e.kv_faults.engines import LOAD_TIMEOUT_S, Engines
from tests.e2e.kv_faults.network import Namespace, corrupting, missing_for_namespaces, truncating
from tests.e2e.kv_faults.pair import BUSY_S, Pair, fresh_text, timed

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(bool(missing_for_namespaces()), reason=missing_for_namespaces() or "-"),
]

LEFT_ALONE = "vllm:omni_kv_peers_left_alone"


@pytest.fixture
def far(engines: Engines, pair: Pair) -> Iterator[Pair]:
    """The far P with the usual D. Its KV ports are open at first and at the end."""
    assert engines.far_prefill is not None
    far = Pair(engines.far_prefill, engines.decode, pair.plain)
    far.assert_recovers()
    yield far
    far.assert_recovers()


@pytest.fixture
def kv_ports(engines: Engines, far: Pair) -> tuple[int, int]:
    """Of the far P: its control port and its rank server's."""
    return far.control_port(), engines.rank_server_port(engines.namespace.host)


@pytest.fixture
def namespace(engines: Engines) -> Namespace:
    return engines.namespace


def test_kv_comes_over_tcp(far: Pair) -> None:
    before = far.counts()
    assert far.answers_right(fresh_text(2000))
    assert before.eventually(tcp_loads=1, loads=1, failures=0)


def test_a_cut_between_the_kv_ports(far: Pair, pair: Pair, namespace: Namespace, kv_ports: tuple[int, int]) -> None:
    """HTTP works, so P looks healthy. D notices by its deadline, then leaves P alone, and tries it again later."""
    before = far.counts()
    with namespace.cut(kv_ports):
        with timed(LOAD_TIMEOUT_S + BUSY_S):
            assert far.answers_right(fresh_text())
        assert before.eventually(failures=1, loads=0)
        assert eventually(lambda: far.decode.metric(LEFT_ALONE) == 1, BUSY_S)
        assert far.prefill.is_ready()
        # Others are not held up by it, and those for it fail at once, but for one that tries again now and then.
        for _ in range(8):
            assert far.answers_right(fresh_text())
        assert pair.answers_right(fresh_text())
        assert before.eventually(failures=9, loads=1)
        assert before.since()["unreachable"] >= 4
    far.assert_recovers()
    assert far.decode.metric(LEFT_ALONE) == 0


def test_a_cut_of_the_rank_server_alone(far: Pair, namespace: Namespace, kv_ports: tuple[int, int]) -> None:
    """The control port still answers; the connection that D has kept does not."""
    before = far.counts()
    with namespace.cut(kv_ports[1:]), timed(LOAD_TIMEOUT_S + BUSY_S):
        assert far.answers_right(fresh_text())
    assert before.eventually(deadline=1, failures=1, loads=0)


def test_a_slow_link_ends_by_the_deadline_and_delays_no_other(far: Pair, pair: Pair, namespace: Namespace) -> None:
    """4 MB at 1 Mbit/s take half a minute."""
    text = fresh_text(2000)
    params = far.hand_off(text)
    before = far.counts()
    with namespace.slow(1_000_000), ThreadPoolExecutor(1) as pool:
        slow = pool.submit(far.finish, text, params)
        assert eventually(lambda: far.decode.metric("vllm:kv_cache_usage_perc") > 0, LOAD_TIMEOUT_S)
        assert pair.answers_right(fresh_text())
        assert before.eventually(loads=1, failures=0, timeout_s=LOAD_TIMEOUT_S)
        assert slow.result() == far.expected(text)
    assert before.eventually(deadline=1, failures=1, loads=1)


def test_a_link_that_is_slow_and_fast_enough(far: Pair, namespace: Namespace) -> None:
    before = far.counts()
    with namespace.slow(20_000_000):
        assert far.answers_right(fresh_text())  # 1.4 MB
    assert before.eventually(loads=1, failures=0)


def test_a_lossy_link(far: Pair, namespace: Namespace) -> None:
    """TCP makes up for it, or the load fails; the answers are right."""
    before = far.counts()
    with namespace.lossy(0.05):
        for _ in range(5):
            assert far.answers_right(fresh_text())
    assert before.eventually(granted=5)
    assert before.since().get("loads", 0) + before.since().get("failures", 0) == 5


@pytest.mark.parametrize("after_bytes", [1_000, 700_000])
def test_a_corrupting_link(far: Pair, namespace: Namespace, kv_ports: tuple[int, int], after_bytes: int) -> None:
    before = far.counts()
    with namespace.relayed(kv_ports[1], corrupting(after_bytes)):
        assert eventually(lambda: far.answers_right(fresh_text()) and before.since(["checksum"]) != {}, BUSY_S)
    assert before.since(["loads"]) == {}


@pytest.mark.parametrize("after_bytes", [0, 20, 1_000, 700_000])
def test_a_connection_that_ends_too_early(
    far: Pair, namespace: Namespace, kv_ports: tuple[int, int], after_bytes: int
) -> None:
    before = far.counts()
    with namespace.relayed(kv_ports[1], truncating(after_bytes)) as relayed:
        assert eventually(lambda: far.answers_right(fresh_text()) and after_bytes in relayed, BUSY_S)
    assert before.since(["loads"]) == {}
    assert before.since(["unreachable"])["unreachable"] == before.since(["failures"])["failures"]

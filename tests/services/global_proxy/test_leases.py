"""Who ends a lease."""

import pytest

from services.global_proxy.leases import LeaseLedger
from services.global_proxy.observing.metrics import Metrics


class Ledger:
    def __init__(self) -> None:
        self.metrics = Metrics()
        self.ledger = LeaseLedger(self.metrics.open_leases)
        self.released: list[str] = []

    @property
    def num_open(self) -> tuple[int, float | None]:
        return len(self.ledger), self.metrics.registry.get_sample_value("omni_proxy_open_leases")


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


def test_one_that_nobody_will_read_is_released_once(ledger: Ledger) -> None:
    lease = ledger.ledger.open(lambda: ledger.released.append("a"))
    other = ledger.ledger.open(lambda: ledger.released.append("b"))
    assert ledger.num_open == (2, 2.0)
    lease.give_up()
    lease.give_up()
    assert ledger.released == ["a"]
    assert ledger.num_open == (1, 1.0)
    other.give_up()
    assert ledger.num_open == (0, 0.0)


def test_one_that_has_been_read_is_left_to_its_reader(ledger: Ledger) -> None:
    lease = ledger.ledger.open(lambda: ledger.released.append("a"))
    lease.taken()
    lease.give_up()
    assert ledger.released == []
    assert ledger.num_open == (0, 0.0)

"""The time in tests of leases."""

LEASE_S = 30.0
MAX_LEASE_S = 100.0


class Clock:
    """A clock that the test winds."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s

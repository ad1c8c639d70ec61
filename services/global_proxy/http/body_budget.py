"""The memory that clients' request bodies take together."""


class BodyBudget:
    """Shared by all connections of a worker.

    Attributes:
        max_bytes: of bodies received and not yet answered. A body that is too much for it is refused.
        num_bytes: so many there are.
    """

    __slots__ = ("max_bytes", "num_bytes")

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0

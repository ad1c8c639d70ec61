"""What a transport is."""

from abc import ABC, abstractmethod
from typing import ClassVar

from kv_transfer.memory.regions import Memory, Spans
from kv_transfer.protocol import Offer, RankEndpoint


class Transport(ABC):
    """Moves bytes from the KV memory of a worker of P into that of a worker of D. D reads; P serves.

    A transport knows nothing of blocks, requests or leases: it moves what the spans hold at this moment. Whether the
    bytes were still the right ones is asked afterwards, on the control channel.

    P makes one of each kind and publishes their offers; D makes one of each kind too and reads with the first, in the
    order of preference, that `can_read` the peer's offer. Every method may be called from several threads at once.
    """

    name: ClassVar[str]  # in configuration, logs and metrics; the tag of its offers

    def __init__(self, memory: Memory) -> None:
        self.memory = memory

    @abstractmethod
    def offer(self) -> Offer | None:
        """P: how peers read this memory from now on; None where it cannot serve here. Called once."""

    @abstractmethod
    def can_read(self, peer: RankEndpoint, offer: Offer) -> bool:
        """D: whether this offer can be taken up from here. May try it out, within a second; moves no KV."""

    @abstractmethod
    def read(self, peer: RankEndpoint, offer: Offer, spans: Spans, deadline: float) -> None:
        """D: read the peer's spans into ours; when it returns, all bytes have arrived.

        Args:
            peer: the worker of P; new with every start of P, so a peer that has restarted is another one.
            offer: one that `can_read` approved.
            spans: where from, where to; checked against our memory here, against the peer's memory there.
            deadline: on `time.monotonic`; nothing is written into our memory after this method has ended.

        Raises:
            KVTransferError: one of its kinds; our spans then hold anything.
        """

    @abstractmethod
    def forget(self, peer: RankEndpoint) -> None:
        """D: the peer is gone, or its last read failed: give up what is held for it (connections, mappings)."""

    @abstractmethod
    def close(self) -> None:
        """Both: end every thread, connection, mapping and file. Reads under way fail."""

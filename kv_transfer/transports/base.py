"""What a transport is."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from kv_transfer.memory import BlockMemory
from kv_transfer.protocol import RankEndpoint


class Transport(ABC):
    """Moves KV blocks between the memories of two workers. The reading side (D) asks, the serving side (P) answers.

    A transport knows nothing of requests or leases: it moves the bytes that the blocks hold at this moment. Whether
    they were still the right ones is asked afterwards, on the control channel.
    """

    def __init__(self, memory: BlockMemory) -> None:
        self.memory = memory

    @abstractmethod
    def serve(self, host: str) -> RankEndpoint:
        """Let peers read this memory; returns where."""

    @abstractmethod
    def read(self, peer: RankEndpoint, remote_ids: Sequence[int], local_ids: Sequence[int], deadline: float) -> int:
        """Read the peer's blocks into ours, one for one; returns the bytes moved. Safe to call from several threads.

        Args:
            deadline: on `time.monotonic`; nothing is written into our blocks afterwards.

        Raises:
            KVTransferError: one of its kinds; our blocks then hold anything.
        """

    @abstractmethod
    def close(self) -> None:
        """Close every connection and end every thread."""

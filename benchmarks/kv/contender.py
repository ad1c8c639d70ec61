"""What is measured: something that moves bytes from a process P to a process D."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from benchmarks.kv.buffers import Buffer, MemoryKind, new_buffer
from kv_transfer.memory.regions import Spans


@dataclass
class Contender(ABC):
    """Made in the benchmark's own process, pickled, and brought to life in P by `serve` and in D by `connect`."""

    name: str
    memory_kind: MemoryKind = field(default="anonymous", kw_only=True)
    is_pinned: bool = field(default=True, kw_only=True)  # P to one CPU, D to the other
    environment: Mapping[str, str] = field(default_factory=dict, kw_only=True)  # of both processes
    family: ClassVar[Literal["baseline", "peer", "ours"]]
    needs: ClassVar[tuple[str, ...]] = ()  # modules

    def make_buffer(self) -> Buffer:
        """Both: the memory, of the kind that this contender really works with."""
        return new_buffer(self.memory_kind)

    @abstractmethod
    def serve(self, buffer: Buffer) -> Any:
        """P: from now on serve these bytes. Returns what D must know, to be pickled."""

    @abstractmethod
    def connect(self, buffer: Buffer, served: Any) -> None:
        """D: get ready to read into this buffer. What is done here is not timed."""

    @abstractmethod
    def read(self, spans: Spans) -> None:
        """D: one read, with all that the interface wants done for each; when it returns the bytes have arrived."""

    @abstractmethod
    def close(self) -> None:
        """Both: the end of what `serve` or `connect` began; where that failed, the process just ends."""

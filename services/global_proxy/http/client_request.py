"""One request of a client, as it was received."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class ClientRequest:
    """Attributes:
    target: as sent, so with the query.
    headers: by lower-case name; of repeated ones the values joined by commas.
    body: all of it, without its framing.
    """

    method: str = ""
    target: bytes = b""
    headers: dict[bytes, bytes] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)
    keep_alive: bool = True
    takes_chunks: bool = True  # HTTP/1.1 or newer
    client: str = ""  # the peer's address

    @property
    def path(self) -> str:
        return self.target.partition(b"?")[0].decode("latin-1")

    @property
    def query(self) -> bytes:
        return self.target.partition(b"?")[2]

"""One request of a client, as it was received."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from services.global_proxy.errors import ProxyError
    from services.global_proxy.security.api_keys import ApiKey
    from services.global_proxy.security.routes import Route


@dataclass(slots=True)
class ClientRequest:
    """Attributes:
    target: as sent, so with the query.
    headers: by lower-case name; of repeated ones the values joined by commas.
    body: all of it, without its framing; empty if the request was turned away, or once it has been parsed.
    num_body_bytes: of it, while they are counted.
    entry: the route under which the door has let it in, and whose key it has. None: it has not been there, or
    turned_away: why the door has not.
    """

    method: str = ""
    target: bytes = b""
    headers: dict[bytes, bytes] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)
    num_body_bytes: int = 0
    keep_alive: bool = True
    takes_chunks: bool = True  # HTTP/1.1 or newer
    client: str = ""  # the peer's address
    entry: "tuple[Route, ApiKey | None] | None" = None
    turned_away: "ProxyError | None" = None

    @property
    def path(self) -> str:
        return self.target.partition(b"?")[0].decode("latin-1")

    @property
    def query(self) -> bytes:
        return self.target.partition(b"?")[2]

"""Tickets: what the proxy gives P and D at once, so that D reads a prompt's KV layer by layer while P computes it.

A ticket stands in `kv_transfer_params.omni.ticket` of both requests. It names the transfer and where P's control port
is, and is signed with the deployment key: no client can make one.
"""

import secrets
import time
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from kv_transfer.auth import DeploymentKey
from kv_transfer.errors import HandOffError
from kv_transfer.protocol import Host, Port

_LIFETIME_S = 3600
_MAX_CLOCK_SKEW_S = 60

Hex32 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]
Hex64 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]


class Ticket(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One prompt's transfer from one P."""

    transfer_id: Hex32  # also the id of P's lease
    prefill_host: Host
    prefill_port: Port  # P's control port
    expires_at: Annotated[int, msgspec.Meta(ge=0, lt=1 << 40)]  # seconds on the proxy's wall clock
    signature: Hex64 = ""

    def as_params(self) -> dict[str, Any]:
        params: dict[str, Any] = msgspec.to_builtins(self)
        return params

    def signed_bytes(self) -> bytes:
        return msgspec.msgpack.encode(msgspec.structs.replace(self, signature=""))


def new_ticket(key: DeploymentKey, prefill_host: str, prefill_port: int) -> Ticket:
    """A ticket for a transfer that was never heard of before."""
    unsigned = Ticket(
        transfer_id=secrets.token_hex(16),
        prefill_host=prefill_host,
        prefill_port=prefill_port,
        expires_at=int(time.time()) + _LIFETIME_S,
    )
    return msgspec.structs.replace(unsigned, signature=key.mac("ticket", unsigned.signed_bytes()).hex())


def parse_ticket(params: Mapping[str, Any], key: DeploymentKey) -> Ticket | None:
    """The ticket in `kv_transfer_params`; None when there is none.

    Raises:
        HandOffError: it is malformed, too old, or was not made with this key.
    """
    ours = params.get("omni")
    given = ours.get("ticket") if isinstance(ours, Mapping) else None
    if given is None:
        return None
    try:
        ticket = msgspec.convert(given, Ticket)
        genuine = key.is_mac(bytes.fromhex(ticket.signature), "ticket", ticket.signed_bytes())
    except (msgspec.ValidationError, UnicodeError, RecursionError) as error:
        raise HandOffError(f"kv_transfer_params.omni.ticket: {error}") from None
    if not genuine:
        raise HandOffError("kv_transfer_params.omni.ticket.signature is not that of the ticket under this key")
    if time.time() > ticket.expires_at + _MAX_CLOCK_SKEW_S:
        raise HandOffError(f"kv_transfer_params.omni.ticket.expires_at is {ticket.expires_at}, which has passed")
    return ticket

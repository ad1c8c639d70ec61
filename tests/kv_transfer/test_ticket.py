import json
import secrets
import time
from typing import Any

import msgspec
import pytest

from kv_transfer.auth import DeploymentKey
from kv_transfer.errors import HandOffError
from kv_transfer.ticket import Ticket, new_ticket, parse_ticket
from tests.kv_transfer.rank_peers import KEY, OTHER_KEY


def params_of(ticket: Ticket, **changes: Any) -> dict[str, Any]:
    """As an engine gets them: through JSON."""
    params: dict[str, Any] = json.loads(json.dumps({"omni": {"ticket": {**ticket.as_params(), **changes}}}))
    return params


def resigned(ticket: Ticket, key: DeploymentKey = KEY, **changes: Any) -> dict[str, Any]:
    """A ticket that the proxy could have made, but never does."""
    changed = msgspec.structs.replace(ticket, **changes, signature="")
    signature = key.mac("ticket", changed.signed_bytes()).hex()
    return params_of(msgspec.structs.replace(changed, signature=signature))


def test_a_ticket_survives_json() -> None:
    ticket = new_ticket(KEY, "10.0.0.1", 9000)
    parsed = parse_ticket(params_of(ticket), KEY)
    assert parsed == ticket
    assert (ticket.prefill_host, ticket.prefill_port) == ("10.0.0.1", 9000)


def test_every_ticket_is_another() -> None:
    assert len({new_ticket(KEY, "host", 1).transfer_id for _ in range(1000)}) == 1000


@pytest.mark.parametrize(
    "params", [{}, {"omni": None}, {"omni": {}}, {"omni": {"ticket": None}}, {"omni": [1]}, {"do_remote_decode": True}]
)
def test_no_ticket(params: dict[str, Any]) -> None:
    assert parse_ticket(params, KEY) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("transfer_id", "0" * 32),
        ("prefill_host", "10.0.0.2"),
        ("prefill_port", 9001),
        ("expires_at", int(time.time()) + 100_000),
        ("signature", "0" * 64),
    ],
)
def test_a_changed_ticket_is_refused(field: str, value: object) -> None:
    ticket = new_ticket(KEY, "10.0.0.1", 9000)
    with pytest.raises(HandOffError, match="signature"):
        parse_ticket(params_of(ticket, **{field: value}), KEY)


def test_a_ticket_under_another_key_is_refused() -> None:
    with pytest.raises(HandOffError, match="under this key"):
        parse_ticket(params_of(new_ticket(OTHER_KEY, "host", 1)), KEY)
    with pytest.raises(HandOffError, match="under this key"):
        parse_ticket(resigned(new_ticket(KEY, "host", 1), OTHER_KEY), KEY)


def test_a_ticket_without_a_signature_is_refused() -> None:
    params = params_of(new_ticket(KEY, "host", 1))
    del params["omni"]["ticket"]["signature"]
    with pytest.raises(HandOffError, match="signature"):
        parse_ticket(params, KEY)


def test_a_signature_for_another_purpose_is_refused() -> None:
    ticket = new_ticket(KEY, "host", 1)
    forged = KEY.mac("hand-off", ticket.signed_bytes()).hex()
    with pytest.raises(HandOffError, match="signature"):
        parse_ticket(params_of(ticket, signature=forged), KEY)


def test_a_ticket_does_not_live_for_ever() -> None:
    now = int(time.time())
    ticket = new_ticket(KEY, "host", 1)
    assert now + 600 < ticket.expires_at < now + 24 * 3600
    assert parse_ticket(resigned(ticket, expires_at=now - 1), KEY) is not None  # clocks differ
    with pytest.raises(HandOffError, match="expires_at"):
        parse_ticket(resigned(ticket, expires_at=now - 3600), KEY)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("transfer_id", "Z" * 32),
        ("transfer_id", "0" * 31),
        ("transfer_id", "0" * 32 + "\n"),
        ("transfer_id", 5),
        ("prefill_host", ""),
        ("prefill_host", "a b"),
        ("prefill_host", "host\n"),
        ("prefill_host", "\ud800"),
        ("prefill_host", "x" * 256),
        ("prefill_port", 0),
        ("prefill_port", 65536),
        ("prefill_port", "9000"),
        ("prefill_port", True),
        ("expires_at", -1),
        ("expires_at", 1 << 40),
        ("expires_at", 1.5),
        ("signature", "xyz"),
        ("signature", None),
        ("unknown", 1),
    ],
)
def test_what_is_malformed_is_refused(field: str, value: object) -> None:
    with pytest.raises(HandOffError, match=r"kv_transfer_params\.omni\.ticket"):
        parse_ticket(params_of(new_ticket(KEY, "host", 1), **{field: value}), KEY)


@pytest.mark.parametrize("ticket", ["text", 5, [], {}, {"transfer_id": secrets.token_hex(16)}, True])
def test_what_is_no_ticket_is_refused(ticket: object) -> None:
    with pytest.raises(HandOffError):
        parse_ticket({"omni": {"ticket": ticket}}, KEY)

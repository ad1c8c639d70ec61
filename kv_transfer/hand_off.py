"""The hand-off parameters: what P returns with a finished prefill and D gets with the request, by way of strangers.

They bear the names that vLLM's NixlConnector uses, so that any router that can drive it can drive us, and ours under
`omni`, signed with the deployment key: who does not hold it can neither make a hand-off nor change one.
"""

import hashlib
import re
import reprlib
import time
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeVar

import msgspec

from kv_transfer.auth import DeploymentKey
from kv_transfer.errors import HandOffError
from kv_transfer.protocol import MAX_GROUPS, PROTOCOL_VERSION, BlockIds, Host, Name, Port
from kv_transfer.ticket import Ticket, parse_ticket

T = TypeVar("T")

MAX_READERS = 128
_MAX_CLOCK_SKEW_S = 60.0

WireBlockTables = Annotated[tuple[BlockIds, ...], msgspec.Meta(min_length=1, max_length=MAX_GROUPS)]
Hex32 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]
Hex64 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
UNSIGNED = "0" * 64  # in place of a signature that is to come
NumReaders = Annotated[int, msgspec.Meta(ge=1, le=MAX_READERS)]


class OmniHandOff(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Ours among the hand-off parameters, under the key `omni`."""

    version: Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
    run_id: Name  # of the engine: new with every start
    lease_id: Name
    prompt_digest: Hex32
    expires_at: Annotated[int, msgspec.Meta(ge=0, lt=1 << 40)]  # seconds on P's wall clock, by which it ends its lease
    signature: Hex64  # over everything else


class HandOff(msgspec.Struct, frozen=True, kw_only=True):
    """The hand-off parameters that P returns and D reads: NIXL's names, and ours under `omni`."""

    do_remote_prefill: bool
    do_remote_decode: bool
    remote_engine_id: Name
    remote_request_id: Name
    remote_host: Host
    remote_port: Port
    remote_block_ids: WireBlockTables  # one for each KV cache group; 0 is no block, where P has given it up
    remote_num_tokens: Annotated[int, msgspec.Meta(ge=1, lt=1 << 31)]
    tp_size: Annotated[int, msgspec.Meta(ge=1, le=4096)]
    omni: OmniHandOff

    def as_params(self) -> dict[str, Any]:
        params: dict[str, Any] = msgspec.to_builtins(self)
        return params

    def signed(self, key: DeploymentKey) -> "HandOff":
        """The same, with its signature."""
        signature = key.mac("hand-off", self._signed_bytes()).hex()
        return msgspec.structs.replace(self, omni=msgspec.structs.replace(self.omni, signature=signature))

    def is_signed_with(self, key: DeploymentKey) -> bool:
        return key.is_mac(bytes.fromhex(self.omni.signature), "hand-off", self._signed_bytes())

    @property
    def has_expired(self) -> bool:
        return time.time() > self.omni.expires_at + _MAX_CLOCK_SKEW_S

    def _signed_bytes(self) -> bytes:
        unsigned = msgspec.structs.replace(self.omni, signature="")
        return msgspec.msgpack.encode(msgspec.structs.replace(self, omni=unsigned))


class _OmniAsked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`omni` in what a router asks for."""

    num_readers: NumReaders = 1
    ticket: Ticket | None = None


class _Asked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a router asks for without a hand-off: P to keep a prompt's blocks, or D to follow a ticket. NIXL's other
    names may be there, without a value: routers send them so.
    """

    do_remote_decode: bool | None = None
    do_remote_prefill: bool | None = None
    omni: _OmniAsked | None = None
    prompt_token_ids: Any = None  # of a chat, instead of its messages: a prompt like any other, and vLLM judges it
    remote_engine_id: None = None
    remote_request_id: None = None
    remote_host: None = None
    remote_port: None = None
    remote_block_ids: None = None
    remote_num_tokens: None = None
    remote_blocks_expiry_time: None = None
    remote_prefill_cached_tokens: None = None
    remote_block_size: None = None
    transfer_mode: None = None
    tp_size: None = None
    dcp_size: None = None
    pp_size: None = None


_BESIDE_A_HAND_OFF = frozenset(_Asked.__struct_fields__) - frozenset(HandOff.__struct_fields__)


def parse_hand_off(params: Mapping[str, Any], key: DeploymentKey) -> HandOff:
    """Check hand-off parameters that came through a client's hands.

    Raises:
        HandOffError: a field is missing, of the wrong type or out of bounds, or the signature is wrong, or it is too
            old; the message names it.
    """
    hand_off = _parse_signed(params, key)
    if hand_off.has_expired:
        raise HandOffError(f"kv_transfer_params.omni.expires_at is {hand_off.omni.expires_at}, which has passed")
    return hand_off


def parse_num_readers(params: Mapping[str, Any]) -> int:
    """How many sequences of D will read the blocks (`n` of the client's request); 1 unless P was told otherwise.

    Raises:
        HandOffError: it was told something out of bounds.
    """
    ours = params.get("omni")
    num_readers = ours.get("num_readers", 1) if isinstance(ours, Mapping) else 1
    if type(num_readers) is not int or not 1 <= num_readers <= MAX_READERS:
        raise HandOffError(
            f"kv_transfer_params.omni.num_readers is {_shown(num_readers)}, not a whole number from 1 to {MAX_READERS}"
        )
    return num_readers


def check_params(params: Any, key: DeploymentKey, *, is_producer: bool, is_consumer: bool) -> None:
    """Whether an engine may be handed a request with these `kv_transfer_params`: they are a router's, not a client's.

    A hand-off that is merely too old passes: clocks differ, and D then computes the prompt itself.

    Raises:
        HandOffError: they are not; the message names the field and its value.
    """
    if params is None:
        return
    if not isinstance(params, Mapping):
        raise HandOffError(f"kv_transfer_params is {_shown(params)}, not an object")
    if params.get("do_remote_prefill"):
        if not is_consumer:
            raise HandOffError("kv_transfer_params.do_remote_prefill is set, and this engine only prefills")
        if not _has_ticket(params):
            _check_beside_hand_off(params)
            _parse_signed(params, key)
            return
    asked = _convert(params, _Asked)
    parse_ticket(params, key)
    if asked.do_remote_decode and not is_producer:
        raise HandOffError("kv_transfer_params.do_remote_decode is true, and this engine only decodes")
    if asked.do_remote_decode and asked.do_remote_prefill:
        raise HandOffError("kv_transfer_params.do_remote_decode is true, and so is do_remote_prefill")


def _has_ticket(params: Mapping[str, Any]) -> bool:
    ours = params.get("omni")
    return isinstance(ours, Mapping) and ours.get("ticket") is not None


def _parse_signed(params: Mapping[str, Any], key: DeploymentKey) -> HandOff:
    hand_off = _convert(params, HandOff)
    if hand_off.omni.version != PROTOCOL_VERSION:
        raise HandOffError(f"kv_transfer_params.omni.version is {hand_off.omni.version}, not {PROTOCOL_VERSION}")
    try:
        is_genuine = hand_off.is_signed_with(key)
    except UnicodeError:  # half of a surrogate pair, which no hand-off of ours has
        is_genuine = False
    if not is_genuine:
        raise HandOffError(
            f"kv_transfer_params.omni.signature is {_shown(hand_off.omni.signature)}, which is not that of these "
            "parameters under this deployment's key"
        )
    return hand_off


def _check_beside_hand_off(params: Mapping[str, Any]) -> None:
    """Unsigned, and so without a value; but for the prompt's tokens, which vLLM judges, and we by their digest."""
    for name, value in params.items():
        if name in HandOff.__struct_fields__ or name == "prompt_token_ids":
            continue
        if name == "remote_prefill_cached_tokens" and type(value) is int and value >= 0:
            continue  # vLLM adds it on P, and shows it in D's usage: no more than a client could count itself
        if name not in _BESIDE_A_HAND_OFF:
            raise HandOffError(f"kv_transfer_params has an unknown field {_shown(name)}")
        if value is not None:
            raise HandOffError(f"kv_transfer_params.{name} is {_shown(value)}, not null")


def _convert(params: Mapping[str, Any], kind: type[T]) -> T:
    try:
        return msgspec.convert(params, kind)
    except (msgspec.ValidationError, UnicodeError) as error:  # a name may have half of a surrogate pair
        raise HandOffError(_problem(params, str(error))) from None


def _problem(params: Any, error: str) -> str:
    """msgspec's words, with the field's value: "Expected `int`, got `str` - at `$.omni.version`"."""
    what, _, path = error.partition(" - at `$")
    field = "kv_transfer_params" + path.removesuffix("`")
    if unknown := re.fullmatch(r"Object contains unknown field `(.*)`", what, re.DOTALL):
        return f"{field} has an unknown field {_shown(unknown[1])}"
    if not what.startswith("Expected "):
        return f"{field}: {what}"
    value = params
    for name, index in re.findall(r"\.(\w+)|\[(\d+)\]", path):
        value = value[name] if name else value[int(index)]
    return f"{field} is {_shown(value)}: {what}"


_shortener = reprlib.Repr()
_shortener.maxlevel, _shortener.maxlist, _shortener.maxtuple, _shortener.maxdict = 2, 4, 4, 4
_shortener.maxstring = _shortener.maxlong = _shortener.maxother = 60


def _shown(value: Any) -> str:
    """The value, however large, in a line."""
    return _shortener.repr(value)


def prompt_digest(token_ids: Iterable[int], *others: str | None) -> str:
    """What identifies a prompt's KV: its tokens, and all else that flows into it (adapter, images, cache salt)."""
    digest = hashlib.blake2b(digest_size=16)
    for token_id in token_ids:
        digest.update(token_id.to_bytes(8, "little", signed=True))
    digest.update(b"\xff" * 8)  # the token id -1: no prompt has it
    for other in others:
        digest.update(b"\xff" if other is None else f"{len(other)}:{other}".encode(errors="surrogatepass"))
    return digest.hexdigest()

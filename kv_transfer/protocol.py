"""What crosses the wire between a prefill engine (P) and a decode engine (D), and the hand-off parameters.

Control messages travel over zmq as msgpack. Block reads travel over TCP: a length-prefixed msgpack `ReadBlocks`,
answered by a length-prefixed `BlocksFollow` or `Refused` and, after `BlocksFollow`, the bytes themselves: for each
region in order, for each block in order. With a checksum, four bytes of CRC-32 follow, little endian.

Nothing here imports vLLM or torch; nothing is ever pickled.
"""

import hashlib
import struct
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import msgspec

from kv_transfer.errors import HandOffError, ProtocolError

PROTOCOL_VERSION = 1

# Bounds on what a peer or a client may make us allocate.
MAX_BLOCKS = 1 << 20
MAX_READERS = 128
MAX_FRAME_BYTES = 16 << 20

Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
Host = Annotated[str, msgspec.Meta(pattern=r"^[0-9A-Za-z._:%-]{1,255}\Z")]  # a name or an address
BlockId = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
BlockIds = Annotated[tuple[BlockId, ...], msgspec.Meta(max_length=MAX_BLOCKS)]


class Fingerprint(msgspec.Struct, frozen=True, kw_only=True):
    """All that must be equal in P and D for the same block bytes to mean the same keys and values."""

    protocol_version: int = PROTOCOL_VERSION
    vllm_version: str
    model: str  # a digest of the model's configuration, not its path: P and D may keep it in different places
    kv_cache_dtype: str
    block_size: int  # tokens
    tp_size: int
    layout: str  # a digest of every layer's block shape and strides, and of the instruction set that orders the bytes

    def differences(self, other: "Fingerprint") -> list[str]:
        """One sentence for each field that differs, ours first."""
        return [
            f"{name} is {getattr(self, name)!r} here and {getattr(other, name)!r} there"
            for name in self.__struct_fields__
            if getattr(self, name) != getattr(other, name)
        ]


class RankEndpoint(msgspec.Struct, frozen=True):
    """Where the blocks of one tensor-parallel rank of P are read. `run_id` is new with every start of P."""

    host: Host
    port: Port
    run_id: Name


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """D → P: who asks."""

    fingerprint: Fingerprint


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """P → D: the blocks are compatible; here they are read."""

    ranks: Annotated[tuple[RankEndpoint, ...], msgspec.Meta(max_length=4096)]


class EndRead(msgspec.Struct, frozen=True, tag="end_read"):
    """D → P: `reader` needs the lease's blocks no longer on this rank, or on every rank (`rank` is None)."""

    lease_id: Name
    reader: Name
    rank: Annotated[int, msgspec.Meta(ge=0, le=4095)] | None


class EndLease(msgspec.Struct, frozen=True, tag="end_lease"):
    """Proxy → P: nobody will read; whoever does already will find its read void."""

    lease_id: Name


class ReadEnded(msgspec.Struct, frozen=True, tag="read_ended"):
    """P's answer to both: whether the lease held until now, that is, whether what was read is good."""

    valid: bool


class ReadBlocks(msgspec.Struct, frozen=True, tag="read_blocks"):
    """D → P, on the block connection."""

    run_id: Name
    block_ids: BlockIds
    checksum: bool = False


class BlocksFollow(msgspec.Struct, frozen=True, tag="blocks_follow"):
    """P → D: so many bytes follow."""

    num_bytes: Annotated[int, msgspec.Meta(ge=0)]


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """P → D: no, and why."""

    why: str


Request = Hello | EndRead | EndLease | ReadBlocks
Reply = Welcome | ReadEnded | BlocksFollow | Refused

_encoder = msgspec.msgpack.Encoder()
_request_decoder: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_reply_decoder: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)

FRAME_HEADER = struct.Struct("<I")


def encode(message: Request | Reply) -> bytes:
    return _encoder.encode(message)


def decode_request(data: bytes | bytearray) -> Request:
    """Raises ProtocolError."""
    try:
        return _request_decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise ProtocolError(f"not a request of protocol {PROTOCOL_VERSION}: {error}") from None


def decode_reply(data: bytes | bytearray) -> Reply:
    """Raises ProtocolError."""
    try:
        return _reply_decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise ProtocolError(f"not a reply of protocol {PROTOCOL_VERSION}: {error}") from None


class OmniHandOff(msgspec.Struct, frozen=True, kw_only=True):
    """Ours among the hand-off parameters, under the key `omni`."""

    version: int
    lease_id: Name
    prompt_digest: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]


class HandOff(msgspec.Struct, frozen=True, kw_only=True):
    """The hand-off parameters that P returns and D reads: NIXL's names, and ours under `omni`."""

    do_remote_prefill: bool
    do_remote_decode: bool
    remote_engine_id: Name
    remote_request_id: Name
    remote_host: Host
    remote_port: Port
    remote_block_ids: tuple[BlockIds]  # one KV cache group
    remote_num_tokens: Annotated[int, msgspec.Meta(ge=1)]
    tp_size: Annotated[int, msgspec.Meta(ge=1, le=4096)]
    omni: OmniHandOff

    def as_params(self) -> dict[str, Any]:
        params: dict[str, Any] = msgspec.to_builtins(self)
        return params


def parse_hand_off(params: Mapping[str, Any]) -> HandOff:
    """Check hand-off parameters that came through a client's hands.

    Raises:
        HandOffError: a field is missing, of the wrong type or out of bounds; the message names it.
    """
    try:
        hand_off = msgspec.convert(params, HandOff)
    except (msgspec.ValidationError, UnicodeError, RecursionError) as error:
        raise HandOffError(f"kv_transfer_params: {error}") from None
    if hand_off.omni.version != PROTOCOL_VERSION:
        raise HandOffError(f"kv_transfer_params: omni.version is {hand_off.omni.version}, not {PROTOCOL_VERSION}")
    return hand_off


def parse_num_readers(params: Mapping[str, Any]) -> int:
    """How many sequences of D will read the blocks (`n` of the client's request); 1 unless P was told otherwise.

    Raises:
        HandOffError: it was told something out of bounds.
    """
    ours = params.get("omni")
    num_readers = ours.get("num_readers", 1) if isinstance(ours, Mapping) else 1
    if type(num_readers) is not int or not 1 <= num_readers <= MAX_READERS:
        raise HandOffError(f"kv_transfer_params: omni.num_readers is {num_readers!r}, not 1 to {MAX_READERS}")
    return num_readers


def prompt_digest(token_ids: Iterable[int], *others: str | None) -> str:
    """What identifies a prompt's KV: its tokens, and all else that flows into it (adapter, images, cache salt)."""
    digest = hashlib.blake2b(digest_size=16)
    for token_id in token_ids:
        digest.update(token_id.to_bytes(8, "little", signed=True))
    digest.update(b"\xff" * 8)  # the token id -1: no prompt has it
    for other in others:
        digest.update(b"\xff" if other is None else f"{len(other)}:{other}".encode(errors="surrogatepass"))
    return digest.hexdigest()

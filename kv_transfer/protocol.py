"""What crosses the wire between a prefill engine (P) and a decode engine (D).

Control messages travel over zmq (`control`), block requests over TCP (`rank_server`); both as msgpack, both proven with
the deployment key. Nothing here imports vLLM or torch; nothing is ever pickled.
"""

from typing import Annotated

import msgspec

from kv_transfer.auth import MAC_BYTES, NONCE_BYTES
from kv_transfer.errors import ProtocolError

PROTOCOL_VERSION = 2

# Bounds on what a peer or a client may make us allocate.
MAX_BLOCKS = 1 << 20
MAX_GROUPS = 64
MAX_RANKS = 4096
MAX_FRAME_BYTES = 16 << 20

Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
Host = Annotated[str, msgspec.Meta(pattern=r"^[0-9A-Za-z._:%-]{1,255}\Z")]  # a name or an address
Nonce = Annotated[bytes, msgspec.Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
Mac = Annotated[bytes, msgspec.Meta(min_length=MAC_BYTES, max_length=MAC_BYTES)]
Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
Positive = Annotated[int, msgspec.Meta(ge=1, lt=1 << 62)]
Address = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
BlockId = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
BlockIds = Annotated[tuple[BlockId, ...], msgspec.Meta(max_length=MAX_BLOCKS)]
Rank = Annotated[int, msgspec.Meta(ge=0, lt=MAX_RANKS)]
Packed = Annotated[bytes, msgspec.Meta(max_length=MAX_FRAME_BYTES - 1024)]  # little-endian int64s


# --- what P says of itself


class Fingerprint(msgspec.Struct, frozen=True, kw_only=True):
    """All that must be equal in P and D for KV of the one to be of use to the other."""

    protocol_version: int = PROTOCOL_VERSION
    vllm_version: str
    model: str  # a digest of the model's configuration, not its path: P and D may keep it in different places
    kv_cache_dtype: str

    def differences(self, other: "Fingerprint") -> list[str]:
        """One sentence for each field that differs, ours first."""
        return [
            f"{name} is {getattr(self, name)!r} here and {getattr(other, name)!r} there"
            for name in self.__struct_fields__
            if getattr(self, name) != getattr(other, name)
        ]


class Plane(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a layer's KV cache (K, V, both together, or an MLA latent) as a grid of runs of bytes.

    The run of block b, head h, row r and token unit u begins at
    `offset + b * block_stride + h * head_stride + r * row_stride + u * unit_stride` and has `unit_bytes` bytes. All in
    bytes, offsets in the rank's memory. A unit is the smallest number of tokens whose bytes lie together and can be
    moved without the others'. Rows are for caches that keep a token's elements apart (K by columns); mostly one.

    A backend's blocks may be smaller than those of vLLM's block tables: block B of a table is then the plane's blocks
    B * split up to (B + 1) * split, in this order.
    """

    offset: Count
    num_blocks: Positive
    block_stride: Positive
    split: Positive = 1
    num_heads: Positive
    head_stride: Count
    num_rows: Positive
    row_stride: Count
    unit_tokens: Positive
    unit_stride: Positive
    unit_bytes: Positive

    def end(self, num_units: int) -> int:
        """Where the plane's last run ends, when a block has so many units."""
        return (
            self.offset
            + (self.num_blocks - 1) * self.block_stride
            + (self.num_heads - 1) * self.head_stride
            + (self.num_rows - 1) * self.row_stride
            + (num_units - 1) * self.unit_stride
            + self.unit_bytes
        )


class LayerLayout(msgspec.Struct, frozen=True, kw_only=True):
    """One layer's KV cache on one rank."""

    name: Name
    group: Annotated[int, msgspec.Meta(ge=0, lt=MAX_GROUPS)]  # KV cache group, whose block table it uses
    encoding: Annotated[str, msgspec.Meta(max_length=256)]  # what a unit's bytes mean: equal, or of no use
    first_head: Count  # of the model's KV heads, the first that lies here; the others follow
    planes: Annotated[tuple[Plane, ...], msgspec.Meta(min_length=1, max_length=8)]

    @property
    def heads(self) -> range:
        return range(self.first_head, self.first_head + self.planes[0].num_heads)


class RankLayout(msgspec.Struct, frozen=True, kw_only=True):
    """All that a peer needs to find a token's bytes in a rank's memory."""

    block_sizes: Annotated[tuple[Positive, ...], msgspec.Meta(max_length=MAX_GROUPS)]  # tokens, for each group
    layers: Annotated[tuple[LayerLayout, ...], msgspec.Meta(max_length=4096)]  # in the order in which they are computed

    def __post_init__(self) -> None:
        for layer in self.layers:
            if layer.group >= len(self.block_sizes):
                raise ValueError(f"layer {layer.name}: there is no KV cache group {layer.group}")
            if any(plane.num_heads != len(layer.heads) for plane in layer.planes):
                raise ValueError(f"layer {layer.name}: its planes differ in heads")
            for plane in layer.planes:
                if self.block_sizes[layer.group] % (plane.split * plane.unit_tokens) or plane.num_blocks % plane.split:
                    raise ValueError(f"layer {layer.name}: its blocks are not a whole number of units")
                if plane.end(self.block_tokens(layer, plane) // plane.unit_tokens) >= 1 << 63:
                    raise ValueError(f"layer {layer.name}: it ends beyond any memory")

    def block_tokens(self, layer: LayerLayout, plane: Plane) -> int:
        """Tokens in a block of this plane."""
        return self.block_sizes[layer.group] // plane.split


class RankEndpoint(msgspec.Struct, frozen=True):
    """Where the rank server of one worker of P listens. `run_id` is new with every start of P."""

    host: Host
    port: Port
    run_id: Name


class TcpOffer(msgspec.Struct, frozen=True, tag="tcp"):
    """Over connections to the rank server."""


class SharedMemoryOffer(msgspec.Struct, frozen=True, tag="shared_memory"):
    """The memory is an unnamed file that a process of the same host and user can open through /proc."""

    host_id: Name  # machine boot and pid namespace
    pid: Positive
    fd: Count
    device: Count  # st_dev and st_ino of the file: another file under that number is not taken for it
    inode: Count
    num_bytes: Positive


class ProcessVmOffer(msgspec.Struct, frozen=True, tag="process_vm"):
    """The memory is read out of the process, by address."""

    host_id: Name
    pid: Positive
    start_time: Count  # of the process, in the kernel's ticks: a later process under that pid is not taken for it
    addresses: Annotated[tuple[Address, ...], msgspec.Meta(max_length=4096)]  # of the regions, in order
    sizes: Annotated[tuple[Positive, ...], msgspec.Meta(max_length=4096)]
    probe_address: Address  # of `probe`, to be read first: proves that reading works and that it is this process
    probe: Nonce


class HcclOffer(msgspec.Struct, frozen=True, tag="hccl"):
    """torch.distributed point-to-point, on demand, asked for through the rank server."""

    backend: Name  # "hccl" or "gloo"


class MooncakeOffer(msgspec.Struct, frozen=True, tag="mooncake"):
    """Mooncake's transfer engine."""

    session: Name  # host:port of P's engine
    protocol: Name  # "tcp", "ascend", ...
    addresses: Annotated[tuple[Address, ...], msgspec.Meta(max_length=4096)]
    sizes: Annotated[tuple[Positive, ...], msgspec.Meta(max_length=4096)]


Offer = SharedMemoryOffer | ProcessVmOffer | HcclOffer | MooncakeOffer | TcpOffer


class RankInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One worker of P: where it is asked, what lies where in its memory, how that memory can be read."""

    endpoint: RankEndpoint
    layout: RankLayout
    offers: Annotated[tuple[Offer, ...], msgspec.Meta(max_length=16)]


# --- control channel: D (or the proxy) asks P's scheduler process


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """D → P: who asks."""

    fingerprint: Fingerprint


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """P → D: our KV is of use to you; here it is read. `run_id` is new with every start of P."""

    run_id: Name
    ranks: Annotated[tuple[RankInfo, ...], msgspec.Meta(min_length=1, max_length=MAX_RANKS)]


class ExtendLease(msgspec.Struct, frozen=True, tag="extend_lease"):
    """D → P: these leases are still needed, though their blocks have not been read yet."""

    lease_ids: Annotated[tuple[Name, ...], msgspec.Meta(max_length=1024)]


class LeasesExtended(msgspec.Struct, frozen=True, tag="leases_extended"):
    """P → D: those that are open, and so live on."""

    lease_ids: Annotated[tuple[Name, ...], msgspec.Meta(max_length=1024)]


class EndRead(msgspec.Struct, frozen=True, tag="end_read"):
    """D → P: `reader` needs the lease's blocks no longer on `rank` of its `num_ranks`, or on all (`rank` is None)."""

    lease_id: Name
    reader: Name
    rank: Rank | None = None
    num_ranks: Annotated[int, msgspec.Meta(ge=1, le=MAX_RANKS)] = 1

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank >= self.num_ranks:
            raise ValueError(f"rank {self.rank} of {self.num_ranks}")


class EndLease(msgspec.Struct, frozen=True, tag="end_lease"):
    """Proxy → P: nobody will read; whoever does already will find its read void."""

    lease_id: Name


class ReadEnded(msgspec.Struct, frozen=True, tag="read_ended"):
    """P's answer to both: whether the lease held until now, that is, whether what was read is good."""

    valid: bool


# --- rank server: a worker of D asks a worker of P, over TCP


class Connect(msgspec.Struct, frozen=True, tag="connect"):
    """D → P, first: prove that you hold the deployment key."""

    nonce: Nonce


class Challenge(msgspec.Struct, frozen=True, tag="challenge"):
    """P → D: here is the proof, over both nonces; now you."""

    nonce: Nonce
    proof: Mac


class Proof(msgspec.Struct, frozen=True, tag="proof"):
    """D → P: the proof, over both nonces. Requests for `run_id` may follow at once."""

    proof: Mac
    run_id: Name


class ReadSpans(msgspec.Struct, frozen=True, tag="read_spans"):
    """D → P: send these bytes of your memory, in this order."""

    offsets: Packed
    sizes: Packed
    checksum: bool = False


class SpansFollow(msgspec.Struct, frozen=True, tag="spans_follow"):
    """P → D: so many bytes follow; then, if asked for, 8 bytes of XXH3 over all of them, big-endian."""

    num_bytes: Count


class FollowPrefill(msgspec.Struct, frozen=True, tag="follow_prefill"):
    """D → P: tell me, as it goes on, how much of this prompt's KV is there. P may not have begun it yet."""

    transfer_id: Name
    prompt_digest: Name


class PrefillProgress(msgspec.Struct, frozen=True, tag="prefill_progress"):
    """P → D, again and again, at least once a second, until the last token is there.

    All layers of the tokens before `end_token` have been computed, and the first `num_layers` layers of those before
    `partial_end_token`.
    """

    end_token: Count
    partial_end_token: Count
    num_layers: Count
    is_last: bool
    block_ids: Annotated[tuple[BlockIds, ...], msgspec.Meta(max_length=MAX_GROUPS)] = ()  # for each group, from token 0


class JoinGroup(msgspec.Struct, frozen=True, tag="join_group"):
    """D → P: make a group of two with me. This connection is the group's from now on, and the group ends with it."""

    backend: Name  # "hccl" or "gloo", as P has offered


class GroupOpen(msgspec.Struct, frozen=True, tag="group_open"):
    """P → D: make your end; I make mine."""


class GroupKey(msgspec.Struct, frozen=True, tag="group_key"):
    """Both ways, while the group is made: what torch.distributed would have told the other through its store."""

    key: Name
    value: Annotated[bytes, msgspec.Meta(max_length=64 << 10)]


class GroupProof(msgspec.Struct, frozen=True, tag="group_proof"):
    """D → P: this came first through the group, so that its other end is whoever is at the end of this connection."""

    nonce: Nonce


class ReadPiece(msgspec.Struct, frozen=True, tag="read_piece"):
    """D → P: send these bytes of your memory through the group, in this order, as one message."""

    offsets: Packed
    sizes: Packed
    checksum: bool = False


class PieceFollows(msgspec.Struct, frozen=True, tag="piece_follows"):
    """P → D: so many bytes are sent through the group."""

    num_bytes: Count
    checksum: Annotated[bytes, msgspec.Meta(max_length=8)] = b""  # XXH3 over all of them, if asked for


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """P → D: no, and why."""

    why: str


Request = (
    Hello
    | ExtendLease
    | EndRead
    | EndLease
    | Connect
    | Proof
    | ReadSpans
    | FollowPrefill
    | JoinGroup
    | GroupKey
    | GroupProof
    | ReadPiece
)
Reply = (
    Welcome
    | LeasesExtended
    | ReadEnded
    | Challenge
    | SpansFollow
    | PrefillProgress
    | Refused
    | GroupOpen
    | GroupKey
    | PieceFollows
)

_encoder = msgspec.msgpack.Encoder()
_request_decoder: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_reply_decoder: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


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

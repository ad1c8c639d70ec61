import contextlib
import random
import tracemalloc
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from kv_transfer import protocol
from kv_transfer.auth import MAC_BYTES, NONCE_BYTES
from kv_transfer.errors import ProtocolError
from kv_transfer.protocol import (
    MAX_FRAME_BYTES,
    MAX_RANKS,
    Challenge,
    Connect,
    EndLease,
    EndRead,
    ExtendLease,
    Fingerprint,
    FollowPrefill,
    HcclOffer,
    Hello,
    LayerLayout,
    LeasesExtended,
    MooncakeOffer,
    Plane,
    PrefillProgress,
    ProcessVmOffer,
    Proof,
    RankEndpoint,
    RankInfo,
    RankLayout,
    ReadEnded,
    ReadSpans,
    Refused,
    SharedMemoryOffer,
    SpansFollow,
    TcpOffer,
    Welcome,
)

NONCE, MAC = b"n" * NONCE_BYTES, b"m" * MAC_BYTES
FINGERPRINT = Fingerprint(vllm_version="0.32.0", model="m", kv_cache_dtype="bfloat16")
PLANE = Plane(
    offset=100,
    num_blocks=10,
    block_stride=4096,
    split=2,
    num_heads=2,
    head_stride=1024,
    num_rows=1,
    row_stride=0,
    unit_tokens=1,
    unit_stride=64,
    unit_bytes=64,
)
LAYER = LayerLayout(name="layers.0", group=0, encoding="bfloat16 by token", first_head=4, planes=(PLANE, PLANE))
LAYOUT = RankLayout(block_sizes=(16,), layers=(LAYER,))
OFFERS = (
    SharedMemoryOffer("host", 1, 5, 6, 7, 1 << 30),
    ProcessVmOffer("host", 1, 2, (1 << 47,), (1 << 30,), 1 << 46, NONCE),
    HcclOffer("gloo"),
    MooncakeOffer("host:1", "tcp", (1 << 47, 1 << 48), (1, 2)),
    TcpOffer(),
)
RANK = RankInfo(endpoint=RankEndpoint("127.0.0.1", 9000, "rank run"), layout=LAYOUT, offers=OFFERS)
REQUESTS: list[protocol.Request] = [
    Hello(FINGERPRINT),
    ExtendLease(("lease", "other")),
    ExtendLease(()),
    EndRead("lease", "reader é"),
    EndRead("lease", "reader", 3, 4),
    EndLease("lease"),
    Connect(NONCE),
    Proof(MAC, "run"),
    ReadSpans(b"\x01" * 16, b"\x02" * 16, True),
    ReadSpans(b"", b""),
    FollowPrefill("transfer", "digest"),
]
REPLIES: list[protocol.Reply] = [
    Welcome("run", (RANK, RANK)),
    LeasesExtended(("lease",)),
    ReadEnded(True),
    Challenge(NONCE, MAC),
    SpansFollow(1 << 40),
    PrefillProgress(end_token=10, partial_end_token=20, num_layers=3, is_last=False, block_ids=((1, 2), (3,))),
    Refused("no"),
]


def changed(message: Any, **fields: Any) -> Any:
    return msgspec.structs.replace(message, **fields)


def welcome(**fields: Any) -> Welcome:
    """With these fields of its rank, of that rank's layout, layer or plane changed."""
    plane = changed(PLANE, **{name: fields.pop(name) for name in tuple(fields) if name in PLANE.__struct_fields__})
    layer = changed(LAYER, planes=(plane,))
    layer = changed(layer, **{name: fields.pop(name) for name in tuple(fields) if name in LAYER.__struct_fields__})
    layout = msgspec.structs.asdict(LAYOUT) | {"layers": (layer,)}
    layout |= {name: fields.pop(name) for name in tuple(fields) if name in layout}
    rank = {"endpoint": RANK.endpoint, "layout": layout, "offers": OFFERS} | fields
    return Welcome("run", (rank,))  # type: ignore[arg-type]


# --- what goes comes back


@pytest.mark.parametrize("request_", REQUESTS)
def test_requests_survive_the_wire(request_: protocol.Request) -> None:
    assert protocol.decode_request(protocol.encode(request_)) == request_


@pytest.mark.parametrize("reply", REPLIES)
def test_replies_survive_the_wire(reply: protocol.Reply) -> None:
    assert protocol.decode_reply(protocol.encode(reply)) == reply
    assert protocol.decode_reply(bytearray(protocol.encode(reply))) == reply


@pytest.mark.parametrize("reply", REPLIES)
def test_a_reply_is_no_request(reply: protocol.Reply) -> None:
    with pytest.raises(ProtocolError, match="not a request of protocol 2"):
        protocol.decode_request(protocol.encode(reply))


@pytest.mark.parametrize("request_", REQUESTS)
def test_a_request_is_no_reply(request_: protocol.Request) -> None:
    with pytest.raises(ProtocolError, match="not a reply of protocol 2"):
        protocol.decode_reply(protocol.encode(request_))


# --- bounds


@pytest.mark.parametrize(
    "request_",
    [
        EndRead("", "reader"),
        EndRead("lease", "r" * 513),
        EndRead("lease", "reader", -1, 4),
        EndRead("lease", "reader", None, 0),
        EndRead("lease", "reader", 0, MAX_RANKS + 1),
        EndLease(""),
        EndLease("l" * 513),
        ExtendLease(("lease",) * 1025),
        ExtendLease(("",)),
        Connect(b"short"),
        Connect(NONCE + b"x"),
        Proof(MAC[1:], "run"),
        Proof(MAC, ""),
        ReadSpans(bytes(MAX_FRAME_BYTES), b""),
        ReadSpans("text", b""),  # type: ignore[arg-type]
        FollowPrefill("", "digest"),
    ],
)
def test_requests_out_of_bounds_are_refused(request_: protocol.Request) -> None:
    with pytest.raises(ProtocolError):
        protocol.decode_request(protocol.encode(request_))


def test_a_rank_that_does_not_exist_is_refused() -> None:
    """It would count among those that have ended their read."""
    with pytest.raises(ValueError, match="rank 4 of 4"):
        EndRead("lease", "reader", 4, 4)
    sent = protocol.encode(EndRead("lease", "reader", 3, 4)).replace(b"\xa9num_ranks\x04", b"\xa9num_ranks\x03")
    with pytest.raises(ProtocolError, match="rank 3 of 3"):
        protocol.decode_request(sent)


@pytest.mark.parametrize(
    "reply",
    [
        Welcome("", (RANK,)),
        Welcome("run", ()),
        welcome(endpoint=RankEndpoint("", 9000, "run")),
        welcome(endpoint=RankEndpoint("a b", 9000, "run")),
        welcome(endpoint=RankEndpoint("host\n", 9000, "run")),
        welcome(endpoint=RankEndpoint("host", 0, "run")),
        welcome(endpoint=RankEndpoint("host", 65536, "run")),
        welcome(offers=(TcpOffer(),) * 17),
        welcome(offers=({"type": "carrier pigeon"},)),
        welcome(offers=(SharedMemoryOffer("host", 0, 5, 6, 7, 8),)),
        welcome(offers=(ProcessVmOffer("host", 1, 2, (-1,), (1,), 1, NONCE),)),
        welcome(layers=(LAYER,) * 4097),
        welcome(planes=()),
        welcome(group=1),
        welcome(group=-1),
        welcome(first_head=-1),
        welcome(offset=-1),
        welcome(num_blocks=0),
        welcome(num_blocks=9),  # no whole number of vLLM's blocks
        welcome(unit_tokens=3),
        welcome(split=3),
        welcome(unit_bytes=0),
        welcome(offset=(1 << 62) - 1, block_stride=(1 << 62) - 1),
        welcome(block_stride=(1 << 62) - 1),
        welcome(planes=(PLANE, changed(PLANE, num_heads=1))),
        SpansFollow(-1),
        SpansFollow(1 << 62),
        PrefillProgress(end_token=-1, partial_end_token=0, num_layers=0, is_last=False),
        PrefillProgress(end_token=0, partial_end_token=0, num_layers=0, is_last=False, block_ids=((),) * 65),
        PrefillProgress(end_token=0, partial_end_token=0, num_layers=0, is_last=False, block_ids=((1 << 31,),)),
    ],
)
def test_replies_out_of_bounds_are_refused(reply: protocol.Reply) -> None:
    with pytest.raises(ProtocolError):
        protocol.decode_reply(protocol.encode(reply))


def test_what_the_bounds_allow_is_taken() -> None:
    """The reference of the changes above."""
    assert protocol.decode_reply(protocol.encode(welcome())) == Welcome(
        "run", (changed(RANK, layout=changed(LAYOUT, layers=(changed(LAYER, planes=(PLANE,)),))),)
    )


# --- what is not ours


@pytest.mark.parametrize("decode", [protocol.decode_request, protocol.decode_reply])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xc1",
        b"\x91" * 100_000,  # nested deeper than any stack
        b"\x81\xa1a" * 100_000,
        b"\x81\xa4type\xa6nobody",
        b"\x84\xa4type\xa8end_read\xa8lease_id\xa2\xff\xfe\xa6reader\xa1a\xa4rank\xc0",  # a name that is not UTF-8
        b"\x82\xa4type\xa7refused\xa3why\xa2\xff\xfe",
    ],
)
def test_what_is_not_our_protocol_is_a_protocol_error(decode: Callable[[bytes], object], data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(data)


@pytest.mark.parametrize(
    ("decode", "messages"), [(protocol.decode_request, REQUESTS), (protocol.decode_reply, REPLIES)]
)
def test_damaged_messages_decode_or_are_protocol_errors(decode: Callable[[bytes], object], messages: list[Any]) -> None:
    rng = random.Random(7)
    encoded = [protocol.encode(message) for message in messages]
    for _ in range(20_000):
        data = bytearray(rng.choice(encoded))
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        del data[rng.randint(1, len(data)) :]
        with contextlib.suppress(ProtocolError):
            decode(bytes(data))


@pytest.mark.parametrize("announced", [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"])
@pytest.mark.parametrize(
    ("kind", "field"),
    [("extend_lease", "lease_ids"), ("welcome", "ranks"), ("prefill_progress", "block_ids"), ("proof", "unknown")],
)
def test_what_is_announced_and_does_not_come_takes_no_memory(announced: bytes, kind: str, field: str) -> None:
    """Arrays, maps and bytes of four billion entries: a stranger's first message may say so."""
    data = b"\x82\xa4type" + msgspec.msgpack.encode(kind) + msgspec.msgpack.encode(field) + announced
    decode = protocol.decode_request if kind in ("extend_lease", "proof") else protocol.decode_reply
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            decode(data)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_differences_name_each_field_and_both_values() -> None:
    assert FINGERPRINT.differences(FINGERPRINT) == []
    other = Fingerprint(protocol_version=1, vllm_version="0.33.0", model="m", kv_cache_dtype="bfloat16")
    assert FINGERPRINT.differences(other) == [
        "protocol_version is 2 here and 1 there",
        "vllm_version is '0.32.0' here and '0.33.0' there",
    ]


def test_layouts_know_their_heads_and_blocks() -> None:
    assert LAYER.heads == range(4, 6)
    assert LAYOUT.block_tokens(LAYER, PLANE) == 8  # vLLM's 16, in two of the backend's blocks
    assert PLANE.end(8) == 100 + 9 * 4096 + 1024 + 7 * 64 + 64

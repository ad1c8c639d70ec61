import contextlib
import random
from collections.abc import Callable
from typing import Any

import pytest

from kv_transfer import protocol
from kv_transfer.errors import HandOffError, ProtocolError
from kv_transfer.protocol import (
    MAX_READERS,
    BlocksFollow,
    EndLease,
    EndRead,
    Fingerprint,
    HandOff,
    Hello,
    RankEndpoint,
    ReadBlocks,
    ReadEnded,
    Refused,
    Welcome,
    parse_hand_off,
    parse_num_readers,
    prompt_digest,
)

FINGERPRINT = Fingerprint(
    vllm_version="0.32.0", model="m", kv_cache_dtype="bfloat16", block_size=16, tp_size=1, layout="l"
)
REQUESTS = [
    Hello(FINGERPRINT),
    EndRead("lease", "reader é", None),
    EndRead("lease", "reader", 3),
    EndLease("lease"),
    ReadBlocks("run", (1, 2, 500), True),
    ReadBlocks("run", ()),
]
REPLIES = [
    Welcome((RankEndpoint("127.0.0.1", 9000, "run"),)),
    ReadEnded(True),
    BlocksFollow(1 << 40),
    Refused("no"),
]


def good_params() -> dict[str, Any]:
    """As they come back from a client: JSON has made lists of the tuples."""
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_engine_id": "engine",
        "remote_request_id": "cmpl-1",
        "remote_host": "127.0.0.1",
        "remote_port": 9000,
        "remote_block_ids": [[4, 7, 8]],
        "remote_num_tokens": 40,
        "tp_size": 1,
        "omni": {"version": 1, "lease_id": "lease", "prompt_digest": "0" * 32},
    }


# --- messages


@pytest.mark.parametrize("request_", REQUESTS)
def test_requests_survive_the_wire(request_: protocol.Request) -> None:
    assert protocol.decode_request(protocol.encode(request_)) == request_


@pytest.mark.parametrize("reply", REPLIES)
def test_replies_survive_the_wire(reply: protocol.Reply) -> None:
    assert protocol.decode_reply(protocol.encode(reply)) == reply


@pytest.mark.parametrize("reply", REPLIES)
def test_a_reply_is_no_request(reply: protocol.Reply) -> None:
    with pytest.raises(ProtocolError, match="not a request of protocol 1"):
        protocol.decode_request(protocol.encode(reply))


@pytest.mark.parametrize(
    "request_",
    [
        EndRead("", "reader", 0),
        EndRead("lease", "r" * 513, 0),
        EndRead("lease", "reader", -1),
        EndRead("lease", "reader", 4096),
        ReadBlocks("run", (-1,)),
        ReadBlocks("run", (1 << 31,)),
        ReadBlocks("run", ("1",)),  # type: ignore[arg-type]
    ],
)
def test_requests_out_of_bounds_are_refused(request_: protocol.Request) -> None:
    with pytest.raises(ProtocolError):
        protocol.decode_request(protocol.encode(request_))


def test_more_blocks_than_any_engine_has_are_refused() -> None:
    with pytest.raises(ProtocolError, match=str(protocol.MAX_BLOCKS)):
        protocol.decode_request(protocol.encode(ReadBlocks("run", (0,) * (protocol.MAX_BLOCKS + 1))))


@pytest.mark.parametrize("decode", [protocol.decode_request, protocol.decode_reply])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xc1",
        b"\x91" * 100_000,  # nested deeper than any stack
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
    for _ in range(20_000):
        data = bytearray(protocol.encode(rng.choice(messages)))
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        del data[rng.randint(1, len(data)) :]
        with contextlib.suppress(ProtocolError):
            decode(bytes(data))


def test_differences_name_each_field_and_both_values() -> None:
    assert FINGERPRINT.differences(FINGERPRINT) == []
    other = Fingerprint(
        vllm_version="0.33.0", model="m", kv_cache_dtype="bfloat16", block_size=32, tp_size=1, layout="l"
    )
    assert FINGERPRINT.differences(other) == [
        "vllm_version is '0.32.0' here and '0.33.0' there",
        "block_size is 16 here and 32 there",
    ]


# --- hand-off parameters


def test_hand_off_parameters_come_back_as_they_went() -> None:
    hand_off = parse_hand_off(good_params())
    assert hand_off.remote_block_ids == ((4, 7, 8),)
    assert parse_hand_off(hand_off.as_params()) == hand_off


def test_parameters_that_others_added_are_ignored() -> None:
    params = good_params() | {"remote_blocks_expiry_time": 1.5, "transfer_mode": "pull"}
    assert parse_hand_off(params) == parse_hand_off(good_params())


@pytest.mark.parametrize("name", HandOff.__struct_fields__)
def test_a_missing_field_is_named(name: str) -> None:
    params = good_params()
    del params[name]
    with pytest.raises(HandOffError, match=name):
        parse_hand_off(params)


@pytest.mark.parametrize("name", ["version", "lease_id", "prompt_digest"])
def test_a_missing_field_of_ours_is_named(name: str) -> None:
    params = good_params()
    del params["omni"][name]
    with pytest.raises(HandOffError, match=name):
        parse_hand_off(params)


WRONG = [
    ("do_remote_prefill", [1, "true", None]),
    ("do_remote_decode", [0, "false", None]),
    ("remote_engine_id", ["", "x" * 513, 7, None, ["engine"]]),
    ("remote_request_id", ["", "x" * 513, 7, None]),
    ("remote_host", ["", "x" * 256, 7, None, {}, "a b", "a\x00b", "\ud800", "10.0.0.1;tcp://10.0.0.2", "a\n", "*"]),
    ("remote_port", [0, -1, 65536, "9000", 9000.5, True, None, 1 << 70]),
    (
        "remote_block_ids",
        [None, 3, "1", [], [1, 2], [[1], [2]], [[-1]], [[1.5]], [["1"]], [[None]], [[True]], [[1 << 31]], [[1 << 70]]],
    ),
    ("remote_num_tokens", [0, -1, "40", 1.5, None, True]),
    ("tp_size", [0, -1, 4097, "1", None]),
    ("omni", [None, 1, "x", [], {}]),
]


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG for value in values])
def test_a_wrong_field_is_named(name: str, value: object) -> None:
    with pytest.raises(HandOffError, match=name):
        parse_hand_off(good_params() | {name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("version", 2),
        ("version", 0),
        ("version", "1"),
        ("version", None),
        ("lease_id", ""),
        ("lease_id", "x" * 513),
        ("lease_id", 7),
        ("prompt_digest", "0" * 31),
        ("prompt_digest", "0" * 33),
        ("prompt_digest", "G" * 32),
        ("prompt_digest", "0" * 31 + "\n"),
        ("prompt_digest", "0" * 32 + "\n"),
        ("prompt_digest", None),
    ],
)
def test_a_wrong_field_of_ours_is_named(name: str, value: object) -> None:
    params = good_params()
    params["omni"][name] = value
    with pytest.raises(HandOffError, match=name):
        parse_hand_off(params)


def test_forged_parameters_parse_or_are_hand_off_errors() -> None:
    rng = random.Random(11)
    values: list[Any] = [None, True, 0, -1, 1, 1 << 70, 1.5, float("nan"), "", "x", "\ud800", "\0", b"x", [], [[]], {}]
    for _ in range(20_000):
        params = good_params()
        for _ in range(rng.randint(1, 3)):
            target = rng.choice([params, params["omni"]]) if isinstance(params.get("omni"), dict) else params
            name = rng.choice([*target, "unknown"])
            target[name] = rng.choice([*values, rng.choice(values), [rng.choice(values)], {"omni": rng.choice(values)}])
        with contextlib.suppress(HandOffError):
            parse_hand_off(params)
        with contextlib.suppress(HandOffError):
            assert 1 <= parse_num_readers(params) <= MAX_READERS


def test_deep_nesting_is_ignored_or_a_hand_off_error() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert parse_hand_off(good_params() | {"unknown": deep}) == parse_hand_off(good_params())
    with pytest.raises(HandOffError):
        parse_hand_off(good_params() | {"remote_block_ids": deep})


@pytest.mark.parametrize(
    ("params", "num_readers"),
    [
        ({}, 1),
        ({"omni": None}, 1),
        ({"omni": {}}, 1),
        ({"omni": []}, 1),
        ({"omni": {"num_readers": 1}}, 1),
        ({"omni": {"num_readers": MAX_READERS}}, MAX_READERS),
    ],
)
def test_num_readers(params: dict[str, Any], num_readers: int) -> None:
    assert parse_num_readers(params) == num_readers


@pytest.mark.parametrize("value", [0, -1, MAX_READERS + 1, 1.0, "2", None, True, [1]])
def test_num_readers_out_of_bounds_is_named(value: object) -> None:
    with pytest.raises(HandOffError, match=r"omni\.num_readers"):
        parse_num_readers({"omni": {"num_readers": value}})


# --- digest


def test_the_digest_is_that_of_the_prompt_and_of_all_that_flows_into_it() -> None:
    prompts: list[tuple[Any, ...]] = [
        ([], None, None),
        ([0], None, None),
        ([1], None, None),
        ([0, 0], None, None),
        ([1, 2], None, None),
        ([2, 1], None, None),
        ([1, 2], "adapter", None),
        ([1, 2], None, "adapter"),
        ([1, 2], "", None),
        ([1, 2], "a", "b"),
        ([1, 2], "ab", ""),
        ([1, 2], "a1:b", None),
        ([1, 2], None, None, "image"),
        ([1, 2], None, None, "image", "image"),
        ([1, 2], None, None, "image,image"),
        ([1, 2], None, None, "é"),
        ([1, 2], None, None, "\ud800"),
        ([int.from_bytes(b"3:aaaaaa", "little")], "aaa", None),
    ]
    digests = {prompt_digest(*prompt) for prompt in prompts}
    assert len(digests) == len(prompts)
    assert all(len(digest) == 32 for digest in digests)
    assert prompt_digest([1, 2], "a", None) == prompt_digest((1, 2), "a", None)


def test_tokens_and_names_cannot_be_shifted_into_each_other() -> None:
    as_token = int.from_bytes(b"6:aaaaaa", "little")
    assert prompt_digest([as_token]) != prompt_digest([], "aaaaaa")
    assert prompt_digest([5, as_token]) != prompt_digest([5], "aaaaaa")


def test_the_digest_does_not_change_between_releases() -> None:
    """P and D of one protocol version must agree; change PROTOCOL_VERSION with this value."""
    assert prompt_digest([1, 2, 3], "adapter", None, "image") == "6a3cc34fac458aca5cc71a84119bf6e9"

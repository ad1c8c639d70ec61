import json
import time
import tracemalloc
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.errors import HandOffError
from kv_transfer.hand_off import (
    MAX_READERS,
    HandOff,
    OmniHandOff,
    check_params,
    parse_hand_off,
    parse_num_readers,
    prompt_digest,
)
from kv_transfer.protocol import MAX_GROUPS, PROTOCOL_VERSION
from kv_transfer.ticket import new_ticket

from .hand_off_strategies import (
    KEY,
    OTHER_KEY,
    Params,
    as_received,
    fuzz,
    garbled,
    genuine,
    hand_off,
    json_values,
    mutated,
    nested,
    prefill_params,
)


def check(params: Any, role: str = "both") -> None:
    check_params(params, KEY, is_producer=role in ("prefill", "both"), is_consumer=role in ("decode", "both"))


def changed(path: str, value: Any) -> Params:
    """A genuine hand-off, received with another value at `path`."""
    params = as_received(hand_off())
    *parents, last = path.split(".")
    block = params
    for parent in parents:
        block = block[parent]
    block[last] = value
    return params


@fuzz
@given(genuine)
def test_a_genuine_one_is_read_as_it_was_written(hand_off: HandOff) -> None:
    assert parse_hand_off(as_received(hand_off), KEY) == hand_off
    check(as_received(hand_off), "decode")


@fuzz
@given(mutated())
def test_a_genuine_one_with_anything_changed_is_refused(params: Params) -> None:
    with pytest.raises(HandOffError):
        parse_hand_off(params, KEY)
    with pytest.raises(HandOffError):
        check(params, "decode")


@fuzz
@given(st.one_of(garbled(), st.dictionaries(st.text(), json_values), st.dictionaries(st.integers(), json_values)))
def test_whatever_else_comes_is_refused(params: Params) -> None:
    with pytest.raises(HandOffError):
        parse_hand_off(params, KEY)


@fuzz
@given(st.one_of(json_values, garbled()))
def test_nothing_unsigned_has_an_engine_read_foreign_blocks(params: Any) -> None:
    try:
        check(params)
    except HandOffError:
        return
    assert not params or params.get("do_remote_prefill") in (False, None)


@fuzz
@given(prefill_params)
def test_what_routers_send_to_prefill(params: Params) -> None:
    check(params, "prefill")
    check(params, "both")
    assert 1 <= parse_num_readers(params) <= MAX_READERS
    with pytest.raises(HandOffError, match="only decodes"):
        check(params, "decode")


@fuzz
@given(prefill_params, st.sampled_from(["remote_host", "remote_block_ids", "tp_size", "x", "omni"]), json_values)
def test_what_prefill_is_not_sent(params: Params, name: str, value: Any) -> None:
    if value is None or (name == "omni" and value == {}):
        value = {"x": 1}
    with pytest.raises(HandOffError):
        check(params | {name: value}, "prefill")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("remote_port", 65536, "remote_port is 65536: Expected `int` <= 65535"),
        ("remote_port", True, "remote_port is True: Expected `int`"),
        ("remote_host", "a/b", "remote_host is 'a/b': Expected `str` matching"),
        ("remote_host", "", "remote_host is '': "),
        ("remote_engine_id", "x" * 513, "remote_engine_id is 'xxxxx.*: Expected `str` of length <= 512"),
        ("remote_block_ids", [], r"remote_block_ids is \[\]: "),
        ("remote_block_ids", [[1]] * (MAX_GROUPS + 1), r"remote_block_ids is \[\[1\], .*of length <= 64"),
        ("remote_block_ids", [[1, 1 << 31]], r"remote_block_ids\[0\]\[1\] is 2147483648: Expected `int` <= "),
        ("remote_block_ids", [[1], [-1]], r"remote_block_ids\[1\]\[0\] is -1: "),
        ("remote_num_tokens", 10**30, "remote_num_tokens is 1000.*: Expected `int` <= "),
        ("remote_num_tokens", 0, "remote_num_tokens is 0: "),
        ("tp_size", 4097, "tp_size is 4097: "),
        ("do_remote_decode", None, "do_remote_decode is None: "),
        ("do_remote_prefill", 1, "do_remote_prefill is 1: Expected `bool`"),
        ("omni.expires_at", 10**30, "omni.expires_at is 1000.*: Expected `int` <= "),
        ("omni.version", 10**30, "omni.version is 1000"),
        ("omni.prompt_digest", "0" * 32 + "\n", "omni.prompt_digest is "),
        ("omni.signature", "A" * 64, "omni.signature is 'AAAA"),
        ("omni.x", 1, "omni has an unknown field 'x'"),
        ("omni", None, "omni is None: Expected `object`"),
    ],
)
def test_a_refusal_names_field_and_value(path: str, value: Any, message: str) -> None:
    params = changed(path, value)
    with pytest.raises(HandOffError, match=rf"^kv_transfer_params\.{message}") as caught:
        parse_hand_off(params, KEY)
    assert len(str(caught.value)) < 400
    with pytest.raises(HandOffError, match=rf"^kv_transfer_params\.{message}"):
        check(params)


def test_a_client_s_names_are_shown_shortened_and_in_one_line() -> None:
    for params in ({"x\n" * 9999: 1}, {"omni": {"x\n" * 9999: 1}}, {"do_remote_prefill": True, "x\n" * 9999: 1}):
        with pytest.raises(HandOffError, match=r"an unknown field 'x\\nx\\nx") as caught:
            check(params)
        assert len(str(caught.value)) < 150
        assert "\n" not in str(caught.value)


def test_a_missing_field_is_named() -> None:
    with pytest.raises(HandOffError, match="missing required field `do_remote_decode`"):
        check({"do_remote_prefill": True})


@pytest.mark.parametrize("path", ["remote_engine_id", "remote_request_id", "omni.run_id", "omni.lease_id"])
def test_half_a_surrogate_pair(path: str) -> None:
    with pytest.raises(HandOffError, match="signature is"):
        parse_hand_off(changed(path, "\ud800"), KEY)


@pytest.mark.parametrize("params", [{"\ud800": 1}, {"omni": {"\ud800": 1}}, {"do_remote_prefill": True, "\ud800": 1}])
def test_half_a_surrogate_pair_in_a_name(params: Params) -> None:
    with pytest.raises(HandOffError):
        check(params)
    with pytest.raises(HandOffError):
        parse_hand_off(as_received(hand_off()) | {"tp_size": 0} | params, KEY)


def test_the_key_decides() -> None:
    with pytest.raises(HandOffError, match=r"omni\.signature is .* not that of these parameters"):
        parse_hand_off(as_received(hand_off()), OTHER_KEY)


def test_another_protocol_version() -> None:
    ours = msgspec.structs.replace(hand_off().omni, version=PROTOCOL_VERSION + 1)
    with pytest.raises(HandOffError, match=rf"omni\.version is {PROTOCOL_VERSION + 1}, not {PROTOCOL_VERSION}"):
        parse_hand_off(as_received(hand_off(omni=ours)), KEY)


def expiring(expires_at: int) -> Params:
    return as_received(hand_off(omni=msgspec.structs.replace(hand_off().omni, expires_at=expires_at)))


def test_an_old_one_is_not_read_but_may_come_from_a_router() -> None:
    params = expiring(int(time.time()) - 3600)
    with pytest.raises(HandOffError, match=r"omni\.expires_at is \d+, which has passed"):
        parse_hand_off(params, KEY)
    check(params)


def test_clocks_may_differ_by_some_seconds() -> None:
    parse_hand_off(expiring(int(time.time()) - 20), KEY)


def test_who_may_be_handed_what() -> None:
    check(as_received(hand_off()), "decode")
    with pytest.raises(HandOffError, match="do_remote_prefill is set, and this engine only prefills"):
        check(as_received(hand_off()), "prefill")


def ticket(**changes: Any) -> Params:
    return {"omni": {"ticket": new_ticket(KEY, "127.0.0.1", 9000).as_params() | changes}}


def test_a_ticket_is_for_both() -> None:
    check({"do_remote_decode": True, "remote_host": None} | ticket(), "prefill")
    check({"do_remote_prefill": True, "remote_host": None} | ticket(), "decode")


@pytest.mark.parametrize(
    "params",
    [
        {"do_remote_prefill": True} | ticket(prefill_port=9001),
        {"do_remote_prefill": True} | ticket(transfer_id="0" * 32),
        {"do_remote_prefill": True} | ticket(expires_at=1 << 39),
        {"do_remote_prefill": True} | ticket(prefill_host="\ud800"),
        {"do_remote_prefill": True} | ticket(x=1),
        {"do_remote_prefill": 1} | ticket(),
        {"do_remote_prefill": True, "remote_host": "x"} | ticket(),
        {"do_remote_prefill": True, "do_remote_decode": True} | ticket(),
        {"do_remote_prefill": True, "omni": {"ticket": []}},
        {"do_remote_decode": True} | ticket(prefill_port=9001),
        {"do_remote_decode": True, "omni": {"ticket": 1}},
        as_received(hand_off()) | ticket(),
    ],
)
def test_a_ticket_that_the_proxy_did_not_make(params: Params) -> None:
    with pytest.raises(HandOffError, match=r"^kv_transfer_params\."):
        check(params)


@pytest.mark.parametrize("nothing", [None, {}, {"do_remote_prefill": False, "do_remote_decode": None, "tp_size": None}])
def test_nothing_wanted(nothing: Params | None) -> None:
    check(nothing, "decode")
    check(nothing, "prefill")


def test_beside_a_hand_off_there_may_be_the_prompt_s_tokens_and_names_without_a_value() -> None:
    params = as_received(hand_off())
    check(params | {"prompt_token_ids": [1, 2], "remote_blocks_expiry_time": None, "pp_size": None})
    with pytest.raises(HandOffError, match=r"kv_transfer_params\.pp_size is 2, not null"):
        check(params | {"pp_size": 2})
    with pytest.raises(HandOffError, match="unknown field 'x'"):
        check(params | {"x": None})


@pytest.mark.parametrize("beside", [{}, {"do_remote_decode": False}, {"do_remote_prefill": None}])
def test_a_chat_s_tokens_are_no_hand_off(beside: Params) -> None:
    check({"prompt_token_ids": [1, 2]} | beside)
    check({"prompt_token_ids": [1, 2], "do_remote_prefill": True} | ticket(), "decode")
    with pytest.raises(HandOffError, match=r"kv_transfer_params\.remote_block_ids is "):
        check({"prompt_token_ids": [1, 2], "remote_block_ids": [[1]]} | beside)


@pytest.mark.parametrize("value", [0, MAX_READERS + 1, True, 1.0, "1", None, [], 10**30])
def test_readers_out_of_bounds(value: Any) -> None:
    params = {"do_remote_decode": True, "omni": {"num_readers": value}}
    with pytest.raises(HandOffError, match=r"omni\.num_readers is .* 1 to 128"):
        parse_num_readers(params)
    with pytest.raises(HandOffError, match=r"omni\.num_readers is "):
        check(params)


@pytest.mark.parametrize("params", [{}, {"omni": None}, {"omni": {}}])
def test_one_reader_unless_said_otherwise(params: Params) -> None:
    assert parse_num_readers(params) == 1


def test_refusals_stay_small() -> None:
    large = {"x" * 1000: ["y" * 1000] * 1000}
    tracemalloc.start()
    try:
        for params in (
            changed("omni", large),
            changed("remote_block_ids", [[1] * (1 << 20)] * 3 + [0]),
            changed("remote_host", nested(90)),
            {"do_remote_decode": large},
            [large] * 1000,
            {"do_remote_prefill": large, **large},
        ):
            with pytest.raises(HandOffError) as caught:
                check(params)
            assert len(str(caught.value)) < 2000
        assert tracemalloc.get_traced_memory()[1] < 200 << 20
    finally:
        tracemalloc.stop()


def test_deep_nesting() -> None:
    for params in ({"omni": nested(100_000)}, changed("tp_size", nested(100_000)), nested(100_000)):
        with pytest.raises(HandOffError):
            check(params)


def test_every_field_is_signed() -> None:
    """Also those that a later version may add."""
    signatures = {hand_off().omni.signature}
    others: Params = {"do_remote_prefill": False, "do_remote_decode": True, "remote_block_ids": ((1, 2), (3,))}
    for name in HandOff.__struct_fields__:
        if name != "omni":
            value = others.get(name) or (getattr(hand_off(), name) * 2)
            signatures.add(hand_off(**{name: others.get(name, value)}).omni.signature)
    for name in OmniHandOff.__struct_fields__:
        if name != "signature":
            ours = hand_off().omni
            value = {"expires_at": 1, "version": 1}.get(name, "1" * 32)
            signatures.add(hand_off(omni=msgspec.structs.replace(ours, **{name: value})).omni.signature)
    assert len(signatures) == 1 + len(HandOff.__struct_fields__) - 1 + len(OmniHandOff.__struct_fields__) - 1


def test_prompt_digests() -> None:
    one = prompt_digest([1, 2, 3], None, "salt")
    assert one == prompt_digest([1, 2, 3], None, "salt")
    others = [
        prompt_digest([1, 2], None, "salt"),
        prompt_digest([1, 2, 3], "salt", None),
        prompt_digest([1, 2, 3], None, "sal", "t"),
        prompt_digest([1, 2, 3], None, ""),
        prompt_digest([1, 2, 3], None),
        prompt_digest([1, 2, 3, -1], None, "salt"),
        prompt_digest([1, 2, 3], None, "\ud800"),
        prompt_digest([1 << 40], None, "salt"),
    ]
    assert len({one, *others}) == 1 + len(others)
    assert json.loads(json.dumps(one)) == one
    assert len(one) == 32

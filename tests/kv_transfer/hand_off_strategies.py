"""Hand-off parameters for tests: genuine ones, genuine ones with one thing changed, and whatever JSON can hold.

For hypothesis, and for anybody who wants to try an engine with them.
"""

import copy
import json
from typing import Any

import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from kv_transfer.auth import DeploymentKey
from kv_transfer.hand_off import MAX_READERS, UNSIGNED, HandOff, OmniHandOff
from kv_transfer.protocol import PROTOCOL_VERSION

KEY = DeploymentKey(b"the key of this deployment......")
OTHER_KEY = DeploymentKey(b"the key of another deployment...")
FAR_FUTURE = (1 << 40) - 1

Params = dict[str, Any]

# The machine may be busy, and tests leave no files behind.
fuzz = settings(deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])


def hand_off(**changes: Any) -> HandOff:
    """A genuine one."""
    fields: Params = {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_engine_id": "trial.prefill.group1.rank0",
        "remote_request_id": "cmpl-1",
        "remote_host": "127.0.0.1",
        "remote_port": 9000,
        "remote_block_ids": ((1, 2, 3),),
        "remote_num_tokens": 40,
        "tp_size": 1,
        "omni": OmniHandOff(
            version=PROTOCOL_VERSION,
            run_id="run",
            lease_id="lease",
            prompt_digest="0" * 32,
            expires_at=FAR_FUTURE,
            signature=UNSIGNED,
        ),
    }
    return HandOff(**(fields | changes)).signed(KEY)


def as_received(hand_off: HandOff) -> Params:
    """As it comes out of JSON."""
    params: Params = json.loads(json.dumps(hand_off.as_params()))
    return params


_names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
_digits = st.sampled_from("0123456789abcdef")
_omni_hand_offs = st.builds(
    OmniHandOff,
    version=st.just(PROTOCOL_VERSION),
    run_id=_names,
    lease_id=_names,
    prompt_digest=st.text(_digits, min_size=32, max_size=32),
    expires_at=st.integers(1 << 38, FAR_FUTURE),
    signature=st.just(UNSIGNED),
)

genuine: st.SearchStrategy[HandOff] = st.builds(
    HandOff,
    do_remote_prefill=st.just(True),
    do_remote_decode=st.just(False),
    remote_engine_id=_names,
    remote_request_id=_names,
    remote_host=st.from_regex(r"[0-9A-Za-z._:%-]{1,255}", fullmatch=True),
    remote_port=st.integers(1, 65535),
    remote_block_ids=st.lists(
        st.lists(st.integers(0, (1 << 31) - 1), max_size=8).map(tuple), min_size=1, max_size=4
    ).map(tuple),
    remote_num_tokens=st.integers(1, (1 << 31) - 1),
    tp_size=st.integers(1, 4096),
    omni=_omni_hand_offs,
).map(lambda unsigned: unsigned.signed(KEY))

_flags = st.sampled_from([None, False])
prefill_params: st.SearchStrategy[Params] = st.fixed_dictionaries(
    {"do_remote_decode": st.just(True)},
    optional={
        "do_remote_prefill": _flags,
        "remote_engine_id": st.none(),
        "remote_block_ids": st.none(),
        "remote_host": st.none(),
        "remote_port": st.none(),
        "remote_blocks_expiry_time": st.none(),
        "omni": st.one_of(st.none(), st.fixed_dictionaries({"num_readers": st.integers(1, MAX_READERS)})),
    },
)  # as routers send them to P

_texts = st.text(st.characters(), max_size=12)  # halves of surrogate pairs among them
_scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(1, 60).map(lambda digits: 10**digits),
    st.just(10**4000),
    st.floats(),
    _texts,
    st.sampled_from(["127.0.0.1", "0" * 32, "0" * 64, "0" * 64 + "\n", "::1", "\0", "x" * 513]),
)
json_values: st.SearchStrategy[Any] = st.recursive(
    _scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(_texts, inner, max_size=4)),
    max_leaves=12,
)


def nested(depth: int) -> Any:
    """Lists in lists."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


_FIELDS = [(name,) for name in HandOff.__struct_fields__] + [("omni", name) for name in OmniHandOff.__struct_fields__]


@st.composite
def garbled(draw: st.DrawFn) -> Params:
    """Parameters with the right names and any values."""
    params: Params = {}
    for path in draw(st.lists(st.sampled_from(_FIELDS), unique=True)):
        _put(params, path, draw(json_values))
    return params


@st.composite
def mutated(draw: st.DrawFn) -> Params:
    """A genuine hand-off of which one field is gone, or has another value."""
    params = as_received(draw(genuine))
    path = draw(st.sampled_from(_FIELDS))
    block = params["omni"] if len(path) == 2 else params
    if draw(st.booleans()):
        del block[path[-1]]
        return params
    before = copy.deepcopy(block[path[-1]])
    alike = draw(genuine).as_params()
    others = alike["omni"][path[-1]] if len(path) == 2 else alike[path[-1]]
    value = draw(st.one_of(json_values, st.just(msgspec.to_builtins(others))))
    block[path[-1]] = value
    if json.dumps(value) == json.dumps(before):
        del block[path[-1]]
    return params


def _put(params: Params, path: tuple[str, ...], value: Any) -> None:
    if len(path) == 2:
        params["omni"] = params["omni"] if isinstance(params.get("omni"), dict) else {}
        params["omni"][path[1]] = value
    else:
        params[path[0]] = value

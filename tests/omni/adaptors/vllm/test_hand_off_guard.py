"""What the guard lets through, and that it lets it through unchanged."""

import asyncio
import itertools
import json
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.auth import load_key
from kv_transfer.errors import HandOffError
from kv_transfer.hand_off import check_params
from omni.adaptors.vllm import hand_off_guard
from omni.adaptors.vllm.hand_off_guard import HandOffGuard, InstalledGuard, Message, RefusedError, Rules, install

from ....kv_transfer.hand_off_strategies import (
    KEY,
    Params,
    as_received,
    fuzz,
    garbled,
    hand_off,
    json_values,
    mutated,
    nested,
    prefill_params,
)

PREFILL = Rules(key=KEY, is_producer=True, is_consumer=False)
DECODE = Rules(key=KEY, is_producer=False, is_consumer=True)
GENUINE = as_received(hand_off())
ROUTED = {"do_remote_decode": True, "do_remote_prefill": False, "remote_host": None, "omni": {"num_readers": 2}}
DISCONNECT: Message = {"type": "http.disconnect"}
JSON = [(b"host", b"x"), (b"content-type", b"application/json")]


class Exchange:
    """One request to a guard with an application behind it that reads the whole body and waits for the client to go."""

    def __init__(
        self,
        chunks: Iterable[bytes],
        *,
        rules: Rules = DECODE,
        ends: bool = True,
        headers: list[tuple[bytes, bytes]] = JSON,
        **scope: Any,
    ) -> None:
        chunks = list(chunks)
        self._coming = [
            {"type": "http.request", "body": chunk, "more_body": index + 1 < len(chunks) or not ends}
            for index, chunk in enumerate(chunks)
        ] + [DISCONNECT]
        self.received: list[Message] = []  # by the application
        self.sent: list[Message] = []
        self.scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers} | scope
        asyncio.run(HandOffGuard(self._app, rules)(self.scope, self._receive, self._send))

    async def _receive(self) -> Message:
        return self._coming.pop(0)

    async def _send(self, message: Message) -> None:
        self.sent.append(message)

    async def _app(self, scope: Message, receive: Any, send: Any) -> None:
        assert scope is self.scope
        assert send == self._send
        while not self.received or self.received[-1] != DISCONNECT:
            self.received.append(await receive())
            assert len(self.received) < 100

    @property
    def body(self) -> bytes | None:
        """What the application saw; None if it was not asked."""
        return b"".join(message.get("body", b"") for message in self.received) if self.received else None

    @property
    def error(self) -> Any:
        start, body = self.sent
        assert dict(start["headers"])[b"content-length"] == b"%d" % len(body["body"])
        error = json.loads(body["body"])["error"]
        assert start["status"] == error["code"]
        assert set(error) == {"message", "type", "param", "code"}
        return error


def asking(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "prompt": "hello"} | fields).encode()


def refusal(raw: bytes, rules: Rules = DECODE) -> dict[str, Any]:
    exchange = Exchange([raw], rules=rules)
    assert exchange.body is None
    error: dict[str, Any] = exchange.error
    assert (error["code"], error["type"]) == (400, "BadRequestError")
    return error


@pytest.mark.parametrize(
    ("rules", "raw"),
    [
        (DECODE, asking()),
        (PREFILL, asking()),
        (DECODE, asking(kv_transfer_params=None)),
        (DECODE, asking(kv_transfer_params=GENUINE)),
        (DECODE, asking(kv_transfer_params=GENUINE | {"prompt_token_ids": [1, 2, 3]})),
        (DECODE, asking(kv_transfer_params={"prompt_token_ids": [1, 2, 3]})),
        (PREFILL, asking(kv_transfer_params=ROUTED)),
        (PREFILL, asking(sampling_params={"extra_args": {"kv_transfer_params": {"do_remote_decode": True}}})),
        (DECODE, asking(vllm_xargs={"session_id": "s"})),
        (DECODE, asking(prompt="what is kv_transfer_params? é \ud83d\ude00")),
        (DECODE, asking(messages=[{"kv_transfer_params": 1}])),
        (DECODE, asking(sampling_params=[], vllm_xargs="kv_transfer")),
        (DECODE, b""),
        (DECODE, b'["kv_transfer"]'),
        (DECODE, b"kv transfer"),
    ],
)
def test_what_passes_passes_unchanged(rules: Rules, raw: bytes) -> None:
    exchange = Exchange([raw], rules=rules)
    assert exchange.body == raw
    assert exchange.received[-1] == DISCONNECT
    assert exchange.sent == []


def test_a_body_in_one_piece_is_not_copied() -> None:
    raw = asking(prompt="x" * 1000)
    assert Exchange([raw]).received[0]["body"] is raw


@pytest.mark.parametrize(
    ("rules", "fields", "param", "message"),
    [
        (
            DECODE,
            {"kv_transfer_params": {"do_remote_prefill": True}},
            "kv_transfer_params",
            "kv_transfer_params: Object missing",
        ),
        (DECODE, {"kv_transfer_params": {"a": 1}}, "kv_transfer_params", "kv_transfer_params has an unknown field 'a'"),
        (DECODE, {"kv_transfer_params": "x"}, "kv_transfer_params", "kv_transfer_params is 'x', not an object"),
        (DECODE, {"kv_transfer_params": []}, "kv_transfer_params", "kv_transfer_params is [], not an object"),
        (DECODE, {"kv_transfer_params": ROUTED}, "kv_transfer_params", "kv_transfer_params.do_remote_decode is true"),
        (PREFILL, {"kv_transfer_params": GENUINE}, "kv_transfer_params", "kv_transfer_params.do_remote_prefill is set"),
        (
            DECODE,
            {"kv_transfer_params": GENUINE | {"remote_port": 1}},
            "kv_transfer_params",
            "kv_transfer_params.omni.signature is",
        ),
        (
            PREFILL,
            {"kv_transfer_params": {"do_remote_decode": True, "omni": {"num_readers": 1000}}},
            "kv_transfer_params",
            "kv_transfer_params.omni.num_readers is 1000",
        ),
        (DECODE, {"vllm_xargs": {"kv_transfer_params": 1}}, "vllm_xargs", "vllm_xargs holds kv_transfer_params"),
        (DECODE, {"vllm_xargs": {"kv_transfer_params": None}}, "vllm_xargs", "vllm_xargs holds kv_transfer_params"),
        (DECODE, {"vllm_xargs": {"kv_transfer_params": GENUINE}}, "vllm_xargs", "vllm_xargs holds kv_transfer_params"),
        (
            DECODE,
            {"sampling_params": {"extra_args": {"kv_transfer_params": {"do_remote_prefill": True}}}},
            "sampling_params.extra_args",
            "kv_transfer_params: Object missing",
        ),
    ],
)
def test_a_refusal_in_openai_s_shape(rules: Rules, fields: Params, param: str, message: str) -> None:
    error = refusal(asking(**fields), rules)
    assert error["param"] == param
    assert error["message"].startswith(message)
    assert error["message"].endswith("from what a prefill engine returned")


@pytest.mark.parametrize(
    "encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be", "utf-8-sig"]
)
def test_other_encodings_hide_nothing(encoding: str) -> None:
    """vLLM would read them."""
    raw = asking(kv_transfer_params={"do_remote_prefill": True}).decode().encode(encoding)
    assert json.loads(raw)["kv_transfer_params"]
    assert refusal(raw)["message"].startswith("The request body is not valid JSON: ")


def test_escapes_hide_nothing() -> None:
    name = "".join(f"\\u{ord(letter):04x}" for letter in "kv_transfer_params")
    refusal(b'{"%b": {"do_remote_prefill": true}}' % name.encode())
    refusal(b'{"kv\\u005Ftransfer_params": {"do_remote_prefill": true}}')
    refusal(b'{"vllm_xargs": {"%b": 1}}' % name.encode())
    refusal(b'{"sampling_params": {"\\u0065xtra_args": {"kv_transfer_params": 1}}}')


def test_the_last_of_equal_names_counts_as_it_does_for_vllm() -> None:
    refusal(b'{"kv_transfer_params": null, "kv_transfer_params": {"do_remote_prefill": true}}')
    assert Exchange([b'{"kv_transfer_params": {"do_remote_prefill": true}, "kv_transfer_params": null}']).body


@pytest.mark.parametrize(
    "params",
    [b"NaN", b"-Infinity", b'{"do_remote_prefill": NaN}', b"1e999", b"1" * 4000, b'"\\ud800"', b'"\xff"', b"{", b""],
)
def test_broken_json_is_refused(params: bytes) -> None:
    refusal(b'{"kv_transfer_params": ' + params + b"}")


def test_deep_nesting_is_refused() -> None:
    for depth in (500, 100_000):
        opened, closed = b"[" * depth, b"]" * depth
        refusal(b'{"kv_transfer_params": ' + opened + closed + b"}")
        refusal(b'{"kv_transfer_params": {"omni": ' + opened + closed + b"}}")
    refusal(b'{"a": ' + b"[" * 100_000 + b', "kv_transfer_params": 1}')
    assert len(json.dumps(nested(50))) == 102


def test_large_parameters_are_refused_unread() -> None:
    raw = b'{"kv_transfer_params": [%b0]}' % (b"[]," * (hand_off_guard.MAX_PARAMS_BYTES // 3))
    assert "bytes, more than 8388608" in refusal(raw)["message"]


def test_a_body_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hand_off_guard, "MAX_BODY_BYTES", 100)
    assert Exchange([b"x" * 50, b"y" * 50]).body == b"x" * 50 + b"y" * 50
    exchange = Exchange([b"x" * 50, b"y" * 51, b"z" * 1000])
    assert exchange.body is None
    assert exchange.error["code"] == 413
    assert dict(exchange.sent[0]["headers"])[b"connection"] == b"close"


@pytest.mark.parametrize("chunks", [[], [b'{"kv_transfer_params": '], [b"", b""]])
def test_a_client_that_goes_before_the_end_reaches_nobody(chunks: list[bytes]) -> None:
    exchange = Exchange(chunks, ends=False)
    assert exchange.body is None
    assert exchange.sent == []


@fuzz
@given(st.data(), st.sampled_from([asking(kv_transfer_params={"x": 1}), asking(kv_transfer_params=GENUINE), asking()]))
def test_borders_of_chunks_do_not_matter(data: st.DataObject, raw: bytes) -> None:
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=5))), len(raw)]
    exchange = Exchange([raw[start:end] for start, end in itertools.pairwise(cuts)])
    assert exchange.body == (None if b'"x"' in raw else raw)
    assert bool(exchange.sent) == (b'"x"' in raw)


@pytest.mark.parametrize(
    ("headers", "passes"),
    [
        ([(b"content-type", b"multipart/form-data; boundary=kv_transfer_params")], True),
        ([(b"content-type", b"Application/X-WWW-Form-Urlencoded ;x")], True),
        (
            [(b"content-type", b"multipart/form-data"), (b"content-type", b"application/json")],
            True,
        ),  # vLLM asks the first
        ([(b"content-type", b"application/json"), (b"content-type", b"multipart/form-data")], False),
        ([(b"content-type", b"application/vnd.x+json")], False),
        ([(b"content-type", b"text/plain")], False),
        ([], False),
    ],
)
def test_forms_pass(headers: list[tuple[bytes, bytes]], passes: bool) -> None:
    raw = asking(kv_transfer_params={"do_remote_prefill": True})
    exchange = Exchange([raw[:9], raw[9:]], headers=headers)
    assert exchange.body == (raw if passes else None)
    if passes:
        assert len(exchange.received) == 3, "as it came"


@pytest.mark.parametrize(
    "scope", [{"type": "websocket"}, {"type": "lifespan"}, {"method": "GET"}, {"method": "OPTIONS"}]
)
def test_other_scopes_pass(scope: dict[str, str]) -> None:
    raw = asking(kv_transfer_params={"do_remote_prefill": True})
    exchange = Exchange([raw[:9], raw[9:]], **scope)
    assert exchange.body == raw
    assert len(exchange.received) == 3


def test_refusals_are_counted_and_the_log_is_told(caplog: pytest.LogCaptureFixture) -> None:
    before = hand_off_guard._num_refused._value.get()
    refusal(asking(kv_transfer_params={"x\n": 1}))
    assert hand_off_guard._num_refused._value.get() == before + 1
    (record,) = caplog.records
    assert "unknown field" in record.getMessage()
    assert "\n" not in record.getMessage()


# --- against what vLLM will read


def vllm_would_meet(raw: bytes, rules: Rules) -> bool:
    """Whether vLLM, which reads bodies with json.loads, would find parameters there that it must not be handed."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        return False
    if not isinstance(body, dict):
        return False
    found = [body.get("kv_transfer_params")]
    sampling = body.get("sampling_params")
    extra = sampling.get("extra_args") if isinstance(sampling, dict) else None
    if isinstance(extra, dict):
        found.append(extra.get("kv_transfer_params"))
    xargs = body.get("vllm_xargs")
    if isinstance(xargs, dict) and "kv_transfer_params" in xargs:
        return True
    for params in found:
        try:
            check_params(params, rules.key, is_producer=rules.is_producer, is_consumer=rules.is_consumer)
        except HandOffError:
            return True
    return False


def refuses(raw: bytes, rules: Rules) -> bool:
    try:
        rules.check(raw)
    except RefusedError:
        return True
    return False


@st.composite
def json_texts(draw: st.DrawFn) -> bytes:
    """Bodies as clients could write them: names twice, names in escapes, odd encodings, NaN, halves of pairs."""
    params = st.one_of(
        st.just(GENUINE), prefill_params, mutated(), garbled(), json_values, st.fixed_dictionaries({"x": json_values})
    )
    inner = params.map(lambda value: {"kv_transfer_params": value})
    fields = st.one_of(
        st.tuples(st.just("kv_transfer_params"), params),
        st.tuples(st.just("vllm_xargs"), st.one_of(json_values, inner)),
        st.tuples(st.just("sampling_params"), st.one_of(json_values, inner.map(lambda value: {"extra_args": value}))),
        st.tuples(st.sampled_from(["prompt", "kv_transfer", ""]), json_values),
    )
    pieces = []
    escapes = draw(st.booleans())
    for name, value in draw(st.lists(fields, max_size=4)):
        text = json.dumps({name: value}, ensure_ascii=draw(st.booleans()))[1:-1]
        if escapes:
            text = text.replace("_", draw(st.sampled_from(["\\u005f", "\\u005F", "_"])))
        pieces.append(text)
    text = draw(st.sampled_from(["", " \n"])) + "{" + draw(st.sampled_from([",", " ,\t"])).join(pieces) + "}"
    encoding = draw(st.sampled_from(["utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32-le"]))
    return text.encode(encoding, "surrogatepass")


@fuzz
@given(json_texts(), st.sampled_from([PREFILL, DECODE, Rules(key=KEY, is_producer=True, is_consumer=True)]))
def test_nothing_reaches_vllm_that_must_not(raw: bytes, rules: Rules) -> None:
    if vllm_would_meet(raw, rules):
        assert refuses(raw, rules)


@fuzz
@given(st.one_of(st.binary(), st.binary().map(lambda raw: b'{"kv_transfer_params":' + raw)))
def test_bytes_end_in_400_or_pass(raw: bytes) -> None:
    exchange = Exchange([raw])
    assert (exchange.body == raw) != bool(exchange.sent and exchange.error["code"] == 400)


@fuzz
@given(mutated())
def test_a_changed_hand_off_is_refused(params: Params) -> None:
    assert refuses(json.dumps({"kv_transfer_params": params}).encode(), DECODE)


# --- how it gets in front of vLLM


def arguments(connector: str | None, **extra: Any) -> Any:
    transfer = SimpleNamespace(
        kv_connector=connector, is_kv_producer=True, is_kv_consumer=False, kv_connector_extra_config=extra
    )
    return SimpleNamespace(kv_transfer_config=transfer if connector else None, middleware=["a.b"])


def test_only_our_connector_s_engines_are_guarded() -> None:
    for connector in (None, "NixlConnector"):
        args = arguments(connector, key_file="/nowhere")
        install(args)
        assert args.middleware == ["a.b"]


def test_the_guard_stands_before_all_other_middleware(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InstalledGuard, "rules", None, raising=False)
    path = tmp_path / "key"
    path.touch(0o600)
    path.write_text("ab" * 32)
    args = arguments("OmniConnector", key_file=str(path))
    install(args)
    assert args.middleware == ["a.b", "omni.adaptors.vllm.hand_off_guard.InstalledGuard"]
    assert (InstalledGuard.rules.is_producer, InstalledGuard.rules.is_consumer) == (True, False)
    assert InstalledGuard.rules.key.mac("x") == load_key(path).mac("x")


def test_without_a_key_nothing_starts(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=r"key_file: the deployment key .* cannot be read"):
        install(arguments("OmniConnector", key_file=str(tmp_path / "none")))


def test_errors_are_vllm_s_field_for_field() -> None:
    raw = Exchange([asking(kv_transfer_params=1)]).sent[1]["body"]
    assert list(msgspec.json.decode(raw)["error"]) == ["message", "type", "param", "code"]

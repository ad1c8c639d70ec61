"""A stand-in engine whose tokens follow from one another: a stream that was continued must be like one that was not.

The next token is a function of all tokens before it. Texts are as awkward as a real tokenizer's: characters in several
tokens, tokens with the end of one character and the start of the next, tokens without text, quotes and line ends. Its
answers are vLLM 0.32's, byte for byte, and so is its trap: a prompt that ends inside of a character comes back as text.
"""

import asyncio
import itertools
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

EOS = 1
_FIRST_BYTE = 1000  # a prompt's text is its bytes
_WHOLE = [" a", "b", '"', "\n", "\\", "[1]", "]", ' "token_ids":[7]', "é"]
_PARTS = {100: b"\xe4", 101: b"\xbd", 102: b"\xa0", 110: b"\xf0", 111: b"\x9f", 112: b"\x98\x80"}
_ACROSS = {120: b"\xc3", 121: b"\xa9\xc3", 122: b"\xa9"}
_PIECES = {10 + i: text.encode() for i, text in enumerate(_WHOLE)} | _PARTS | _ACROSS | {130: b"", EOS: b""}
_AFTER = {100: [101], 101: [102], 110: [111], 111: [112], 120: [121, 122], 121: [122]}
_ANYWHERE = [*range(10, 19), 100, 100, 110, 120, 120, 130]

_ERRORS = {
    "says so": {"message": "EngineCore encountered an issue", "type": "InternalServerError", "code": 500},
    "refuses": {"message": "no", "type": "BadRequestError", "code": 400},
}

_created = itertools.count(1_795_000_000)


def encode(text: str) -> list[int]:
    return [_FIRST_BYTE + byte for byte in text.encode()]


def decode(token_ids: list[int]) -> str:
    pieces = (_PIECES[i] if i < _FIRST_BYTE else bytes([i - _FIRST_BYTE]) for i in token_ids)
    return b"".join(pieces).decode(errors="replace")


def next_token(token_ids: list[int], may_end: bool) -> int:
    chance = zlib.crc32(json.dumps(token_ids).encode())
    choices = _AFTER.get(token_ids[-1])
    if choices is None and may_end and chance % 29 == 0:
        return EOS
    choices = choices or _ANYWHERE
    return choices[chance // 29 % len(choices)]


@dataclass
class Fates:
    """What becomes of the streams of several engines, in the order in which they begin. Without an entry they live.

    Attributes:
        deaths: the engine dies after so many events.
        how: between two events; inside an event; inside a chunk of HTTP; it says so, as vLLM's api server does of its
            engine, and ends the stream well; or it refuses, with the client's own fault.
    """

    deaths: list[int] = field(default_factory=list)
    how: str = "between"
    num_begun: int = 0

    def next_death(self) -> int | None:
        self.num_begun += 1
        return self.deaths[self.num_begun - 1] if self.num_begun <= len(self.deaths) else None


@dataclass(frozen=True)
class Habits:
    """How streams are written.

    Attributes:
        tokens_an_event: cycled through.
        events_a_chunk: of HTTP; 0: chunks end anywhere.
        has_parser: a chat's events without text are withheld unless token ids are asked for.
        hides_token_ids: although they are asked for.
        reasons: a chat's first texts are reasoning.
    """

    tokens_an_event: tuple[int, ...] = (1,)
    events_a_chunk: int = 1
    has_parser: bool = False
    hides_token_ids: bool = False
    reasons: bool = False


class TokenEngine:
    """`async with TokenEngine(fates) as engine:` listens on a free port of 127.0.0.1. It is P or D, as it is asked.

    Attributes:
        bodies: of the streams it was asked for, and of the prefills.
        wrong: what a real engine would refuse, or an operator should be told of.
    """

    def __init__(self, fates: Fates | None = None, habits: Habits | None = None) -> None:
        self.url = ""
        self.habits = habits or Habits()
        self.bodies: list[dict[str, Any]] = []
        self.wrong: list[str] = []
        self._fates = fates or Fates()

    async def __aenter__(self) -> "TokenEngine":
        app = web.Application()
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/v1/chat/completions", self._complete)
        app.router.add_post("/detokenize", self._detokenize)
        app.router.add_get("/health", self._health)
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        host, port = self._runner.addresses[0]
        self.url = f"http://{host}:{port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _detokenize(self, request: web.Request) -> web.Response:
        return web.json_response({"prompt": decode((await request.json())["tokens"])})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        params = body.get("kv_transfer_params") or {}
        prompt = self._prompt_of(request.path, body)
        if params.get("do_remote_decode"):
            if request.path != "/v1/completions" and "prompt_token_ids" in params:
                self.wrong.append("P was given the token ids of a chat")
            return web.json_response(self._handed_off(body, prompt))
        if params.get("remote_block_ids", [prompt]) != [prompt]:
            self.wrong.append("the hand-off is another prompt's")
        if (body.get("max_completion_tokens") or body.get("max_tokens") or 1) < 1:
            self.wrong.append("not even one token is asked for")
        stream = Stream(request.path, body, prompt, request.headers["x-request-id"], self.habits)
        return await self._stream(request, [event for event in stream.events() if event])

    def _prompt_of(self, path: str, body: dict[str, Any]) -> list[int]:
        if path == "/v1/completions":
            prompt = body["prompt"]
            return encode(prompt) if isinstance(prompt, str) else list(prompt)
        ids = (body.get("kv_transfer_params") or {}).get("prompt_token_ids")
        if ids is None and not body["messages"]:
            self.wrong.append("a chat without messages and token ids")
        return list(ids or encode("".join(f"<{m['role']}>{m['content']}" for m in body["messages"])))

    def _handed_off(self, body: dict[str, Any], prompt: list[int]) -> dict[str, Any]:
        ids = prompt if body.get("return_token_ids") else None
        params = {"do_remote_prefill": True, "do_remote_decode": False, "remote_block_ids": [prompt]}
        params |= {"remote_host": "127.0.0.1", "remote_port": 1, "remote_engine_id": "p", "remote_request_id": "r"}
        return {
            "choices": [{"index": 0, "prompt_token_ids": ids}],
            "prompt_token_ids": ids,
            "usage": {"prompt_tokens": len(prompt), "completion_tokens": 1, "total_tokens": len(prompt) + 1},
            "kv_transfer_params": params,
        }

    async def _stream(self, request: web.Request, events: list[bytes]) -> web.StreamResponse:
        death = self._fates.next_death()
        dies = death is not None and death < len(events)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        rest = b""
        if dies:
            events, rest = events[:death], events[death or 0]
        if dies and self._fates.how == "inside an event":
            events, rest = [*events, rest[: len(rest) // 2]], b""
        if dies and self._fates.how in _ERRORS:
            events += [_event({"error": _ERRORS[self._fates.how]}), b"data: [DONE]\n\n"]
        for chunk in self._chunks(events):
            await response.write(chunk)
        if dies and self._fates.how not in _ERRORS:
            assert request.transport is not None
            if self._fates.how == "inside a chunk":
                request.transport.write(b"%x\r\n%b" % (len(rest), rest[: len(rest) // 2]))
            request.transport.close()
            await asyncio.sleep(10)  # until the server notices and cancels this
        return response

    def _chunks(self, events: list[bytes]) -> Iterator[bytes]:
        if self.habits.events_a_chunk:
            size = self.habits.events_a_chunk
            yield from (b"".join(events[start : start + size]) for start in range(0, len(events), size))
            return
        text = b"".join(events)
        for start in range(0, len(text), 101):
            yield text[start : start + 101]


class Stream:
    """One answer's events, [DONE] among them."""

    def __init__(self, path: str, body: dict[str, Any], prompt: list[int], request_id: str, habits: Habits) -> None:
        self._is_chat = path == "/v1/chat/completions"
        self._body = body
        self._prompt = prompt
        self._habits = habits
        self._shows_ids = bool(body.get("return_token_ids"))
        self._num_tokens = 0
        self._head = {
            "id": f"{'chatcmpl' if self._is_chat else 'cmpl'}-{request_id}",
            "object": "chat.completion.chunk" if self._is_chat else "text_completion",
            "created": next(_created),
            "model": body.get("model", "m"),
        }
        options = body.get("stream_options") or {}
        self._usage = bool(options.get("include_usage"))
        self._continuous = self._usage and bool(options.get("continuous_usage_stats"))

    def events(self) -> Iterator[bytes]:
        """Empty where one is withheld."""
        if self._is_chat:
            choice = {
                "index": 0,
                "delta": {"role": "assistant", "content": ""},
                "logprobs": None,
                "finish_reason": None,
            }
            ids = self._prompt if self._shows_ids else None
            yield self._of(choice, {"prompt_token_ids": ids, "prompt_text": None})
        sizes = itertools.cycle(self._habits.tokens_an_event)
        tokens: list[int] = []
        text, size = "", next(sizes)
        for token, piece, reason in self._tokens():
            tokens.append(token)
            text += piece
            if len(tokens) == size or reason is not None:
                yield self._token_event(text, tokens, reason)
                tokens, text, size = [], "", next(sizes)
        if self._usage:
            yield _event(self._head | {"choices": [], "usage": self._counts(), "system_fingerprint": "f"})
        yield b"data: [DONE]\n\n"

    def _tokens(self) -> Iterator[tuple[int, str, str | None]]:
        """Token, the text that it completes, and why it is the last."""
        body, ids = self._body, list(self._prompt)
        limit = body.get("max_completion_tokens") if self._is_chat else None
        limit = limit or body.get("max_tokens") or (40 if self._is_chat else 16)
        shown = decode(ids)
        if shown.endswith("\ufffd"):
            shown = ""
        for number in range(1, limit + 1):
            may_end = not body.get("ignore_eos") and number > (body.get("min_tokens") or 0)
            ids.append(next_token(ids, may_end))
            text = decode(ids)
            piece = "" if text.endswith("\ufffd") else text[len(shown) :]
            shown = shown if text.endswith("\ufffd") else text
            stop = body.get("stop")
            reason = "stop" if ids[-1] == EOS or (stop and stop in piece) else "length" if number == limit else None
            if stop:
                piece = piece.partition(stop)[0]
            yield ids[-1], piece, reason
            if reason is not None:
                return

    def _token_event(self, text: str, tokens: list[int], reason: str | None) -> bytes:
        self._num_tokens += len(tokens)
        shows = self._shows_ids and not self._habits.hides_token_ids
        choice: dict[str, Any] = {"index": 0}
        if not self._is_chat:
            ids = self._prompt if shows and self._num_tokens == len(tokens) else None
            choice |= {"text": text, "logprobs": None, "finish_reason": reason, "stop_reason": None}
            choice |= {"prompt_token_ids": ids, "token_ids": tokens if shows else None}
        else:
            delta = {"reasoning" if self._habits.reasons and self._num_tokens < 5 else "content": text}
            if self._habits.has_parser and not text:
                if not shows and reason is None:
                    return b""
                delta = {}
            choice |= {"delta": delta, "logprobs": None, "finish_reason": reason}
            choice |= ({} if reason is None else {"stop_reason": None}) | {"token_ids": tokens if shows else None}
        return self._of(choice, {} if reason is None or self._usage else {"system_fingerprint": "f"})

    def _of(self, choice: dict[str, Any], more: dict[str, Any]) -> bytes:
        usage = {"usage": self._counts()} if self._continuous else {}
        return _event(self._head | {"choices": [choice]} | usage | more)

    def _counts(self) -> dict[str, int]:
        prompt, new = len(self._prompt), self._num_tokens
        return {"prompt_tokens": prompt, "total_tokens": prompt + new, "completion_tokens": new}


def _event(content: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()

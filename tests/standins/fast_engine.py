"""A stand-in for one vLLM api server that is a process of its own, so that it can be killed, stopped and cut off.

`python -m tests.standins.fast_engine NAME PORT [ROLE PROXY KEY_FILE]` prints the port that it listens on, and joins the
proxy whose control port is HOST:PORT, if one is given. It has no model, but an answer that
depends on every token before it: a token too many, too few or from another request's KV makes another text. P hands off
a digest of the prompt, which is its KV; D goes on from that digest, not from the prompt that it is sent. A prompt that
begins with SLOW_PREFILL or SLOW_DECODE keeps P, or D before its first token, busy for longer than any test.
"""

import asyncio
import json
import socket
import struct
import sys
import time
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import httptools
import uvloop

from omni.process import obey_parent

_VOCABULARY = 1000
BACKLOG = 64  # so many connections fill it while the process is stopped; then new ones wait as on a cut network
SLOW_PREFILL = "slow prefill"
SLOW_DECODE = "slow decode"
_SLOW_S = 600.0
_REMEMBERED = 5000


def digest_of(token_ids: Iterable[int], digest: int = 0) -> int:
    """What stands for the KV of these tokens, behind those that `digest` stands for."""
    for token_id in token_ids:
        digest = zlib.crc32(struct.pack("<I", token_id), digest)
    return digest


def tokens_after(digest: int) -> Iterator[int]:
    """The tokens that the stand-in's model makes, without an end."""
    while True:
        token_id = 256 + digest % _VOCABULARY  # a prompt's bytes are its tokens, below 256
        yield token_id
        digest = digest_of((token_id,), digest)


def expected_text(prompt: str, num_tokens: int) -> str:
    """The only right answer to a prompt."""
    tokens = tokens_after(digest_of(prompt.encode()))
    return "".join(_text(next(tokens)) for _ in range(num_tokens))


def _text(token_id: int) -> str:
    return f"{token_id} "


@dataclass
class Knobs:
    """Set by `POST /standin/knobs`."""

    prefill_s: float = 0.02
    first_token_s: float = 0.0  # before D's first token
    step_s: float = 0.01  # before each of D's tokens
    params: dict[str, Any] | None = None  # handed off instead of the stand-in's own


@dataclass
class Seen:
    """One completion that was asked of this engine. `/standin/state` shows them. Times are on the monotonic clock."""

    id: str  # the x-request-id header
    prompt: str  # its tokens below 256
    is_prefill: bool
    params: dict[str, Any] | None
    has_key: bool
    arrived_s: float
    first_byte_s: float | None = None  # of its answer
    outcome: str = "running"  # answered, aborted


class FastEngine:
    """Plays P or D, as each body asks."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.knobs = Knobs()
        self.seen: deque[Seen] = deque(maxlen=_REMEMBERED)
        self.connections: set[_Connection] = set()

    async def serve(self, connection: "_Connection", path: str, body: bytes) -> None:
        if path == "/health":
            connection.answer({})
        elif path == "/standin/state":
            connection.answer({"name": self.name, "seen": [asdict(seen) for seen in self.seen]})
        elif path == "/standin/knobs":
            self.knobs = Knobs(**json.loads(body))
            connection.answer({})
        elif path == "/standin/close_idle":
            for other in tuple(self.connections):
                other.close_if_idle()
            connection.answer({})
        elif path == "/v1/completions":
            await self._complete(connection, json.loads(body))
        else:
            connection.answer({"error": path}, 404)

    async def _complete(self, connection: "_Connection", body: dict[str, Any]) -> None:
        prompt = body["prompt"]
        prompt_ids = list(prompt.encode()) if isinstance(prompt, str) else prompt
        params = body.get("kv_transfer_params")
        is_prefill = bool(params and params.get("do_remote_decode"))
        text = bytes(token_id for token_id in prompt_ids if token_id < 256).decode()
        request_id, has_key = connection.headers.get("x-request-id", ""), "authorization" in connection.headers
        seen = Seen(request_id, text, is_prefill, params, has_key, time.monotonic())
        self.seen.append(seen)
        try:
            if is_prefill:
                await asyncio.sleep(_SLOW_S if text.startswith(SLOW_PREFILL) else self.knobs.prefill_s)
                connection.answer(self._prefilled(seen, prompt_ids))
            else:
                await self._decode(connection, seen, body, prompt_ids)
            seen.outcome = "answered"
        except asyncio.CancelledError:
            seen.outcome = "aborted"
            raise

    def _prefilled(self, seen: Seen, prompt_ids: list[int]) -> dict[str, Any]:
        params = self.knobs.params or {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_engine_id": self.name,
            "digest": digest_of(prompt_ids),
        }
        choice = {"index": 0, "text": "", "finish_reason": "length", "prompt_token_ids": prompt_ids}
        answer = _answer(seen, choice, len(prompt_ids), 1)
        return answer | {"kv_transfer_params": params}

    async def _decode(self, connection: "_Connection", seen: Seen, body: dict[str, Any], prompt_ids: list[int]) -> None:
        digest = (seen.params or {}).get("digest")
        tokens = tokens_after(digest_of(prompt_ids) if digest is None else digest)
        num_tokens = body["max_tokens"]
        await asyncio.sleep(_SLOW_S if seen.prompt.startswith(SLOW_DECODE) else self.knobs.first_token_s)
        if not body.get("stream"):
            await asyncio.sleep(num_tokens * self.knobs.step_s)
            seen.first_byte_s = time.monotonic()
            choice = {"index": 0, "text": "".join(_text(next(tokens)) for _ in range(num_tokens))}
            connection.answer(_answer(seen, choice | {"finish_reason": "length"}, len(prompt_ids), num_tokens))
            return
        connection.start_stream()
        seen.first_byte_s = time.monotonic()
        with_ids = body.get("return_token_ids")
        for number in range(num_tokens):
            await asyncio.sleep(self.knobs.step_s)
            token_id = next(tokens)
            choice = {
                "index": 0,
                "text": _text(token_id),
                "finish_reason": "length" if number == num_tokens - 1 else None,
                "prompt_token_ids": prompt_ids if with_ids and number == 0 else None,
                "token_ids": [token_id] if with_ids else None,
            }
            connection.send_event(_dumps(_answer(seen, choice)))
        connection.send_event(b"[DONE]")
        connection.end_stream()


def _answer(seen: Seen, choice: dict[str, Any], num_prompt: int = 0, num_new: int = 0) -> dict[str, Any]:
    answer = {"id": f"cmpl-{seen.id}", "object": "text_completion", "created": 1, "model": "m", "choices": [choice]}
    if num_prompt:
        answer["usage"] = {"prompt_tokens": num_prompt, "completion_tokens": num_new}
    return answer


def _dumps(content: object) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()


class _Connection(asyncio.Protocol):
    """One request at a time. Who hangs up aborts what was asked for."""

    def __init__(self, engine: FastEngine) -> None:
        self.headers: dict[str, str] = {}
        self._engine = engine
        self._task: asyncio.Task[None] | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._path = ""
        self._body = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._engine.connections.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._engine.connections.discard(self)
        if self._task is not None:
            self._task.cancel()

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self.headers, self._path, self._body = {}, "", b""

    def on_url(self, url: bytes) -> None:
        self._path += url.decode()

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode().lower()] = value.decode()

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._serve())

    async def _serve(self) -> None:
        await self._engine.serve(self, self._path, self._body)
        self._task = None

    def close_if_idle(self) -> None:
        if self._task is None:
            self._transport.close()

    def answer(self, content: object, status: int = 200) -> None:
        body = _dumps(content)
        head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        self._transport.write(head.encode() + body)

    def start_stream(self) -> None:
        self._transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
        )

    def send_event(self, data: bytes) -> None:
        event = b"data: %b\n\n" % data
        self._transport.write(b"%x\r\n%b\r\n" % (len(event), event))

    def end_stream(self) -> None:
        self._transport.write(b"0\r\n\r\n")


@dataclass(frozen=True)
class _NoLoad:
    """What an engine says of itself that knows nothing."""

    num_running: int = 0
    num_waiting: int = 0
    kv_used_tokens: int = 0
    kv_total_tokens: int = 0


def _agent(url: str, role: str, proxy: str, key_file: str) -> AbstractAsyncContextManager[Any]:
    from kv_transfer.auth import load_or_make_key  # gRPC takes longer to load than all the rest
    from services.instance_agent import AgentSettings, InstanceAgent

    settings = AgentSettings(proxies=(proxy,), role=role, url=url)
    return InstanceAgent(settings, load_or_make_key(Path(key_file)), _NoLoad)


async def _run(name: str, port: int, joining: Sequence[str]) -> None:
    engine = FastEngine(name)
    loop = asyncio.get_running_loop()
    sock = socket.create_server(("127.0.0.1", port), backlog=BACKLOG)
    server = await loop.create_server(lambda: _Connection(engine), sock=sock, backlog=BACKLOG)
    port = sock.getsockname()[1]
    print(port, flush=True)
    agent = _agent(f"http://127.0.0.1:{port}", *joining) if joining else nullcontext()
    async with server, agent:
        await server.serve_forever()


if __name__ == "__main__":
    obey_parent()
    uvloop.run(_run(sys.argv[1], int(sys.argv[2]), sys.argv[3:]))

"""A stand-in for one vLLM api server: same HTTP, no model.

It plays P or D as the body asks, records what it was sent, and misbehaves on demand. Every knob is a plain attribute.
"""

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from aiohttp import web

KV_TRANSFER_PARAMS = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_block_ids": [[1, 2, 3]],
    "remote_engine_id": "stand-in",
    "remote_request_id": "cmpl-abc-0",
    "remote_host": "127.0.0.1",
    "remote_port": 5600,
    "tp_size": 1,
    "omni": {"layout": "é", "exact": 1e-05},
}


@dataclass(frozen=True)
class Received:
    path: str
    headers: dict[str, str]  # names in lower case
    body: dict[str, Any]

    @property
    def is_prefill(self) -> bool:
        return bool((self.body.get("kv_transfer_params") or {}).get("do_remote_decode"))


class StandinEngine:
    """`async with StandinEngine() as engine:` listens on a free port of 127.0.0.1."""

    def __init__(self, name: str = "engine") -> None:
        self.name = name
        self.received: list[Received] = []
        self.num_answered = 0
        self.num_aborted = 0  # requests whose connection the proxy closed before the answer was complete
        self.healthy = True
        self.num_chunks = 3  # of a streamed answer
        self.num_chunks_sent = 0
        self.error: tuple[int, str] | None = None  # answer every completion with this status and body
        self.params: object = KV_TRANSFER_PARAMS  # handed off by a prefill
        self.answer_text: str | None = None  # answer every completion with 200 and this
        self.bootstrap: object = {"0": {"engine_id": f"{name}-1", "worker_addr": {"0": {"0": "tcp://127.0.0.1:1"}}}}
        self.num_queries = 0  # of the above: an engine with a MooncakeConnector has a bootstrap server
        self.gate = (
            asyncio.Event()
        )  # clear: completions wait, before their answer or (stream) after `gate_after` chunks
        self.gate.set()
        self.bootstrap_gate = asyncio.Event()  # clear: its queries wait
        self.bootstrap_gate.set()
        self.gate_after = 0
        self.die_after: int | None = None  # cut the connection after so many chunks; 0: before the status line
        self.half_event = False  # the last chunk before dying is half an event
        self.url = ""
        self._arrived = asyncio.Condition()

    async def __aenter__(self) -> "StandinEngine":
        app = web.Application(client_max_size=2**26)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/v1/chat/completions", self._complete)
        for path in ("/v1/embeddings", "/tokenize", "/detokenize"):
            app.router.add_post(path, self._relayed)
        app.router.add_get("/health", self._health)
        app.router.add_get("/query", self._query)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/version", self._version)
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0]
        self.url = f"http://{host}:{port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Close every connection and refuse new ones."""
        self.gate.set()
        await self._runner.cleanup()

    async def wait_for(self, num_received: int = 1, num_aborted: int = 0) -> None:
        """Until so many requests have arrived, and so many were aborted by their sender."""
        async with asyncio.timeout(5), self._arrived:
            await self._arrived.wait_for(lambda: len(self.received) >= num_received and self.num_aborted >= num_aborted)

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        headers = {name.lower(): value for name, value in request.headers.items()}
        async with self._arrived:
            self.received.append(Received(request.path, headers, body))
            self._arrived.notify_all()
        try:
            response = await self._answer(request, self.received[-1])
            await response.prepare(request)
            await response.write_eof()
            self.num_answered += 1
            return response
        except (asyncio.CancelledError, ConnectionResetError):
            self.num_aborted += 1
            async with self._arrived:
                self._arrived.notify_all()
            raise

    async def _answer(self, request: web.Request, received: Received) -> web.StreamResponse:
        if not received.body.get("stream"):
            await self.gate.wait()
            if self.die_after is not None:
                await self._die(request)
        if self.error is not None:
            status, text = self.error
            return web.Response(status=status, text=text, content_type="application/json", headers={"Retry-After": "7"})
        if self.answer_text is not None:
            return web.Response(text=self.answer_text, content_type="application/json")
        if not received.body.get("stream") and received.body.get("stream_options"):
            return web.json_response({"error": "Stream options can only be defined when `stream=True`."}, status=400)
        if received.body.get("stream"):
            return await self._stream(request, received)
        return web.json_response(self._whole(received))

    def _whole(self, received: Received) -> dict[str, Any]:
        body, chat = received.body, received.path.endswith("/chat/completions")
        choices = [
            {"index": i, "finish_reason": "length", "logprobs": None}
            | ({"message": {"role": "assistant", "content": f"{self.name}!"}} if chat else {"text": f"{self.name}!"})
            for i in range(body.get("n") or 1)
        ]
        return {
            "id": "cmpl-" + received.headers["x-request-id"],
            "object": "chat.completion" if chat else "text_completion",
            "created": 1,
            "model": body.get("model", "m"),
            "choices": choices,
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
            "kv_transfer_params": self.params if received.is_prefill else None,
        }

    async def _stream(self, request: web.Request, received: Received) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        if self.die_after == 0:
            await self._die(request)
        await response.prepare(request)
        for i in range(self.num_chunks):
            if i == self.gate_after:
                await self.gate.wait()
            if i == self.die_after:
                if self.half_event:
                    await response.write(b'data: {"half')
                    await asyncio.sleep(0.05)
                await self._die(request)
            await response.write(b"data: " + json.dumps(self._chunk(received, i)).encode() + b"\n\n")
            self.num_chunks_sent += 1
        await response.write(b"data: [DONE]\n\n")
        return response

    def _chunk(self, received: Received, i: int) -> dict[str, Any]:
        chat = received.path.endswith("/chat/completions")
        choice: dict[str, Any] = {"index": 0, "finish_reason": None}
        choice |= {"delta": {"content": f"t{i} "}} if chat else {"text": f"t{i} "}
        return {
            "id": "cmpl-" + received.headers["x-request-id"],
            "object": "chat.completion.chunk" if chat else "text_completion",
            "created": 1,
            "model": received.body.get("model", "m"),
            "choices": [choice],
        }

    async def _die(self, request: web.Request) -> None:
        assert request.transport is not None
        request.transport.abort()
        await asyncio.sleep(10)  # until the server notices and cancels this

    async def _relayed(self, request: web.Request) -> web.Response:
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.received.append(Received(request.path, headers, await request.json()))
        if self.error is not None:
            return web.Response(status=self.error[0], text=self.error[1], content_type="application/json")
        return web.json_response({"from": self.name})

    async def _health(self, request: web.Request) -> web.Response:
        response = web.Response(status=200 if self.healthy else 503)
        response.force_close()  # a request that breaks on a connection that has served would be sent again: see Leg
        return response

    async def _query(self, request: web.Request) -> web.Response:
        self.num_queries += 1
        await self.bootstrap_gate.wait()
        return web.json_response(self.bootstrap)

    async def _models(self, request: web.Request) -> web.Response:
        if request.headers.get("Authorization") == "Bearer wrong":
            return web.json_response({"error": "Unauthorized"}, status=401)
        card = {"id": self.name, "object": "model", "created": 1, "owned_by": "vllm"}
        return web.json_response({"object": "list", "data": [card]})

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "0.32.0"})

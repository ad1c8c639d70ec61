"""An engine that takes everything on every path, and remembers it byte for byte."""

import json
from dataclasses import dataclass

from aiohttp import web


@dataclass(frozen=True)
class Taken:
    method: str
    target: str
    headers: dict[str, str]  # names in lower case
    body: bytes


class AnyEngine:
    """`async with AnyEngine() as engine:` listens on a free port of 127.0.0.1. Health checks are not remembered."""

    def __init__(self) -> None:
        self.taken: list[Taken] = []
        self.url = ""

    async def __aenter__(self) -> "AnyEngine":
        self._runner = web.ServerRunner(web.Server(self._answer, access_log=None), shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0]
        self.url = f"http://{host}:{port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _answer(self, request: web.BaseRequest) -> web.Response:
        if request.raw_path == "/health":
            return web.Response()
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.taken.append(Taken(request.method, request.raw_path, headers, await request.read()))
        is_prefill = "do_remote_decode" in json.dumps(json.loads(self.taken[-1].body or b"{}"))
        params = {"remote_block_ids": [[1]], "remote_request_id": "r", "remote_engine_id": "e"} if is_prefill else None
        return web.json_response({"choices": [], "kv_transfer_params": params})

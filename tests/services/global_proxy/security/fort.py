"""A proxy between two engines that take everything, and requests to it that are exactly what they say."""

import json
from dataclasses import dataclass
from typing import Any

from services.global_proxy.security.routes import ROUTES
from tests.services.global_proxy.any_engine import AnyEngine
from tests.services.global_proxy.conftest import Deployment

POSTED = [route.path for route in ROUTES if "POST" in route.methods]
COMPLETIONS = [route.path for route in ROUTES if route.kind == "completion"]
FROM_AN_ENGINE = [route.path for route in ROUTES if route.kind != "local"]
JSON = b"Content-Type: application/json\r\n"


@dataclass
class Fort:
    """A proxy between two engines that take everything."""

    pd: Deployment
    prefill: AnyEngine
    decode: AnyEngine

    @property
    def taken(self) -> Any:
        return self.prefill.taken + self.decode.taken

    async def ask(self, method: str, path: str, headers: bytes = b"", body: bytes = b"") -> tuple[int, bytes, Any]:
        """Status, raw head and JSON body of the answer to exactly these bytes."""
        length = b"Content-Length: %d\r\n" % len(body) if body else b""
        head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n".encode("latin-1")
        reader, writer = await self.pd.raw(head + headers + length + b"\r\n" + body)
        answer = await reader.read()
        writer.close()
        answer_head, _, text = answer.partition(b"\r\n\r\n")
        if b"transfer-encoding: chunked" in answer_head:
            return int(answer_head[9:12]), answer_head, text
        return int(answer_head[9:12]), answer_head, json.loads(text) if text.startswith(b"{") else text

    async def use(self, path: str, headers: bytes = b"", **fields: Any) -> tuple[int, bytes, Any]:
        """A request that this path is for."""
        if path not in POSTED:
            return await self.ask("GET", path, headers)
        prompt = {"input": "Hi"} if path in ("/v1/responses", "/v1/embeddings") else {"prompt": "Hi"}
        return await self.ask("POST", path, JSON + headers, json.dumps(prompt | fields).encode())


def assert_error(answer: tuple[int, bytes, Any], status: int, kind: str) -> str:
    """In OpenAI's shape; returns its message."""
    assert answer[0] == status, answer
    error = answer[2]["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["code"], error["type"]) == (status, kind)
    return str(error["message"])


def bearer(key: str) -> bytes:
    return f"Authorization: Bearer {key}\r\n".encode("latin-1")

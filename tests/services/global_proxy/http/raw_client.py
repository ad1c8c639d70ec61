"""What raw clients send and are sent."""

import asyncio
import json
import re

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
LIVE = b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n"


def completion(**fields: object) -> bytes:
    body = json.dumps({"model": "m", "prompt": "Hello", "max_tokens": 9} | fields).encode()
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body


async def rest(reader: asyncio.StreamReader) -> bytes:
    """Until the proxy hangs up."""
    async with asyncio.timeout(20):
        return await reader.read()


def statuses(answers: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answers)]

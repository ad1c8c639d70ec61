"""One real completion through the proxy: the proof that a deployment serves."""

import asyncio
import json
import secrets
import ssl
import time
from dataclasses import dataclass
from typing import Any

_NUM_TOKENS = 8
_NO_KEY = "requests need an API key: name a file with one by --api-key-file, or set $OMNI_API_KEY"


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What came of it.

    Attributes:
        ttft_ms: until the first event with a choice.
        path: which way it took, as the proxy says: "disaggregated" (P, then D), "decode_only"...
        problem: why there is no whole answer; None: there is.
    """

    text: str = ""
    num_tokens: int | None = None
    ttft_ms: float | None = None
    total_ms: float | None = None
    path: str | None = None
    problem: str | None = None


def complete(
    url: str, model: str, *, timeout_s: float, key: str | None, asks_for_keys: bool, tls: ssl.SSLContext | None = None
) -> Completion:
    """Some tokens of `model`, through the proxy at `url`. A failure is in the answer, not raised."""
    if asks_for_keys and key is None:
        return Completion(problem=_NO_KEY)
    import aiohttp  # takes longer to load than many commands take to run

    try:
        return asyncio.run(_complete(url, model, timeout_s, key, tls))
    except TimeoutError:
        return Completion(problem=f"no whole answer within {timeout_s:g} s")
    except (aiohttp.ClientError, OSError, ValueError, LookupError, TypeError) as error:
        return Completion(problem=f"{url} did not answer to the end: {error or type(error).__name__}")


async def _complete(url: str, model: str, timeout_s: float, key: str | None, tls: ssl.SSLContext | None) -> Completion:
    import aiohttp

    body = {
        "model": model,
        "prompt": f"{secrets.token_hex(8)}: are you well?",  # no prefix cache knows it
        "max_tokens": _NUM_TOKENS,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    async with aiohttp.ClientSession(timeout=timeout) as session:  # an $http_proxy is not asked
        began_s = time.monotonic()
        async with session.post(f"{url}/v1/completions", json=body, headers=headers, ssl=tls or True) as answer:
            path = answer.headers.get("x-omni-path")
            if answer.status != 200:
                return Completion(
                    path=path, problem=f"the proxy answered {answer.status}: {_reason(await answer.text())}"
                )
            return await _read(answer, began_s, path)


async def _read(answer: Any, began_s: float, path: str | None) -> Completion:
    text, num_tokens, first_s, is_finished = "", None, None, False
    async for line in answer.content:
        data = line.removeprefix(b"data:").strip()
        if data == b"[DONE]":
            break
        if not data or not line.startswith(b"data:"):
            continue
        event = json.loads(data)
        if "error" in event:
            return Completion(path=path, problem=f"the stream ended with an error: {_reason(data.decode())}")
        for choice in event.get("choices") or ():
            first_s = first_s or time.monotonic()
            text += choice.get("text") or ""
            is_finished |= choice.get("finish_reason") is not None
        if event.get("usage"):
            num_tokens = event["usage"]["completion_tokens"]
    else:
        return Completion(text=text, path=path, problem="the stream broke off")
    if first_s is None or not is_finished:
        return Completion(text=text, path=path, problem="the stream has no whole answer in it")
    return Completion(
        text=text,
        num_tokens=num_tokens,
        ttft_ms=round(1000 * (first_s - began_s), 1),
        total_ms=round(1000 * (time.monotonic() - began_s), 1),
        path=path,
    )


def _reason(text: str) -> str:
    """Of an error in OpenAI's shape, its message."""
    try:
        return str(json.loads(text)["error"]["message"])[:500]
    except (ValueError, LookupError, TypeError):
        return text.strip()[:500]

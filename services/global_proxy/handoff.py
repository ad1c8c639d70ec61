"""The life of a request between the client and the engines.

1. A request that one hand-off cannot carry goes to D alone (rules.py).
2. Leg 1: P computes the prompt and answers with `kv_transfer_params`. Any other answer of P is the client's.
3. Leg 2: D gets the client's request plus those parameters, unread, and its answer is relayed as it comes.
4. If D did not take the request, P is told that its KV blocks are not needed (release.py).

Once a byte has been relayed nothing is tried again.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import aiohttp
import msgspec

from services.global_proxy.errors import DiedError, UnreachableError, UpstreamError
from services.global_proxy.metrics import Metrics
from services.global_proxy.release import LeaseReleaser
from services.global_proxy.reply import Header, Reply
from services.global_proxy.request_body import RequestBody
from services.global_proxy.rules import NO_HANDOFF, decode_only_reason
from services.global_proxy.upstream import EngineClient, Instance, Pool

_NULL = msgspec.Raw(b"null")
_PATH_DISAGGREGATED = (b"x-omni-path", b"disaggregated")
_PATH_DECODE_ONLY = (b"x-omni-path", b"decode_only")


@dataclass(frozen=True)
class Call:
    """A request on its way: what to send where, as the same thing under the same id on both legs."""

    path: str
    body: RequestBody
    headers: Mapping[str, str]
    started_s: float  # time.monotonic()


@dataclass
class Trace:
    """What became of a request, for its log line."""

    prefill: str | None = None  # the instances asked last
    decode: str | None = None
    decode_only: str | None = None  # why P had no part in it
    ttft_s: float | None = None


@dataclass(frozen=True)
class Answer:
    status: int
    content_type: bytes
    body: bytes
    headers: tuple[Header, ...] = ()


class _PrefillAnswer(msgspec.Struct):
    kv_transfer_params: msgspec.Raw = _NULL


class Handoff:
    """Serves requests with one pool of each role."""

    def __init__(
        self, prefill: Pool, decode: Pool, client: EngineClient, leases: LeaseReleaser, metrics: Metrics
    ) -> None:
        self._prefill_pool = prefill
        self._decode_pool = decode
        self._client = client
        self._leases = leases
        self._metrics = metrics

    async def serve(self, call: Call, reply: Reply, trace: Trace) -> None:
        """Answer `call` through `reply`.

        Raises:
            InvalidRequestError: the body cannot be rewritten. Nothing has been sent.
            UpstreamError: an engine failed, and no other could take over.
        """
        params = _NULL
        trace.decode_only = decode_only_reason(call.body.fields)
        if trace.decode_only is None:
            answer, params = await self._prefill(call, trace)
            if answer.status != 200:
                await _relay_whole(answer, reply, _PATH_DISAGGREGATED)
                return
            if params == _NULL:
                trace.decode_only = NO_HANDOFF
        if trace.decode_only is not None:
            self._metrics.decode_only.labels(trace.decode_only).inc()
            await self._decode(call, call.body.plain_json, reply, trace)
            return
        try:
            await self._decode(call, call.body.decode_json(params), reply, trace)
        finally:
            if reply.status != 200:
                self._leases.release(params)

    async def _prefill(self, call: Call, trace: Trace) -> tuple[Answer, msgspec.Raw]:
        """Leg 1. A prompt can be computed twice: whatever went wrong on one P, another is tried."""
        body = call.body.prefill_json()
        first = self._choose(self._prefill_pool)
        try:
            return await self._prefill_on(first, call, body, trace)
        except UpstreamError:
            other = self._prefill_pool.choose(tried=first)
            if other is None:
                raise
            return await self._prefill_on(other, call, body, trace)

    async def _prefill_on(
        self, instance: Instance, call: Call, body: bytes, trace: Trace
    ) -> tuple[Answer, msgspec.Raw]:
        """P's answer, and what it hands off: null if nothing."""
        trace.prefill = instance.name
        started_s = time.monotonic()
        async with self._client.post(self._prefill_pool, instance, call.path, body, call.headers) as response:
            answer = await _read_whole(response)
        self._metrics.prefill_seconds.observe(time.monotonic() - started_s)
        self._count_server_error(instance, answer.status)
        if answer.status != 200:
            return answer, _NULL
        try:
            return answer, msgspec.json.decode(answer.body, type=_PrefillAnswer).kv_transfer_params
        except ValueError as error:
            raise self._client.failed(
                instance, DiedError("The prefill instance's answer is nonsense"), error
            ) from error

    async def _decode(self, call: Call, body: bytes, reply: Reply, trace: Trace) -> None:
        """Leg 2. The hand-off is good for one reader: another D is tried only if the first one saw nothing of it."""
        first = self._choose(self._decode_pool)
        try:
            await self._decode_on(first, call, body, reply, trace)
        except UnreachableError:
            other = self._decode_pool.choose(tried=first)
            if other is None:
                raise
            await self._decode_on(other, call, body, reply, trace)

    async def _decode_on(self, instance: Instance, call: Call, body: bytes, reply: Reply, trace: Trace) -> None:
        trace.decode = instance.name
        path_header = _PATH_DISAGGREGATED if trace.decode_only is None else _PATH_DECODE_ONLY
        async with self._client.post(self._decode_pool, instance, call.path, body, call.headers) as response:
            if response.content_type == "text/event-stream":
                await self._relay_stream(response, call, reply, trace, path_header)
                return
            answer = await _read_whole(response)
        self._saw_first_byte(call, trace)
        self._count_server_error(instance, answer.status)
        await _relay_whole(answer, reply, path_header)

    async def _relay_stream(
        self, response: aiohttp.ClientResponse, call: Call, reply: Reply, trace: Trace, path_header: Header
    ) -> None:
        """Bytes as they come. The status line waits for the first one: until then D's failure is an HTTP error."""
        chunk = await response.content.readany()
        self._saw_first_byte(call, trace)
        await reply.start(response.status, _content_type(response), [path_header])
        while chunk:
            await reply.chunk(chunk)
            chunk = await response.content.readany()
        await reply.end()

    def _choose(self, pool: Pool) -> Instance:
        instance = pool.choose()
        assert instance is not None, "settings require one instance of each role"
        return instance

    def _saw_first_byte(self, call: Call, trace: Trace) -> None:
        trace.ttft_s = time.monotonic() - call.started_s
        self._metrics.ttft_seconds.observe(trace.ttft_s)

    def _count_server_error(self, instance: Instance, status: int) -> None:
        if status >= 500:
            self._metrics.upstream_failures.labels(instance.role, instance.name, f"status_{status}").inc()


async def _read_whole(response: aiohttp.ClientResponse) -> Answer:
    retry_after = response.headers.get("Retry-After")
    headers = () if retry_after is None else ((b"retry-after", retry_after.encode("latin-1")),)
    return Answer(response.status, _content_type(response), await response.read(), headers)


async def _relay_whole(answer: Answer, reply: Reply, path_header: Header) -> None:
    await reply.whole(answer.status, answer.content_type, answer.body, [path_header, *answer.headers])


def _content_type(response: aiohttp.ClientResponse) -> bytes:
    return response.headers.get("Content-Type", "application/octet-stream").encode("latin-1")

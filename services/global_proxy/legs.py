"""The two legs of a request: to P, which computes the prompt, and to D, whose answer is relayed as it comes."""

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import aiohttp

from services.global_proxy.errors import UnreachableError, UpstreamError
from services.global_proxy.metrics import Metrics
from services.global_proxy.reply import Header, Reply
from services.global_proxy.request_body import RequestBody
from services.global_proxy.upstream import EngineClient, Instance, Pool

_PATH_DISAGGREGATED = (b"x-omni-path", b"disaggregated")
_PATH_DECODE_ONLY = (b"x-omni-path", b"decode_only")

Gate = Callable[[int], Awaitable[None]]  # called with the status of D's answer; returns once it may be relayed


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


class Legs:
    """Sends legs to one pool of each role."""

    def __init__(self, prefill: Pool, decode: Pool, client: EngineClient, metrics: Metrics) -> None:
        self._prefill_pool = prefill
        self._decode_pool = decode
        self._client = client
        self._metrics = metrics

    def choose_prefill(self) -> Instance:
        return _choose(self._prefill_pool)

    def other_prefill(self, tried: Instance, error: UpstreamError) -> Instance | None:
        """Another P after one has failed so: a prompt can be computed twice. The only one, if nothing came to it."""
        only = tried if isinstance(error, UnreachableError) else None
        return self._prefill_pool.choose(tried) or only

    async def prefill(self, instance: Instance, call: Call, body: bytes, trace: Trace) -> Answer:
        """P's whole answer. Raises UpstreamError."""
        trace.prefill = instance.name
        started_s = time.monotonic()
        async with self._client.post(self._prefill_pool, instance, call.path, body, call.headers) as response:
            answer = await _read_whole(response)
        self._metrics.prefill_seconds.observe(time.monotonic() - started_s)
        self._count_server_error(instance, answer.status)
        return answer

    async def relay_prefill(self, answer: Answer, reply: Reply) -> None:
        """Give P's answer to the client: it is an error, and the end."""
        await _relay_whole(answer, reply, _PATH_DISAGGREGATED)

    async def decode(self, call: Call, body: bytes, reply: Reply, trace: Trace, gate: Gate | None = None) -> None:
        """Relay D's answer. A hand-off is good for one D: another is tried (the only one, once more) only if the first
        saw nothing of it.

        Args:
            gate: may hold back D's answer, at its first bytes; no more of it is read in the meantime.

        Raises:
            UpstreamError: D failed, and no other could take over.
        """
        first = _choose(self._decode_pool)
        try:
            await self._decode_on(first, call, body, reply, trace, gate)
        except UnreachableError:
            other = self._decode_pool.choose(tried=first) or first
            await self._decode_on(other, call, body, reply, trace, gate)

    async def decode_alone(self, call: Call, reply: Reply, trace: Trace, reason: str) -> None:
        """Have D compute the prompt too. Raises UpstreamError."""
        trace.decode_only = reason
        self._metrics.decode_only.labels(reason).inc()
        await self.decode(call, call.body.plain_json, reply, trace)

    def prefill_failed(self, instance: Instance, error: UpstreamError, cause: Exception | None = None) -> UpstreamError:
        """Count and log that P let us down; pass it over for a while if it cannot be reached."""
        if isinstance(error, UnreachableError):
            self._prefill_pool.avoid(instance)
        return self._client.failed(instance, error, cause)

    async def _decode_on(
        self, instance: Instance, call: Call, body: bytes, reply: Reply, trace: Trace, gate: Gate | None
    ) -> None:
        trace.decode = instance.name
        path_header = _PATH_DISAGGREGATED if trace.decode_only is None else _PATH_DECODE_ONLY
        async with self._client.post(self._decode_pool, instance, call.path, body, call.headers) as response:
            held_back = b""
            if gate is not None:
                held_back = await response.content.readany()
                await gate(response.status)
            if response.content_type == "text/event-stream":
                await self._relay_stream(response, held_back, call, reply, trace, path_header)
                return
            answer = await _read_whole(response, held_back)
        self._saw_first_byte(call, trace)
        self._count_server_error(instance, answer.status)
        await _relay_whole(answer, reply, path_header)

    async def _relay_stream(
        self,
        response: aiohttp.ClientResponse,
        held_back: bytes,
        call: Call,
        reply: Reply,
        trace: Trace,
        path_header: Header,
    ) -> None:
        """Bytes as they come. The status line waits for the first one: until then D's failure is an HTTP error."""
        chunk = held_back or await response.content.readany()
        self._saw_first_byte(call, trace)
        await reply.start(response.status, _content_type(response), [path_header])
        while chunk:
            await reply.chunk(chunk)
            chunk = await response.content.readany()
        await reply.end()

    def _saw_first_byte(self, call: Call, trace: Trace) -> None:
        trace.ttft_s = time.monotonic() - call.started_s
        self._metrics.ttft_seconds.observe(trace.ttft_s)

    def _count_server_error(self, instance: Instance, status: int) -> None:
        if status >= 500:
            self._metrics.upstream_failures.labels(instance.role, instance.name, f"status_{status}").inc()


def _choose(pool: Pool) -> Instance:
    instance = pool.choose()
    assert instance is not None, "settings require one instance of each role"
    return instance


async def _read_whole(response: aiohttp.ClientResponse, held_back: bytes = b"") -> Answer:
    retry_after = response.headers.get("Retry-After")
    headers = () if retry_after is None else ((b"retry-after", retry_after.encode("latin-1")),)
    return Answer(response.status, _content_type(response), held_back + await response.read(), headers)


async def _relay_whole(answer: Answer, reply: Reply, path_header: Header) -> None:
    await reply.whole(answer.status, answer.content_type, answer.body, [path_header, *answer.headers])


def _content_type(response: aiohttp.ClientResponse) -> bytes:
    return response.headers.get("Content-Type", "application/octet-stream").encode("latin-1")

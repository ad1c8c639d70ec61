"""A request's way through the proxy, top to bottom: receive, admit, prefill and hand off, relay, settle."""

import asyncio
import logging
import random
import time
from dataclasses import dataclass

from services.global_proxy.admission.gate import Admitted, Gate
from services.global_proxy.cached_tokens import CachedTokensSink
from services.global_proxy.call import Call
from services.global_proxy.errors import (
    ClientGoneError,
    DiedError,
    NoInstanceError,
    ProxyError,
    UpstreamError,
)
from services.global_proxy.http.client_request import ClientRequest
from services.global_proxy.http.engine_connection import Sink
from services.global_proxy.http.reply import Reply
from services.global_proxy.instances.instance import Instance
from services.global_proxy.legs import Legs, Opened
from services.global_proxy.mixed import OTHERS_DOWN, MixedEngines
from services.global_proxy.observing.metrics import Metrics
from services.global_proxy.observing.request_log import RequestLog, RequestRecord
from services.global_proxy.observing.tracing import RequestTrace, Tracing
from services.global_proxy.prompt_of import PromptReader
from services.global_proxy.relay import StreamRelay
from services.global_proxy.replay.continuer import Continuer
from services.global_proxy.request_body import parse_body
from services.global_proxy.request_scope import InFlight
from services.global_proxy.retries import RetryBudget
from services.global_proxy.rules import SEVERAL_CHOICES, decode_only_reason
from services.global_proxy.security.api_keys import ApiKey
from services.global_proxy.settings import Settings
from services.global_proxy.settling import Settling, reply_whole
from services.global_proxy.short_prompts import ShortPrompts
from services.global_proxy.ways.way import Way

logger = logging.getLogger(__name__)

SHORT_PROMPT = "short_prompt"
NO_PREFILL = "no_prefill_up"
_MAX_CLIENT_ID_BYTES = 256
_ids = random.Random()  # noqa: S311 (not a secret; seeded by the system, and by nobody else)


@dataclass(frozen=True)
class Parts:
    """What serving a request takes."""

    settings: Settings
    gate: Gate
    way: Way
    legs: Legs
    mixed: MixedEngines
    continuer: Continuer
    retries: RetryBudget
    short: ShortPrompts
    prompts: PromptReader
    in_flight: InFlight
    metrics: Metrics
    request_log: RequestLog
    tracing: Tracing


class Serving:
    """Serves what is answered by P and D together, or by one engine that does both."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._settings = parts.settings
        self._metrics = parts.metrics
        self._settling = Settling(parts.metrics, parts.request_log)

    async def serve(self, request: ClientRequest, reply: Reply, key: ApiKey | None) -> None:
        """Answer one request, whatever happens."""
        task = asyncio.current_task()
        assert task is not None, "a request has a task"
        started_s = time.monotonic()
        headers, parts = request.headers, self._parts
        record = RequestRecord(id=new_id(), path=request.path, key=None if key is None else key.name)
        trace = parts.tracing.begin(headers.get(b"traceparent"), headers.get(b"tracestate"))
        scope = parts.in_flight.open(task, started_s)
        reply.on_client_gone = lambda: scope.end(ClientGoneError())
        reply.headers.append((b"x-request-id", headers.get(b"x-request-id") or record.id.encode()))
        self._metrics.in_flight.inc()
        call: Call | None = None
        try:
            parts.in_flight.admit()
            call = self._receive(request, record, trace, key)
            admitted = parts.gate.try_enter(call.prompt) or await self._queue(call, key, started_s)
            try:
                opened = await self._open(call)
                try:
                    admitted.arrived()
                    await self._relay(opened, call, reply, started_s)
                finally:
                    opened.close()
                admitted.ended_well(record.chunks or None, call.prompt.max_new_tokens)
                if record.chunks and not record.continued and parts.legs.mixed_pool.instances:
                    parts.mixed.saw_answer(record.chunks, call.prompt.max_new_tokens)
                if record.chunks:
                    parts.gate.give_back(key, call.prompt.max_new_tokens - record.chunks)
            finally:
                admitted.leave()
        except ProxyError as error:
            self._settling.refuse(error, reply, record)
        except asyncio.CancelledError:
            if scope.why is None:
                raise
            self._settling.end_early(scope.why, reply, record)
        except Exception as error:
            logger.exception("a mistake of ours")
            self._settling.refuse(ProxyError("Internal error"), reply, record, cause=error)
        finally:
            parts.in_flight.close(scope)
            self._settling.settle(request, reply, record, trace, call, started_s)

    # Receive

    def _receive(self, request: ClientRequest, record: RequestRecord, trace: RequestTrace, key: ApiKey | None) -> Call:
        """Check the request, and note all that the legs need. Raises InvalidRequestError, RateLimitError."""
        headers = request.headers
        record.client_id = client_id_of(request)
        body = parse_body(bytes(request.body), self._settings.max_n)
        request.body = bytearray()  # the parsed one is a copy, and one is enough
        lines = b"content-type: application/json\r\nx-request-id: %b\r\n" % record.id.encode()
        authorization = headers.get(b"authorization")
        if authorization is not None:  # a key of ours has been taken away at the door
            lines += b"authorization: %b\r\n" % authorization
        prompt = self._parts.prompts.read(body, headers.get(b"x-session-id"))
        self._parts.gate.charge(key, prompt)
        path = request.target.partition(b"?")[0]
        continuable = self._parts.continuer.could_continue(body)
        return Call(path, body, lines, prompt, record, trace, prefill_path=path, continuable=continuable)

    # Admit

    async def _queue(self, call: Call, key: ApiKey | None, started_s: float) -> Admitted:
        """Wait for room. Raises NotAdmittedError."""
        metrics = self._metrics
        metrics.queued.inc()
        try:
            priority = call.body.fields.get("priority")
            own = priority if type(priority) is int else 0
            deadline_s = started_s + self._settings.request_timeout_s
            return await self._parts.gate.enter(call.prompt, key, own, deadline_s)
        finally:
            metrics.queued.dec()
            call.record.queue_s = time.monotonic() - started_s
            metrics.queue_seconds.observe(call.record.queue_s)
            call.trace.admitted()

    # Prefill and hand off

    async def _open(self, call: Call) -> Opened:
        """Until the answer begins; anew with other instances if these let the request down.

        Raises:
            UpstreamError: they did, and there was no other, or it came too often.
            NoInstanceError: all of a role are down.
        """
        self._parts.retries.request_came()
        failure: UpstreamError | None = None
        try:
            while True:
                try:
                    return await self._open_once(call)
                except UpstreamError as error:
                    failure = error
                    if not self._parts.retries.may_retry(call, error):
                        raise
                except NoInstanceError as error:
                    raise failure or error from None
        finally:
            failure = None  # its traceback has this frame: together they would keep the body until garbage is collected

    async def _open_once(self, call: Call) -> Opened:
        parts = self._parts
        reason = decode_only_reason(call.body.fields)
        if reason is None and call.body.n > 1 and not parts.way.carries_choices:
            reason = SEVERAL_CHOICES
        if reason is None and parts.short.applies(call.prompt):
            reason = SHORT_PROMPT
        has_mixed = bool(parts.legs.mixed_pool.instances)
        if call.body.fields.get("previous_response_id") is not None and parts.legs.decode_pool.instances:
            has_mixed = False  # a D has the answer that it goes on from: another engine would deny that there is one
        if has_mixed and (why := parts.mixed.why(call, needs_one_engine=reason is not None)) is not None:
            return await parts.mixed.open(call, why)
        try:
            if reason is not None:
                if reason == SHORT_PROMPT:
                    parts.short.gave_to_decode()
                return await parts.legs.decode_alone(call, reason)
            if self._settings.fallback == "decode_only" and not parts.legs.prefill_pool.has_healthy():
                return await parts.legs.decode_alone(call, NO_PREFILL)
            return await parts.way.open(call)
        except NoInstanceError:
            if not has_mixed:
                raise
        return await parts.mixed.open(call, OTHERS_DOWN)

    # Relay

    async def _relay(self, opened: Opened, call: Call, reply: Reply, started_s: float) -> None:
        """Give the client what was opened. Raises DiedError: D died mid-stream, and nobody could go on."""
        answer, record = opened.answer, call.record
        record.ttft_s = time.monotonic() - started_s
        self._metrics.ttft_seconds.observe(record.ttft_s)
        if not answer.head.is_stream:
            reply_whole(answer, reply, [opened.path_header], call.num_cached_tokens)
            return
        continuer = self._parts.continuer
        headers = [opened.path_header]
        instance = opened.instance
        load_before = (instance.num_requests, instance.num_tokens)
        relay: StreamRelay
        if call.continuable:
            relay = continuer.transcript(reply)
            headers.append(continuer.header)
        else:
            relay = StreamRelay(reply, self._metrics.itl_seconds)
        reply.start(answer.head.status, answer.head.content_type, headers)
        try:
            num_cached = call.num_cached_tokens
            await _stream(opened, relay if num_cached is None else CachedTokensSink(relay, num_cached), reply)
        except DiedError as error:
            opened.close(error.reason)
            await self._continue(call, relay, reply, error)
        finally:
            self._note_speed(instance, relay, call, load_before)
        reply.end()

    async def _continue(self, call: Call, relay: StreamRelay, reply: Reply, error: DiedError) -> None:
        """Have others go on with the stream. Raises DiedError: `error`, if that cannot be."""
        lost: DiedError | None = error
        del error
        try:
            while lost is not None:
                if not self._parts.retries.may_retry(call, lost):
                    raise lost
                lost = await self._continue_once(call, relay, reply, lost)
        finally:
            lost = None  # as above

    async def _continue_once(self, call: Call, relay: StreamRelay, reply: Reply, lost: DiedError) -> DiedError | None:
        """None: the stream has come to its end; or what has ended it again. Raises DiedError: `lost`."""
        following = await self._parts.continuer.following(call, relay)
        if following is None:
            raise lost
        call.record.continued += 1
        self._metrics.continued_streams.inc()
        if following.call is None:
            return None  # all but the stream's end had been sent
        try:
            opened = await self._open(following.call)
        except ProxyError:
            raise lost from None
        try:
            if opened.answer.head.is_stream:
                await _stream(opened, following.sink, reply)
                return None
        except DiedError as another:
            return another
        finally:
            opened.close()
        raise lost

    def _note_speed(self, instance: Instance, relay: StreamRelay, call: Call, load_before: tuple[int, int]) -> None:
        """Args: load_before: requests and tokens there as the stream began; what it cost is due to the mean."""
        record = call.record
        record.chunks = relay.num_chunks
        record.tpot_s = relay.seconds_per_chunk
        if record.tpot_s is None or record.continued:
            return
        self._metrics.tpot_seconds.observe(record.tpot_s)
        if instance.takes_cost(relay.last_s):
            num_requests = (load_before[0] + instance.num_requests) // 2
            num_tokens = (load_before[1] + instance.num_tokens) // 2
            instance.costs.observe_decode(num_requests, num_tokens, record.tpot_s)


async def _stream(opened: Opened, sink: Sink, reply: Reply) -> None:
    """Raises DiedError."""
    assert opened.leg is not None, "a stream has begun"
    reply.fed_by(opened.leg.connection)
    try:
        await opened.leg.relay_to(sink)
    finally:
        reply.fed_by(None)


def new_id() -> str:
    """In the form of a UUID's hexadecimal digits."""
    return f"{_ids.getrandbits(128):032x}"


def client_id_of(request: ClientRequest) -> str | None:
    """The client's own X-Request-Id, as it is logged."""
    value = request.headers.get(b"x-request-id")
    return None if value is None else value[:_MAX_CLIENT_ID_BYTES].decode("latin-1")

"""POST /v1/completions and /v1/chat/completions: one ASGI application, called once per request.

A plain ASGI application rather than a FastAPI endpoint: the body is read, checked and relayed without a model of it.
"""

import logging
import time
import uuid
from dataclasses import dataclass

import msgspec
from starlette.types import Receive, Scope, Send

from services.global_proxy.errors import ClientGoneError, InvalidRequestError, ProxyError
from services.global_proxy.handoff import Handoff
from services.global_proxy.legs import Call, Trace
from services.global_proxy.metrics import Metrics
from services.global_proxy.reply import Reply, read_body
from services.global_proxy.request_body import parse_body
from services.global_proxy.request_scope import InFlight, RequestScope
from services.global_proxy.settings import Settings

logger = logging.getLogger(__name__)

CLIENT_GONE_STATUS = 499  # nginx's number for it; in logs and metrics only
_FORWARDED = {  # everything else is between the client and the proxy
    b"authorization": "Authorization",
    b"traceparent": "traceparent",
    b"tracestate": "tracestate",
}


class Completions:
    """Bounds, answers, counts and logs each request."""

    def __init__(self, settings: Settings, handoff: Handoff, in_flight: InFlight, metrics: Metrics) -> None:
        self._settings = settings
        self._handoff = handoff
        self._in_flight = in_flight
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        arrival = _Arrival(scope["path"], dict(scope["headers"]), uuid.uuid4().hex, time.monotonic())
        reply = Reply(send, [(b"x-request-id", arrival.client_id or arrival.request_id.encode())])
        trace = Trace()
        bounds = RequestScope(self._settings.request_timeout_s)
        status = 500  # unless something below knows better
        try:
            self._in_flight.add(bounds)
            await self._serve(arrival, bounds, receive, reply, trace)
            status = reply.status or status
        except ProxyError as error:
            status = error.status
            await reply.error(error)
        except ClientGoneError:
            status = CLIENT_GONE_STATUS
        finally:
            self._in_flight.remove(bounds)
            self._record(arrival, status, trace)

    async def _serve(
        self, arrival: "_Arrival", bounds: RequestScope, receive: Receive, reply: Reply, trace: Trace
    ) -> None:
        settings = self._settings
        content_length = arrival.headers.get(b"content-length")
        async with bounds:
            _require_json(arrival.headers.get(b"content-type", b""))
            raw = await read_body(receive, content_length, settings.max_body_bytes, settings.body_timeout_s)
            bounds.watch_client(receive, lambda: reply.complete)
            body = parse_body(raw, settings.max_n)
            call = Call(arrival.path, body, arrival.engine_headers(), arrival.started_s)
            await self._handoff.serve(call, reply, trace)

    def _record(self, arrival: "_Arrival", status: int, trace: Trace) -> None:
        seconds = time.monotonic() - arrival.started_s
        self._metrics.requests.labels(arrival.path, str(status)).inc()
        self._metrics.request_seconds.observe(seconds)
        if not logger.isEnabledFor(logging.INFO):
            return
        line = {
            "id": arrival.request_id,
            "client_id": arrival.client_id and arrival.client_id.decode("latin-1"),
            "path": arrival.path,
            "status": status,
            "prefill": trace.prefill,
            "decode": trace.decode,
            "decode_only": trace.decode_only,
            "seconds": round(seconds, 6),
            "ttft_s": trace.ttft_s and round(trace.ttft_s, 6),
        }
        logger.info(msgspec.json.encode(line).decode())


@dataclass(frozen=True)
class _Arrival:
    """A request as it came in, under the id that it has inside."""

    path: str
    headers: dict[bytes, bytes]
    request_id: str
    started_s: float  # time.monotonic()

    @property
    def client_id(self) -> bytes | None:
        """The client's own name for the request, which need not be unique."""
        return self.headers.get(b"x-request-id")

    def engine_headers(self) -> dict[str, str]:
        """What both engines are told."""
        engine_headers = {"Content-Type": "application/json", "X-Request-Id": self.request_id}
        for name, engine_name in _FORWARDED.items():
            if (value := self.headers.get(name)) is not None:
                engine_headers[engine_name] = value.decode("latin-1")
        return engine_headers


def _require_json(content_type: bytes) -> None:
    """As vLLM does, so that no web page can post here without the browser asking first."""
    if content_type.partition(b";")[0].strip().lower() != b"application/json":
        raise InvalidRequestError("Unsupported Media Type: Only 'application/json' is allowed")

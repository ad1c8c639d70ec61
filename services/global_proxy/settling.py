"""The end of a request: an error told, what became of it counted and logged."""

import time

from services.global_proxy import openai_error
from services.global_proxy.cached_tokens import with_cached_tokens
from services.global_proxy.call import Call
from services.global_proxy.engine_failure import as_our_own
from services.global_proxy.errors import EngineStatusError, ProxyError
from services.global_proxy.http.client_request import ClientRequest
from services.global_proxy.http.engine_connection import EngineAnswer
from services.global_proxy.http.reply import Header, Reply
from services.global_proxy.observing.metrics import Metrics
from services.global_proxy.observing.refusals import reason_of
from services.global_proxy.observing.request_log import RequestLog, RequestRecord
from services.global_proxy.observing.tracing import RequestTrace

CLIENT_GONE_STATUS = 499  # nginx's number for it; in logs and metrics only
_JSON = b"application/json"


class Settling:
    def __init__(self, metrics: Metrics, request_log: RequestLog) -> None:
        self._metrics = metrics
        self._request_log = request_log

    def refuse(self, error: ProxyError, reply: Reply, record: RequestRecord, cause: Exception | None = None) -> None:
        """Say what went wrong: with a status if there is still time for one, else as the stream's last event."""
        record.error = type(cause or error).__name__
        if (reason := reason_of(error)) is not None:
            self._metrics.refused.labels(reason).inc()
        if reply.complete:
            return
        headers: list[Header] = []
        if isinstance(error, EngineStatusError):
            headers.append(error.path_header)
            error = as_our_own(error, record.id)
        if reply.status is not None:
            reply.event(openai_error.to_event(error))
            reply.end()
            return
        if error.retry_after_s is not None:
            headers.append((b"retry-after", b"%d" % error.retry_after_s))
        reply.whole(error.status, _JSON, openai_error.to_json(error), headers)

    def end_early(self, why: Exception, reply: Reply, record: RequestRecord) -> None:
        if isinstance(why, ProxyError):
            self.refuse(why, reply, record)
        else:
            record.error = type(why).__name__
            record.status = CLIENT_GONE_STATUS

    def settle(
        self,
        request: ClientRequest,
        reply: Reply,
        record: RequestRecord,
        trace: RequestTrace,
        call: Call | None,
        started_s: float,
    ) -> None:
        """Count and log what became of it."""
        metrics = self._metrics
        record.status = record.status or reply.status or 500
        record.seconds = time.monotonic() - started_s
        record.bytes = reply.num_bytes
        record.trace_id = trace.trace_id
        metrics.in_flight.dec()
        metrics.requests.labels(record.path, record.status).inc()
        metrics.request_seconds.observe(record.seconds)
        metrics.received_bytes.inc(request.num_body_bytes)
        metrics.sent_bytes.inc(reply.num_bytes)
        if call is None:
            trace.finish(record)
        else:
            metrics.prompt_tokens.inc(call.prompt.num_tokens)
            model = call.body.fields.get("model")
            trace.finish(
                record,
                model if isinstance(model, str) else None,
                call.body.fields.get("stream") is True,
                call.body.max_new_tokens,
            )
        self._request_log.add(record)


def reply_whole(
    answer: EngineAnswer, reply: Reply, headers: list[Header], num_cached_tokens: int | None = None
) -> None:
    if answer.head.retry_after is not None:
        headers.append((b"retry-after", answer.head.retry_after))
    body = answer.body if num_cached_tokens is None else with_cached_tokens(answer.body, num_cached_tokens)
    reply.whole(answer.head.status, answer.head.content_type, body, headers)

"""An engine's own 5xx, as a client is told of it: its text may name files, addresses and other people's requests."""

import logging

from services.global_proxy.errors import EngineStatusError, ProxyError

logger = logging.getLogger(__name__)

_MAX_LOGGED_BYTES = 2000
_MAX_RETRY_AFTER_DIGITS = 4
_OTHERS = 502

# By status: OpenAI's `error.type` in vLLM's words, and what is said.
_ANSWERS = {
    500: ("InternalServerError", "The {role} instance failed"),
    501: ("NotImplementedError", "The {role} instance does not support this request"),
    502: ("BadGatewayError", "The {role} instance failed"),
    503: ("ServiceUnavailableError", "The {role} instance cannot take the request now: send it again"),
    504: ("GatewayTimeoutError", "The {role} instance took too long"),
}


def as_our_own(failure: EngineStatusError, request_id: str) -> ProxyError:
    """The answer to the client, in fixed words; the engine's go to the log, which has the request under this id."""
    head, body = failure.answer.head, failure.answer.body
    instance = failure.instance
    text = body[:_MAX_LOGGED_BYTES].decode(errors="replace")
    logger.warning("request %s: %s %s says %d: %r", request_id, instance.role, instance.name, head.status, text)
    status = head.status if head.status in _ANSWERS else _OTHERS
    kind, message = _ANSWERS[status]
    error = ProxyError(message.format(role=instance.role))
    error.status, error.kind = status, kind
    retry_after = head.retry_after or b""  # a number, a date, or any text
    if status == 503 and retry_after.isdigit() and len(retry_after) <= _MAX_RETRY_AFTER_DIGITS:
        error.retry_after_s = int(retry_after)
    return error

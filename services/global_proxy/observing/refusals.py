"""Under which reason an error counts that turned a request away before any engine saw it."""

from services.global_proxy.admission.errors import OverloadedError, QueueTimeoutError, RateLimitError
from services.global_proxy.errors import (
    BodyTooLargeError,
    DrainingError,
    InvalidRequestError,
    NoInstanceError,
    ProxyError,
)
from services.global_proxy.security.errors import NoSuchRouteError, UnauthorizedError, WrongMethodError

_REASONS: dict[type[ProxyError], str] = {
    RateLimitError: "rate_limited",
    OverloadedError: "overloaded",
    QueueTimeoutError: "queue_timeout",
    DrainingError: "draining",
    NoInstanceError: "no_instance_up",
    UnauthorizedError: "unauthorized",
    NoSuchRouteError: "unknown_route",
    WrongMethodError: "unknown_route",
    InvalidRequestError: "invalid",
    BodyTooLargeError: "invalid",
}


def reason_of(error: ProxyError) -> str | None:
    """None: an engine saw the request."""
    return _REASONS.get(type(error))

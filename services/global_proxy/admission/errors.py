"""Refusals of the proxy itself; each says after how many seconds to come again.

ProxyError
└── NotAdmittedError
    ├── OverloadedError     503   the queue is full, or the wait would be too long: refused at once
    ├── QueueTimeoutError   503   waited for as long as it could
    └── RateLimitError      429   this client has had its share
"""

import math

from services.global_proxy.errors import ProxyError

_MAX_RETRY_AFTER_S = 60


class NotAdmittedError(ProxyError):
    """The request was never begun, so it can be sent again as it is."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = max(1, min(_MAX_RETRY_AFTER_S, math.ceil(retry_after_s)))


class OverloadedError(NotAdmittedError):
    status = 503
    kind = "ServiceUnavailableError"


class QueueTimeoutError(NotAdmittedError):
    status = 503
    kind = "ServiceUnavailableError"


class RateLimitError(NotAdmittedError):
    status = 429
    kind = "RateLimitError"

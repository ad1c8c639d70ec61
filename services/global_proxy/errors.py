"""Everything that can end a request early.

    RequestEnded
    ├── ClientGone              the client hung up: there is nobody to answer
    └── ProxyError              answered in OpenAI's shape, with `status` and `kind`
        ├── InvalidRequest      400
        │   ├── BodyTimeout     408
        │   └── BodyTooLarge    413
        ├── DeadlineExceeded    504
        ├── Draining            503   the proxy is stopping
        └── UpstreamError             an engine let us down
            ├── Unreachable     503   no connection was ever made: nothing ran there
            └── Died            502   the connection broke, or the answer makes no sense
"""

from typing import ClassVar


class RequestEnded(Exception):
    """The base of this package's errors."""


class ClientGone(RequestEnded):
    """The client hung up."""


class ProxyError(RequestEnded):
    """An error with an answer.

    Args:
        message: for the client; says what happened and, where there is something, what to do.
        param: the field of the request body at fault.
    """

    status: ClassVar[int]
    kind: ClassVar[str]  # OpenAI's `error.type`, in vLLM's words
    retry_after_s: ClassVar[int | None] = None

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequest(ProxyError):
    status = 400
    kind = "BadRequestError"


class BodyTimeout(InvalidRequest):
    status = 408
    kind = "RequestTimeoutError"


class BodyTooLarge(InvalidRequest):
    status = 413
    kind = "RequestTooLargeError"


class DeadlineExceeded(ProxyError):
    status = 504
    kind = "GatewayTimeoutError"


class Draining(ProxyError):
    status = 503
    kind = "ServiceUnavailableError"
    retry_after_s = 1


class UpstreamError(ProxyError):
    reason: ClassVar[str]  # label of omni_proxy_upstream_failures_total


class Unreachable(UpstreamError):
    status = 503
    kind = "ServiceUnavailableError"
    retry_after_s = 1
    reason = "unreachable"


class Died(UpstreamError):
    status = 502
    kind = "BadGatewayError"
    reason = "died"

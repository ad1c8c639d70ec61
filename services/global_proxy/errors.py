"""Everything that can end a request early.

RequestEndedError
├── ClientGoneError             the client hung up: there is nobody to answer
└── ProxyError                  answered in OpenAI's shape, with `status` and `kind`
    ├── InvalidRequestError     400
    │   ├── BodyTimeoutError    408
    │   └── BodyTooLargeError   413
    ├── DeadlineError           504
    ├── DrainingError           503   the proxy is stopping
    └── UpstreamError                 an engine let us down
        ├── UnreachableError    503   no connection was ever made: nothing ran there
        └── DiedError           502   the connection broke, or the answer makes no sense
"""

from typing import ClassVar


class RequestEndedError(Exception):
    """The base of this package's errors."""


class ClientGoneError(RequestEndedError):
    """The client hung up."""


class ProxyError(RequestEndedError):
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


class InvalidRequestError(ProxyError):
    status = 400
    kind = "BadRequestError"


class BodyTimeoutError(InvalidRequestError):
    status = 408
    kind = "RequestTimeoutError"


class BodyTooLargeError(InvalidRequestError):
    status = 413
    kind = "RequestTooLargeError"


class DeadlineError(ProxyError):
    status = 504
    kind = "GatewayTimeoutError"


class DrainingError(ProxyError):
    status = 503
    kind = "ServiceUnavailableError"
    retry_after_s = 1


class UpstreamError(ProxyError):
    reason: ClassVar[str]  # label of omni_proxy_upstream_failures_total


class UnreachableError(UpstreamError):
    status = 503
    kind = "ServiceUnavailableError"
    retry_after_s = 1
    reason = "unreachable"


class DiedError(UpstreamError):
    status = 502
    kind = "BadGatewayError"
    reason = "died"

"""Everything that can end a request early.

RequestEndedError
├── ClientGoneError             the client hung up: there is nobody to answer
└── ProxyError                  answered in OpenAI's shape, with `status` and `kind`
    ├── InvalidRequestError     400
    │   └── BodyTooLargeError   413
    ├── DeadlineError           504
    ├── DrainingError           503   the proxy is stopping
    ├── NoInstanceError         503   none of a role is there to be asked
    └── UpstreamError                 an instance let us down: another may do better
        ├── UnreachableError    503   no connection was ever made: nothing ran there
        ├── DiedError           502   the connection broke
        ├── NonsenseError       502   the answer makes no sense
        └── EngineStatusError         the engine's own 5xx: told in our words (engine_failure.py) if nobody does better
"""

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from services.global_proxy.http.engine_connection import EngineAnswer
    from services.global_proxy.instances.instance import Instance


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

    status: int = 500
    kind: str = "InternalServerError"  # OpenAI's `error.type`, in vLLM's words
    retry_after_s: int | None = None

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequestError(ProxyError):
    status = 400
    kind = "BadRequestError"


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


class NoInstanceError(ProxyError):
    status = 503
    kind = "ServiceUnavailableError"
    retry_after_s = 1


class UpstreamError(ProxyError):
    """Args: instance: which let us down."""

    reason: str  # label of omni_proxy_upstream_failures_total and omni_proxy_retries_total
    text: ClassVar[str]

    def __init__(self, instance: "Instance") -> None:
        super().__init__(self.text.format(role=instance.role))
        self.instance = instance


class UnreachableError(UpstreamError):
    status = 503
    kind = "ServiceUnavailableError"
    retry_after_s = 1
    reason = "unreachable"
    text = "No connection to the {role} instance"


class DiedError(UpstreamError):
    status = 502
    kind = "BadGatewayError"
    reason = "died"
    text = "The {role} instance broke off the request"


class NonsenseError(UpstreamError):
    status = 502
    kind = "BadGatewayError"
    reason = "nonsense"
    text = "The {role} instance's answer is nonsense"


class EngineStatusError(UpstreamError):
    text = "The {role} instance failed"

    def __init__(self, instance: "Instance", answer: "EngineAnswer") -> None:
        super().__init__(instance)
        self.answer = answer
        self.path_header: tuple[bytes, bytes] = (b"x-omni-path", b"disaggregated")
        self.status = answer.head.status
        self.reason = f"status_{answer.head.status}"

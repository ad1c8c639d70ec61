"""How often failed legs are sent again: enough to hide a lost instance, too rarely to bury the others."""

from services.global_proxy.call import Call
from services.global_proxy.errors import UpstreamError
from services.global_proxy.observing.metrics import Metrics

_SHARE = 0.2  # of requests
_RESERVE = 20.0  # retries that a quiet proxy has at hand


class RetryBudget:
    """What an instance had when it was ejected may all be sent elsewhere, once: that is no storm.

    Beyond it, retries are a share of the requests.

    Args:
        max_retries: of one request.
    """

    def __init__(self, max_retries: int, metrics: Metrics) -> None:
        self._max_retries = max_retries
        self._metrics = metrics
        self._left = _RESERVE

    def request_came(self) -> None:
        self._left = min(self._left + _SHARE, _RESERVE)

    def may_retry(self, call: Call, error: UpstreamError) -> bool:
        """Whether to ask another instance. If so, that is counted."""
        call.note_failure(error)
        if call.record.retries >= self._max_retries:
            return False
        if not error.instance.take_excuse():
            if self._left < 1.0:
                return False
            self._left -= 1.0
        call.record.retries += 1
        self._metrics.retries.labels(error.instance.role, error.reason).inc()
        return True

"""When an instance is passed over because requests to it fail, and how it comes back."""

import random

_FIRST_S = 2.0
_LONGEST_S = 60.0
_DEATHS = 3  # requests in a row that an instance took and let down


class Ejection:
    """One instance's record, in one worker process.

    An instance that fails is ejected for a while, twice as long each time. Then it is half open: one request is let
    through, and once that is answered, others. Answers of 4xx are good ones: it is the request that was at fault.

    Attributes:
        half_open: it was ejected, and has answered nothing since.
    """

    def __init__(self) -> None:
        self.half_open = False
        self._num_failed = 0  # in a row
        self._num_ejected = 0  # since it last did all of a request

    @property
    def clean(self) -> bool:
        return self._num_failed == 0 and self._num_ejected == 0

    def failed(self, reason: str) -> float | None:
        """A request failed: "unreachable", or anything else. Returns for how many seconds to eject it now, if so."""
        self._num_failed += _DEATHS if reason == "unreachable" else 1  # without a connection nothing can be served
        if self._num_failed < _DEATHS and not self.half_open:
            return None
        seconds = min(_FIRST_S * 2.0**self._num_ejected, _LONGEST_S)
        self._num_failed = 0
        self._num_ejected += 1
        self.half_open = True
        return seconds * random.uniform(1.0, 1.25)  # noqa: S311 (so that instances do not come back in step)

    def ejected_elsewhere(self) -> None:
        """Another worker process has ejected it, for which there is a reason here, too."""
        self._num_failed = 0
        self._num_ejected += 1
        self.half_open = True

    def answered(self) -> None:
        """It has begun to answer. What it has done so often before, it may still break off."""
        self.half_open = False

    def succeeded(self) -> None:
        """It has done all of a request."""
        self.half_open = False
        self._num_failed = self._num_ejected = 0

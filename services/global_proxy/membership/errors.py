"""What can be wrong with the membership.

ValueError                      a value is wrong: the message names it and says what to do
├── UnknownInstanceError        no member has this name
└── StillBusyError              an instance has requests, so it was not removed
RuntimeError
├── ChannelClosedError          the registry's process is gone, or does not answer
└── WorkerStartError            a worker process ended or was silent before it served
"""


class UnknownInstanceError(ValueError):
    """No member has this name."""


class StillBusyError(ValueError):
    """An instance has requests, so it was not removed."""


class ChannelClosedError(RuntimeError):
    """An answer will not come."""


class WorkerStartError(RuntimeError):
    """A worker process ended, or was silent, before it served."""

"""Why a stream ends.

ControlPlaneError
├── NotGenuineError     the other side has not proven that it holds the deployment key
└── RefusedError        it has, but the instance cannot be a member here
"""


class ControlPlaneError(Exception):
    """The base of this package's errors."""


class NotGenuineError(ControlPlaneError):
    """Says nothing of what was wrong to the other side."""


class RefusedError(ControlPlaneError):
    """The message is for the instance's log: what is wrong there and what to do."""

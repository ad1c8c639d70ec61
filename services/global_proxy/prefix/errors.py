"""What can go wrong with an engine's KV events.

KvEventError
└─ MalformedEventError   what came is not a batch of KV events
"""


class KvEventError(Exception):
    """The base of this package's errors."""


class MalformedEventError(KvEventError):
    """The message says what is wrong with the batch."""

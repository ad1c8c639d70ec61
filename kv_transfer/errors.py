"""Everything that can go wrong while KV blocks move.

KVTransferError
├── HandOffError        hand-off parameters that are not ours, incomplete or out of bounds
├── ProtocolError       a peer sent something that is not our protocol
├── PeerRefusedError    the peer answered, and said no: its blocks and ours do not mean the same bytes
├── AuthError           a peer does not hold the deployment key
├── PeerUnreachableError  no connection, or it broke
├── DeadlineError       the load did not end in its time
├── LeaseEndedError     the blocks may have been reused before the read ended: what was read is void
├── CancelledError      nobody waits for the load any more
└── ChecksumError       the bytes that arrived are not the bytes that were sent
"""


class KVTransferError(Exception):
    """Base class; `reason` labels the failure in logs and metrics."""

    reason = "other"


class HandOffError(KVTransferError):
    reason = "hand_off"


class ProtocolError(KVTransferError):
    reason = "protocol"


class PeerRefusedError(KVTransferError):
    reason = "refused"


class AuthError(KVTransferError):
    reason = "auth"


class PeerUnreachableError(KVTransferError):
    reason = "unreachable"


class DeadlineError(KVTransferError):
    reason = "deadline"


class LeaseEndedError(KVTransferError):
    reason = "lease_ended"


class CancelledError(KVTransferError):
    reason = "cancelled"


class ChecksumError(KVTransferError):
    reason = "checksum"


FAILURE_REASONS = tuple(sorted({KVTransferError.reason, *(kind.reason for kind in KVTransferError.__subclasses__())}))

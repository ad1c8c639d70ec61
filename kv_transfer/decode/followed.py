"""Layer-wise hand-off, D's worker: what is to be read next of a prompt that P is still computing."""

from dataclasses import dataclass

from kv_transfer.protocol import PrefillProgress


@dataclass(frozen=True)
class Due:
    """Read these layers (positions in the source's layout) of tokens [first_token, end_token)."""

    first_token: int
    end_token: int
    layers: range


class Followed:
    """What has been read of one source.

    Args:
        first_token, end_token: what this reader needs.
        num_layers: of the source.
    """

    def __init__(self, first_token: int, end_token: int, num_layers: int) -> None:
        self._first_token = first_token
        self._end_token = end_token
        self._all_layers = range(num_layers)
        self._read_end = 0  # before it, every layer has been read
        self._partial_end = 0  # from there up to here, these layers
        self._partial_layers = 0

    @property
    def is_complete(self) -> bool:
        return self._read_end >= self._end_token

    def next_reads(self, progress: PrefillProgress) -> list[Due]:
        """What the progress lets us read that was not read before; it counts as read from now on."""
        due: list[Due] = []
        if progress.end_token > self._read_end:
            begun = max(self._read_end, self._partial_end)
            due += self._clipped(self._read_end, begun, self._all_layers[self._partial_layers :])
            due += self._clipped(begun, progress.end_token, self._all_layers)
            self._read_end, self._partial_end, self._partial_layers = progress.end_token, 0, 0
        if progress.partial_end_token > self._read_end and progress.num_layers > self._partial_layers:
            layers = self._all_layers[self._partial_layers : progress.num_layers]
            due += self._clipped(self._read_end, progress.partial_end_token, layers)
            self._partial_end, self._partial_layers = progress.partial_end_token, progress.num_layers
        return due

    def _clipped(self, first_token: int, end_token: int, layers: range) -> list[Due]:
        first, end = max(first_token, self._first_token), min(end_token, self._end_token)
        return [Due(first, end, layers)] if first < end and layers else []

"""A log file that is rotated by size and never stops what is logged."""

from pathlib import Path


class RotatingLog:
    """Appends bytes; at `max_bytes` the file becomes NAME.1, that one NAME.2 and so on.

    When the disk is full, or the folder gone, what cannot be written is dropped and counted.
    """

    def __init__(self, path: Path, *, max_bytes: int = 32 << 20, num_old: int = 3) -> None:
        self.path = path
        self.num_dropped_bytes = 0
        self._max_bytes = max_bytes
        self._num_old = num_old
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)

    def write(self, data: bytes) -> None:
        try:
            if self._file.tell() + len(data) > self._max_bytes:
                self._rotate()
            num_written = self._file.write(data)
        except OSError:
            num_written = 0
        self.num_dropped_bytes += len(data) - num_written  # a disk that gets full takes a part

    def close(self) -> None:
        self._file.close()

    def _rotate(self) -> None:
        """Raises OSError, and goes on with the present file, when a new one cannot be opened."""
        if self.path.exists():  # else it was renamed before, and opening a new one failed
            for index in range(self._num_old, 0, -1):
                older = self.path.with_name(f"{self.path.name}.{index}")
                newer = self.path if index == 1 else self.path.with_name(f"{self.path.name}.{index - 1}")
                if newer.exists():
                    newer.replace(older)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        full, self._file = self._file, self.path.open("ab", buffering=0)
        full.close()

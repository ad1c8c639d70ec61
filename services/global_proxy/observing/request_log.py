"""One line of JSON per request.

Lines gather in memory and are written together, at most every 100 ms: a timer runs only while there are any. Writing
never waits: what a full disk or a reader that has gone away does not take is dropped and counted.
"""

import asyncio
import fcntl
import os
import select
import stat
import time
from datetime import UTC, datetime

import msgspec

from services.global_proxy.observing.cells import Counter

_FLUSH_S = 0.1
_MAX_PENDING_BYTES = 4 * 1024 * 1024
_PIPE_BYTES = 1024 * 1024  # asked for: as much as an ordinary user may
_NEWLINE = 0x0A
_LAST_WRITE_S = 0.5  # for a reader that is slow when the proxy stops


class RequestRecord(msgspec.Struct, gc=False):
    """What became of a request; filled in on its way. Durations are in seconds."""

    id: str
    path: str
    time: datetime | None = None  # wall clock, of the answer's end; set by the log
    status: int = 0
    client_id: str | None = None  # the client's own name for it
    key: str | None = None  # the name of its API key
    trace_id: str | None = None  # if it is traced
    prefill: str | None = None  # the instances asked last
    decode: str | None = None
    decode_only: str | None = None  # why P had no part in it
    mixed: str | None = None  # the instance that did all of it
    retries: int = 0
    continued: int = 0  # times that another D went on with the stream
    queue_s: float | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    seconds: float = 0.0
    prompt_tokens: int | None = None
    chunks: int = 0
    bytes: int = 0  # of the answer's body
    error: str | None = None


class RequestLog:
    """Writes records to a descriptor. Use it on the event loop's thread; close it.

    Args:
        descriptor: a file, pipe, socket or terminal, such as stderr's. It stays open.
        dropped: counts the lines that could not be written.
        max_pending_bytes: what may wait in memory for a slow reader.
    """

    def __init__(self, descriptor: int, dropped: Counter, max_pending_bytes: int = _MAX_PENDING_BYTES) -> None:
        self._output = _Output(descriptor)
        self._dropped = dropped
        self._max_pending_bytes = max_pending_bytes
        self._encode_into = msgspec.json.Encoder().encode_into
        self._pending = bytearray()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, record: RequestRecord) -> None:
        """The record is encoded at once and may change afterwards."""
        pending = self._pending
        start = len(pending)
        if start >= self._max_pending_bytes:
            self._dropped.inc()
            return
        record.time = datetime.now(UTC)
        try:
            self._encode_into(record, pending, -1)
        except UnicodeEncodeError:  # a text that came from bytes which are none
            self._dropped.inc()
            del pending[start:]  # msgspec leaves there what memory held
            return
        pending += b"\n"
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_FLUSH_S, self._flush)

    def close(self) -> None:
        """Write what there is; wait for a slow reader, but not for long."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        give_up_s = time.monotonic() + _LAST_WRITE_S
        while not self._write():
            left_s = give_up_s - time.monotonic()
            if left_s <= 0 or not self._output.wait(left_s):
                break
        self._drop()
        self._output.close()

    def _flush(self) -> None:
        self._timer = None
        if not self._write():
            self._timer = asyncio.get_running_loop().call_later(_FLUSH_S, self._flush)

    def _write(self) -> bool:
        """Whether nothing is left to write."""
        try:
            del self._pending[: self._output.write(self._pending)]
        except OSError:
            self._drop()
        return not self._pending

    def _drop(self) -> None:
        self._dropped.inc(self._pending.count(b"\n"))
        self._pending.clear()
        self._output.end_line()


class _Output:
    """A descriptor that is written without waiting, and so that other processes' lines stay whole."""

    def __init__(self, descriptor: int) -> None:
        mode = os.fstat(descriptor).st_mode
        self._is_file = stat.S_ISREG(mode)  # never waits; shares its position with whoever else writes there
        self._descriptor = os.dup(descriptor) if self._is_file else _reopen(descriptor)
        self._may_block = os.get_blocking(self._descriptor) and not self._is_file
        if stat.S_ISFIFO(mode):
            self._enlarge_pipe()
        self._poll = select.poll()
        self._poll.register(self._descriptor, select.POLLOUT)
        self._mid_line = False  # what was taken last ends inside a line
        self._owes_newline = False  # the rest of that line was given up

    def _enlarge_pipe(self) -> None:
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        except OSError:
            return  # one user's pipes together have a limit; the usual 64 KiB will do

    def write(self, lines: bytearray) -> int:
        """How many bytes were taken: fewer than all when there is no room now. Raises OSError when none will be."""
        taken = 0
        with memoryview(lines) as view:
            while taken < len(lines):
                if self._may_block and not self.wait(0):
                    break
                try:
                    if self._owes_newline:
                        os.write(self._descriptor, b"\n")
                        self._owes_newline = False
                    taken += os.write(self._descriptor, view[taken : self._piece_end(lines, taken)])
                except BlockingIOError:
                    break
                except OSError:
                    if taken == 0:
                        raise
                    break  # next time it is the first
        if taken > 0:
            self._mid_line = lines[taken - 1] != _NEWLINE
        return taken

    def end_line(self) -> None:
        """What has not been taken will not come: the next line must not be glued to half of the last one."""
        self._owes_newline = self._owes_newline or self._mid_line
        self._mid_line = False

    def wait(self, timeout_s: float) -> bool:
        """Whether there is room, or an error to be had, within this time."""
        return bool(self._poll.poll(timeout_s * 1000))

    def close(self) -> None:
        os.close(self._descriptor)

    def _piece_end(self, lines: bytearray, start: int) -> int:
        """Where to cut: several processes write to one pipe, and PIPE_BUF bytes at once are not mixed with theirs."""
        end = start + select.PIPE_BUF
        if self._is_file or end >= len(lines):
            return len(lines)
        return lines.rfind(b"\n", start, end) + 1 or end


def _reopen(descriptor: int) -> int:
    """The same pipe or terminal without waiting: to change `descriptor` itself would do so for all who share it."""
    try:
        return os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK)
    except OSError:  # a socket
        return os.dup(descriptor)

"""Where an answer's body ends, and its chunks' boundaries (RFC 9112, sections 6 and 7).

A stream is relayed as it came, chunk framing included: all that is looked at is the size line of each chunk.
"""

from collections.abc import Iterator

MAX_ANSWER_BYTES = 256 * 1024 * 1024  # of an answer that is read whole
_MAX_CHUNK_BYTES = 64 * 1024 * 1024
_MAX_SIZE_LINE = 64  # bytes: sixteen hexadecimal digits and any extension that a server of this world sends
_HEX = b"0123456789abcdefABCDEF"
_USUAL_SIZES = {b"%x" % num_bytes: num_bytes for num_bytes in range(2048)}  # looking one up takes half the time
_MAX_USUAL_LINE = 5  # bytes of a size line, its end included

LAST_CHUNK = b"0\r\n\r\n"


class FramingError(ValueError):
    """The peer breaks the rules of HTTP."""


def as_chunk(payload: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(payload), payload)


class LengthFraming:
    """A body with a Content-Length. Raises FramingError: it is too long."""

    def __init__(self, num_bytes: int) -> None:
        if num_bytes > MAX_ANSWER_BYTES:
            raise FramingError(f"an answer of {num_bytes} bytes")
        self._num_bytes = num_bytes

    def take_all(self, buffer: bytearray) -> bytes | None:
        """The payload, once all of it is in `buffer`, which is then empty. Raises FramingError if there is more."""
        if len(buffer) < self._num_bytes:
            return None
        if len(buffer) > self._num_bytes:
            raise FramingError("more bytes than the Content-Length announces")
        payload = bytes(buffer)
        buffer.clear()
        return payload


class ChunkedFraming:
    """A chunked body. Trailers are not taken: no engine sends any.

    Attributes:
        done: the last chunk has been seen.
        num_needed: how much of what is not yet a whole chunk must be there for another look to be of use.
    """

    def __init__(self) -> None:
        self.done = False
        self.num_needed = 0
        self._payload = bytearray()

    def take_all(self, buffer: bytearray) -> bytes | None:
        """The payload, once all of it has been in `buffer`, which is then empty. Raises FramingError."""
        if len(buffer) < self.num_needed:
            return None
        data = bytes(buffer)
        num_whole = self.whole_chunks(data)
        del buffer[:num_whole]
        self._payload += b"".join(payloads(data[:num_whole]))
        if len(self._payload) > MAX_ANSWER_BYTES:
            raise FramingError("an endless answer")
        return bytes(self._payload) if self.done else None

    def whole_chunks(self, data: bytes) -> int:
        """How many leading bytes of `data` are whole chunks; the rest belongs to the start of the next call's `data`.

        Raises FramingError.
        """
        position, end, num_needed = 0, len(data), 0
        while position < end:
            chunk = _chunk_at(data, position)
            if chunk is None:
                break
            start, stop = chunk
            if stop + 2 > end:
                num_needed = stop + 2 - position
                break
            if data[stop : stop + 2] != b"\r\n":
                raise FramingError("a chunk that does not end where it says, or a trailer")
            position = stop + 2
            if start == stop:
                if position != end:
                    raise FramingError("bytes after the last chunk")
                self.done = True
        self.num_needed = num_needed
        return position


def is_one_chunk(data: bytes) -> bool:
    """Whether it is one whole chunk of a usual size and not the last: most of what engines send. False says nothing."""
    line_end = data.find(b"\r\n", 0, _MAX_USUAL_LINE)
    num_bytes = _USUAL_SIZES.get(data[:line_end], 0)
    return num_bytes > 0 and line_end + num_bytes + 4 == len(data) and data.endswith(b"\r\n")


def payloads(data: bytes) -> Iterator[bytes]:
    """What is in `data`, which is whole chunks."""
    position = 0
    while position < len(data):
        chunk = _chunk_at(data, position)
        assert chunk is not None, "whole chunks"
        start, stop = chunk
        if start != stop:
            yield data[start:stop]
        position = stop + 2


def _chunk_at(data: bytes, position: int) -> tuple[int, int] | None:
    """Where the payload of the chunk at `position` starts and stops; None while its size line is not all there."""
    line_end = data.find(b"\r\n", position, position + _MAX_SIZE_LINE)
    if line_end < 0:
        if len(data) - position >= _MAX_SIZE_LINE:
            raise FramingError("a chunk without a size")
        return None
    line = data[position:line_end]
    num_bytes = _USUAL_SIZES.get(line)
    if num_bytes is None:
        num_bytes = _size(line)
    start = line_end + 2
    return start, start + num_bytes


def _size(line: bytes) -> int:
    digits = line.partition(b";")[0].rstrip(b" \t")
    if not digits or digits.translate(None, _HEX) or b"\n" in line or b"\r" in line:  # int() takes signs, 0x and _
        raise FramingError(f"not a chunk size: {line[:20]!r}")
    num_bytes = int(digits, 16)
    if num_bytes > _MAX_CHUNK_BYTES:
        raise FramingError(f"a chunk of {num_bytes} bytes")
    return num_bytes

"""However a body is split on its way, the same bytes come out; what is no chunk is an error."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.global_proxy.http import framing
from services.global_proxy.http.framing import LAST_CHUNK, ChunkedFraming, FramingError, LengthFraming, as_chunk

CHUNKS = st.lists(st.one_of(st.binary(min_size=1, max_size=40), st.just(b"x" * 5000)), max_size=6)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


@given(CHUNKS, st.lists(st.integers(min_value=0), max_size=12))
def test_any_split_of_a_whole_body(chunks: list[bytes], cuts: list[int]) -> None:
    body, buffer, taken = ChunkedFraming(), bytearray(), None
    for piece in pieces(b"".join(map(as_chunk, chunks)) + LAST_CHUNK, cuts):
        assert taken is None or not piece
        buffer += piece
        taken = body.take_all(buffer) if taken is None else taken
    assert taken == b"".join(chunks)
    assert not buffer


@given(CHUNKS, st.lists(st.integers(min_value=0), max_size=12))
def test_any_split_of_a_stream(chunks: list[bytes], cuts: list[int]) -> None:
    """Nothing but whole chunks comes out, as soon as they are there; waiting for `num_needed` misses nothing."""
    stream, data = ChunkedFraming(), b"".join(map(as_chunk, chunks)) + LAST_CHUNK
    out, rest = b"", b""
    for piece in pieces(data, cuts):
        rest += piece
        if len(rest) < stream.num_needed:
            assert ChunkedFraming().whole_chunks(rest) == 0
            continue
        num_whole = stream.whole_chunks(rest)
        assert b"".join(map(as_chunk, framing.payloads(rest[:num_whole]))) in (rest[:num_whole], rest[:num_whole][:-5])
        out, rest = out + rest[:num_whole], rest[num_whole:]
    assert (out, rest, stream.done) == (data, b"", True)


@pytest.mark.parametrize(
    "data",
    [b"2;name=value\r\nab\r\n0;last\r\n\r\n", b"2 \r\nab\r\n00\r\n\r\n", b"0002\r\nab\r\n" + LAST_CHUNK],
)
def test_other_ways_to_write_a_size(data: bytes) -> None:
    assert ChunkedFraming().take_all(bytearray(data)) == b"ab"


@pytest.mark.parametrize(
    "data",
    [
        *(b"%b\r\nab\r\n" % size for size in (b"", b" 2", b"2\x0b", b"-2", b"+2", b"0x2", b"2_0", b"g", b";2", b"2\n")),
        b"2;x\ny\r\nab\r\n",
        b"2\r\nabc\r\n",
        b"2\r\nab\n\r",
        b"f" * 64,
        b"fffffffff\r\n",
        b"4000001\r\n",
        b"0\r\nTrailer: x\r\n\r\n",
        LAST_CHUNK + b"0",
        b"0" * 70 + b"\r\n",
    ],
)
def test_malformed(data: bytes) -> None:
    with pytest.raises(FramingError):
        ChunkedFraming().whole_chunks(data)
    with pytest.raises(FramingError):
        ChunkedFraming().take_all(bytearray(data))


@given(st.binary(max_size=200))
def test_nonsense_never_fails_otherwise(data: bytes) -> None:
    try:
        assert ChunkedFraming().whole_chunks(data) <= len(data)
    except FramingError:
        return


@given(st.one_of(st.binary(max_size=300).map(as_chunk), st.binary(max_size=20)), st.binary(max_size=3))
def test_what_passes_for_one_chunk_is_one(data: bytes, more: bytes) -> None:
    stream = ChunkedFraming()
    if framing.is_one_chunk(data + more):
        assert (stream.whole_chunks(data + more), stream.done) == (len(data + more), False)


def test_one_chunk() -> None:
    event = as_chunk(b"data: {}\n\n")
    assert framing.is_one_chunk(event)
    for other in (b"", LAST_CHUNK, event[:-1], event + b"x", event[:-2] + b"xx", event * 2, event + LAST_CHUNK):
        assert not framing.is_one_chunk(other)


def test_a_large_chunk_is_walked_once() -> None:
    """Looking at all of it for each piece would take quadratic time."""
    body, buffer = ChunkedFraming(), bytearray(b"100000\r\n")
    assert body.take_all(buffer) is None
    assert body.num_needed == len(b"100000\r\n") + 0x100000 + 2


def test_endless_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(framing, "MAX_ANSWER_BYTES", 1000)
    with pytest.raises(FramingError):
        LengthFraming(1001)
    body = ChunkedFraming()
    assert body.take_all(bytearray(as_chunk(b"x" * 1000))) is None
    with pytest.raises(FramingError):
        body.take_all(bytearray(as_chunk(b"x")))


def test_length() -> None:
    body, buffer = LengthFraming(3), bytearray(b"ab")
    assert body.take_all(buffer) is None
    buffer += b"c"
    assert body.take_all(buffer) == b"abc"
    assert LengthFraming(0).take_all(bytearray()) == b""
    with pytest.raises(FramingError):
        LengthFraming(3).take_all(bytearray(b"abcd"))

"""The number of cached tokens that a client is told."""

from services.global_proxy.cached_tokens import CachedTokensSink, with_cached_tokens
from services.global_proxy.http.framing import LAST_CHUNK, as_chunk


class Taken:
    def __init__(self) -> None:
        self.data: list[tuple[bytes, bool]] = []

    def take(self, data: bytes, done: bool) -> None:
        self.data.append((data, done))


def test_a_whole_answer() -> None:
    body = b'{"usage":{"prompt_tokens":600,"prompt_tokens_details":{"cached_tokens":599}}}'
    assert with_cached_tokens(body, 0) == body.replace(b"599", b"0")
    assert with_cached_tokens(body.replace(b"599", b"null"), 512) == body.replace(b"599", b"512")


def test_text_that_looks_like_it_stays() -> None:
    body = rb'{"text":"\"cached_tokens\":7"}'
    assert with_cached_tokens(body, 0) == body


def test_a_stream_changes_in_that_event_alone() -> None:
    taken = Taken()
    sink = CachedTokensSink(taken, 512)
    plain = as_chunk(b'data: {"choices":[]}\n\n')
    usage = b'data: {"usage":{"prompt_tokens_details":{"cached_tokens":9}}}\n\n'
    sink.take(plain, False)
    sink.take(as_chunk(usage) + plain + LAST_CHUNK, True)
    assert taken.data == [
        (plain, False),
        (as_chunk(usage.replace(b":9", b":512")) + plain + LAST_CHUNK, True),
    ]

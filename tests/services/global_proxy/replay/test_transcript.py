"""What no engine of ours sends. The rest is in test_streams.py."""

from typing import cast

import pytest

from services.global_proxy.http.framing import LAST_CHUNK, FramingError, as_chunk
from services.global_proxy.http.reply import Reply
from services.global_proxy.observing.cells import Histogram
from services.global_proxy.replay.transcript import Transcript

EVENT = b'data: {"created":1,"choices":[{"text":"a","finish_reason":null,"prompt_token_ids":[5],"token_ids":%b}]}\n\n'


class Client:
    """Takes what a reply takes."""

    def __init__(self) -> None:
        self.received = b""
        self.complete = False

    def take(self, data: bytes, done: bool = False) -> None:
        assert not self.complete
        self.received += data
        self.complete = done


class Unobserved:
    def observe(self, value: float) -> None:
        pass


def transcript() -> tuple[Transcript, Client]:
    client = Client()
    return Transcript(cast(Reply, client), cast(Histogram, Unobserved())), client


async def test_a_stream_that_ends_inside_an_event_ends_there_for_the_client_too() -> None:
    relay, client = transcript()
    relay.take(as_chunk(b"data: 1\n\ndata: 2\n") + LAST_CHUNK, True)
    assert client.received == as_chunk(b"data: 1\n\ndata: 2\n") + LAST_CHUNK
    assert client.complete


async def test_a_stream_of_nothing() -> None:
    relay, client = transcript()
    relay.take(LAST_CHUNK, True)
    assert not client.received, "the last chunk is the reply's"


@pytest.mark.parametrize("ids", [b"[1,x]", b'["1"]', b"[1"])
async def test_token_ids_that_are_none(ids: bytes) -> None:
    relay, client = transcript()
    relay.take(as_chunk(EVENT % b"[7]"), False)
    sent = client.received
    assert (relay.prompt_token_ids, relay.token_ids, relay.created) == (b"[5]", [7], b"1")
    event = EVENT % ids if ids.endswith(b"]") else b'data: {"text":"a","token_ids":[1}\n\n'
    with pytest.raises(FramingError):
        relay.take(as_chunk(event), False)
    assert (client.received, relay.token_ids) == (sent, [7])

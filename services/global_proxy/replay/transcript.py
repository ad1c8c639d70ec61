"""What of a stream the client has: relayed event by event, its token ids taken out and kept.

D is asked for token ids in secret. Where the client would find null they are replaced by null again, with bytes moved,
not parsed: a quote inside of a JSON string is escaped, so the names searched for are names.
"""

from collections.abc import Callable

from services.global_proxy.error_events import loss_in
from services.global_proxy.http.framing import LAST_CHUNK, FramingError, as_chunk, payloads
from services.global_proxy.http.reply import Reply
from services.global_proxy.observing.cells import Histogram
from services.global_proxy.relay import StreamRelay

DONE = b"data: [DONE]\n\n"
PROMPT_TOKEN_IDS = b'"prompt_token_ids":['

_CREATED = b'"created":'
_TOKEN_IDS = b'"token_ids":['
_EMPTY_DELTA = b'"delta":{}'  # a parser's event without text, which vLLM does not send unless token ids are asked for
_QUOTE = ord('"')

Rewrite = Callable[[bytes], bytes]


class Transcript(StreamRelay):
    """A sink between D and the client, and between the next D and the client.

    Attributes:
        created: of the first event, JSON; None: the client has nothing yet.
        prompt_token_ids: a JSON list; None while D has not told them.
        token_ids: of the events so far.
        num_exact: so many of them stand for the text so far. The others, behind, have given no text.
        num_last: so many of those came in one event, whose text may end before the last of them.
        followed: all events were tokens with their text, or about them. Of anything else D holds a state.
        finished: the finish reason was sent: no token follows.
        done: so was [DONE].
    """

    def __init__(self, reply: Reply, itl_seconds: Histogram) -> None:
        super().__init__(reply, itl_seconds)
        self.created: bytes | None = None
        self.prompt_token_ids: bytes | None = None
        self.token_ids: list[int] = []
        self.num_exact = 0
        self.num_last = 0
        self.followed = True
        self.finished = False
        self.done = False
        self._pending = b""  # the beginning of an event
        self._num_shown = 0  # so many tokens' events the client has; another D sends those again that gave no text
        self._counted = False  # the client has the final usage
        self._rewrite: Rewrite | None = None

    def take(self, data: bytes, done: bool) -> None:
        """Raises FramingError: D tells the client that it has failed, or its token ids are none."""
        self._time()
        start = data.find(b"\n") + 1
        is_one_event = data.find(b"\n\n", start) == len(data) - 4 and data.find(b"\r\n", start) == len(data) - 2
        if is_one_event and not self._pending and not done:  # as vLLM writes them
            self._write(self._pass(data[start:-2]), False)
            return
        out: list[bytes] = []
        try:
            for payload in payloads(data):
                self._split(payload, out)
        except FramingError:
            self._write(b"".join(out), False)  # the stream goes on elsewhere, behind what is sent
            raise
        self._write(b"".join(out), done)

    def go_on(self, rewrite: Rewrite | None = None) -> None:
        """What comes next is another D's: the prompt and the exact tokens were its prompt."""
        self._pending = b""
        self._rewrite = rewrite
        self._num_shown = max(self._num_shown, len(self.token_ids))
        del self.token_ids[self.num_exact :]

    def _split(self, payload: bytes, out: list[bytes]) -> None:
        """Append to `out` what the client gets of the events that end here."""
        *events, self._pending = (self._pending + payload).split(b"\n\n")
        for event in events:
            out.append(self._pass(event + b"\n\n"))

    def _write(self, events: bytes, done: bool) -> None:
        if done:
            events += self._pending
        if events:
            self._reply.take(as_chunk(events) + LAST_CHUNK if done else as_chunk(events), done)

    def _pass(self, event: bytes) -> bytes:
        """The event as the client would have it; empty if not at all."""
        if self._rewrite is not None:
            event = self._rewrite(event)
        start = event.find(_TOKEN_IDS)
        if start < 0:
            return self._pass_without_tokens(event)
        if self.prompt_token_ids is None:
            event = self._begin(event)
            start = event.find(_TOKEN_IDS)
        ids, event = cut_list(event, start + len(_TOKEN_IDS))
        if ids.isdigit():
            self.token_ids.append(int(ids))
            num_new = 1
        else:
            new = _numbers(ids)
            self.token_ids += new
            num_new = len(new)
        gives_text = self._gives_text(event)
        if gives_text:
            self.num_exact = len(self.token_ids)
            self.num_last = num_new
        if event.find(b'"finish_reason":null') < 0:
            self.finished = True
        elif not gives_text and (len(self.token_ids) <= self._num_shown or _EMPTY_DELTA in event):
            return b""
        return event

    def _pass_without_tokens(self, event: bytes) -> bytes:
        """A chat's first event, usage, the end, a failure; or a D that does not say its token ids."""
        if event == DONE:
            self.done = True
        elif event.startswith(b'data: {"error":'):
            if (loss := loss_in(event)) is not None:
                raise FramingError(f"the engine failed in the middle of a stream: {loss!r}")
            self.followed = False
        elif b'"choices":[]' in event:  # usage, which a D that is asked for the end alone tells again
            event, self._counted = b"" if self._counted else event, True
        elif b'"token_ids":null' in event:
            self.followed = False
        elif self.prompt_token_ids is None:
            return self._begin(event)
        return event

    def _begin(self, event: bytes) -> bytes:
        """Note what only the first event tells."""
        start = event.find(_CREATED) + len(_CREATED)
        self.created = event[start : event.find(b",", start)]
        start = event.find(PROMPT_TOKEN_IDS)
        if start < 0:
            return event
        ids, event = cut_list(event, start + len(PROMPT_TOKEN_IDS))
        self.prompt_token_ids = b"[%b]" % ids
        return event

    def _gives_text(self, event: bytes) -> bool:
        start = event.find(b'"text":"')
        if start >= 0:
            return event[start + 8] != _QUOTE
        start = event.find(b'"delta":{"content":"')
        if start >= 0 and event.find(b'"reasoning":', start) < 0:
            return event[start + 20] != _QUOTE
        if _EMPTY_DELTA not in event:
            self.followed = False
        return False


def cut_list(event: bytes, start: int) -> tuple[bytes, bytes]:
    """What is in the list that begins before `start`, and the event with null in its place. Raises FramingError."""
    end = event.find(b"]", start)
    if end < 0:
        raise FramingError("a list without an end")
    return event[start:end], b"%bnull%b" % (event[: start - 1], event[end + 1 :])


def _numbers(ids: bytes) -> list[int]:
    try:
        return [int(token_id) for token_id in ids.split(b",")] if ids else []
    except ValueError as error:
        raise FramingError(f"not token ids: {ids[:40]!r}") from error

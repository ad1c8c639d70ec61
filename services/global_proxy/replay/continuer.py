"""Having others go on with a stream whose D was lost."""

import asyncio
import dataclasses
from dataclasses import dataclass

import msgspec

from services.global_proxy.call import Call
from services.global_proxy.errors import UpstreamError
from services.global_proxy.http.reply import Header, Reply
from services.global_proxy.instances.leg import Leg
from services.global_proxy.instances.pool import Pool
from services.global_proxy.observing.cells import Histogram
from services.global_proxy.policies.base import Prompt
from services.global_proxy.relay import StreamRelay
from services.global_proxy.replay.continuation import ReplayedBody, Rewriting, limits_left
from services.global_proxy.replay.exactness import why_not_exact
from services.global_proxy.replay.transcript import Transcript
from services.global_proxy.request_body import RequestBody

_DETOKENIZE_S = 5.0
_NUM_LAST_TOKENS = 8  # which hold a whole character: it has four bytes at most, and a token that gives text one or more


@dataclass(frozen=True)
class Following:
    """How the stream goes on. `call` is None when the client has all of it."""

    call: Call | None
    sink: Transcript


class _Text(msgspec.Struct):
    prompt: str


class Continuer:
    """Args: enabled: streams that can be continued exactly are, where there is another D or plain engine."""

    header: Header = (b"x-omni-continuable", b"exact")

    def __init__(self, decode: Pool, mixed: Pool, itl_seconds: Histogram, enabled: bool) -> None:
        self._decode = decode
        self._mixed = mixed
        self._itl_seconds = itl_seconds
        self._enabled = enabled

    def could_continue(self, body: RequestBody) -> bool:
        """Whether to note what is sent: a microsecond or two a chunk, and for nothing if one engine alone answers."""
        num_others = len(self._decode.instances) + len(self._mixed.instances) - 1
        if not self._enabled or num_others < 1 or body.fields.get("stream") is not True:
            return False
        return why_not_exact(body) is None

    def transcript(self, reply: Reply) -> Transcript:
        return Transcript(reply, self._itl_seconds)

    async def following(self, call: Call, relay: StreamRelay) -> Following | None:
        """What to ask others for; None if the stream cannot be continued exactly.

        Args: call: the client's own, however often its stream was continued.
        """
        if not isinstance(relay, Transcript):
            return None
        if relay.done:
            return Following(None, relay)
        if not relay.followed:
            return None
        if relay.created is None:  # the client has nothing yet
            relay.go_on()
            return Following(call, relay)
        if relay.prompt_token_ids is None:
            return None
        if relay.finished:
            return self._end(call, relay, relay.prompt_token_ids)
        if relay.num_last > 1:
            num_exact = await self._num_exact(call, relay)
            if num_exact is None:
                return None
            relay.num_exact, relay.num_last = num_exact, 1
        return self._rest(call, relay, relay.prompt_token_ids)

    def _rest(self, call: Call, relay: Transcript, prompt: bytes) -> Following | None:
        left = limits_left(call.body, relay.num_exact)
        if any(most is not None and most < 1 for name, most in left.items() if name != "min_tokens"):
            return None  # all tokens without a finish reason: not vLLM
        body = ReplayedBody.of(call.body, prompt, relay.token_ids[: relay.num_exact])
        relay.go_on(_rewriting(call, relay, prompt, relay.num_exact))
        return Following(_replayed(call, body, relay.num_exact), relay)

    def _end(self, call: Call, relay: Transcript, prompt: bytes) -> Following:
        """The last token was sent. Usage may be missing, which D alone can tell: it makes that token once more."""
        sent = relay.token_ids[:-1]
        body = ReplayedBody.of(call.body, prompt, sent, max_tokens=1)
        relay.num_exact = len(relay.token_ids)
        relay.go_on(_rewriting(call, relay, prompt, len(sent), end_only=True))
        return Following(_replayed(call, body, len(sent)), relay)

    async def _num_exact(self, call: Call, relay: Transcript) -> int | None:
        """How many of the tokens stand for the text, if the last came several in one event.

        Its text then ends with the last token that completed a character. Were a prompt to end inside of a character,
        all of it would come back as text. None if it cannot be told.
        """
        for num_tokens in range(relay.num_exact, relay.num_exact - relay.num_last, -1):
            ids = relay.token_ids[max(num_tokens - _NUM_LAST_TOKENS, 0) : num_tokens]
            text = await self._text(call, ids)
            if text is None:
                return None
            if not text.endswith("\ufffd"):
                return num_tokens
        return None

    async def _text(self, call: Call, token_ids: list[int]) -> str | None:
        prompt, tried = call.prompt, call.tried
        first, second = self._decode, self._mixed
        if not first.has_up(tried):  # what is left of it may be a last resort
            first, second = second, first
        instance = first.choose(prompt, tried) or second.choose(prompt, tried)
        if instance is None:
            return None
        fields = {"model": call.body.sent.get("model"), "tokens": token_ids}
        request = instance.endpoint.request(b"POST", b"/detokenize", call.headers, msgspec.json.encode(fields))
        leg = Leg(instance, 0)
        try:
            async with asyncio.timeout(_DETOKENIZE_S):
                answer = await leg.send(request)
            return msgspec.json.decode(answer.body, type=_Text).prompt if answer.head.status == 200 else None
        except (UpstreamError, TimeoutError, msgspec.DecodeError):
            return None
        finally:
            leg.close()


def _rewriting(call: Call, relay: Transcript, prompt: bytes, num_replayed: int, end_only: bool = False) -> Rewriting:
    num_prompt = prompt.count(b",") + 1
    return Rewriting(relay.created or b"0", num_prompt, num_replayed, call.num_cached_tokens, end_only)


def _replayed(call: Call, body: ReplayedBody, num_replayed: int) -> Call:
    prompt = Prompt(
        body.token_ids.count(b",") + 1,
        max(call.prompt.max_new_tokens - num_replayed, 1),
        call.prompt.session,
        body.token_ids,
    )
    return dataclasses.replace(call, body=body, prompt=prompt, prefill_path=b"/v1/completions", prompt_token_ids=None)

"""The rest of a stream, from another P and D: what they are asked, and how their events become the first D's."""

import re
from typing import Any

import msgspec

from services.global_proxy.replay.transcript import DONE, PROMPT_TOKEN_IDS, cut_list
from services.global_proxy.request_body import RequestBody

_DEFAULT_MAX_TOKENS = 16  # vLLM's, for completions
_KEPT_FOR_PREFILL = ("model", "cache_salt", "priority")  # what KV depends on beside the tokens, and the turn

_encode = msgspec.json.encode
_decode = msgspec.json.Decoder().decode


class ReplayedBody(RequestBody):
    """The client's request, where prompt and sent tokens are the prompt.

    P gets it as a completion, whatever it was: its token ids are final, and a hand-off does not depend on the path. D
    gets it on the client's path, a chat with the ids among the parameters and no messages.

    Attributes:
        token_ids: of that prompt, a JSON list.
    """

    token_ids: bytes

    @classmethod
    def of(cls, body: RequestBody, prompt: bytes, sent: list[int], max_tokens: int | None = None) -> "ReplayedBody":
        """Args:
        prompt: its token ids, a JSON list that is not empty.
        max_tokens: to ask for, if not what is left of the client's limit.
        """
        ids = b"%b,%b" % (prompt[:-1], _encode(sent)[1:]) if sent else prompt
        is_chat = body.fields.get("messages") is not None
        changes: dict[str, Any] = limits_left(body, len(sent)) if max_tokens is None else {"max_tokens": max_tokens}
        changes["messages" if is_chat else "prompt"] = msgspec.Raw(b"[]" if is_chat else ids)
        dropped = ("max_tokens", "max_completion_tokens", "min_tokens")
        fields, raw = (
            {name: value for name, value in old.items() if name not in dropped} | changes
            for old in (body.fields, body.sent)
        )
        replayed = cls(fields, 1, raw)
        replayed.token_ids = ids
        return replayed

    @property
    def plain_json(self) -> bytes:
        return self.decode_json(b"{}")

    @property
    def takes_token_ids(self) -> bool:
        return False  # both legs have them already

    @property
    def num_token_ids(self) -> int | None:
        return self.token_ids.count(b",") + 1

    @property
    def prompt_text(self) -> bytes:
        return self.token_ids

    def prefill_json(self, kv_transfer_params: Any, want_token_ids: bool = False) -> bytes:
        kept = {name: self.sent[name] for name in _KEPT_FOR_PREFILL if name in self.sent}
        prompt = {"prompt": msgspec.Raw(self.token_ids), "max_tokens": 1, "min_tokens": 1, "ignore_eos": True}
        return _encode(kept | prompt | {"kv_transfer_params": kv_transfer_params})

    def decode_json(self, kv_transfer_params: msgspec.Raw | bytes, prompt_token_ids: bytes | None = None) -> bytes:
        return super().decode_json(kv_transfer_params, self.token_ids)


def limits_left(body: RequestBody, num_sent: int) -> dict[str, Any]:
    """What is left of the client's limits when it has so many tokens."""
    fields = body.fields
    is_chat = fields.get("messages") is not None
    name = "max_completion_tokens" if is_chat and fields.get("max_completion_tokens") is not None else "max_tokens"
    most = fields.get(name, None if is_chat else _DEFAULT_MAX_TOKENS)
    least = fields.get("min_tokens")
    if isinstance(least, msgspec.Raw):
        least = _decode(least)
    left: dict[str, Any] = {name: most if most is None else most - num_sent}
    if least is not None:
        left["min_tokens"] = max(least - num_sent, 0)
    return left


_COUNT = re.compile(rb'"(prompt|completion|cached)_tokens":(\d+)')


class Rewriting:
    """Makes the next D's events the first one's, byte for byte; called with one at a time.

    Args:
        created: the first D's, JSON.
        num_prompt, num_replayed: tokens of the client's prompt, and those that were sent and are now behind it.
        num_cached: of the client's prompt; None: nobody knows, and the next P's number has to do.
        end_only: the tokens are all there: only what follows them is wanted.
    """

    def __init__(
        self, created: bytes, num_prompt: int, num_replayed: int, num_cached: int | None = None, end_only: bool = False
    ) -> None:
        self._created = created
        self._num_prompt = num_prompt
        self._num_replayed = num_replayed
        self._num_cached = num_cached
        self._end_only = end_only

    def __call__(self, event: bytes) -> bytes:
        """The event; empty if the client has it already."""
        if event == DONE or event.startswith(b'data: {"error":'):
            return event
        if self._end_only and b'"choices":[]' not in event:
            return b""
        if b'"delta":{"role":' in event and b'"token_ids":[' not in event:
            return b""  # a chat's first event
        head, found, rest = event.partition(b'"created":')
        if found:
            event = b"%b%b%b,%b" % (head, found, self._created, rest.partition(b",")[2])
        start = event.find(PROMPT_TOKEN_IDS)
        if start >= 0:
            _, event = cut_list(event, start + len(PROMPT_TOKEN_IDS))
        start = event.find(b'"usage":{')
        if start >= 0:
            event = event[:start] + _COUNT.sub(self._corrected, event[start:])
        return event

    def _corrected(self, count: re.Match[bytes]) -> bytes:
        """What was sent is no part of the client's prompt."""
        name, number = count[1], int(count[2])
        if name == b"prompt":
            number -= self._num_replayed
        elif name == b"completion":
            number += self._num_replayed
        else:
            number = min(number, self._num_prompt) if self._num_cached is None else self._num_cached
        return b'"%b_tokens":%d' % (name, number)

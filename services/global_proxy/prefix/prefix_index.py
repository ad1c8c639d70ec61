"""How many of a prompt's first tokens each instance has cached, as its KV events say.

1. The prompt's token ids are known, because the client sent them or P told them for this very text: exact, but for what
   happened since the instance's last event.
2. They are known for a beginning of the text: exact as to blocks and evictions; how far the beginning reaches is known
   to a piece of the text (tokens.py).
3. They are not known, or the instance does not tell its events: None, and whoever asks has to guess.
"""

import re
from array import array
from collections.abc import Mapping
from typing import Annotated, Protocol

import msgspec

from services.global_proxy.prefix.index import TOKEN_BYTES, KvEventIndex
from services.global_proxy.prefix.text_pieces import piece_keys, whole_key
from services.global_proxy.prefix.tokens import TokenMemory

_decode_ids = msgspec.json.Decoder(list[Annotated[int, msgspec.Meta(ge=0, le=0xFFFF_FFFF)]]).decode
_is_token_ids = re.compile(rb"\s*\[\s*[0-9]").match


class Prompt(Protocol):
    """What is read of a request."""

    @property
    def num_tokens(self) -> int:
        """Estimated, if the prompt is no list of token ids."""

    @property
    def text(self) -> bytes:
        """The prompt's JSON text: a string, a list of token ids, or a chat's messages. It does not change."""


class PrefixIndex:
    """One process's knowledge. Not thread-safe.

    Args:
        events: kept up to date by the subscribers; contains the instances that tell their events.
    """

    def __init__(self, events: KvEventIndex, tokens: TokenMemory | None = None) -> None:
        self._events = events
        self._tokens = TokenMemory() if tokens is None else tokens
        self._text = b""  # choosing, counting and learning ask for the same keys
        self._keys: list[int] = []
        self._whole_key = whole_key(b"", [])
        self._token_ids: bytes | None = None
        self._prompt: Prompt | None = None  # a policy asks for one instance after the other
        self._version = -1  # of the index, when `_matches` was looked up
        self._matches: Mapping[str, int] | None = None

    def matched_tokens(self, instance_name: str, prompt: Prompt) -> int | None:
        """How many of the prompt's first tokens the instance has cached; None: it is not known."""
        found = self.matches(prompt)
        if found is None or instance_name not in self._events:
            return None
        return found.get(instance_name, 0)

    def matches(self, prompt: Prompt) -> Mapping[str, int] | None:
        """The same for all instances; one that is left out has none, or does not tell. None: the token ids are unknown.

        Always less than the prompt's number of tokens: vLLM computes the last one in any case.
        """
        if prompt is not self._prompt or self._version != self._events.version:
            self._prompt, self._version = prompt, self._events.version
            self._matches = self._look_up(prompt)
        return self._matches

    def num_tokens(self, text: bytes) -> int | None:
        """How many tokens this very text has, if it is a list of token ids, or P has told so before."""
        self._use(text)
        return self._tokens.num_tokens(self._whole_key) if self._token_ids is None else _num_tokens(self._token_ids)

    def learn(self, prompt: Prompt, token_ids_json: bytes | memoryview) -> None:
        """P told the prompt's token ids: a JSON array. What is no such array is passed over."""
        if self.num_tokens(prompt.text) is not None:
            return
        token_ids = _pack_token_ids(token_ids_json)
        if token_ids:
            self._tokens.learn(self._whole_key, self._keys, len(prompt.text), token_ids)

    def _look_up(self, prompt: Prompt) -> Mapping[str, int] | None:
        self._use(prompt.text)
        if self._token_ids is not None:
            return self._events.cached_tokens(self._token_ids)
        known = self._tokens.look_up(self._whole_key, self._keys)
        if known is None:
            return None
        found = self._events.cached_tokens(known.token_ids, known.num_tokens - known.is_whole)
        for name in found:
            if found[name] >= prompt.num_tokens:  # an estimate, and too low
                found[name] = max(0, prompt.num_tokens - 1)
        return found

    def _use(self, text: bytes) -> None:
        """Have the text's token ids, or its keys."""
        if text is self._text:
            return
        self._text = text
        self._token_ids = _pack_token_ids(text) if _is_token_ids(text) else None
        if self._token_ids is None:
            self._keys = piece_keys(text)
            self._whole_key = whole_key(text, self._keys)


def _pack_token_ids(token_ids_json: bytes | memoryview) -> bytes | None:
    """A JSON array of token ids as array("I") has them; None: it is something else."""
    try:
        return array("I", _decode_ids(token_ids_json)).tobytes()
    except msgspec.DecodeError:
        return None


def _num_tokens(token_ids: bytes) -> int:
    return len(token_ids) // TOKEN_BYTES

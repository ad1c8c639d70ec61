"""Which instance was sent which beginnings of prompts: a guess at what it has cached, without asking it."""

from collections.abc import Iterator
from itertools import islice

import xxhash

from services.global_proxy.policies.base import Prompt

_BLOCK_BYTES = 256  # the finest step, about 64 tokens of English
_SHARE = 16  # further on a block is a sixteenth of what came before it, so a long prompt has few
_MOST_BLOCKS = 128 * 1024  # of all prompts; those not sent for longest are forgotten first
_MOST_HOLDERS = 8  # instances remembered for a block: the latest


class SentPrefixes:
    """The blocks of the prompts that were sent, each by a hash of everything up to its end.

    Bounded, and holds nothing but hashes and names: an instance that is gone fades from it.
    """

    def __init__(self) -> None:
        self._holders: dict[int, tuple[str, ...]] = {}  # in order of last use
        self._text = b""  # whose blocks are at hand: a prompt is looked up, then sent
        self._blocks: list[tuple[int, int]] = []

    def matches(self, prompt: Prompt) -> dict[str, int]:
        """Tokens of the prompt's beginning that were sent before, by the name of the instance; left out: none."""
        found: dict[str, int] = {}
        holders = self._holders
        for digest, num_bytes in reversed(self._blocks_of(prompt.text)):
            for name in holders.get(digest, ()):
                if name not in found:
                    found[name] = num_bytes * prompt.num_tokens // len(prompt.text)
        return found

    def add(self, instance_name: str, prompt: Prompt) -> None:
        """The prompt was sent to the instance."""
        holders = self._holders
        for digest, _ in self._blocks_of(prompt.text):
            known = holders.pop(digest, ())
            if instance_name not in known:
                known = (instance_name, *known[: _MOST_HOLDERS - 1])
            holders[digest] = known
        excess = len(holders) - _MOST_BLOCKS
        if excess > 0:
            for digest in list(islice(holders, excess)):
                del holders[digest]

    def _blocks_of(self, text: bytes) -> list[tuple[int, int]]:
        if text is not self._text:
            self._text, self._blocks = text, list(_blocks(text))
        return self._blocks


def _blocks(text: bytes) -> Iterator[tuple[int, int]]:
    """(hash of the text up to the block's end, that end in bytes). What is left over at the end is no block."""
    digest, start, end = 0, 0, _BLOCK_BYTES
    while end <= len(text):
        digest = xxhash.xxh3_64_intdigest(text[start:end], digest)
        yield digest, end
        start, end = end, end + max(_BLOCK_BYTES, end // _SHARE)

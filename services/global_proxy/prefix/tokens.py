"""Token ids of texts that were seen before, so that a prompt's need not be computed to know what is cached of it.

P tells the token ids of every prompt that it answers. What is known of a later text:

- The very same text: its token ids, exactly.
- A text with the same beginning, up to the end of some piece: about how many of the earlier prompt's tokens lie in that
  beginning. Which token ends where is P's tokenizer's knowledge, and a token may reach over the place where two texts
  part (or be merged differently on account of what follows), so no one without that tokenizer can be exact here. The
  first prompt's tokens are taken as spread evenly over its text. As soon as a second prompt parts from it, the tokens
  that the two have in common bound the number from both sides to within the piece in which they part: so for a shared
  system prompt the number is good to a piece after two prompts.

A wrong number makes a worse choice of P, never a wrong answer.
"""

from collections import OrderedDict
from typing import NamedTuple

from services.global_proxy.prefix.index import TOKEN_BYTES
from services.global_proxy.prefix.text_pieces import PIECE_ENDS

MAX_BYTES = 64 << 20
_PIECE_COST_BYTES = 200  # what remembering a piece takes
_PROMPT_COST_BYTES = 500


class KnownTokens(NamedTuple):
    """The tokens with which a text begins."""

    token_ids: bytes  # of a prompt that begins alike
    num_tokens: int  # so many of these
    is_whole: bool  # all of them, and all of the text's


class _Learned:
    """A prompt whose token ids are known."""

    __slots__ = ("key", "keys", "num_bytes", "token_ids")

    def __init__(self, key: int, keys: list[int], token_ids: bytes) -> None:
        self.key = key
        self.keys = keys
        self.token_ids = token_ids
        self.num_bytes = _PROMPT_COST_BYTES + len(token_ids) + _PIECE_COST_BYTES * len(keys)


class TokenMemory:
    """Remembers the prompts used last.

    Args:
        max_bytes: about so much memory.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._prompts: OrderedDict[int, _Learned] = (
            OrderedDict()
        )  # by the whole text's key; the one used last at the end
        self._pieces: dict[int, tuple[_Learned, int]] = {}  # the last prompt with this beginning; tokens of it therein

    def __len__(self) -> int:
        """Prompts."""
        return len(self._prompts)

    def num_tokens(self, key: int) -> int | None:
        """How many this very text has, by its whole key, if it is known."""
        learned = self._prompts.get(key)
        return None if learned is None else len(learned.token_ids) // TOKEN_BYTES

    def look_up(self, key: int, keys: list[int]) -> KnownTokens | None:
        """What is known of a text, by the keys of it and of its pieces."""
        learned = self._prompts.get(key)
        if learned is not None:
            self._prompts.move_to_end(key)
            return KnownTokens(learned.token_ids, len(learned.token_ids) // TOKEN_BYTES, True)
        shared = self._num_shared(keys)
        if not shared:
            return None
        learned, num_tokens = self._pieces[keys[shared - 1]]
        self._prompts.move_to_end(learned.key)
        return KnownTokens(learned.token_ids, num_tokens, False)

    def learn(self, key: int, keys: list[int], num_text_bytes: int, token_ids: bytes) -> None:
        """Remember a text's token ids. One that is known already, or takes more than all the memory, is passed over."""
        learned = _Learned(key, keys, token_ids)
        if key in self._prompts or learned.num_bytes > self._max_bytes:
            return
        num_tokens = len(token_ids) // TOKEN_BYTES
        shared = self._num_shared(keys)
        least, at, most = 0, 0, num_tokens
        if shared:
            earlier, before = self._pieces[keys[shared - 1]]
            most = _num_common(earlier.token_ids, token_ids)
            end = PIECE_ENDS[shared - 1]
            piece_bytes = PIECE_ENDS[shared] - end
            at_least = most - piece_bytes * num_tokens // max(1, num_text_bytes)
            least, at = min(most, max(before, at_least)), end
        for index, piece in enumerate(keys):
            if index < shared - 1:
                earlier_piece = self._pieces.get(piece)
                counted = min(earlier_piece[1], least) if earlier_piece is not None else 0
            else:
                counted = least + (PIECE_ENDS[index] - at) * (num_tokens - least) // max(1, num_text_bytes - at)
            self._pieces[piece] = (learned, counted)
        self._prompts[key] = learned
        self._num_bytes += learned.num_bytes
        while self._num_bytes > self._max_bytes:
            self._forget_oldest()

    def _num_shared(self, keys: list[int]) -> int:
        """How many pieces from the beginning are known."""
        pieces, low, high = self._pieces, 0, len(keys)
        if not high or keys[0] not in pieces:
            return 0
        if keys[-1] in pieces:
            return high
        while high - low > 1:  # as a rule what is known is known from the beginning; if not, less is found
            middle = (low + high) // 2
            if keys[middle] in pieces:
                low = middle
            else:
                high = middle
        return high

    def _forget_oldest(self) -> None:
        _, oldest = self._prompts.popitem(last=False)
        self._num_bytes -= oldest.num_bytes
        for piece in oldest.keys:
            owner = self._pieces.get(piece)
            if owner is not None and owner[0] is oldest:
                del self._pieces[piece]


def _num_common(one: bytes, other: bytes) -> int:
    """How many tokens two sequences have in common at their beginning."""
    low, high = 0, min(len(one), len(other)) // TOKEN_BYTES
    while low < high:
        middle = (low + high + 1) // 2
        start, end = low * TOKEN_BYTES, middle * TOKEN_BYTES
        if one[start:end] == other[start:end]:
            low = middle
        else:
            high = middle - 1
    return low

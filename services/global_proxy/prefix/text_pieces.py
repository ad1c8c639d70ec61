"""A prompt's text as a chain of pieces, each with a key that says it and all before it.

Pieces end at the same places in every text: every 256 bytes at first, further on after a sixteenth of what came before.
So a million bytes have about a hundred of them, and a place is known to 6 %.
"""

import secrets
from collections.abc import Iterator

import xxhash

_FIRST_BYTES = 256
_SHARE = 16
_MAX_TEXT_BYTES = 16 << 20  # what comes after that is in no piece

_SEED = secrets.randbits(64)  # nobody can make texts that look alike


def _ends() -> Iterator[int]:
    end = 0
    while end < _MAX_TEXT_BYTES:
        end += max(_FIRST_BYTES, end // _SHARE)
        yield end


PIECE_ENDS = tuple(_ends())  # bytes


def piece_keys(text: bytes) -> list[int]:
    """The keys of all whole pieces; that of piece i stands for the text's first PIECE_ENDS[i] bytes."""
    keys = []
    digest = xxhash.xxh3_64_intdigest
    length = len(text)
    start, key = 0, _SEED
    for end in PIECE_ENDS:
        if end > length:
            break
        key = digest(text[start:end], key)
        keys.append(key)
        start = end
    return keys


def whole_key(text: bytes, keys: list[int]) -> int:
    """A key of the whole text, given its pieces' keys."""
    start = PIECE_ENDS[len(keys) - 1] if keys else 0
    return xxhash.xxh3_64_intdigest(text[start:], keys[-1] if keys else _SEED)

"""Requests of a recorded shape: when they arrive, how long they are, what they have in common.

Arrivals are a Markov-modulated Poisson process (calm and busy spells). Lengths are log-normal. "chat" has nothing in
common; "shared" are conversations, whose prompts begin with one of a few system prompts and all that was said so far.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from services.global_proxy.policies.base import Prompt

BLOCK_TOKENS = 64
_BLOCK_BYTES = 256  # 4 bytes a token, as in English
_MAX_TOKENS = 16_384

_CALM = (0.6, 4.0)  # times the mean rate, mean spell in s
_BUSY = (1.8, 2.0)

Shape = Literal["chat", "shared"]


@dataclass(frozen=True, slots=True)
class Request:
    at_s: float
    prompt: Prompt
    num_new_tokens: int
    blocks: Sequence[int]  # one number per full block of the prompt; equal beginnings have equal numbers


def make_trace(shape: Shape, num_requests: int, rate: float, seed: int) -> list[Request]:
    """`num_requests` requests, in order, on average `rate` a second. The same arguments give the same requests."""
    rng = np.random.default_rng(seed)
    if shape == "chat":
        return _chat(rng, _arrivals(rng, num_requests, rate))
    return _conversations(rng, num_requests, rate)


@cache
def mean_lengths(shape: Shape) -> tuple[float, float, float]:
    """Mean prompt tokens and new tokens of a sample, and the share of the prompt tokens that came before."""
    sample = make_trace(shape, 4000, rate=40.0, seed=0)
    seen: set[int] = set()
    num_seen = 0
    for request in sample:
        num_seen += sum(block in seen for block in request.blocks) * BLOCK_TOKENS
        seen.update(request.blocks)
    num_tokens = float(np.mean([request.prompt.num_tokens for request in sample]))
    num_new = float(np.mean([request.num_new_tokens for request in sample]))
    return num_tokens, num_new, num_seen / (num_tokens * len(sample))


def _arrivals(rng: np.random.Generator, num: int, rate: float) -> np.ndarray:
    """Times of a two-state Markov-modulated Poisson process: unit-rate arrivals, stretched by the rate's integral."""
    num_spells = 16 + int(num / rate / (_CALM[1] + _BUSY[1]) * 4)
    spells_s = rng.exponential(np.tile([_CALM[1], _BUSY[1]], num_spells))
    rates = rate * np.tile([_CALM[0], _BUSY[0]], num_spells)
    ends_s = np.concatenate([[0.0], np.cumsum(spells_s)])
    expected = np.concatenate([[0.0], np.cumsum(spells_s * rates)])
    return np.interp(np.cumsum(rng.exponential(1.0, num)), expected, ends_s)


def _lengths(rng: np.random.Generator, median: float, sigma: float, num: int) -> np.ndarray:
    return np.clip(rng.lognormal(np.log(median), sigma, num), 1, _MAX_TOKENS).astype(int)


def _new_tokens(rng: np.random.Generator, num: int) -> np.ndarray:
    return np.clip(_lengths(rng, 300, 0.75, num), 1, 2048)


def _chat(rng: np.random.Generator, arrivals_s: np.ndarray) -> list[Request]:
    num = len(arrivals_s)
    fresh = _Blocks()
    return [
        _request(float(at_s), int(num_tokens), int(num_new), fresh.more(int(num_tokens)), None)
        for at_s, num_tokens, num_new in zip(
            arrivals_s, _lengths(rng, 600, 1.1, num), _new_tokens(rng, num), strict=True
        )
    ]


def _conversations(rng: np.random.Generator, num: int, rate: float) -> list[Request]:
    """Sessions of 1 to 12 turns; a turn adds what the user says and the answer before it."""
    fresh = _Blocks()
    systems = [fresh.more(int(size)) for size in _lengths(rng, 1000, 0.7, 40)]
    popularity = 1.0 / np.arange(1, len(systems) + 1)
    popularity /= popularity.sum()
    mean_turns = 4.0
    starts_s = _arrivals(rng, num, rate / mean_turns)
    requests: list[Request] = []
    for number, start_s in enumerate(starts_s):
        if len(requests) > num and start_s > requests[num].at_s and number % 64 == 0:
            requests.sort(key=lambda request: request.at_s)
            if start_s > requests[num - 1].at_s:
                break
        blocks = list(systems[int(rng.choice(len(systems), p=popularity))])
        at_s = float(start_s)
        for _ in range(min(int(rng.geometric(1 / mean_turns)), 12)):
            blocks += fresh.more(int(rng.lognormal(np.log(200), 1.0)) + 1)
            num_new = int(_new_tokens(rng, 1)[0])
            num_tokens = len(blocks) * BLOCK_TOKENS
            if num_tokens > _MAX_TOKENS:
                break
            requests.append(_request(at_s, num_tokens, num_new, tuple(blocks), b"session %d" % number))
            blocks += fresh.more(num_new)
            at_s += 1.0 + rng.exponential(4.0)
    return sorted(requests, key=lambda request: request.at_s)[:num]


class _Blocks:
    """Numbers blocks that nobody has sent before."""

    def __init__(self) -> None:
        self._next = 0

    def more(self, num_tokens: int) -> tuple[int, ...]:
        start, self._next = self._next, self._next + num_tokens // BLOCK_TOKENS
        return tuple(range(start, self._next))


def _request(at_s: float, num_tokens: int, num_new: int, blocks: Sequence[int], session: bytes | None) -> Request:
    text = b"".join(block.to_bytes(8, "big") * (_BLOCK_BYTES // 8) for block in blocks)
    text += b"." * (num_tokens % BLOCK_TOKENS * _BLOCK_BYTES // BLOCK_TOKENS)
    return Request(at_s, Prompt(num_tokens, 2048, session, text), num_new, blocks)

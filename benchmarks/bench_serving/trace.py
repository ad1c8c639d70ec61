"""Which requests arrive when: steady short chats, and long prompts as a Poisson process. The seed decides all of it."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["chat", "long"]
KINDS: tuple[Kind, ...] = ("chat", "long")

CHAT_MESSAGE_TOKENS = 20  # SmolLM2's chat template adds 30
CHAT_ANSWER_TOKENS = 64
LONG_PROMPT_TOKENS = (500, 1500)
LONG_ANSWER_TOKENS = 16

Text = Callable[[int, random.Random], str]  # so many tokens, unlike any other text

# Tokens of their own in most vocabularies. More of them would change nothing: prompts are computed, not understood.
_WORDS = ("time", "people", "way", "water", "day", "part", "sound", "work", "place", "year", "back", "thing", "name")


@dataclass(frozen=True)
class Arrival:
    """One request of a trace."""

    at_s: float  # after the trace's start
    kind: Kind
    text: str  # the user's message, or the whole prompt
    num_answer_tokens: int


@dataclass(frozen=True)
class Load:
    """How much of each kind arrives."""

    name: str
    chats_per_s: float
    longs_per_s: float
    duration_s: float


def make_trace(load: Load, seed: int, text: Text) -> list[Arrival]:
    """The requests in the order of their arrival.

    Chats come at even intervals. Long prompts come at independent times, as many as the rate promises: a Poisson
    process given its count, so that chance does not make a light load heavy. Their lengths are uniform, one from each
    of as many equal parts of the range, for the same reason.
    """
    chance = random.Random(f"{seed} {load.name}")  # noqa: S311 (not for secrets)
    num_chats = round(load.chats_per_s * load.duration_s)
    num_longs = round(load.longs_per_s * load.duration_s)
    arrivals = [
        Arrival((number + 0.5) / load.chats_per_s, "chat", text(CHAT_MESSAGE_TOKENS, chance), CHAT_ANSWER_TOKENS)
        for number in range(num_chats)
    ]
    for num_tokens in _lengths(num_longs, chance):
        at_s = chance.uniform(0.0, load.duration_s)
        arrivals.append(Arrival(at_s, "long", text(num_tokens, chance), LONG_ANSWER_TOKENS))
    return sorted(arrivals, key=lambda arrival: arrival.at_s)


def sample(kind: Kind, chance: random.Random, text: Text) -> Arrival:
    """One request on its own; a long one has the mean length."""
    if kind == "chat":
        return Arrival(0.0, kind, text(CHAT_MESSAGE_TOKENS, chance), CHAT_ANSWER_TOKENS)
    return Arrival(0.0, kind, text(sum(LONG_PROMPT_TOKENS) // 2, chance), LONG_ANSWER_TOKENS)


def text_maker(encode: Callable[[str], Sequence[int]], decode: Callable[[Sequence[int]], str]) -> Text:
    """Texts of random words, measured with a tokenizer. Each begins with its own number: no prefix cache has it."""

    def text(num_tokens: int, chance: random.Random) -> str:
        words = [str(chance.randrange(10**6))]
        while True:
            words += chance.choices(_WORDS, k=num_tokens)  # a word is at least one token
            token_ids = encode(" ".join(words))
            if len(token_ids) >= num_tokens:
                return decode(token_ids[:num_tokens])

    return text


def _lengths(count: int, chance: random.Random) -> list[int]:
    shortest, longest = LONG_PROMPT_TOKENS
    width = (longest - shortest) / max(count, 1)
    return [round(shortest + (number + chance.random()) * width) for number in range(count)]

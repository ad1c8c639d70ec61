"""What a policy is, and what it may know.

A policy chooses one instance of one role for one prompt. It is asked once per leg, on the hot path: a few microseconds
are what it may take. It never changes the candidates; load and costs are kept by whoever owns them.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from services.global_proxy.policies.cost_model import Costs

Role = Literal["prefill", "decode", "mixed"]


class Candidate(Protocol):
    """One instance, as a policy sees it."""

    @property
    def name(self) -> str:
        """ "host:port". Stable: it is hashed."""

    @property
    def num_requests(self) -> int:
        """Requests in flight there, over all workers."""

    @property
    def num_tokens(self) -> int:
        """P: prompt tokens sent and not yet answered. D and mixed: prompt and new tokens of the requests there."""

    @property
    def costs(self) -> Costs:
        """What work costs there, fitted online."""


C = TypeVar("C", bound=Candidate)


@dataclass(slots=True, eq=False)
class Prompt:
    """What a policy may know of a request. Two prompts are equal only if they are the same object."""

    num_tokens: int  # exact for prompts of token ids, else estimated
    max_new_tokens: int
    session: bytes | None  # which conversation this belongs to, if the client said so
    text: bytes  # the prompt, or its token ids encoded; for hashing; may be large
    token_ids: bytes | None = None  # as array("I") has them, if the client sent token ids
    num_expected: int | None = None  # of max_new_tokens, as far as somebody has learned how many are made


class Policy(ABC):
    """Chooses one of the candidates, never changing them."""

    @abstractmethod
    def choose(self, candidates: Sequence[C], prompt: Prompt) -> C:
        """One of `candidates`, of which there is at least one; they may differ from call to call."""

    def started(self, instance: Candidate, prompt: Prompt) -> None:  # noqa: B027 (a hook, not a duty)
        """The prompt was sent to the P `instance`: told to the policies of P and D; or to a mixed one: to its own."""

    def tokenised(self, prompt: Prompt, token_ids_json: bytes) -> None:  # noqa: B027
        """P has told the prompt's token ids, a JSON list. Told to the policy of P."""

    def finished(self, instance: Candidate, prompt: Prompt) -> None:  # noqa: B027
        """That prefill is over, however it ended. Told to the same policies, once for each `started`."""

    def cached_tokens(self, prompt: Prompt) -> Mapping[str, int]:
        """How many of the prompt's first tokens instances are taken to have cached, by name; left out: none."""
        return {}


def in_turn(candidates: Sequence[C], turn: int) -> Sequence[C]:
    """The candidates from another one on each turn, so that equals are chosen alike often."""
    start = turn % len(candidates)
    return (*candidates[start:], *candidates[:start]) if start else candidates

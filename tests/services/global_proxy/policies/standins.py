"""Candidates and prompts that say what a test wants."""

from dataclasses import dataclass, field

from services.global_proxy.policies.base import Prompt
from services.global_proxy.policies.cost_model import Costs, Fleet


@dataclass
class StandIn:
    name: str
    num_requests: int = 0
    num_tokens: int = 0
    costs: Costs = field(default_factory=Costs)


def stand_ins(num: int) -> list[StandIn]:
    fleet = Fleet()
    return [StandIn(f"10.0.0.{i}:8000", costs=Costs(fleet)) for i in range(num)]


def prompt(num_tokens: int = 100, text: bytes = b"", session: bytes | None = None) -> Prompt:
    return Prompt(num_tokens, 16, session, text)


def teach_prefill(costs: Costs, base_s: float, token_s: float, num: int = 200) -> None:
    for i in range(num):
        tokens, ahead = 50 + i * 37 % 3000, i % 3 * (i * 91 % 4000)
        costs.observe_prefill(tokens, ahead, base_s + token_s * (tokens + ahead))


def teach_decode(costs: Costs, base_s: float, request_s: float, token_s: float = 0.0, num: int = 200) -> None:
    for i in range(num):
        requests, tokens = 1 + i * 7 % 50, i * 977 % 90_000
        costs.observe_decode(requests, tokens, base_s + request_s * requests + token_s * tokens)

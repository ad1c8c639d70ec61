"""The policies by name."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from services.global_proxy.policies.base import Policy, Role
from services.global_proxy.policies.consistent_hash import ConsistentHash
from services.global_proxy.policies.least_active import LeastActive, WeightedLeastActive
from services.global_proxy.policies.pd_score_balance import PDScoreBalance
from services.global_proxy.policies.power_of_two import PowerOfTwo
from services.global_proxy.policies.prefill_score_balance import PrefillScoreBalance
from services.global_proxy.policies.prefix_aware import PrefixAware, PrefixIndex
from services.global_proxy.policies.round_robin import RoundRobin

NextTurn = Callable[[], int]
Factory = Callable[[Role, PrefixIndex | None, NextTurn | None], Policy]

POLICIES: Mapping[str, Factory] = MappingProxyType(
    {
        "round_robin": lambda role, index, next_turn: RoundRobin(next_turn),
        "least_active": lambda role, index, next_turn: LeastActive(),
        "weighted_least_active": lambda role, index, next_turn: WeightedLeastActive(),
        "power_of_two": lambda role, index, next_turn: PowerOfTwo(role),
        "consistent_hash": lambda role, index, next_turn: ConsistentHash(),
        "prefill_score_balance": lambda role, index, next_turn: PrefillScoreBalance(),
        "pd_score_balance": lambda role, index, next_turn: PDScoreBalance(),
        "prefix_aware": lambda role, index, next_turn: PrefixAware(role, index),
    }
)

ONLY_FOR: Mapping[str, Role] = MappingProxyType({"prefill_score_balance": "prefill", "pd_score_balance": "decode"})


def policy_names(role: Role) -> tuple[str, ...]:
    """Those that a role can have."""
    return tuple(name for name in POLICIES if ONLY_FOR.get(name, role) == role)


def make_policy(name: str, role: Role, index: PrefixIndex | None = None, next_turn: NextTurn | None = None) -> Policy:
    """A new policy for the instances of a role.

    Args:
        index: which instance has which prefix cached, exactly; only `prefix_aware` asks it, and can do without.
        next_turn: counts the choices over all workers; for `round_robin`.

    Raises:
        ValueError: there is no such policy, or not for this role. Says which there are.
    """
    names = policy_names(role)
    if name not in names:
        raise ValueError(f"{role} policy {name!r}: choose one of {', '.join(names)}")
    return POLICIES[name](role, index, next_turn)

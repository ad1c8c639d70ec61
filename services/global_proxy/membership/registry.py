"""The registry: which instances there are and which policies choose among them.

It lives in exactly one process, the proxy's only one or the parent of its workers, and there in one event loop: it is
not thread-safe. Everybody else has a copy of its State, and tells it which version that is.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from services.global_proxy.membership.errors import StillBusyError, UnknownInstanceError
from services.global_proxy.membership.load_table import LoadTable
from services.global_proxy.membership.member import (
    InstanceSpec,
    LoadReport,
    Member,
    Role,
    Source,
    State,
)

__all__ = ["InstanceSpec", "LoadReport", "Member", "Registry", "Role", "Source", "State", "Subscription"]

logger = logging.getLogger(__name__)

_IDLE_CHECK_S = 0.02  # while an instance drains: shared memory rings no bell


class Subscription:
    """One copy of the state, and how far it follows."""

    def __init__(self, registry: "Registry", callback: Callable[[State], None], *, is_remote: bool) -> None:
        self.version = 0
        self._registry = registry
        self._callback = callback
        self._is_remote = is_remote

    def acknowledge(self, version: int) -> None:
        """A remote copy has applied this version: from now on nothing is chosen by an older one."""
        self.version = max(self.version, version)

    def close(self) -> None:
        """The copy is gone: nobody waits for it any more."""
        self._registry._subscriptions.discard(self)

    def _tell(self, state: State) -> None:
        self._callback(state)
        if not self._is_remote:
            self.acknowledge(state.version)


class Registry:
    """Members and policies.

    Args:
        table: where the requests of each member are counted; gives the slots.
        policy_names: for each role that there can be, what it may be set to.
        check_spec: raises ValueError for an instance that this proxy cannot use, e.g. without a KV address.

    Raises:
        ValueError: no such policy.
    """

    def __init__(
        self,
        table: LoadTable,
        policy_names: Mapping[Role, Collection[str]],
        prefill_policy: str,
        decode_policy: str,
        check_spec: Callable[[InstanceSpec], None] | None = None,
        *,
        mixed_policy: str = "prefix_aware",
    ) -> None:
        self._table = table
        self._policy_names = {role: tuple(names) for role, names in policy_names.items()}
        self._policies = {"prefill": prefill_policy, "decode": decode_policy, "mixed": mixed_policy}
        for role in self._policy_names:
            self._check_policy(role, self._policies[role])
        self._check_spec = check_spec
        self._version = 1
        self._members: dict[str, Member] = {}
        self._drained_themselves: set[str] = set()
        self._leaving_slots: dict[int, int] = {}  # a slot whose member is removed → since which version
        self._subscriptions: set[Subscription] = set()

    def members(self) -> tuple[Member, ...]:
        return tuple(self._members.values())

    @property
    def state(self) -> State:
        policies = self._policies
        return State(self._version, self.members(), policies["prefill"], policies["decode"], policies["mixed"])

    @property
    def applied_version(self) -> int:
        """Every subscriber chooses by this version or a later one."""
        return min((subscription.version for subscription in self._subscriptions), default=self._version)

    def subscribe(self, callback: Callable[[State], None], *, is_remote: bool = False) -> Subscription:
        """Call `callback` with the state now and after every change.

        Args:
            is_remote: the state is applied elsewhere, which `acknowledge` tells; otherwise when the callback returns.
        """
        subscription = Subscription(self, callback, is_remote=is_remote)
        self._subscriptions.add(subscription)
        subscription._tell(self.state)
        return subscription

    def add(self, spec: InstanceSpec, source: Source) -> Member:
        """The member of this name, new or not.

        An agent may correct the addresses of its own instance. Adding through the admin API ends a drain.

        Raises:
            ValueError: the instance is known with another role or, from elsewhere, other addresses; this proxy cannot
                use it; or the load table is full.
        """
        if self._check_spec is not None:
            self._check_spec(spec)
        known = self._members.get(spec.name)
        if known is None:
            member = Member(spec, self._free_slot(), "active", source)
            self._change(member)
            logger.info("%s %s is a member (%s)", spec.role, spec.name, source)
            return member
        return self._add_again(known, spec, source)

    def _add_again(self, known: Member, spec: InstanceSpec, source: Source) -> Member:
        if spec.role != known.spec.role or (spec != known.spec and source != "joined"):
            raise ValueError(
                f"{spec.name}: is a member already, as {known.spec.role} instance {known.spec.url} with kv_address "
                f"{known.spec.kv_address} and bootstrap_url {known.spec.bootstrap_url}: remove it first"
            )
        if source == "joined" and spec.kv_events is None:  # agents do not tell it
            spec = replace(spec, kv_events=known.spec.kv_events)
        ends_drain = source == "admin" or known.name in self._drained_themselves
        kept = "admin" if source == "admin" and known.source == "joined" else known.source
        member = Member(spec, known.slot, "active" if ends_drain else known.state, kept)
        self._drained_themselves.discard(known.name)
        if member != known:
            self._change(member)
        return member

    def drain(self, name: str, by: Source = "admin") -> Member:
        """Give it nothing new. By "joined" (its own agent) this lasts until it joins again.

        Raises:
            UnknownInstanceError: no such member.
        """
        known = self._known(name)
        if known.state == "active" and by == "joined":
            self._drained_themselves.add(name)
        elif by != "joined":
            self._drained_themselves.discard(name)
        if known.state == "draining":
            return known
        member = known.but("draining")
        self._change(member)
        logger.info("%s %s drains (%s)", member.spec.role, name, by)
        return member

    def remove(self, name: str) -> None:
        """Forget it now; requests in flight there go on. Raises UnknownInstanceError."""
        member = self._known(name)
        del self._members[name]
        self._drained_themselves.discard(name)
        self._leaving_slots[member.slot] = self._version + 1
        self._table.clear_report(member.slot)
        self._publish()
        logger.info("%s %s is no member any more", member.spec.role, name)

    def leave(self, name: str) -> None:
        """Its agent has left or is lost. A member that the agent alone had named goes with it; others stay.

        Raises:
            UnknownInstanceError: no such member.
        """
        member = self._known(name)
        if member.source == "joined":
            self.remove(name)
            return
        self._table.clear_report(member.slot)
        if name in self._drained_themselves:  # health checks see to it from here
            self._drained_themselves.discard(name)
            self._change(member.but("active"))

    async def remove_when_idle(self, name: str, wait_s: float, *, by_force: bool = False) -> None:
        """Drain it, wait until it has no requests, and remove it: no request fails.

        Args:
            by_force: after `wait_s` seconds remove it all the same.

        Raises:
            UnknownInstanceError: no such member.
            StillBusyError: it has requests after `wait_s` seconds; it stays, draining.
        """
        member = self.drain(name)
        version = self._version
        end_s = time.monotonic() + wait_s
        while not self._is_idle(member, version):
            if time.monotonic() >= end_s:
                if by_force:
                    break
                raise StillBusyError(
                    f"{name}: has {self._table.requests(member.slot)} requests and the KV of "
                    f"{self._table.leases(member.slot)} prompts after {wait_s:g} s, or a worker has not taken note: it "
                    "goes on draining; ask again later, or by force"
                )
            await asyncio.sleep(_IDLE_CHECK_S)
            now = self._members.get(name)
            if now is None:  # somebody else has removed it
                return
            if now.slot != member.slot or now.state != "draining":
                raise ValueError(f"{name}: was added again while it drained, so it was not removed: ask again")
        self.remove(name)

    def _is_idle(self, member: Member, drained_in_version: int) -> bool:
        """Nobody chooses it any more, and nobody has a request there or KV to read. In this order, or one is missed."""
        return self.applied_version >= drained_in_version and self._table.is_empty(member.slot)

    def set_policy(self, role: Role, policy_name: str) -> None:
        """Raises ValueError: no such role or policy."""
        self._check_policy(role, policy_name)
        if policy_name != self._policies[role]:
            self._policies[role] = policy_name
            self._publish()
            logger.info("%s policy is %s", role, policy_name)

    def report(self, name: str, report: LoadReport) -> None:
        """Raises UnknownInstanceError: no such member."""
        self._table.set_report(self._known(name).slot, report)

    def _check_policy(self, role: Role, policy_name: str) -> None:
        if role not in self._policy_names:
            raise ValueError(f"role: must be one of {', '.join(self._policy_names)}, got {role!r}")
        names = self._policy_names[role]
        if policy_name not in names:
            raise ValueError(f"{role} policy: must be one of {', '.join(names)}, got {policy_name!r:.80}")

    def _known(self, name: str) -> Member:
        member = self._members.get(name)
        if member is None:
            names = ", ".join(sorted(self._members)) or "there are none"
            raise UnknownInstanceError(f"name: no instance is called {name!r:.80}; must be one of: {names:.1000}")
        return member

    def _free_slot(self) -> int:
        """The lowest that no member has and no worker may still write to."""
        applied = self.applied_version
        for slot, version in tuple(self._leaving_slots.items()):
            if applied >= version and self._table.is_empty(slot):
                del self._leaving_slots[slot]
        taken = {member.slot for member in self._members.values()} | self._leaving_slots.keys()
        for slot in range(self._table.num_slots):
            if slot not in taken:
                self._table.forget_verdicts(slot)
                return slot
        raise ValueError(f"the load table has {self._table.num_slots} slots, all in use: remove an instance first")

    def _change(self, member: Member) -> None:
        self._members[member.name] = member
        self._publish()

    def _publish(self) -> None:
        self._version += 1
        state = self.state
        for subscription in tuple(self._subscriptions):
            subscription._tell(state)

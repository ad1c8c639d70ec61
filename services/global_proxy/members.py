"""What the registry says, applied: instances come, drain and go; policies change."""

import asyncio
from collections.abc import Callable
from functools import partial

from kv_transfer.auth import DeploymentKey
from kv_transfer.event_keys import server_key
from services.global_proxy.instances.health import HealthCheck
from services.global_proxy.instances.instance import Instance
from services.global_proxy.instances.pool import Pool
from services.global_proxy.membership.load_table import LoadTable, Writer
from services.global_proxy.membership.member import ROLES, Member, Role, State
from services.global_proxy.observing.metrics import Metrics
from services.global_proxy.policies.base import Policy
from services.global_proxy.policies.cost_model import Costs, Fleet
from services.global_proxy.policies.registry import make_policy
from services.global_proxy.prefix.index import KvEventIndex
from services.global_proxy.prefix.prefix_index import PrefixIndex
from services.global_proxy.prefix.sockets import Endpoints
from services.global_proxy.prefix.subscribers import Subscribers
from services.global_proxy.settings import Settings


class Members:
    """The pools, kept as the registry has them. Close it.

    Attributes:
        prefill, decode, mixed: the pools.
        prefixes: what prefix caches hold, as far as they tell.
        changed: called after each change.
    """

    def __init__(
        self, settings: Settings, key: DeploymentKey, table: LoadTable, writer: Writer, metrics: Metrics
    ) -> None:
        self._settings = settings
        self._key = key
        self._cached = KvEventIndex()
        self._subscribers = Subscribers(self._cached)
        self._followed: dict[str, str] = {}  # whose KV events are subscribed to → where
        self._unfollowing: dict[str, asyncio.Task[None]] = {}
        self.prefixes = PrefixIndex(self._cached)
        self._table = table
        self._writer = writer
        self._metrics = metrics
        self._fleets: dict[Role, Fleet] = {role: Fleet() for role in ROLES}
        self._instances: dict[tuple[str, int], Instance] = {}
        self._checks: dict[Instance, tuple[HealthCheck, asyncio.Task[None]]] = {}
        self._policies: dict[Role, str] = {
            "prefill": settings.prefill_policy,
            "decode": settings.decode_policy,
            "mixed": settings.mixed_policy,
        }
        self.prefill, self.decode, self.mixed = (
            Pool(role, self._make_policy(policy, role), table) for role, policy in self._policies.items()
        )
        self.changed: Callable[[], None] = lambda: None
        metrics.instances.read_loads = self._instances.values

    @property
    def pools(self) -> tuple[Pool, Pool, Pool]:
        """Of P, D and plain engines."""
        return self.prefill, self.decode, self.mixed

    def apply(self, state: State) -> None:
        """The registry's newest state."""
        members = {(member.name, member.slot): member for member in state.members}
        for key in self._instances.keys() - members.keys():
            self._remove(key)
        for key, member in members.items():
            if key in self._instances:
                self._instances[key].set_member(member)
            else:
                self._instances[key] = self._add(member)
        policies = (state.prefill_policy, state.decode_policy, state.mixed_policy)
        for pool, policy in zip(self.pools, policies, strict=True):
            if self._policies[pool.role] != policy:
                self._policies[pool.role] = policy
                pool.policy = self._make_policy(policy, pool.role)
            pool.set_instances([i for i in self._instances.values() if i.role == pool.role])
        self._follow()
        self.changed()

    async def missing_roles(self) -> list[Role]:
        """The roles of which no instance is healthy, though one is needed; each has been looked at.

        Nothing is missing while a mixed one is up, for it does without the others.
        """
        await asyncio.gather(*(check.checked.wait() for check, _ in self._checks.values()))
        if self.mixed.has_healthy():
            return []
        if self.mixed.instances and not (self.prefill.instances or self.decode.instances):
            return ["mixed"]
        missing = [pool.role for pool in (self.prefill, self.decode) if not pool.has_healthy()]
        return [*missing, "mixed"] if missing and self.mixed.instances else missing

    async def close(self) -> None:
        await asyncio.gather(*self._unfollowing.values())
        await self._subscribers.close()
        tasks = [task for _, task in self._checks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for instance in self._instances.values():
            instance.endpoint.abort_all()

    def _make_policy(self, name: str, role: Role) -> Policy:
        def next_turn() -> int:
            turn = self._table.turns(role)
            self._writer.add_turn(role)
            return turn

        return make_policy(name, role, self.prefixes, next_turn)

    def _add(self, member: Member) -> Instance:
        counts = self._metrics.instances.add(member.spec.role, member.name, member.slot)
        settings = self._settings
        instance = Instance(member, self._table, self._writer, counts, settings.connect_timeout_s)
        check = HealthCheck(
            instance,
            settings.health_interval_s,
            settings.health_timeout_s,
            settings.health_misses,
            next(pool for pool in self.pools if pool.role == instance.role).changed,
        )
        instance.costs = Costs(self._fleets[instance.role])
        self._checks[instance] = (check, asyncio.create_task(check.run()))
        return instance

    def _remove(self, key: tuple[str, int]) -> None:
        """Requests in flight there go on."""
        instance = self._instances.pop(key)
        self._checks.pop(instance)[1].cancel()
        self._metrics.instances.remove(instance.slot)

    def _follow(self) -> None:
        """Subscribe to the KV events of the members that tell them, and to no others'."""
        members = (instance.member for instance in self._instances.values())
        wanted = {member.name: address for member in members if (address := member.spec.kv_events) is not None}
        for name, address in tuple(self._followed.items()):
            if wanted.get(name) != address:
                del self._followed[name]
                task = self._unfollowing[name] = asyncio.create_task(self._subscribers.remove(name))
                task.add_done_callback(partial(self._unfollowed, name))
        for name in wanted.keys() - self._followed.keys() - self._unfollowing.keys():
            self._subscribers.add(name, Endpoints.at(wanted[name], server_key(self._key)))
            self._followed[name] = wanted[name]

    def _unfollowed(self, name: str, _: asyncio.Task[None]) -> None:
        """It may be a member again, or tell its events elsewhere."""
        del self._unfollowing[name]
        self._follow()

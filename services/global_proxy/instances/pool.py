"""The instances of one role, and choosing among them."""

import time
from collections.abc import Callable, Collection, Sequence

from services.global_proxy.instances.instance import Instance
from services.global_proxy.membership.load_table import LoadTable
from services.global_proxy.membership.member import Role
from services.global_proxy.policies.base import Policy, Prompt

_FRESH_S = 0.05  # for how long the list of those that are up is used again: other workers eject, too


class Pool:
    """Attributes:
    instances: all members of the role; the draining ones too.
    policy: may be replaced at any time.
    """

    def __init__(
        self, role: Role, policy: Policy, table: LoadTable, now_s: Callable[[], float] = time.monotonic
    ) -> None:
        self.role = role
        self.policy = policy
        self.instances: tuple[Instance, ...] = ()
        self._table = table
        self._now_s = now_s
        self._up: list[Instance] = []
        self._fresh_until_s = 0.0

    def set_instances(self, instances: Sequence[Instance]) -> None:
        self.instances = tuple(instances)
        for instance in instances:
            instance.ejected = self.changed
        self.changed()

    def has_healthy(self) -> bool:
        """Whether an instance answers its health checks and takes requests."""
        return bool(self._serving())

    def has_up(self, tried: Collection[Instance] = ()) -> bool:
        """Whether one takes requests that has not been tried."""
        return any(instance not in tried for instance in self.up())

    def changed(self) -> None:
        """One of them is no longer what it was: look again before the next choice."""
        self._fresh_until_s = 0.0

    def choose(self, prompt: Prompt, tried: Collection[Instance] = ()) -> Instance | None:
        """One for this prompt, of those that have not been tried; None: there is no other.

        If all are ejected, one of those is asked all the same; if all are unhealthy, one that refuses connections, for
        it may have started since its last check.
        """
        candidates: Sequence[Instance] = self.up()
        if tried:
            candidates = [i for i in candidates if i not in tried]
        if not candidates:
            candidates = [i for i in self._serving() if i not in tried]
        if not candidates:
            candidates = [i for i in self.instances if i.refuses and i.member.state == "active" and i not in tried]
        if not candidates:
            return None
        chosen = candidates[0] if len(candidates) == 1 else self.policy.choose(candidates, prompt)
        if chosen.half_open:
            self.changed()  # the next request is not for it
        return chosen

    def up(self) -> list[Instance]:
        """Those that take requests. Of half-open ones, only while none is on its way there."""
        now_s = self._now_s()
        if now_s >= self._fresh_until_s:
            self._up = [i for i in self._serving() if not self._table.is_down(i.slot) and not self._is_probed(i)]
            self._fresh_until_s = now_s + _FRESH_S
        return self._up

    def _serving(self) -> list[Instance]:
        return [i for i in self.instances if i.member.state == "active" and not i.unhealthy]

    def _is_probed(self, instance: Instance) -> bool:
        return instance.half_open and instance.num_probes > 0

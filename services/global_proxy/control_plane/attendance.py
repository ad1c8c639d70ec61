"""Which instances are here by their own agents, and what the registry is told of it.

The registry stays the one that knows the members: the admin API may drain or remove an instance that has joined. It is
watched, and the instance is told.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, cast

from google.protobuf.message import DecodeError

from services.global_proxy.control_plane import control_plane_pb2 as pb
from services.global_proxy.control_plane.errors import RefusedError
from services.global_proxy.control_plane.handshake import PROTOCOL
from services.global_proxy.membership.member import InstanceSpec, LoadReport, Role, State
from services.global_proxy.membership.registry import Registry

logger = logging.getLogger(__name__)

_MAX_FACTS: Final = 32
_MAX_START_ID_BYTES: Final = 64
_OF_HAND_OFFS: Final = ("connector", "mode")  # facts in which a plain engine need not agree: it hands nothing off


@dataclass(eq=False, slots=True)
class Joined:
    """One instance's stream.

    Attributes:
        outbox: what the stream's handler sends; None ends the stream.
    """

    name: str
    start_id: bytes
    facts: Mapping[str, str]
    outbox: asyncio.Queue[pb.ProxyMessage | None] = field(default_factory=asyncio.Queue)
    has_left: bool = False
    is_told_to_drain: bool = False
    expiry: asyncio.TimerHandle | None = None  # of a stream that broke


class Attendance:
    """Args:
    facts: what every instance must agree in, as far as the proxy knows it; else the first to join says it.
    rejoin_s: how long an instance whose stream broke may take to be back before it is lost.

    `close` it; the registry then keeps its members.
    """

    def __init__(
        self,
        registry: Registry,
        facts: Mapping[str, str],
        rejoin_s: float,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._facts = facts
        self._rejoin_s = rejoin_s
        self._now_s = now_s
        self._joined: dict[str, Joined] = {}
        self._subscription = registry.subscribe(self._on_state)

    def __len__(self) -> int:
        return len(self._joined)

    def join(self, instance_bytes: bytes) -> Joined:
        """Make the instance a member; an earlier stream of its own ends.

        Args:
            instance_bytes: an Instance message, known to be genuine.

        Raises:
            RefusedError: it cannot be a member; the message says what to do.
        """
        instance, spec = _parse(instance_bytes)
        facts = {key: fact for key, fact in instance.facts.items() if spec.role != "mixed" or key not in _OF_HAND_OFFS}
        self._check_facts(spec.name, facts)
        earlier = self._joined.pop(spec.name, None)
        if earlier is not None:
            _end(earlier)
            if earlier.start_id != instance.start_id:  # a new process: it knows nothing of a drain of the old one
                self._registry.leave(spec.name)
        try:
            member = self._registry.add(spec, "joined")
        except ValueError as error:
            raise RefusedError(str(error)) from None
        joined = Joined(name=member.name, start_id=instance.start_id, facts=facts)
        self._joined[joined.name] = joined
        self._on_state(self._registry.state)  # it may be draining
        logger.info("%s %s has joined", spec.role, spec.name)
        return joined

    def report(self, joined: Joined, load: pb.LoadReport) -> None:
        """Raises RefusedError: the numbers are too large."""
        if self._joined.get(joined.name) is not joined:  # dismissed, or joined anew
            return
        try:
            report = LoadReport(
                num_running=load.num_running,
                num_waiting=load.num_waiting,
                kv_used_tokens=load.kv_used_tokens,
                kv_total_tokens=load.kv_total_tokens,
                at_s=self._now_s(),
            )
        except ValueError as error:
            raise RefusedError(str(error)) from None
        self._registry.report(joined.name, report)

    def leave(self, joined: Joined) -> None:
        """It will end soon: nothing new for it. It is forgotten when its stream ends."""
        if self._joined.get(joined.name) is joined:
            joined.has_left = True
            self._registry.drain(joined.name, by="joined")

    def ended(self, joined: Joined, *, was_silent: bool) -> None:
        """The stream is over. One that broke may come again within `rejoin_s`; a silent one has had its time."""
        if self._joined.get(joined.name) is not joined:
            return
        if joined.has_left or was_silent:
            self._lose(joined)
        else:
            joined.expiry = asyncio.get_running_loop().call_later(self._rejoin_s, self._lose, joined)

    def close(self) -> None:
        self._subscription.close()
        for joined in self._joined.values():
            _end(joined)
        self._joined.clear()

    def _lose(self, joined: Joined) -> None:
        del self._joined[joined.name]
        self._registry.leave(joined.name)
        logger.log(
            logging.INFO if joined.has_left else logging.WARNING,
            "%s %s",
            joined.name,
            "has left" if joined.has_left else "is lost: its agent has not been heard",
        )

    def _check_facts(self, name: str, facts: Mapping[str, str]) -> None:
        others = [("this deployment", self._facts)]
        others += [(other.name, other.facts) for other in self._joined.values() if other.name != name][:1]
        for whose, known in others:
            differing = [
                f"{key} is {facts[key]!r} and {known[key]!r} in {whose}"
                for key in sorted(known.keys() & facts.keys())
                if facts[key] != known[key]
            ]
            if differing:
                raise RefusedError(
                    f"{name} does not fit: {'; '.join(differing)}. Start it with the same, or join it to another proxy"
                )

    def _on_state(self, state: State) -> None:
        members = {member.name: member for member in state.members}
        for joined in tuple(self._joined.values()):
            member = members.get(joined.name)
            if member is None:
                del self._joined[joined.name]
                joined.outbox.put_nowait(pb.ProxyMessage(dismiss=pb.Dismiss(reason="removed from this proxy")))
                _end(joined)
            elif member.state == "active":
                joined.is_told_to_drain = False
            elif not (joined.is_told_to_drain or joined.has_left):
                joined.is_told_to_drain = True
                joined.outbox.put_nowait(pb.ProxyMessage(drain=pb.Drain()))


def _end(joined: Joined) -> None:
    if joined.expiry is not None:
        joined.expiry.cancel()
    joined.outbox.put_nowait(None)


def _parse(instance_bytes: bytes) -> tuple[pb.Instance, InstanceSpec]:
    """Raises RefusedError."""
    try:
        instance = pb.Instance.FromString(instance_bytes)
        if instance.protocol != PROTOCOL:
            raise RefusedError(
                f"protocol: this proxy speaks {PROTOCOL}, the instance {instance.protocol}: run the same omni release"
            )
        if not 1 <= len(instance.start_id) <= _MAX_START_ID_BYTES:
            raise RefusedError(f"start_id: must have 1 to {_MAX_START_ID_BYTES} bytes, has {len(instance.start_id)}")
        if len(instance.facts) > _MAX_FACTS:
            raise RefusedError(f"facts: there are {len(instance.facts)}, more than {_MAX_FACTS}")
        spec = InstanceSpec(
            role=cast(Role, instance.role),  # it checks
            url=instance.url,
            kv_address=instance.kv_address or None,
            bootstrap_url=instance.bootstrap_url or None,
            kv_events=instance.kv_events or None,
        )
    except (DecodeError, ValueError) as error:
        raise RefusedError(str(error)) from None
    return instance, spec

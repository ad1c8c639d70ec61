"""The registry, seen from wherever a request to change it arrives: the same in its own process and in any worker."""

import asyncio
import itertools
import logging
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable

from services.global_proxy.membership.channel import Channel
from services.global_proxy.membership.errors import ChannelClosedError, StillBusyError, UnknownInstanceError
from services.global_proxy.membership.member import InstanceSpec, Member, Role, State
from services.global_proxy.membership.messages import (
    Add,
    Answer,
    Applied,
    Command,
    Drain,
    Ready,
    Remove,
    SetPolicy,
    StateChanged,
    ToWorker,
)
from services.global_proxy.membership.registry import Registry

logger = logging.getLogger(__name__)

_ANSWER_S = 10.0  # for what the registry does at once
_ERROR_TYPES: dict[str, type[ValueError]] = {
    kind.__name__: kind for kind in (ValueError, StillBusyError, UnknownInstanceError)
}


class RegistryClient(ABC):
    """When a change returns, `state` has it. All raise ValueError with what to mend, as Registry does, and
    ChannelClosedError when the registry does not answer.
    """

    @property
    @abstractmethod
    def state(self) -> State:
        """The newest that this process knows."""

    @abstractmethod
    def subscribe(self, callback: Callable[[State], None]) -> None:
        """Call it with the state now and after every change. It must do all of the change before it returns."""

    @abstractmethod
    async def add(self, spec: InstanceSpec) -> Member:
        """Add it as the operator's; see Registry.add."""

    @abstractmethod
    async def drain(self, name: str) -> Member:
        """See Registry.drain."""

    @abstractmethod
    async def remove(self, name: str, wait_s: float, *, by_force: bool) -> None:
        """See Registry.remove_when_idle."""

    @abstractmethod
    async def set_policy(self, role: Role, policy_name: str) -> None:
        """See Registry.set_policy."""


class DirectClient(RegistryClient):
    """In the registry's own process."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    @property
    def state(self) -> State:
        return self._registry.state

    def subscribe(self, callback: Callable[[State], None]) -> None:
        self._registry.subscribe(callback)

    async def add(self, spec: InstanceSpec) -> Member:
        return self._registry.add(spec, "admin")

    async def drain(self, name: str) -> Member:
        return self._registry.drain(name)

    async def remove(self, name: str, wait_s: float, *, by_force: bool) -> None:
        await self._registry.remove_when_idle(name, wait_s, by_force=by_force)

    async def set_policy(self, role: Role, policy_name: str) -> None:
        self._registry.set_policy(role, policy_name)


class ChannelClient(RegistryClient):
    """In a worker. See `open`."""

    def __init__(self, channel: Channel[ToWorker], state: State) -> None:
        self._channel = channel
        self._state = state
        self._callbacks: list[Callable[[State], None]] = []
        self._answers: dict[int, asyncio.Future[Member | None]] = {}
        self._ids = itertools.count(1)
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def open(cls, end: socket.socket) -> "ChannelClient":
        """Over the worker's end of the channel; waits for the first state.

        Raises:
            ChannelClosedError: the registry sends none.
        """
        channel: Channel[ToWorker] = await Channel.open(end, ToWorker)
        try:
            async with asyncio.timeout(_ANSWER_S):
                first = await channel.receive()
        except TimeoutError:
            first = None
        if not isinstance(first, StateChanged):
            channel.close()
            raise ChannelClosedError(f"the registry has sent no state within {_ANSWER_S:g} s")
        return cls(channel, first.state)

    async def ready(self) -> None:
        """This worker serves: it has applied the state, and accepts connections."""
        await self._channel.send(Applied(self._state.version))
        await self._channel.send(Ready())

    async def wait_closed(self) -> None:
        """Return when the registry's process is gone, or talks nonsense: this worker should then end."""
        await asyncio.wait({self._reading})

    async def close(self) -> None:
        self._channel.close()
        self._reading.cancel()
        await asyncio.wait({self._reading})

    @property
    def state(self) -> State:
        return self._state

    def subscribe(self, callback: Callable[[State], None]) -> None:
        self._callbacks.append(callback)
        callback(self._state)

    async def add(self, spec: InstanceSpec) -> Member:
        member = await self._ask(Add(next(self._ids), spec))
        assert member is not None
        return member

    async def drain(self, name: str) -> Member:
        member = await self._ask(Drain(next(self._ids), name))
        assert member is not None
        return member

    async def remove(self, name: str, wait_s: float, *, by_force: bool) -> None:
        await self._ask(Remove(next(self._ids), name, wait_s, by_force), wait_s + _ANSWER_S)

    async def set_policy(self, role: Role, policy_name: str) -> None:
        await self._ask(SetPolicy(next(self._ids), role, policy_name))

    async def _ask(self, command: Command, limit_s: float = _ANSWER_S) -> Member | None:
        if self._reading.done():
            raise ChannelClosedError("the registry's process is gone")
        answer: asyncio.Future[Member | None] = asyncio.get_running_loop().create_future()
        self._answers[command.id] = answer
        try:
            async with asyncio.timeout(limit_s):
                await self._channel.send(command)
                return await answer
        except TimeoutError:
            raise ChannelClosedError(f"the registry has not answered within {limit_s:g} s") from None
        finally:
            del self._answers[command.id]

    async def _read(self) -> None:
        try:
            while (message := await self._channel.receive()) is not None:
                if isinstance(message, Answer):
                    self._settle(message)
                else:
                    await self._apply(message.state)
        except ChannelClosedError as error:
            logger.error("the registry's process: %s", error)
        finally:
            for answer in self._answers.values():
                if not answer.done():
                    answer.set_exception(ChannelClosedError("the registry's process is gone"))

    async def _apply(self, state: State) -> None:
        self._state = state
        for callback in self._callbacks:
            callback(state)
        await self._channel.send(Applied(state.version))

    def _settle(self, message: Answer) -> None:
        answer = self._answers.get(message.id)
        if answer is None or answer.done():  # whoever asked has given up
            return
        if message.error is None:
            answer.set_result(message.member)
        else:
            answer.set_exception(_ERROR_TYPES.get(message.error_type, ValueError)(message.error))

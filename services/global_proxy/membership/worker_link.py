"""The registry's end of one worker's channel."""

import asyncio
from collections import deque

from services.global_proxy.membership.channel import Channel
from services.global_proxy.membership.errors import ChannelClosedError
from services.global_proxy.membership.member import Member, State
from services.global_proxy.membership.messages import (
    Add,
    Answer,
    Applied,
    Drain,
    Ready,
    Remove,
    SetPolicy,
    StateChanged,
    ToRegistry,
)
from services.global_proxy.membership.registry import Registry

_MAX_COMMANDS = 16  # at once, of one worker


class WorkerLink:
    """Sends a worker the state and does what it asks for.

    A worker that reads slowly gets the newest state, not every one: nothing piles up.

    Attributes:
        ready: set when the worker serves.
    """

    def __init__(self, registry: Registry, channel: Channel[ToRegistry]) -> None:
        self.ready = asyncio.Event()
        self._registry = registry
        self._channel = channel
        self._state: State | None = None  # not yet sent
        self._answers: deque[Answer] = deque()
        self._to_send = asyncio.Event()
        self._commands: set[asyncio.Task[None]] = set()
        self._subscription = registry.subscribe(self._state_changed, is_remote=True)

    def close(self) -> None:
        """The worker has ended: nobody waits for it any more."""
        self._subscription.close()

    async def run(self) -> None:
        """Return when the worker's end is closed. Raises ChannelClosedError: it talks nonsense."""
        sending = asyncio.create_task(self._send())
        try:
            while (message := await self._channel.receive()) is not None:
                self._take(message)
        finally:
            self._channel.close()  # before the first await: this may be cancelled there
            tasks = {sending, *self._commands}
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    def _take(self, message: ToRegistry) -> None:
        if isinstance(message, Applied):
            self._subscription.acknowledge(message.version)
        elif isinstance(message, Ready):
            self.ready.set()
        elif len(self._commands) >= _MAX_COMMANDS:
            self._answer(Answer(message.id, error=f"{_MAX_COMMANDS} changes are under way: ask again later"))
        else:
            task = asyncio.create_task(self._obey(message))
            self._commands.add(task)
            task.add_done_callback(self._commands.discard)

    async def _obey(self, command: Add | Drain | Remove | SetPolicy) -> None:
        try:
            member = await self._do(command)
        except ValueError as error:
            self._answer(Answer(command.id, error=str(error), error_type=type(error).__name__))
        else:
            self._answer(Answer(command.id, member))

    async def _do(self, command: Add | Drain | Remove | SetPolicy) -> Member | None:
        match command:
            case Add(spec=spec):
                return self._registry.add(spec, "admin")
            case Drain(name=name):
                return self._registry.drain(name)
            case Remove(name=name, wait_s=wait_s, by_force=by_force):
                await self._registry.remove_when_idle(name, wait_s, by_force=by_force)
            case SetPolicy(role=role, policy_name=policy_name):
                self._registry.set_policy(role, policy_name)
        return None

    def _state_changed(self, state: State) -> None:
        self._state = state
        self._to_send.set()

    def _answer(self, answer: Answer) -> None:
        self._answers.append(answer)
        self._to_send.set()

    async def _send(self) -> None:
        """A change goes out before the answer to whoever asked for it."""
        try:
            while await self._to_send.wait():
                self._to_send.clear()
                while self._state is not None or self._answers:
                    if self._state is not None:
                        state, self._state = self._state, None
                        await self._channel.send(StateChanged(state))
                    else:
                        await self._channel.send(self._answers.popleft())
        except ChannelClosedError:  # `run` reads the end of the channel, and ends
            return

"""What the registry's process and a worker tell one another, as MessagePack."""

import msgspec

from services.global_proxy.membership.member import InstanceSpec, Member, Role, State


class Message(msgspec.Struct, frozen=True, tag=True):
    """The base of all."""


# From the registry's process to a worker


class StateChanged(Message, frozen=True):
    """The whole state: at the start, and after each change (the newest, when several came together)."""

    state: State


class Answer(Message, frozen=True):
    """To the command with this id. At most one of the two is there; the state has been sent before."""

    id: int
    member: Member | None = None
    error: str | None = None
    error_type: str = "ValueError"


# From a worker to the registry's process


class Applied(Message, frozen=True):
    """The worker chooses by this version of the state, or a later one."""

    version: int


class Ready(Message, frozen=True):
    """The worker serves."""


class Command(Message, frozen=True):
    """Something of the registry's, asked for through a worker's admin API. Ids are the worker's."""

    id: int


class Add(Command, frozen=True):
    spec: InstanceSpec


class Drain(Command, frozen=True):
    name: str


class Remove(Command, frozen=True):
    name: str
    wait_s: float
    by_force: bool


class SetPolicy(Command, frozen=True):
    role: Role
    policy_name: str


ToWorker = StateChanged | Answer
ToRegistry = Applied | Ready | Add | Drain | Remove | SetPolicy

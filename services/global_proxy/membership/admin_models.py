"""What the admin API takes and gives."""

import time
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from services.global_proxy.membership.load_table import LoadTable
from services.global_proxy.membership.member import DrainState, InstanceSpec, Member, Role, Source, State

_MAX_CHARS = 512


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


Url = Annotated[str, Field(max_length=_MAX_CHARS, examples=["http://10.0.0.7:8100"])]


class NewInstance(_Model):
    """An engine's api server that shall be given requests."""

    role: Role
    url: Url
    kv_address: str | None = Field(
        None, max_length=_MAX_CHARS, description="HOST:PORT where a prefill instance is asked for KV, layer by layer."
    )
    bootstrap_url: str | None = Field(None, max_length=_MAX_CHARS, description="A prefill instance's, with Mooncake.")

    kv_events: str | None = Field(
        None, max_length=_MAX_CHARS, description="HOST:PORT where it tells what its prefix cache holds; not of decode."
    )

    def spec(self) -> InstanceSpec:
        """Raises ValueError: a value that no instance can have."""
        return InstanceSpec(self.role, self.url.rstrip("/"), self.kv_address, self.bootstrap_url, self.kv_events)


class NewPolicy(_Model):
    """How instances of a role are chosen from now on."""

    policy: str = Field(min_length=1, max_length=_MAX_CHARS, examples=["least_active"])


class Report(_Model):
    """What the instance last said of its own load."""

    num_running: int
    num_waiting: int
    kv_used_tokens: int
    kv_total_tokens: int
    age_s: float


class InstanceStatus(_Model):
    name: str = Field(description="HOST:PORT: what the instance is called in this API, in metrics and in logs.")
    role: Role
    url: str
    kv_address: str | None
    bootstrap_url: str | None
    kv_events: str | None
    state: DrainState
    source: Source = Field(description="Who named it: the deployment file, its own agent, or this API.")
    is_up: bool = Field(description="Whether requests are given to it, as far as its health goes.")
    num_requests: int = Field(description="In flight there, over all workers of this proxy.")
    num_tokens: int = Field(description="Of these requests.")
    num_leases: int = Field(description="Prompts whose KV it keeps until a decode instance has read it.")
    report: Report | None

    @classmethod
    def of(cls, member: Member, table: LoadTable) -> "InstanceStatus":
        spec, slot = member.spec, member.slot
        return cls(
            name=member.name,
            role=spec.role,
            url=spec.url,
            kv_address=spec.kv_address,
            bootstrap_url=spec.bootstrap_url,
            kv_events=spec.kv_events,
            state=member.state,
            source=member.source,
            is_up=not table.is_down(slot),
            num_requests=table.requests(slot),
            num_tokens=table.tokens(slot),
            num_leases=table.leases(slot),
            report=_report(table, slot),
        )


class Instances(_Model):
    instances: list[InstanceStatus]

    @classmethod
    def of(cls, state: State, table: LoadTable) -> "Instances":
        return cls(instances=[InstanceStatus.of(member, table) for member in state.members])


class Policies(_Model):
    prefill: str
    decode: str
    mixed: str


class ProxyState(Instances):
    version: int = Field(description="Grows by one with each change of instances or policies.")
    policies: Policies
    num_workers: int
    num_in_flight: int = Field(description="Requests that this proxy serves now.")
    num_queued: int = Field(description="Requests that wait in this proxy.")

    @classmethod
    def of(cls, state: State, table: LoadTable) -> "ProxyState":
        return cls(
            instances=Instances.of(state, table).instances,
            version=state.version,
            policies=policies_of(state),
            num_workers=table.num_workers,
            num_in_flight=table.num_in_flight(),
            num_queued=table.num_queued(),
        )


class ErrorDetail(_Model):
    message: str
    type: str
    param: str | None
    code: int


class ErrorBody(_Model):
    """OpenAI's shape."""

    error: ErrorDetail


def policies_of(state: State) -> Policies:
    return Policies(prefill=state.prefill_policy, decode=state.decode_policy, mixed=state.mixed_policy)


def _report(table: LoadTable, slot: int) -> Report | None:
    report = table.report(slot)
    if report is None:
        return None
    return Report(
        num_running=report.num_running,
        num_waiting=report.num_waiting,
        kv_used_tokens=report.kv_used_tokens,
        kv_total_tokens=report.kv_total_tokens,
        age_s=max(time.monotonic() - report.at_s, 0.0),
    )

"""The deployment file as typed models: one class per block, one attribute per key.

`omni.deployment.deployment_file` reads a file into `Deployment`; `omni.deployment.validate` has the rules across keys.

Which value counts, where a key may stand in two places:
- data_parallel_size, tensor_parallel_size, pipeline_parallel_size, extra_args, kv_cache_gib: the group's, else
  services.prefill / .decode's.
- env: both, and the group's where both name the same variable.
- in a "host <IP>" block: that block's for that host, else the group's. A private_key there replaces the group's
  password and the other way round.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from kv_transfer.connector.settings import Mode, TransportName
from omni.deployment.fields import (
    Address,
    Arguments,
    AtLeastOne,
    Connections,
    ControlPort,
    Count,
    DecodeGroupName,
    Devices,
    Environment,
    Host,
    Hosts,
    LocalPath,
    MixedGroupName,
    Name,
    Number,
    ParallelSize,
    Port,
    Positive,
    PrefillGroupName,
    Switch,
    Text,
    refusal,
)

Platform = Literal["cpu", "npu", "cuda"]
Backend = Literal["local", "ansible", "ray", "kubernetes"]
Runtime = Literal["docker", "host"]
KvConnector = Literal["omni", "nixl", "mooncake"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]

Fallback = Literal["none", "decode_only"]
PrefillPolicy = Literal[
    "round_robin",
    "least_active",
    "weighted_least_active",
    "power_of_two",
    "consistent_hash",
    "prefill_score_balance",
    "prefix_aware",
]
DecodePolicy = Literal[
    "round_robin",
    "least_active",
    "weighted_least_active",
    "power_of_two",
    "consistent_hash",
    "pd_score_balance",
    "prefix_aware",
]

HOST_KEY = "host <IP>"  # the alias below: how errors name the overrides of single hosts
MASTER_PORT_OFFSET = 1000
KV_PORT_OFFSET = 2000
EVENT_PORT_OFFSET = 3000
EMBEDDED = "embedded:"  # model_path: embedded:<name>


class Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Access(Block):
    """How to log in to a host. The local backend logs in nowhere and reads none of it."""

    user: Text | None = None
    private_key: Text | None = None
    password: SecretStr | None = None


class HostOverride(Access):
    """What differs on one host of a group."""

    master_port: Port | None = None
    base_api_port: Port | None = None
    base_kv_port: Port | None = None
    base_event_port: Port | None = None
    ascend_rt_visible_devices: Devices | None = None


class EngineOptions(Block):
    """Keys that may stand on a group as well as on services.prefill and services.decode."""

    data_parallel_size: ParallelSize | None = None  # default: as many as the devices allow; 1 without devices
    tensor_parallel_size: ParallelSize | None = None  # default: of P and mixed groups all devices of the group; of D 1
    pipeline_parallel_size: ParallelSize | None = None  # default: 1
    extra_args: Arguments | None = None  # more arguments for vLLM's api server
    env: Environment | None = None
    kv_cache_gib: Positive | None = None  # of one DP rank, all its TP ranks together


class Group(Access, EngineOptions):
    """One prefill, decode or mixed instance: data_parallel_size api servers, on one or more hosts."""

    hosts: Hosts = ("127.0.0.1",)  # the master first
    base_api_port: Port  # the api server of rank r listens on base_api_port + r
    master_port: Port | None = None  # where DP ranks find each other; default: base_api_port + 1000
    base_kv_port: Port | None = (
        None  # where rank r is asked for KV, where that is planned; default: base_api_port + 2000
    )
    base_event_port: Port | None = None  # P: rank r publishes its KV events on base_event_port + 2r and + 2r + 1;
    # default: base_api_port + 3000
    ascend_rt_visible_devices: Devices | None = None
    host_overrides: dict[str, HostOverride] = Field(default_factory=dict, alias="host <IP>")

    @model_validator(mode="before")
    @classmethod
    def _gather_host_blocks(cls, data: Any) -> Any:
        """Turns every `host 10.0.0.1:` key into an entry of `host_overrides`."""
        if not isinstance(data, dict):
            return data
        blocks = {key.removeprefix("host ").strip(): data[key] for key in data if key.startswith("host ")}
        rest = {key: data[key] for key in data if not key.startswith("host ")}
        return rest | {HOST_KEY: blocks} if blocks else rest


class Proxy(Access):
    host: Host = "127.0.0.1"
    listen_port: Port = 7000
    control_port: ControlPort = None  # where engines join and report their load; 0: nowhere; default:
    # `omni.deployment.ports.control_port`
    other_control_addresses: tuple[Address, ...] = ()  # HOST:PORT of more proxies that the engines join
    workers: ParallelSize = 1  # processes behind listen_port
    prefill_policy: PrefillPolicy | None = None  # who gets a prompt; default: the proxy's own
    decode_policy: DecodePolicy | None = None
    mixed_policy: PrefillPolicy | None = None
    fallback: Fallback = "none"  # decode_only: while no prefill is up, decode computes prompts too
    api_keys_file: LocalPath | None = None  # hashed keys; without it everybody is served
    tls_certificate_file: LocalPath | None = None  # PEM; with tls_key_file, listen_port speaks TLS
    tls_key_file: LocalPath | None = None
    otlp_endpoint: Text | None = None  # of an OpenTelemetry collector: http://HOST:4318
    extra_args: Arguments = ()  # more arguments for `python -m services.global_proxy`


class Pools(Block):
    """The `deployment` block: who runs where. P and D, or mixed groups (plain engines), or all of them."""

    prefill: Annotated[dict[PrefillGroupName, Group], AtLeastOne] = Field(default_factory=dict)
    decode: Annotated[dict[DecodeGroupName, Group], AtLeastOne] = Field(default_factory=dict)
    mixed: Annotated[dict[MixedGroupName, Group], AtLeastOne] = Field(default_factory=dict)
    proxy: Proxy = Proxy()  # also written as c0

    @model_validator(mode="before")
    @classmethod
    def _c0_is_the_proxy(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "c0" not in data:
            return data
        if "proxy" in data:
            raise refusal("names the proxy twice", "keep one of proxy and c0")
        return {"proxy" if key == "c0" else key: value for key, value in data.items()}

    @model_validator(mode="after")
    def _has_engines(self) -> Self:
        if bool(self.prefill) != bool(self.decode):
            missing = "decode" if self.prefill else "prefill"
            raise refusal(f"has no {missing} group", f"add {missing}:, or write the engines under mixed:")
        if not self.prefill and not self.mixed:
            raise refusal("has no groups of engines", "add prefill: and decode:, or mixed:")
        return self


class PrefillServices(EngineOptions):
    max_model_len: Count = 32000  # tokens; the default shrinks to what the model can do, a written value does not
    kv_events: bool = False  # tell the proxy what the prefix cache holds: for its policy prefix_aware


class DecodeServices(EngineOptions):
    max_model_len: Count = 16384


class MixedServices(EngineOptions):
    max_model_len: Count = 32000  # default beside decode groups: decode's, for the proxy gives a request to either


class ExpertPlacement(Block):
    """How the experts of a mixture of experts lie on the devices of D and of mixed groups."""

    num_redundant_experts: Number = 0  # copies of busy experts, on top
    config_path: Text | None = None  # on NPU: a placement pattern, at the same path on every host


class KvTransfer(Block):
    """How KV gets from prefill to decode. vLLM's own connectors know lease_s (nixl) and load_failure_policy alone."""

    connector: KvConnector = "omni"  # ours, or vLLM's NixlConnector or MooncakeConnector
    transport: TransportName = "auto"  # auto: the fastest that both sides have
    mode: Mode = "pull"  # layerwise: decode reads each layer as soon as prefill has computed it
    key_file: LocalPath | None = None  # the deployment key; default: one of this user's own, made when first needed
    num_connections: Connections = 1  # over TCP, of each pair of ranks
    lease_s: Positive = 30.0  # how long prefill keeps KV blocks that nobody fetches
    max_lease_s: Positive = 600.0  # how long decode may have them kept by asking again
    load_timeout_s: Positive = 30.0  # how long decode waits for KV blocks
    load_failure_policy: Literal["recompute", "fail"] = "recompute"  # what decode does when they do not come
    checksum: bool = False  # of all that is moved over tcp or hccl

    @property
    def roles_with_port(self) -> tuple[str, ...]:
        """Whose engines are asked for KV on a port that others must know before they start."""
        if self.connector == "nixl":
            return ("prefill", "decode")
        return ("prefill",) if self.connector == "mooncake" or self.mode == "layerwise" else ()


class Services(Block):
    """What runs. The local backend uses neither docker nor a copy of the code: it reads past the keys for them."""

    model_path: Text  # a folder, or embedded:<name>
    served_model_name: Text | None = None  # default: the model folder's name
    log_path: LocalPath | None = None  # default: logs/<deployment name>
    dtype: Dtype = "auto"  # of prefill and decode alike: they exchange KV bytes
    code_path: Text | None = None
    local_code_path: Text | None = None
    http_proxy: str | None = None
    docker_image: Text | None = None
    runtime: Runtime | None = None  # of the Ansible backend; default: docker if there is a docker_image
    venv_path: Text | None = None  # runtime host: the virtual environment there; default: code_path/.venv
    rank_table_path: Text | None = None  # a folder on every NPU host; default: ranktable beside the logs (ansible)
    multi_token_prediction: Count | None = None  # tokens that the model's own MTP layers propose at a time
    graph_mode: bool | None = None  # of D and mixed groups; P is eager then. Default: as the platform likes it
    expert_placement: Annotated[ExpertPlacement | None, Switch] = None  # true, or a block
    prefill: PrefillServices = PrefillServices()
    decode: DecodeServices = DecodeServices()
    mixed: MixedServices = MixedServices()
    kv_transfer: KvTransfer = KvTransfer()


class Ray(Block):
    """Where the Ray backend finds its cluster."""

    address: Text = "auto"  # as for ray.init; auto: the one that this machine belongs to


class Deployment(Block):
    """A whole deployment file."""

    name: Name  # default: the file's name without its ending
    platform: Platform | None = None
    backend: Backend = "local"  # default: ansible where the file says how to log in to hosts
    ray: Ray = Ray()
    deployment: Pools
    services: Services

    @model_validator(mode="after")
    def _default_backend(self) -> Self:
        overrides = (block for group in self.groups for block in group.host_overrides.values())
        blocks: list[Access] = [self.deployment.proxy, *self.groups, *overrides]
        if "backend" not in self.model_fields_set and any(b.user or b.private_key or b.password for b in blocks):
            return self.model_copy(update={"backend": "ansible"})
        return self

    @property
    def groups(self) -> tuple[Group, ...]:
        pools = self.deployment
        return (*pools.prefill.values(), *pools.decode.values(), *pools.mixed.values())

    @property
    def hosts(self) -> tuple[str, ...]:
        """Each once, the engines' first."""
        engines = (host for group in self.groups for host in group.hosts)
        return tuple(dict.fromkeys((*engines, self.deployment.proxy.host)))

    @property
    def runtime(self) -> Runtime:
        return self.services.runtime or ("docker" if self.services.docker_image else "host")

    @property
    def effective_platform(self) -> Platform:
        return self.platform or ("npu" if any(group.ascend_rt_visible_devices for group in self.groups) else "cpu")

    @property
    def log_folder(self) -> Path:
        return self.services.log_path or Path("logs", self.name).absolute()

    @property
    def model_name(self) -> str:
        """The name clients send."""
        return self.services.served_model_name or Path(self.services.model_path.removeprefix(EMBEDDED)).name

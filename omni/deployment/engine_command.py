"""The command line of one engine's api server, and what a user may add to it."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from omni.deployment.errors import Problem
from omni.deployment.groups import GroupSettings
from omni.deployment.layout import Rank
from omni.deployment.model import KvConnector, KvTransfer, Platform, Services
from omni.deployment.switches import eager_arguments, switch_arguments

API_SERVER = "omni.adaptors.vllm.api_server"
MOONCAKE_ON_CPU = "omni.adaptors.vllm.mooncake_on_cpu.MooncakeOnCpu"
SHUTDOWN_TIMEOUT_S = 5  # for requests in flight
MAX_NUM_SEQS_CPU = 64  # vLLM's own default is made for accelerators
# Of a prompt that D computes itself, while it has other requests, so many tokens a step: about what doubles its time.
DECODE_CHUNK_TOKENS_CPU = 16
DECODE_CHUNK_TOKENS = 256

_CONNECTORS: Mapping[KvConnector, Mapping[str, str]] = {
    "omni": {"kv_connector": "OmniConnector", "kv_connector_module_path": "kv_transfer.connector"},
    "nixl": {"kv_connector": "NixlConnector"},
    "mooncake": {"kv_connector": "MooncakeConnector"},
}

# What a user may write although the plan has a default or an opinion.
_FREE = (
    "--max-num-seqs",
    "--block-size",
    "--max-num-batched-tokens",
    "--long-prefill-token-threshold",
    "--enforce-eager",
    "--no-enforce-eager",
)
# What would change the processes' number or arrangement behind the plan's back.
_NEVER = (
    "--config",
    "--headless",
    "--api-server-count",
    "--kv-cache-memory-bytes",
    "--enable-expert-parallel",
    "--pipeline-parallel-size",
    "--data-parallel-size",
    "--data-parallel-size-local",
    "--data-parallel-rank",
    "--data-parallel-start-rank",
    "--data-parallel-address",
    "--data-parallel-rpc-port",
    "--data-parallel-backend",
    "--data-parallel-external-lb",
    "--data-parallel-hybrid-lb",
    "--data-parallel-multi-port-external-lb",
    "--nnodes",
    "--node-rank",
    "--master-addr",
    "--master-port",
)
_SHORT = {
    "-dp": "--data-parallel-size",
    "-dpr": "--data-parallel-rank",
    "-tp": "--tensor-parallel-size",
    "-pp": "--pipeline-parallel-size",
}


@dataclass(frozen=True, kw_only=True)
class EngineCommand:
    """Everything that goes into one api server's command line, or that of a further node of its DP rank."""

    group: GroupSettings
    dp_rank: int
    node_rank: int
    nodes: Rank  # the hosts of this DP rank
    name: str  # the process's: "prefill.group1.rank0"
    deployment_name: str
    host: str
    port: int
    model_path: Path
    served_model_name: str
    dtype: str
    max_model_len: int  # tokens
    kv_bytes_per_worker: int | None  # None: vLLM measures the device
    services: Services
    kv_port: int | None  # of this rank; None: none is planned
    event_port: int | None  # where this rank publishes KV events, and on the next one repeats them; None: nowhere
    platform: Platform
    is_moe: bool

    def argv(self) -> tuple[str, ...]:
        return (sys.executable, "-m", API_SERVER, *self._own_arguments(), *self.group.extra_args)

    def problems(self) -> Iterator[Problem]:
        """Extra arguments that would override what the plan sets."""
        reserved = {part for part in self._own_arguments() if part.startswith("--")} | set(_NEVER)
        for part in self.group.extra_args:
            flag = _flag(part)
            # argparse takes an abbreviation for the whole flag.
            if flag and flag not in _FREE and any(own.startswith(flag) for own in reserved):
                yield Problem(self.group.field("extra_args"), f"{part!r} is set by the plan", _mend(flag))

    def kv_env(self) -> Mapping[str, str]:
        """What vLLM's own connectors read from the environment."""
        if self.group.role == "mixed":
            return {}
        if self.kv_transfer.connector == "mooncake":
            bootstrap = {} if self.kv_port is None else {"VLLM_MOONCAKE_BOOTSTRAP_PORT": str(self.kv_port)}
            return {"VLLM_HOST_IP": self.host, **bootstrap}
        if self.kv_transfer.connector == "nixl" and self.kv_port is not None:
            # vLLM adds the rank of ranks that run in step.
            port = self.kv_port - self.dp_rank if self._is_in_step else self.kv_port
            return {"VLLM_NIXL_SIDE_CHANNEL_HOST": self.host, "VLLM_NIXL_SIDE_CHANNEL_PORT": str(port)}
        return {}

    @property
    def max_num_seqs(self) -> int | None:
        """Sequences that the engine computes at once; None: as many as vLLM thinks right for the device."""
        written = number_of(self.group.extra_args, "--max-num-seqs")
        return written or (MAX_NUM_SEQS_CPU if self.is_cpu else None)

    @property
    def is_cpu(self) -> bool:
        return self.platform == "cpu"

    @property
    def kv_transfer(self) -> KvTransfer:
        return self.services.kv_transfer

    @property
    def _is_in_step(self) -> bool:
        return self.is_moe and self.group.data_parallel_size > 1

    def _own_arguments(self) -> Iterator[str]:
        yield from ("--model", str(self.model_path))
        yield from ("--served-model-name", self.served_model_name)
        yield from ("--host", self.host)
        yield from ("--port", str(self.port))
        yield from ("--dtype", self.dtype)
        yield from ("--max-model-len", str(self.max_model_len))
        yield from ("--tensor-parallel-size", str(self.group.tensor_parallel_size))
        if self.group.pipeline_parallel_size > 1:
            yield from ("--pipeline-parallel-size", str(self.group.pipeline_parallel_size))
        if self.group.role != "mixed":
            yield from ("--kv-transfer-config", json.dumps(self._kv_transfer_config()))
        if self.event_port is not None:
            yield from ("--kv-events-config", json.dumps(self._kv_events_config(self.event_port)))
        # Without it vLLM kills its EngineCore at once, which then cannot clean up.
        yield from ("--shutdown-timeout", str(SHUTDOWN_TIMEOUT_S))
        if self.kv_bytes_per_worker is not None:
            yield from ("--kv-cache-memory-bytes", str(self.kv_bytes_per_worker))
        if self._is_in_step:
            yield from self._data_parallel_arguments()
        if len(self.nodes) > 1:
            yield from self._node_arguments()
        yield from switch_arguments(self.services, self.group, self.platform, is_in_step=self._is_in_step)
        if self.group.role == "decode":
            yield from self._decode_defaults()
        if self.is_cpu:
            yield from self._cpu_defaults()

    def _decode_defaults(self) -> Iterator[str]:
        if "--long-prefill-token-threshold" not in {_flag(part) for part in self.group.extra_args}:
            num_tokens = DECODE_CHUNK_TOKENS_CPU if self.is_cpu else DECODE_CHUNK_TOKENS
            yield from ("--long-prefill-token-threshold", str(min(num_tokens, self.max_model_len)))

    def _cpu_defaults(self) -> Iterator[str]:
        written = {_flag(part) for part in self.group.extra_args}
        if self.kv_transfer.connector == "mooncake" and "--worker-extension-cls" not in written:
            yield from ("--worker-extension-cls", MOONCAKE_ON_CPU)
        if "--max-num-seqs" not in written:
            yield from ("--max-num-seqs", str(MAX_NUM_SEQS_CPU))
        if not written & {"--enforce-eager", "--no-enforce-eager"} and self.services.graph_mode is None:
            yield from eager_arguments(self.group, self.platform)  # compiling takes minutes on a CPU

    def _data_parallel_arguments(self) -> Iterator[str]:
        """A mixture of experts spreads its experts over the DP ranks, so these run in step.

        A dense model's ranks get none of this: vLLM refuses such flags for it and has every rank on its own.
        """
        yield from ("--data-parallel-size", str(self.group.data_parallel_size))
        yield from ("--data-parallel-rank", str(self.dp_rank))
        yield from ("--data-parallel-address", self.group.hosts[0])
        yield from ("--data-parallel-rpc-port", str(self.group.master_port))
        yield "--data-parallel-external-lb"
        yield "--enable-expert-parallel"

    def _node_arguments(self) -> Iterator[str]:
        yield from ("--nnodes", str(len(self.nodes)))
        yield from ("--node-rank", str(self.node_rank))
        yield from ("--master-addr", self.nodes[0].host)
        yield from ("--master-port", str(self.group.master_port_of(self.nodes[0].host)))
        if self.node_rank > 0:
            yield "--headless"

    def _kv_transfer_config(self) -> dict[str, object]:
        # Mooncake's connector remembers for ever where an engine of some id is: a new start needs a new id, vLLM's own.
        engine_id = (
            {} if self.kv_transfer.connector == "mooncake" else {"engine_id": f"{self.deployment_name}.{self.name}"}
        )
        return {
            **_CONNECTORS[self.kv_transfer.connector],
            **engine_id,
            "kv_role": {"prefill": "kv_producer", "decode": "kv_consumer"}[self.group.role],
            "kv_load_failure_policy": self.kv_transfer.load_failure_policy,
            "kv_connector_extra_config": self._connector_config(),
        }

    def _kv_events_config(self, port: int) -> dict[str, object]:
        if self._is_in_step:
            port -= self.dp_rank  # vLLM adds the rank of ranks that run in step
        return {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": f"tcp://{self.host}:{port}",
            "replay_endpoint": f"tcp://{self.host}:{port + 1}",
        }

    def _connector_config(self) -> dict[str, object]:
        settings = self.kv_transfer
        if settings.connector == "nixl":
            return {"kv_lease_duration": int(settings.lease_s)}
        if settings.connector == "mooncake":
            return {"mooncake_protocol": "tcp"} if self.is_cpu else {}
        config: dict[str, object] = {
            "listen_host": self.host,
            "transport": settings.transport,
            "mode": settings.mode,
            "num_connections": settings.num_connections,
            "lease_s": settings.lease_s,
            "max_lease_s": settings.max_lease_s,
            "load_timeout_s": settings.load_timeout_s,
            "checksum": settings.checksum,
        }
        if self.kv_port is not None:
            config["listen_port"] = self.kv_port
        if settings.key_file is not None:
            config["key_file"] = str(settings.key_file)  # never the key itself: command lines can be seen by all
        return config


def number_of(extra_args: Sequence[str], flag: str) -> int | None:
    """What `--flag N` or `--flag=N` among the user's arguments says, the last one as for argparse; None: nothing."""
    number = None
    for part, following in zip_longest(extra_args, extra_args[1:], fillvalue=""):
        if _flag(part) == flag:
            text = part.partition("=")[2] or following
            number = int(text) if text.isdecimal() and int(text) > 0 else None
    return number


def _flag(part: str) -> str:
    """`--Max_Len=3` → `--max-len`: vLLM takes underscores for dashes and `--flag.key` for a key of a JSON flag."""
    flag = part.partition("=")[0].partition(".")[0]
    if flag.startswith("--"):
        return flag.replace("_", "-")
    return next((long for short, long in _SHORT.items() if flag.startswith(short)), "")


def _mend(flag: str) -> str:
    keys = {
        "--max-model-len": "max_model_len",
        "--tensor-parallel-size": "tensor_parallel_size",
        "--pipeline-parallel-size": "pipeline_parallel_size",
        "--data-parallel-size": "data_parallel_size",
        "--kv-cache-memory-bytes": "kv_cache_gib",
        "--dtype": "services.dtype",
        "--served-model-name": "services.served_model_name",
        "--model": "services.model_path",
        "--port": "base_api_port",
        "--host": "hosts",
        "--kv-transfer-config": "services.kv_transfer",
        "--kv-events-config": "services.prefill.kv_events",
    }
    return f"delete it and write {keys[flag]}" if flag in keys else "delete it"

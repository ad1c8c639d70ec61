"""The engines of these tests: one deployment; a decode engine that differs; a prefill engine in a network of its own.

All have one deployment key.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from omni.deployment.embedded_model import ensure_embedded_model
from tests.e2e.deployments import DIGESTS, Deployment, Server, Waiter, deployed, engine_arguments, running
from tests.e2e.kv_faults.network import Namespace, missing_for_namespaces

LEASE_S = 4
LOAD_TIMEOUT_S = 4
MAX_MODEL_LEN = 4096
_NUM_BLOCKS = 80  # few, so that given-up blocks are soon another prompt's
NUM_RUNNING = 2  # few, so that a decode engine is soon busy
_KV_CACHE_BYTES = 32 << 20


@dataclass(frozen=True)
class Engines:
    """`prefill` and `decode` are the deployment's, as is `other_model`, a decode engine with another model."""

    deployment: Deployment
    bfloat16: Server  # a decode engine with another dtype, which fails requests whose KV does not come
    far_prefill: Server | None  # None where no namespace can be made
    namespace: Namespace
    logs: Path

    @property
    def prefill(self) -> Server:
        return self.deployment.prefill[0]

    @property
    def decode(self) -> Server:
        return self.deployment.decode[0]

    @property
    def other_model(self) -> Server:
        return self.deployment.decode[1]

    @property
    def key_file(self) -> Path:
        return Path(self.deployment.env["OMNI_STATE_DIR"], "deployment.key")

    def pid(self, role: str) -> int | None:
        """Of the deployment's first api server of this role; None while it waits for its restart."""
        states = Path(self.deployment.env["OMNI_STATE_DIR"], self.deployment.name)
        state = json.loads((states / f"{role}.group1.rank0.process.json").read_text())
        pid: int | None = state["pid"]
        return pid

    def family(self, role: str) -> list[psutil.Process]:
        """That api server, its EngineCore and its worker."""
        parent = psutil.Process(self.pid(role))
        return [parent, *parent.children(recursive=True)]

    def rank_server_port(self, host: str) -> int:
        """The port of the last worker at this address that the decode engine has read from."""
        log = (self.deployment.log_folder / "decode.group1.rank0.log").read_text()
        return int(re.findall(rf"KV from {re.escape(host)}:(\d+): ", log)[-1])


@contextmanager
def engines_for_faults(folder: Path, free_ports: Callable[[int], int]) -> Iterator[Engines]:
    """Start all of them at once; stop them afterwards."""
    extra_args = DIGESTS["extra_args"]
    few_blocks = [*extra_args, "--num-gpu-blocks-override", str(_NUM_BLOCKS), "--max-num-batched-tokens", "512"]
    namespace = Namespace(free_ports(1) % 250)
    with ExitStack() as stack:
        far_waiter: Waiter | None = None
        if not missing_for_namespaces():
            stack.callback(namespace.remove)
            namespace.make()
            far = _engine(folder, free_ports(1), "kv_producer", connector={"transport": "tcp"}, namespace=namespace)
            far_waiter = stack.enter_context(far)
        bfloat16 = _engine(folder, free_ports(1), "kv_consumer", policy="fail", arguments=("--dtype", "bfloat16"))
        bfloat16_waiter = stack.enter_context(bfloat16)
        deployment = stack.enter_context(
            deployed(
                folder,
                free_ports,
                model="embedded:tiny",
                prefill_groups=1,
                decode_groups=2,
                max_model_len=MAX_MODEL_LEN,
                # layerwise: P gets a planned control port, the same after a restart.
                kv_transfer={"lease_s": LEASE_S, "load_timeout_s": LOAD_TIMEOUT_S, "mode": "layerwise"},
                group_options={
                    "prefill.group1": {"extra_args": few_blocks},
                    "decode.group1": {"extra_args": [*extra_args, "--max-num-seqs", str(NUM_RUNNING)]},
                    "decode.group2": {"extra_args": [*extra_args, "--hf-overrides", '{"rope_theta": 5000.0}']},
                },
            )
        )
        yield Engines(deployment, bfloat16_waiter(), far_waiter() if far_waiter else None, namespace, folder)


def _engine(
    folder: Path,
    port: int,
    role: str,
    *,
    policy: str = "recompute",
    connector: dict[str, Any] | None = None,
    arguments: tuple[str, ...] = (),
    namespace: Namespace | None = None,
) -> AbstractContextManager[Waiter]:
    """One engine, started by hand."""
    host = namespace.host if namespace else "127.0.0.1"
    extra_config = {"listen_host": host, "lease_s": LEASE_S, "load_timeout_s": LOAD_TIMEOUT_S, **(connector or {})}
    transfer = {
        "kv_connector": "OmniConnector",
        "kv_connector_module_path": "kv_transfer.connector",
        "kv_role": role,
        "kv_load_failure_policy": policy,
        "kv_connector_extra_config": extra_config,
    }
    usual = engine_arguments(port, ensure_embedded_model("tiny"), MAX_MODEL_LEN)
    usual[usual.index("--host") + 1] = host
    command = [
        *(namespace.prefix if namespace else ()),
        *(sys.executable, "-m", "omni.adaptors.vllm.api_server", *usual),
        *("--kv-cache-memory-bytes", str(_KV_CACHE_BYTES), "--kv-transfer-config", json.dumps(transfer)),
        *arguments,
    ]
    env = {"OMNI_STATE_DIR": str(folder / "state"), "VLLM_CPU_OMP_THREADS_BIND": str(min(os.sched_getaffinity(0)))}
    return running(command, port, folder / f"{role}.log", env, host=host)

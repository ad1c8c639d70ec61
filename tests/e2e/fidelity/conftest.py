"""The two servers, started once for all of these tests, with what a deployment that serves agents turns on."""

import sys
from collections.abc import Callable, Iterator

import pytest

from omni.deployment.embedded_model import ensure_embedded_model
from tests.e2e.deployments import deployed, engine_arguments, running
from tests.e2e.fidelity.pair import FidelityPair, answerer

_OPTIONS = ["--enable-prompt-tokens-details", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"]


@pytest.fixture(scope="session")
def fidelity_pair(tmp_path_factory: pytest.TempPathFactory, free_ports: Callable[[int], int]) -> Iterator[FidelityPair]:
    folder = tmp_path_factory.mktemp("fidelity")
    port = free_ports(1)
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *engine_arguments(port, ensure_embedded_model("tiny")),
        *("--kv-cache-memory-bytes", str(1 << 29), *_OPTIONS),
    ]
    env = {"VLLM_CPU_OMP_THREADS_BIND": "0", "TORCH_COMPILE_DISABLE": "1"}
    options = {"extra_args": _OPTIONS}
    with (
        running(command, port, folder / "plain.log", env) as plain,  # it starts while the deployment does
        deployed(
            folder,
            free_ports,
            model="embedded:tiny",
            prefill_groups=1,
            decode_groups=1,
            group_options={"prefill.group1": options, "decode.group1": options},
        ) as deployment,
        answerer(deployment.proxy) as ours,
        answerer(plain()) as theirs,
    ):
        yield FidelityPair(ours, theirs, deployment)


@pytest.fixture
def pair(fidelity_pair: FidelityPair) -> FidelityPair:
    return fidelity_pair

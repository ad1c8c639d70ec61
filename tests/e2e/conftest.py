"""Engines that several test modules share."""

from collections.abc import Callable, Iterator

import pytest

from omni.deployment.embedded_model import ensure_embedded_model
from tests.e2e.deployments import Server, plain_vllm


@pytest.fixture(scope="session")
def plain_tiny(tmp_path_factory: pytest.TempPathFactory, free_ports: Callable[[int], int]) -> Iterator[Server]:
    """Plain vLLM with the tiny model: what every other topology must answer like."""
    folder = tmp_path_factory.mktemp("plain-tiny")
    with plain_vllm(folder, free_ports, model_path=ensure_embedded_model("tiny")) as server:
        yield server

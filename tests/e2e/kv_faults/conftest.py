"""The engines, started once for all of these tests."""

from collections.abc import Callable, Iterator

import pytest

from tests.e2e.deployments import Server
from tests.e2e.kv_faults.engines import Engines, engines_for_faults
from tests.e2e.kv_faults.pair import Pair


@pytest.fixture(scope="package")
def engines(tmp_path_factory: pytest.TempPathFactory, free_ports: Callable[[int], int]) -> Iterator[Engines]:
    with engines_for_faults(tmp_path_factory.mktemp("kv-faults"), free_ports) as engines:
        yield engines


@pytest.fixture
def pair(engines: Engines, plain_tiny: Server) -> Iterator[Pair]:
    """What a test does to these two, it leaves without a trace."""
    pair = Pair(engines.prefill, engines.decode, plain_tiny)
    yield pair
    pair.assert_recovers()

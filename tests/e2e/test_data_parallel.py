"""Real engines, tiny model, two data-parallel ranks in each instance."""

from collections.abc import Callable, Iterator

import pytest

from omni.deployment.embedded_model import ensure_embedded_model
from tests.e2e.deployments import Deployment, Server, deployed, eventually, plain_vllm
from tests.e2e.equality import COMPLETIONS, choices, completion

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory, free_ports: Callable[[int], int]) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("dp2")
    with deployed(
        folder, free_ports, model="embedded:tiny", prefill_groups=1, decode_groups=1, data_parallel_size=2
    ) as running:
        yield running


@pytest.fixture(scope="module")
def plain(
    deployment: Deployment, tmp_path_factory: pytest.TempPathFactory, free_ports: Callable[[int], int]
) -> Iterator[Server]:
    with plain_vllm(tmp_path_factory.mktemp("plain"), free_ports, model_path=ensure_embedded_model("tiny")) as server:
        yield server


def test_each_rank_is_an_api_server_on_the_next_port(deployment: Deployment) -> None:
    for ranks in (deployment.prefill, deployment.decode):
        first, second = (int(server.url.rsplit(":", 1)[1]) for server in ranks)
        assert second == first + 1


def test_every_pair_of_ranks_answers_like_plain_vllm(deployment: Deployment, plain: Server) -> None:
    before = [server.metric("vllm:request_success_total") for server in deployment.prefill + deployment.decode]
    for number in range(8):
        body = completion(f"{number} green bottles hanging on the wall, " * (1 + 2 * number))
        assert choices(deployment.proxy.post(COMPLETIONS, body)) == choices(plain.post(COMPLETIONS, body))
    after = [server.metric("vllm:request_success_total") for server in deployment.prefill + deployment.decode]
    assert [b - a for a, b in zip(before, after, strict=True)] == [4, 4, 4, 4]
    assert eventually(deployment.prefill_is_idle, 2)

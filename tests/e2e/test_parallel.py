"""Real engines, tiny model: two data-parallel ranks, and two tensor-parallel ranks, in each instance."""

from collections.abc import Callable, Iterator

import pytest

from tests.e2e.deployments import Deployment, Server, deployed, eventually
from tests.e2e.equality import COMPLETIONS, choices, completion

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def two_dp_ranks(tmp_path_factory: pytest.TempPathFactory, free_ports: Callable[[int], int]) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("dp2")
    sizes = {"prefill_groups": 1, "decode_groups": 1, "dp": 2}
    in_turn = {"prefill_policy": "round_robin", "decode_policy": "round_robin"}
    with deployed(folder, free_ports, model="embedded:tiny", proxy_options=in_turn, **sizes) as running:
        yield running


@pytest.fixture(scope="module")
def two_tp_ranks(tmp_path_factory: pytest.TempPathFactory, free_ports: Callable[[int], int]) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("tp2")
    with deployed(folder, free_ports, model="embedded:tiny", prefill_groups=1, decode_groups=1, tp=2) as running:
        yield running


def _texts() -> list[str]:
    return [f"{number} green bottles hanging on the wall, " * (1 + 2 * number) for number in range(8)]


def test_each_dp_rank_is_an_api_server_on_the_next_port(two_dp_ranks: Deployment) -> None:
    for ranks in (two_dp_ranks.prefill, two_dp_ranks.decode):
        first, second = (int(server.url.rsplit(":", 1)[1]) for server in ranks)
        assert second == first + 1


def test_dp_ranks_share_the_requests(two_dp_ranks: Deployment, plain_tiny: Server) -> None:
    ranks = two_dp_ranks.prefill + two_dp_ranks.decode
    before = [server.metric("vllm:request_success_total") for server in ranks]
    for text in _texts():
        body = completion(text)
        assert choices(two_dp_ranks.proxy.post(COMPLETIONS, body)) == choices(plain_tiny.post(COMPLETIONS, body))
    after = [server.metric("vllm:request_success_total") for server in ranks]
    shares = [b - a for a, b in zip(before, after, strict=True)]
    assert sum(shares[:2]) == sum(shares[2:]) == len(_texts())
    # In turn, unless a rank was passed over while it was slow to answer its health check.
    assert min(shares) >= len(_texts()) / 2 - 2
    assert eventually(two_dp_ranks.prefill_is_idle, 2)


def test_every_tp_rank_moves_its_share(two_tp_ranks: Deployment, plain_tiny: Server) -> None:
    decode = two_tp_ranks.decode[0]
    for text in _texts():
        body = completion(text)
        assert choices(two_tp_ranks.proxy.post(COMPLETIONS, body)) == choices(plain_tiny.post(COMPLETIONS, body))
    assert decode.metric("vllm:prompt_tokens_by_source_total", source="local_compute") == len(_texts())
    # A load is counted by each rank; a lease ends once both have read.
    assert decode.metric("vllm:omni_kv_load_seconds_count") == 2 * len(_texts())
    assert eventually(two_tp_ranks.prefill_is_idle, 2)

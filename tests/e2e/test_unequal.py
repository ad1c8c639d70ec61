"""Real engines, tiny model: prefill and decode that differ in tensor-parallel size and block size, in every pairing."""

from collections.abc import Callable, Iterator

import pytest

from tests.e2e.deployments import Deployment, Server, deployed, eventually, proxy_over
from tests.e2e.equality import COMPLETIONS, choices, completion

pytestmark = pytest.mark.engine

ONE_RANK = {"tensor_parallel_size": 1, "extra_args": ["--block-size", "32"]}
TWO_RANKS = {"tensor_parallel_size": 2, "extra_args": ["--block-size", "64"]}
SIZES = tuple(enumerate((ONE_RANK, TWO_RANKS)))
LENGTHS = (1, 2, 31, 32, 33, 64, 65, 96, 129, 700)  # tokens: about the borders of both block sizes


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory, free_ports: Callable[[int], int]) -> Iterator[Deployment]:
    options = {f"{role}.group{1 + index}": ranks for role in ("prefill", "decode") for index, ranks in SIZES}
    with deployed(
        tmp_path_factory.mktemp("unequal"),
        free_ports,
        model="embedded:tiny",
        prefill_groups=2,
        decode_groups=2,
        kv_transfer={"load_failure_policy": "fail"},  # a load that fails is not covered up
        group_options=options,
    ) as running:
        yield running


@pytest.mark.parametrize("prefill", [0, 1], ids=["p-one-rank", "p-two-ranks"])
@pytest.mark.parametrize("decode", [0, 1], ids=["d-one-rank", "d-two-ranks"])
def test_answers_like_plain_vllm(
    deployment: Deployment,
    plain_tiny: Server,
    free_ports: Callable[[int], int],
    tmp_path_factory: pytest.TempPathFactory,
    prefill: int,
    decode: int,
) -> None:
    folder = tmp_path_factory.mktemp("proxy")
    p, d = deployment.prefill[prefill], deployment.decode[decode]
    before = _received(d)
    with proxy_over(folder, free_ports, (p,), (d,)) as proxy:
        for length in LENGTHS:
            body = completion(f"{prefill}{decode}{length:04}{'abcdefg' * 100}"[:length])
            assert choices(proxy.post(COMPLETIONS, body)) == choices(plain_tiny.post(COMPLETIONS, body)), length
    assert _received(d) - before == sum(length - 1 for length in LENGTHS)
    assert eventually(deployment.prefill_is_idle, 5)


def test_a_prefix_that_decode_has_is_not_read_again(
    deployment: Deployment,
    plain_tiny: Server,
    free_ports: Callable[[int], int],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    p, d = deployment.prefill[1], deployment.decode[0]  # blocks of 64 tokens are read into blocks of 32
    shared = "what both prompts begin with ".ljust(224, ".")
    with proxy_over(tmp_path_factory.mktemp("proxy"), free_ports, (p,), (d,)) as proxy:
        for ending in ("first " * 20, "second " * 20):
            before = _received(d)
            body = completion(shared + ending)
            assert choices(proxy.post(COMPLETIONS, body)) == choices(plain_tiny.post(COMPLETIONS, body))
        assert _received(d) - before == len(shared + ending) - 1 - len(shared)


def _received(decode: Server) -> float:
    return decode.metric("vllm:prompt_tokens_by_source_total", source="external_kv_transfer")


def test_pipeline_stages_of_prefill(
    tmp_path_factory: pytest.TempPathFactory, free_ports: Callable[[int], int], plain_tiny: Server
) -> None:
    with deployed(
        tmp_path_factory.mktemp("stages"),
        free_ports,
        model="embedded:tiny",
        prefill_groups=1,
        decode_groups=1,
        kv_transfer={"load_failure_policy": "fail"},
        group_options={"prefill.group1": {"pipeline_parallel_size": 2, "extra_args": []}},
    ) as stages:
        for length in LENGTHS:
            body = completion(f"stages{length:04}{'abcdefg' * 100}"[:length])
            assert choices(stages.proxy.post(COMPLETIONS, body)) == choices(plain_tiny.post(COMPLETIONS, body)), length
        assert _received(stages.decode[0]) == sum(length - 1 for length in LENGTHS)
        assert eventually(stages.prefill_is_idle, 5)

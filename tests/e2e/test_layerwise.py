"""Real engines, tiny model, layer-wise: D reads each layer of each chunk of a prompt while P computes the rest."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from urllib.error import HTTPError

import pytest

from tests.e2e.deployments import Deployment, Server, deployed, eventually
from tests.e2e.equality import COMPLETIONS, AnswersLikePlainVllm, choices, completion
from tests.e2e.prompts import prompts

pytestmark = pytest.mark.engine

CHUNK = 256  # tokens that P computes in a step


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory, free_ports: Callable[[int], int]) -> Iterator[Deployment]:
    with deployed(
        tmp_path_factory.mktemp("layerwise"),
        free_ports,
        model="embedded:tiny",
        prefill_groups=1,
        decode_groups=1,
        kv_transfer={"mode": "layerwise", "load_failure_policy": "fail"},
        group_options={"prefill.group1": {"extra_args": ["--max-num-batched-tokens", str(CHUNK)]}},
    ) as running:
        yield running


@pytest.fixture(scope="module")
def plain(plain_tiny: Server) -> Server:
    return plain_tiny


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return prompts(lambda text: len(text.encode()))


class TestLayerwise(AnswersLikePlainVllm):
    @pytest.fixture
    def served(self, deployment: Deployment) -> Server:
        return deployment.proxy

    def test_many_at_once(self, served: Server, plain: Server, texts: list[str]) -> None:
        expected = [choices(plain.post(COMPLETIONS, completion(text))) for text in texts]
        with ThreadPoolExecutor(10) as pool:
            answers = list(pool.map(lambda text: served.post(COMPLETIONS, completion(text)), texts * 2))
        assert [choices(answer) for answer in answers] == expected * 2


def test_decode_reads_while_prefill_computes(deployment: Deployment) -> None:
    prefill, decode = deployment.prefill[0], deployment.decode[0]
    before = _seconds(prefill, decode)
    length = 6 * CHUNK
    received = decode.metric("vllm:prompt_tokens_by_source_total", source="external_kv_transfer")
    deployment.proxy.post(COMPLETIONS, completion("While P computes, D reads. ".ljust(length, "d")))
    after = _seconds(prefill, decode)
    computing_s, loading_s = (b - a for a, b in zip(before, after, strict=True))
    assert loading_s > 0.5 * computing_s, "D began to load when P had computed the prompt"
    assert decode.metric("vllm:prompt_tokens_by_source_total", source="external_kv_transfer") - received == length - 1
    assert eventually(deployment.prefill_is_idle, 2)


def test_a_refused_request_leaves_nothing(deployment: Deployment) -> None:
    with pytest.raises(HTTPError) as raised:
        deployment.proxy.post(COMPLETIONS, {**completion("x" * 300), "temperature": -1})
    assert raised.value.code == 400
    raised.value.close()
    assert eventually(deployment.prefill_is_idle, 5)
    assert eventually(lambda: deployment.decode[0].metric("vllm:kv_cache_usage_perc") == 0, 15)


def _seconds(prefill: Server, decode: Server) -> tuple[float, float]:
    """That P has computed prompts, and that D has loaded KV, in all."""
    computing = prefill.metric("vllm:request_prefill_time_seconds_sum")
    return computing, decode.metric("vllm:omni_kv_load_seconds_sum")

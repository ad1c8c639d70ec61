"""With what others wrote: vllm-router drives our engines, and our proxy drives vLLM's own connectors, all unchanged.

Every answer must be plain vLLM's, and the KV must have moved: with a tiny model of random weights, an answer can be
right although nothing was loaded, so the blocks' bytes are compared too.

NIXL burns a core in every worker, also when idle: these engines live for one class, one pair at a time.
"""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from urllib.error import HTTPError

import pytest

from omni.deployment.embedded_model import ensure_embedded_model
from tests.e2e.deployments import DIGESTS, Server, deployed, eventually, running
from tests.e2e.equality import COMPLETIONS, AnswersLikePlainVllm, completion
from tests.e2e.prompts import BLOCK_SIZE, prompts

pytestmark = pytest.mark.engine

FreePorts = Callable[[int], int]
BACK_TIMEOUT_S = 15  # for KV blocks to be free again; less than any lease
LEASE_S = 30  # of our engines; vLLM's own have as much or more


@dataclass(frozen=True)
class Served:
    """One P and one D, and what answers for them."""

    front: Server
    prefill: Server
    decode: Server


@pytest.fixture(scope="module")
def plain(plain_tiny: Server) -> Server:
    return plain_tiny


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return prompts(lambda text: len(text.encode()))  # each byte is a token


@pytest.fixture(scope="class")
def router_over_ours(tmp_path_factory: pytest.TempPathFactory, free_ports: FreePorts) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("router")
    with deployed(folder, free_ports, model="embedded:tiny", prefill_groups=1, decode_groups=1) as deployment:
        (prefill,), (decode,) = deployment.prefill, deployment.decode
        with _vllm_router(folder, free_ports, prefill, decode) as router:
            yield Served(router, prefill, decode)


@pytest.fixture(scope="class")
def proxy_over_nixl(tmp_path_factory: pytest.TempPathFactory, free_ports: FreePorts) -> Iterator[Served]:
    with _vllms_connector(tmp_path_factory.mktemp("nixl"), free_ports, "nixl", DIGESTS) as served:
        yield served


@pytest.fixture(scope="class")
def proxy_over_mooncake(tmp_path_factory: pytest.TempPathFactory, free_ports: FreePorts) -> Iterator[Served]:
    options = {
        **DIGESTS,
        "extra_args": ["--worker-extension-cls", "tests.e2e.mooncake_digests.MooncakeWithDigests"],
    }
    with _vllms_connector(tmp_path_factory.mktemp("mooncake"), free_ports, "mooncake", options) as served:
        yield served


class HandsOff(AnswersLikePlainVllm):
    """What must hold of any front over any pair of engines."""

    # Prompt tokens that D computes itself. Ours: the last one, to sample the next. vLLM's own connectors read its KV
    # too and compute it again, which vLLM does not count.
    computed_by_decode: ClassVar[int]

    @pytest.fixture
    def served(self, pair: Served) -> Server:
        return pair.front

    def test_decode_reads_the_prompts_and_computes_them_not(self, pair: Served) -> None:
        lengths = (2, BLOCK_SIZE, BLOCK_SIZE + 1, 3 * BLOCK_SIZE - 5)
        before = _prompt_tokens(pair.decode)
        for number, length in enumerate(lengths):
            pair.front.post(COMPLETIONS, completion(_fresh_text(length, number)))
        computed = self.computed_by_decode * len(lengths)
        expected = {"local_compute": computed, "local_cache_hit": 0, "external_kv_transfer": sum(lengths) - computed}
        assert eventually(lambda: _difference(before, _prompt_tokens(pair.decode)) == expected, 5)

    def test_the_kv_blocks_on_decode_are_those_on_prefill(self, pair: Served) -> None:
        num_full_blocks = 5
        before = [set(engine.block_digests()) for engine in (pair.prefill, pair.decode)]
        pair.front.post(COMPLETIONS, completion(_fresh_text(num_full_blocks * BLOCK_SIZE + 17, 100)))
        after = [set(engine.block_digests()) for engine in (pair.prefill, pair.decode)]
        on_prefill, on_decode = (new - old for new, old in zip(after, before, strict=True))
        assert len(on_prefill & on_decode) >= num_full_blocks

    def test_prefill_is_empty_again(self, pair: Served) -> None:
        assert eventually(lambda: _is_empty(pair.prefill), LEASE_S + 10)  # no one reads all that vllm-router has kept
        for number in range(3):
            pair.front.post(COMPLETIONS, completion(_fresh_text(900, 200 + number)))
        assert eventually(lambda: _is_empty(pair.prefill), BACK_TIMEOUT_S)

    def test_a_request_that_decode_refuses_leaves_nothing_on_prefill(self, pair: Served) -> None:
        """Prefill is not asked for log-probabilities, and so does not see that they are too many."""
        with pytest.raises(HTTPError) as raised:
            pair.front.post(COMPLETIONS, completion(_fresh_text(900, 300), logprobs=10_000))
        raised.value.close()
        assert raised.value.code == 400
        assert eventually(lambda: _is_empty(pair.prefill), BACK_TIMEOUT_S)


class TestVllmRouterOverOurEngines(HandsOff):
    computed_by_decode = 1

    @pytest.fixture
    def pair(self, router_over_ours: Served) -> Served:
        return router_over_ours


class TestOurProxyOverNixl(HandsOff):
    computed_by_decode = 0

    @pytest.fixture
    def pair(self, proxy_over_nixl: Served) -> Served:
        return proxy_over_nixl

    def test_nixl_counted_every_block(self, pair: Served) -> None:
        lengths = (BLOCK_SIZE, 3 * BLOCK_SIZE - 5)
        before = pair.decode.metric("vllm:nixl_bytes_transferred_sum")
        expired = pair.prefill.metric("vllm:nixl_num_kv_expired_reqs_total")  # of those that other tests broke off
        for number, length in enumerate(lengths):
            pair.front.post(COMPLETIONS, completion(_fresh_text(length, 400 + number)))
        expected = before + (1 + 3) * _bytes_per_block()
        assert eventually(lambda: pair.decode.metric("vllm:nixl_bytes_transferred_sum") == expected, 5)
        assert pair.decode.metric("vllm:nixl_num_failed_transfers_total") == 0
        assert pair.prefill.metric("vllm:nixl_num_kv_expired_reqs_total") == expired


class TestOurProxyOverMooncake(HandsOff):
    computed_by_decode = 0

    @pytest.fixture
    def pair(self, proxy_over_mooncake: Served) -> Served:
        return proxy_over_mooncake


@contextmanager
def _vllm_router(folder: Path, free_ports: FreePorts, prefill: Server, decode: Server) -> Iterator[Server]:
    """The router of the vLLM project, from its package."""
    port = free_ports(2)
    executable = shutil.which("vllm-router", path=str(Path(sys.executable).parent))
    assert executable is not None
    command = [
        *(executable, "--vllm-pd-disaggregation", "--kv-connector", "nixl", "--policy", "round_robin"),
        *("--prefill", prefill.url, "--decode", decode.url),
        *("--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(port + 1)),
        *("--disable-retries", "--worker-startup-check-interval", "1"),
    ]
    with running(command, port, folder / "router.log") as until_ready:
        yield until_ready()


@contextmanager
def _vllms_connector(folder: Path, free_ports: FreePorts, connector: str, options: dict[str, Any]) -> Iterator[Served]:
    """A deployment of which everything is ours but the engines' connector."""
    with deployed(
        folder,
        free_ports,
        model="embedded:tiny",
        prefill_groups=1,
        decode_groups=1,
        kv_transfer={"connector": connector},
        group_options={"prefill.group1": options, "decode.group1": options},
    ) as deployment:
        yield Served(deployment.proxy, deployment.prefill[0], deployment.decode[0])


def _prompt_tokens(engine: Server) -> dict[str, float]:
    sources = ("local_compute", "local_cache_hit", "external_kv_transfer")
    return {source: engine.metric("vllm:prompt_tokens_by_source_total", source=source) for source in sources}


def _difference(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    return {name: after[name] - value for name, value in before.items()}


def _is_empty(engine: Server) -> bool:
    return engine.metric("vllm:kv_cache_usage_perc") == 0


def _bytes_per_block() -> int:
    """What the model's configuration says: K and V of every layer, float32."""
    config = json.loads((ensure_embedded_model("tiny") / "config.json").read_text())
    per_token = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * 4
    return int(per_token * BLOCK_SIZE)


def _fresh_text(length: int, number: int) -> str:
    """So many tokens (bytes), beginning like no other prompt, so that no prefix cache has them."""
    if length <= 4:
        return chr(65 + number) * length
    return f"{number:04d}".ljust(length, "abcdefghij"[number % 10])

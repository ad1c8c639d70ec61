"""Layer by layer, D is asked before P has answered: what P found in its prefix cache has to come another way."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.e2e.deployments import proxy_over
from tests.e2e.equality import CHAT, COMPLETIONS
from tests.e2e.fidelity.pair import FidelityPair, answerer, fresh_text
from tests.e2e.fidelity.test_usage import asked
from tests.e2e.prompts import BLOCK_SIZE

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def layerwise_pair(
    fidelity_pair: FidelityPair, tmp_path_factory: pytest.TempPathFactory, free_ports: Callable[[int], int]
) -> Iterator[FidelityPair]:
    """One more proxy over the same engines."""
    deployment = fidelity_pair.deployment
    log = (deployment.log_folder / "prefill.group1.rank0.log").read_text()
    address = re.findall(r"KV control port: (\S+)", log)[-1]
    key_file = Path(deployment.env["OMNI_STATE_DIR"], "deployment.key")
    options = ("--mode", "layerwise", "--kv-address", address, "--key-file", str(key_file))
    folder = tmp_path_factory.mktemp("layerwise")
    with (
        proxy_over(folder, free_ports, deployment.prefill, deployment.decode, *options) as proxy,
        answerer(proxy) as ours,
    ):
        yield replace(fidelity_pair, ours=ours)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("stream", [False, True])
def test_cached_tokens_are_those_of_the_prompt(layerwise_pair: FidelityPair, path: str, stream: bool) -> None:
    more = {"stream_options": {"include_usage": True}} if stream else {}
    body = asked(path, fresh_text(3 * BLOCK_SIZE + 40), **more)
    ask = layerwise_pair.agree_streamed if stream else layerwise_pair.agree
    for expected in (0, 3 * BLOCK_SIZE):
        assert ask(path, body)["usage"]["prompt_tokens_details"]["cached_tokens"] == expected

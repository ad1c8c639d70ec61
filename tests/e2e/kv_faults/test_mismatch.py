"""P and D that do not fit: the handshake is refused, and says what differs and what to do."""

import json
from urllib.error import HTTPError

import pytest

from tests.e2e.deployments import Server
from tests.e2e.equality import COMPLETIONS, completion
from tests.e2e.kv_faults.engines import Engines
from tests.e2e.kv_faults.pair import Pair, fresh_text

pytestmark = pytest.mark.engine


@pytest.fixture
def with_other_model(engines: Engines, pair: Pair) -> Pair:
    """D's model has other parameters than P's, so its answers are compared with its own."""
    return Pair(engines.prefill, engines.other_model, engines.other_model)


def test_another_model_is_refused_and_decode_computes_the_prompt(engines: Engines, with_other_model: Pair) -> None:
    pair, text = with_other_model, fresh_text()
    before = pair.counts()
    answer = pair.finish(text, pair.hand_off(text))
    assert before.eventually(refused=1, failures=1, loads=0)
    pair.decode.post("/reset_prefix_cache", {})
    assert answer == pair.expected(text)
    for process in ("decode.group2.rank0", "prefill.group1.rank0"):
        log = (engines.deployment.log_folder / f"{process}.log").read_text()
        assert "prefill and decode do not fit: model is" in log
    assert "Start both from one deployment file" in log


def test_another_dtype_is_refused_and_the_request_fails(engines: Engines, pair: Pair) -> None:
    """With policy fail. The answer does not tell a client about the engines; the log tells the operator."""
    text = fresh_text()
    before = Pair(engines.prefill, engines.bfloat16, pair.plain).counts()
    params = pair.hand_off(text)
    with pytest.raises(HTTPError) as raised:
        engines.bfloat16.post(COMPLETIONS, completion(text, kv_transfer_params=params))
    assert raised.value.code == json.load(raised.value)["error"]["code"] == 500
    assert before.eventually(refused=1, failures=1, loads=0)
    assert _last_refusal(engines).count("kv_cache_dtype is 'torch.float32' here and 'torch.bfloat16' there") == 1
    assert _answers(engines.bfloat16)


def _last_refusal(engines: Engines) -> str:
    lines = (engines.logs / "kv_consumer.log").read_text().splitlines()
    return next(line for line in reversed(lines) if "do not fit" in line)


def _answers(server: Server) -> bool:
    return len(server.post(COMPLETIONS, completion("Still there?"))["choices"]) == 1

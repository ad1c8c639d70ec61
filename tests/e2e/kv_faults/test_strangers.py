"""Who does not hold the deployment key: noise, floods, forged messages, forged hand-offs; and misused genuine ones."""

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.auth import DeploymentKey
from kv_transfer.control import ControlClient
from kv_transfer.errors import AuthError, DeadlineError, PeerUnreachableError
from kv_transfer.protocol import EndRead, RankEndpoint
from kv_transfer.rank_server import RankClient
from tests.e2e.deployments import Server, eventually, proxy_over
from tests.e2e.equality import COMPLETIONS, choices, completion
from tests.e2e.kv_faults.engines import LEASE_S, Engines
from tests.e2e.kv_faults.injectors import many_connections, send_garbage
from tests.e2e.kv_faults.pair import BUSY_S, Pair, fresh_text
from tests.kv_transfer.hand_off_strategies import Params, fuzz, garbled, mutated

pytestmark = pytest.mark.engine

STRANGERS_KEY = DeploymentKey(b"the key of some other deployment")
DROPPED = "vllm:omni_kv_dropped_messages_total"


def test_garbage_and_floods_on_the_kv_ports(engines: Engines, pair: Pair) -> None:
    """Dropped and counted, while requests go on."""
    ports = (pair.control_port(), engines.rank_server_port("127.0.0.1"))
    before, dropped = pair.counts(), _dropped(pair.prefill)
    with ThreadPoolExecutor(4) as pool:
        for port in ports:
            with many_connections("127.0.0.1", port, 200):
                noise = [pool.submit(send_garbage, "127.0.0.1", port) for _ in range(8)]
                assert pair.answers_right(fresh_text())
                assert [each.result() for each in noise] == [None] * 8
    assert before.eventually(loads=2, failures=0, expired=0)
    pair.answers_right(fresh_text())  # counts come with a step
    assert eventually(lambda: _dropped(pair.prefill)[0] > dropped[0], BUSY_S)
    assert eventually(lambda: _dropped(pair.prefill)[1] > dropped[1], BUSY_S)


def test_forged_messages_end_nothing(engines: Engines, pair: Pair) -> None:
    text = fresh_text()
    params = pair.hand_off(text)
    before, dropped = pair.counts(), _dropped(pair.prefill)
    lease_id = params["omni"]["lease_id"]
    with zmq.Context() as context, ControlClient(context, STRANGERS_KEY, "127.0.0.1", params["remote_port"]) as forger:
        with pytest.raises((DeadlineError, PeerUnreachableError)):
            forger.end_lease(lease_id, time.monotonic() + 0.5)
        with pytest.raises((DeadlineError, PeerUnreachableError)):
            forger.end_read(EndRead(lease_id, "forger"), time.monotonic() + 0.5)
    endpoint = RankEndpoint("127.0.0.1", engines.rank_server_port("127.0.0.1"), "run")
    client = RankClient(STRANGERS_KEY)
    with pytest.raises(AuthError), client.connection(endpoint, time.monotonic() + LEASE_S):
        pass
    client.close()
    assert pair.finish(text, params) == pair.expected(text)
    assert before.eventually(loads=1, failures=0, released=1)
    assert eventually(lambda: _dropped(pair.prefill)[0] > dropped[0], BUSY_S)


def test_forged_hand_offs_are_refused(engines: Engines, pair: Pair) -> None:
    """From any client, to either engine: 400, and no load, no lease, no 5xx."""

    @fuzz
    @given(params=st.one_of(mutated(), garbled().map(lambda params: {**params, "do_remote_prefill": True})))
    def are_refused(params: Params) -> None:
        for engine in (engines.decode, engines.prefill):
            assert _status(engine, completion("Forged?", kv_transfer_params=params)) == 400

    before = pair.counts()
    are_refused()
    assert before.since() == {}


@pytest.mark.parametrize(
    "name", ["remote_block_ids", "remote_num_tokens", "remote_port", "remote_engine_id", "tp_size"]
)
def test_a_genuine_hand_off_with_one_change_is_refused(pair: Pair, name: str) -> None:
    """P's lease is not touched by it: the true one still serves."""
    text = fresh_text()
    params = pair.hand_off(text)
    before = pair.counts()
    others = {"remote_block_ids": [[1, 2, 3, 4, 5, 6]], "remote_engine_id": "another"}
    forged = {**params, name: others.get(name) or params[name] + 1}
    assert _status(pair.decode, completion(text, kv_transfer_params=forged)) == 400
    assert before.since() == {}
    assert pair.finish(text, params) == pair.expected(text)
    assert before.eventually(loads=1, failures=0)


def test_a_hand_off_used_twice(engines: Engines, pair: Pair) -> None:
    """The second time P's blocks are no longer kept: what is read there is not used."""
    text = fresh_text()
    params = pair.hand_off(text)
    before = pair.counts()
    for _ in range(2):
        assert pair.finish(text, params) == pair.expected(text)
        pair.decode.post("/reset_prefix_cache", {})
    assert before.eventually(loads=1, lease_ended=1, failures=1)


def test_a_hand_off_used_twice_at_once(engines: Engines, pair: Pair) -> None:
    text = fresh_text()
    params = pair.hand_off(text)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: pair.finish(text, params), range(4)))
    assert answers == [pair.expected(text)] * 4


def test_a_hand_off_for_another_prompt(engines: Engines, pair: Pair) -> None:
    text = fresh_text()
    params = pair.hand_off(fresh_text())
    before = pair.counts()
    assert pair.finish(text, params) == pair.expected(text)
    assert before.eventually(hand_off=1, failures=1, loads=0)


@pytest.mark.parametrize("mode", ["pull", "layerwise"])
def test_one_request_id_for_several_requests(
    engines: Engines, pair: Pair, free_ports: Callable[[int], int], tmp_path: Path, mode: str
) -> None:
    """A client's id names no KV."""
    address = f"127.0.0.1:{pair.control_port()}"
    arguments = ["--key-file", str(engines.key_file), "--mode", mode]
    arguments += ["--kv-address", address] if mode == "layerwise" else []
    texts = [fresh_text() for _ in range(6)]
    before = pair.counts()
    with proxy_over(tmp_path, free_ports, (pair.prefill,), (pair.decode,), *arguments) as proxy:
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda text: _post_as(proxy, "the-same-id", completion(text)), texts))
        assert answers == [pair.expected(text) for text in texts]
        assert before.eventually(loads=6, failures=0)


def _dropped(prefill: Server) -> list[float]:
    return [prefill.metric(DROPPED, port=port) for port in ("control", "rank_server")]


def _status(engine: Server, body: dict[str, Any]) -> int:
    try:
        engine.post(COMPLETIONS, body)
    except HTTPError as error:
        code: int = json.load(error)["error"]["code"]
        error.close()
        return code
    return 200


def _post_as(server: Server, request_id: str, body: dict[str, Any]) -> list[tuple[Any, ...]]:
    with server.open(COMPLETIONS, body, {"X-Request-Id": request_id}) as response:
        return choices(json.load(response))

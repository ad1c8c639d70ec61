"""What the index says of an engine's prefix cache is what vLLM then finds there, evictions and all."""

import asyncio
import json
import random
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import zmq

from kv_transfer.auth import load_or_make_key
from kv_transfer.event_keys import server_key
from omni.deployment.embedded_model import ensure_embedded_model
from services.global_proxy.prefix.index import KvEventIndex
from services.global_proxy.prefix.prefix_index import PrefixIndex
from services.global_proxy.prefix.sockets import Endpoints, open_socket
from services.global_proxy.prefix.subscribers import Subscribers
from tests.e2e.deployments import Server, engine_arguments, running

pytestmark = pytest.mark.engine

NAME = "engine"
BLOCK_SIZE = 32
NUM_BLOCKS = 24  # vLLM keeps one for itself
MAX_MODEL_LEN = 512


@dataclass(eq=False)
class Prompt:
    ids: list[int]
    is_text: bool  # the tiny model's tokens are the text's bytes

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    @property
    def content(self) -> str | list[int]:
        return bytes(self.ids).decode() if self.is_text else self.ids

    @cached_property
    def text(self) -> bytes:
        return json.dumps(self.content).encode()


@dataclass(frozen=True)
class Engine:
    server: Server
    endpoints: Endpoints

    async def complete(self, prompt: Prompt) -> dict[str, Any]:
        body = {"prompt": prompt.content, "max_tokens": 1, "return_token_ids": True}
        answer: dict[str, Any] = await asyncio.to_thread(self.server.post, "/v1/completions", body)
        return answer

    def num_batches(self) -> int:
        """How many it has published. It looks for this question once between two batches, so ask more than once."""
        with zmq.Context() as context, open_socket(context, zmq.DEALER, self.endpoints.server_key) as socket:
            socket.rcvtimeo = 5000
            assert self.endpoints.replay is not None
            socket.connect(self.endpoints.replay)
            count = 0
            for _ in range(3):
                socket.send_multipart([b"", bytes(8)])
                while (number := int.from_bytes(socket.recv_multipart()[2], "big", signed=True)) >= 0:
                    count = number + 1
            return count


@dataclass(frozen=True)
class Follower:
    index: KvEventIndex
    prefix_index: PrefixIndex
    subscribers: Subscribers

    async def until_told(self, engine: Engine) -> None:
        """Until it knows all that the engine has published."""
        num_batches = await asyncio.to_thread(engine.num_batches)
        async with asyncio.timeout(20):
            while self.subscribers.num_batches(NAME) < num_batches:  # noqa: ASYNC110
                await asyncio.sleep(0.005)


@asynccontextmanager
async def following(endpoints: Endpoints) -> AsyncIterator[Follower]:
    index = KvEventIndex()
    subscribers = Subscribers(index)
    subscribers.add(NAME, endpoints)
    try:
        yield Follower(index, PrefixIndex(index), subscribers)
    finally:
        await subscribers.close()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, free_ports: Callable[[int], int]) -> Iterator[Engine]:
    port = free_ports(1)
    with TemporaryDirectory(prefix="omni-test-") as folder:
        key = load_or_make_key(Path(folder, "deployment.key"))
        endpoints = Endpoints(f"ipc://{folder}/events", f"ipc://{folder}/replay", server_key(key))
        events = {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": endpoints.publish,
            "replay_endpoint": endpoints.replay,
        }
        command = [
            *(sys.executable, "-m", "omni.adaptors.vllm.api_server"),
            *engine_arguments(port, ensure_embedded_model("tiny"), MAX_MODEL_LEN),
            *("--kv-cache-memory-bytes", str(1 << 28), "--block-size", str(BLOCK_SIZE)),
            *("--num-gpu-blocks-override", str(NUM_BLOCKS), "--enable-prompt-tokens-details"),
            *("--kv-events-config", json.dumps(events)),
        ]
        env = {"VLLM_CPU_OMP_THREADS_BIND": "0", "VLLM_SERVER_DEV_MODE": "1", "OMNI_STATE_DIR": folder}
        log_file: Path = tmp_path_factory.mktemp("prefix-events") / "engine.log"
        with running(command, port, log_file, env) as until_ready:
            yield Engine(until_ready(), endpoints)


def random_prompt(source: random.Random, bases: list[list[int]]) -> Prompt:
    """Some shared beginning, and something new."""
    base = source.choice(bases)
    new = [source.randrange(97, 123) for _ in range(source.randrange(90))]
    return Prompt(base[: source.randrange(len(base) + 1)] + new or [97], is_text=False)


async def test_index_tells_what_vllm_then_finds(engine: Engine) -> None:
    source = random.Random(4)
    bases = [[source.randrange(97, 123) for _ in range(300)] for _ in range(4)]
    sent: list[Prompt] = []
    hits, evicted = 0, 0
    async with following(engine.endpoints) as follower:
        for step in range(40):
            prompt = source.choice(sent) if sent and step % 4 == 1 else random_prompt(source, bases)
            await follower.until_told(engine)
            expected = follower.prefix_index.matched_tokens(NAME, prompt)
            if step % 10 == 7:  # vLLM computes all of them, and keeps several copies of their blocks
                await asyncio.gather(*(engine.complete(prompt) for _ in range(3)))
                continue
            usage = (await engine.complete(prompt))["usage"]
            assert expected == (usage["prompt_tokens_details"] or {}).get("cached_tokens", 0), f"prompt {step}"
            hits += expected > 0
            evicted += prompt in sent and expected < (prompt.num_tokens - 1) // BLOCK_SIZE * BLOCK_SIZE
            sent.append(prompt)
        assert hits >= 10
        assert evicted >= 2

        await follower.until_told(engine)
        async with following(engine.endpoints) as latecomer:
            await latecomer.until_told(engine)
            assert follower.index.num_blocks(NAME) > 10
            assert latecomer.index.num_blocks(NAME) == follower.index.num_blocks(NAME)
            for prompt in sent:
                assert latecomer.prefix_index.matches(prompt) == follower.prefix_index.matches(prompt)

        (await asyncio.to_thread(engine.server.open, "/reset_prefix_cache", {})).close()
        await engine.complete(Prompt([97], is_text=False))
        await follower.until_told(engine)
        assert follower.index.num_blocks(NAME) == 0


async def test_texts_are_found_by_what_the_engine_told_of_them(engine: Engine) -> None:
    source = random.Random(5)
    common = [source.randrange(97, 123) for _ in range(300)]
    async with following(engine.endpoints) as follower:
        for step in range(4):
            prompt = Prompt(common + [source.randrange(97, 123) for _ in range(40)], is_text=True)
            await follower.until_told(engine)
            matched = follower.prefix_index.matched_tokens(NAME, prompt)
            answer = await engine.complete(prompt)
            cached = (answer["usage"]["prompt_tokens_details"] or {}).get("cached_tokens", 0)
            if step == 0:
                assert matched is None
                assert cached == 0
            else:  # known up to a piece of 256 bytes, a quotation mark included
                assert matched == 224
                assert cached == 288
            follower.prefix_index.learn(prompt, json.dumps(answer["choices"][0]["prompt_token_ids"]).encode())
            await follower.until_told(engine)
            assert follower.prefix_index.matched_tokens(NAME, prompt) == 320

"""The demo's request against a stand-in for the proxy."""

import asyncio
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from rich.console import Console

from omni.cli.demo import QUESTION, run_demo
from omni.deployment.errors import DeploymentError
from tests.omni.cli.launchers import plan_of
from tests.standins.engine import StandinEngine

DONE = "data: [DONE]\n\n"


@pytest.fixture
async def proxy() -> AsyncIterator[StandinEngine]:
    async with StandinEngine() as standin:
        yield standin


async def demo(folder: Path, url: str) -> str:
    output = io.StringIO()
    plan = plan_of(folder, proxy_port=urlsplit(url).port or 0)
    await asyncio.to_thread(run_demo, plan, Console(file=output, width=200))
    return output.getvalue()


def events(*texts: str, last: object = None) -> str:
    chunks: list[object] = [{"choices": [{"index": 0, "delta": {"content": text}}]} for text in texts]
    usage = {"prompt_tokens": 12, "completion_tokens": 3}
    chunks.append(last or {"choices": [], "usage": usage})
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + DONE


async def test_the_answer_and_its_speed(tmp_path: Path, proxy: StandinEngine) -> None:
    proxy.answer_text = events("The ", "[sky]", " is blue.")
    output = await demo(tmp_path, proxy.url)
    command, answer, speed = output.strip().split("\n\n")
    assert command.startswith(f"curl -N {proxy.url}/v1/chat/completions ")
    assert answer == "The [sky] is blue."
    assert speed.startswith("12 prompt tokens, 3 completion tokens: TTFT ")
    assert speed.endswith(" tokens/s")
    (received,) = proxy.received
    assert received.body["messages"] == [{"role": "user", "content": QUESTION}]
    assert received.body["model"] == "smollm2"
    assert json.dumps(received.body) in command, "what is shown is what was sent"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (events("one"), "the stream ended before two tokens had come"),
        (events("one", "two", "three").removesuffix(DONE), r"the stream ended without \[DONE\]"),
        (events("one", "two", last={"error": {"message": "D is gone"}}), "the stream ended with an error: .*D is gone"),
        (events("one", "two")[:90], "did not answer to the end: JSONDecodeError"),
    ],
    ids=["too short", "cut off", "error event", "half an event"],
)
async def test_a_stream_that_fails(tmp_path: Path, proxy: StandinEngine, answer: str, message: str) -> None:
    proxy.answer_text = answer
    with pytest.raises(DeploymentError, match=message):
        await demo(tmp_path, proxy.url)


async def test_an_error_status(tmp_path: Path, proxy: StandinEngine) -> None:
    proxy.error = (503, '{"error": {"message": "no prefill instance"}}')
    with pytest.raises(DeploymentError, match=r"the proxy answered 503: .*no prefill instance"):
        await demo(tmp_path, proxy.url)


async def test_a_proxy_that_dies(tmp_path: Path, proxy: StandinEngine) -> None:
    proxy.die_after = 0
    with pytest.raises(DeploymentError, match=f"{proxy.url} did not answer to the end: "):
        await demo(tmp_path, proxy.url)

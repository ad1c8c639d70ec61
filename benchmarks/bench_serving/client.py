"""An open-loop client: requests leave when their time has come, whether or not earlier ones were answered."""

import asyncio
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import aiohttp
import msgspec

from benchmarks.bench_serving.trace import Arrival, Kind

UNFINISHED = "unfinished"
_CONNECT_S = 30.0


@dataclass
class Outcome:
    """What became of a request. Times count from when it was due, seconds."""

    kind: Kind
    at_s: float  # when it was due, after the trace's start
    num_asked: int  # tokens of the answer
    late_s: float = 0.0  # by so much the client was late to send it
    ttft_s: float | None = None  # until the first token; None: none came
    e2e_s: float = 0.0  # until the end of the answer; unfinished: until the client gave up
    gaps_s: list[float] = field(default_factory=list)  # between the tokens; unfinished: the last one had not ended
    num_prompt_tokens: int = 0  # as the server counted them
    num_tokens: int = 0  # of the answer
    error: str | None = None

    @property
    def is_failed(self) -> bool:
        """Refused, broken off or answered wrongly; too slow is another matter."""
        return self.error is not None and self.error != UNFINISHED


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta = msgspec.field(default_factory=_Delta)


class _Event(msgspec.Struct):
    choices: list[_Choice] = msgspec.field(default_factory=list)
    usage: _Usage | None = None
    error: Any = None


_decoder = msgspec.json.Decoder(_Event)


async def play(url: str, model: str, trace: Sequence[Arrival], give_up_s: float) -> list[Outcome]:
    """Send a trace and hear the answers out.

    Args:
        give_up_s: so long after the last request was due, what is not answered is cut off and counted as unfinished.
    """
    loop = asyncio.get_running_loop()
    outcomes = [Outcome(arrival.kind, arrival.at_s, arrival.num_answer_tokens) for arrival in trace]
    bodies = [json.dumps(body_of(arrival, model)).encode() for arrival in trace]
    tasks: list[asyncio.Task[None]] = []
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, timeout=timeout, connector=connector) as session:
        start_s = loop.time()
        for arrival, outcome, body in zip(trace, outcomes, bodies, strict=True):
            await asyncio.sleep(start_s + arrival.at_s - loop.time())
            tasks.append(loop.create_task(_ask(session, body, outcome, start_s + arrival.at_s)))
        if tasks:
            _, pending = await asyncio.wait(tasks, timeout=give_up_s)
            for task in pending:
                task.cancel()
            await asyncio.gather(*tasks)
    return outcomes


@contextmanager
def first_in_line() -> Iterator[bool]:
    """This thread runs as soon as it has something to do, if the system allows it: gives whether.

    Clients have machines of their own. Here one would wait for a core behind the engines, and count that as theirs.
    """
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except PermissionError:
        yield False
        return
    try:
        yield True
    finally:
        os.sched_setscheduler(0, policy, parameters)


def body_of(arrival: Arrival, model: str) -> dict[str, object]:
    """The request as OpenAI's API has it; greedy, and of exactly as many tokens as asked for."""
    if arrival.kind == "chat":
        prompt: dict[str, object] = {"messages": [{"role": "user", "content": arrival.text}]}
    else:
        prompt = {"prompt": arrival.text}
    limits = {"max_tokens": arrival.num_answer_tokens, "ignore_eos": True, "temperature": 0.0}
    return {"model": model, **prompt, **limits, "stream": True, "stream_options": {"include_usage": True}}


async def _ask(session: aiohttp.ClientSession, body: bytes, outcome: Outcome, due_s: float) -> None:
    now_s = asyncio.get_running_loop().time
    outcome.late_s = now_s() - due_s
    path = "/v1/chat/completions" if outcome.kind == "chat" else "/v1/completions"
    heard = _Heard(outcome, due_s)
    headers = {"content-type": "application/json", "x-request-id": f"{outcome.kind}-{uuid4().hex}"}
    try:
        async with session.post(path, data=body, headers=headers) as response:
            if response.status != 200:
                outcome.error = f"{response.status}: {(await response.text())[:200]}"
            else:
                async for line in response.content:
                    heard.line(line, now_s())
                outcome.error = heard.fault()
    except asyncio.CancelledError:  # by `play` alone, which gave up
        outcome.error = UNFINISHED
        heard.cut_off(now_s())
    except (aiohttp.ClientError, OSError, msgspec.DecodeError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
    outcome.e2e_s = now_s() - due_s


class _Heard:
    """Writes a stream's events into an outcome."""

    def __init__(self, outcome: Outcome, due_s: float) -> None:
        self._outcome = outcome
        self._due_s = due_s
        self._last_s: float | None = None  # when a token came
        self._has_usage = False
        self._is_done = False
        self._error: str | None = None

    def line(self, line: bytes, now_s: float) -> None:
        if not line.startswith(b"data:"):
            return
        data = line[5:].strip()
        if data == b"[DONE]":
            self._is_done = True
            return
        event = _decoder.decode(data)
        if event.error is not None:
            self._error = f"in the stream: {event.error}"[:200]
        if event.usage is not None:
            self._has_usage = True
            self._outcome.num_prompt_tokens = event.usage.prompt_tokens
            self._outcome.num_tokens = event.usage.completion_tokens
        if any(choice.text or choice.delta.content for choice in event.choices):
            self._token(now_s)

    def _token(self, now_s: float) -> None:
        outcome = self._outcome
        if self._last_s is None:
            outcome.ttft_s = now_s - self._due_s
        else:
            outcome.gaps_s.append(now_s - self._last_s)
        self._last_s = now_s
        if not self._has_usage:
            outcome.num_tokens += 1

    def cut_off(self, now_s: float) -> None:
        """The wait that was not over counts too, or the worst ones would not."""
        if self._last_s is not None:
            self._outcome.gaps_s.append(now_s - self._last_s)

    def fault(self) -> str | None:
        """Why an answer that has ended is not a good one."""
        outcome = self._outcome
        if self._error is not None:
            return self._error
        if not self._is_done or outcome.ttft_s is None:
            return "the stream ended early"
        if self._has_usage and outcome.num_tokens != outcome.num_asked:
            return f"{outcome.num_tokens} tokens instead of {outcome.num_asked}"
        return None

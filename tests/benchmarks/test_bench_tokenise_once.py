"""What the benchmark of token ids sends, and what it makes of clocks."""

import io
import json
import os
import time
from collections.abc import Callable
from http.client import HTTPConnection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.trainers import WordLevelTrainer

from benchmarks import bench_tokenise_once as bench
from benchmarks.bench_proxy.processes import BenchmarkError
from benchmarks.bench_tokenise_once import (
    CHAT,
    COMPLETION,
    IDS,
    PARAMS,
    PREFILL,
    PREFILL_IDS,
    TEXT,
    Figures,
    Row,
    Server,
    alternate,
    check_that_ids_are_taken,
    client_body,
    extra_proxy_s,
    measure,
    read_ids,
    table,
    texts,
)

WORDS = "once upon a time there was"
WORD_IDS = [7, 8, 9, 10, 11, 12]


class FakeServer(Server):
    """Tokenises for 5 ms of CPU, gets ids in 2, and returns them in 1; its answers take twice as long."""

    def __init__(self, *, takes_ids: bool = True) -> None:
        self.sent: list[tuple[str, dict[str, Any]]] = []
        self.used_s = 0.0
        self.now_s = 100.0
        self._takes_ids = takes_ids

    def send(self, route: str, body: bytes) -> bytes:
        fields = json.loads(body)
        self.sent.append((route, fields))
        ids = fields["prompt"] if route == COMPLETION else fields["kv_transfer_params"].get("prompt_token_ids")
        has_ids = self._takes_ids and isinstance(ids, list)
        cost_s = (0.002 if has_ids else 0.005) + (0.001 if fields.get("return_token_ids") else 0.0)
        self.used_s += cost_s
        self.now_s += 2 * cost_s
        answer: dict[str, Any] = {"usage": {"prompt_tokens": len(ids if has_ids else WORD_IDS)}, "choices": [{}]}
        if fields.get("return_token_ids"):
            (answer if route == CHAT else answer["choices"][0])["prompt_token_ids"] = WORD_IDS
        return json.dumps(answer).encode()

    def cpu_s(self) -> float:
        return self.used_s


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    server = FakeServer()
    monkeypatch.setattr(bench, "time", SimpleNamespace(monotonic=lambda: server.now_s))
    return server


@pytest.mark.parametrize("route", [COMPLETION, CHAT])
def test_a_prompt_goes_out_in_the_forms_that_the_proxy_sends(route: str, server: FakeServer) -> None:
    row = measure(server, route, WORDS, num_rounds=3, batch_size=2)
    assert {sent for sent, _ in server.sent} == {route}
    text, ids, prefill, prefill_ids = (fields for _, fields in server.sent[2:6])  # the first of each form
    prompt = {"prompt": WORDS} if route == COMPLETION else {"messages": [{"role": "user", "content": WORDS}]}
    assert text.items() >= (prompt | {"max_tokens": 1, "kv_transfer_params": {"do_remote_prefill": False}}).items()
    if route == COMPLETION:
        assert ids == text | {"prompt": WORD_IDS}
    else:
        assert ids == text | {"kv_transfer_params": {"do_remote_prefill": False, "prompt_token_ids": WORD_IDS}}
    assert prefill.items() >= prompt.items()
    assert prefill_ids == prefill | {"return_token_ids": True}
    assert (row.route, row.num_tokens) == (route, len(WORD_IDS))
    figures = [(row.forms[form].cpu_s, row.forms[form].latency_s) for form in (TEXT, IDS, PREFILL, PREFILL_IDS)]
    for found, expected_s in zip(figures, (0.005, 0.002, 0.005, 0.006), strict=True):
        assert found == pytest.approx((expected_s, 2 * expected_s))


def test_forms_take_turns_and_each_begins_a_round(server: FakeServer) -> None:
    bodies = {name: json.dumps({"prompt": name}).encode() for name in ("a", "b", "c")}
    figures = alternate(server, COMPLETION, bodies, num_rounds=4, batch_size=2)
    order = "".join(fields["prompt"] for _, fields in server.sent)
    assert order == "abc" + "aabbcc" + "bbccaa" + "ccaabb" + "aabbcc"
    assert figures["a"].num_bytes == len(bodies["a"])


def test_slow_requests_do_not_move_the_medians(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    send = server.send

    def sometimes_slow(route: str, body: bytes) -> bytes:
        if len(server.sent) == 3:
            server.now_s += 1
            server.used_s += 1
        return send(route, body)

    monkeypatch.setattr(server, "send", sometimes_slow)
    figures = alternate(server, COMPLETION, {"a": b'{"prompt": "a"}'}, num_rounds=5, batch_size=1)["a"]
    assert (figures.cpu_s, figures.latency_s) == pytest.approx((0.005, 0.01))


@pytest.mark.parametrize("route", [COMPLETION, CHAT])
def test_a_server_that_tokenises_all_the_same_is_no_measure(route: str) -> None:
    body, token_ids = client_body(route, WORDS), json.dumps(WORD_IDS).encode()
    check_that_ids_are_taken(FakeServer(), route, body, token_ids)
    with pytest.raises(BenchmarkError, match=f"{route}: the server tokenises"):
        check_that_ids_are_taken(FakeServer(takes_ids=False), route, body, token_ids)


def test_ids_are_read_where_each_route_has_them() -> None:
    assert read_ids(b'{"choices": [{"prompt_token_ids": [1, 2]}]}') == b"[1, 2]"
    assert read_ids(b'{"choices": [{}], "prompt_token_ids": [3]}') == b"[3]"
    for nothing in (b"{}", b'{"choices": [{"prompt_token_ids": null}]}'):
        with pytest.raises(BenchmarkError, match="no token ids"):
            read_ids(nothing)


def test_the_proxys_part_is_what_it_does_more_with_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    def repeat(part: Callable[[], bytes], number: int, repeat: int) -> list[float]:
        """As if a run took as many seconds as it writes bytes, and was sometimes held up."""
        return [number * (len(part()) + held_up_s) for held_up_s in next(held_up)] * repeat

    held_up = iter([(9, 0, 5), (0, 3, 1)])
    monkeypatch.setattr(bench, "timeit", SimpleNamespace(repeat=repeat))
    body, answer = client_body(CHAT, WORDS), b'{"kv_transfer_params": %b}' % bytes(PARAMS)
    assert extra_proxy_s(body, answer, b'{"prompt_token_ids": [1, 2]}') == len(',"prompt_token_ids":[1, 2]')


def test_texts_have_about_as_many_tokens_as_asked_for_and_begin_apart(tmp_path: Path) -> None:
    tokenizer = Tokenizer(WordLevel(unk_token="?"))  # noqa: S106 (no password)
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.train_from_iterator(bench.topics.values(), WordLevelTrainer(special_tokens=["?"], show_progress=False))
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    first, second, third = texts(path, (50, 300, 50))
    assert [len(tokenizer.encode(text).ids) for text in (first, second, third)] == [50, 300, 50]
    assert len({text[:20] for text in (first, second, third)}) == 3
    with pytest.raises(SystemExit, match="--sizes: 10000000 tokens in all, and the text has"):
        texts(path, (10_000_000,))


def test_the_table_says_what_is_saved_and_what_is_not() -> None:
    forms = {
        TEXT: Figures(17_800, 0.0136, 0.2),
        IDS: Figures(18_100, 0.0060, 0.21),
        PREFILL: Figures(17_900, 0.0130, 0.2),
        PREFILL_IDS: Figures(17_950, 0.0135, 0.2),
    }
    *_, completion, chat = table([Row(COMPLETION, 4000, forms, 22e-6), Row(CHAT, 4030, forms, -2e-6)])
    figures = "17.8 / 18.1 | 13.60 / 6.00 / **+7.60** | 200.00 / 210.00 / **-10.00** | +0.50 |"
    assert completion == f"| completion, 4000 | {figures} +22 |"
    assert chat == f"| chat, 4030 | {figures} -2 |"
    assert len({line.count("|") for line in table([Row(CHAT, 4030, forms, 0.0)])}) == 1


class TestServer:
    def test_its_clock_is_the_process_clock(self) -> None:
        before_s = time.process_time()
        used_s = Server(cast(HTTPConnection, None), os.getpid()).cpu_s()
        assert before_s <= used_s <= time.process_time()

    @pytest.mark.parametrize("status", [200, 400])
    def test_what_is_not_200_is_an_error(self, status: int) -> None:
        asked: list[tuple[Any, ...]] = []
        response = SimpleNamespace(status=status, read=io.BytesIO(b"an answer").read)
        connection = SimpleNamespace(request=lambda *args: asked.append(args), getresponse=lambda: response)
        server = Server(cast(HTTPConnection, connection), os.getpid())
        if status == 200:
            assert server.send(CHAT, b"{}") == b"an answer"
        else:
            with pytest.raises(BenchmarkError, match=f"{CHAT}: 400 an answer"):
                server.send(CHAT, b"{}")
        assert asked == [("POST", CHAT, b"{}", {"content-type": "application/json"})]

"""What it gains that D gets P's token ids instead of the text: `make bench-tokenise`.

One vLLM api server with omni's connector, as D is, answers the same prompts in four forms, in turn, one at a time, one
token each. The proxy's own code makes them: leg 2 with the text or with P's token ids, and leg 1 whose answer has no
token ids or has them. All of a prompt but its end is in the prefix cache from the first time on, so the engine's part
is small and the same for all. What differs is the api server's: to render, tokenise, parse and write. The text is the
same each time too, and a tokenizer remembers words: new ones take it longer.
"""

import argparse
import json
import os
import secrets
import signal
import statistics
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from pydoc_data.topics import topics  # some 100,000 tokens of English

import msgspec
from tokenizers import Tokenizer

from benchmarks.bench_proxy.processes import BenchmarkError
from benchmarks.bench_serving.processes import running, wait_until_healthy
from benchmarks.servers import free_port
from omni.deployment.embedded_model import ensure_embedded_model
from services.global_proxy.legs import NULL, PrefillAnswer
from services.global_proxy.request_body import RequestBody, parse_body

COMPLETION, CHAT = ROUTES = ("/v1/completions", "/v1/chat/completions")
TEXT, IDS, PREFILL, PREFILL_IDS = "leg 2, text", "leg 2, token ids", "leg 1", "leg 1, token ids returned"
SIZES_TOKENS = (100, 1000, 4000)
PARAMS = msgspec.Raw(b'{"do_remote_prefill":false}')  # in place of P's: the same in all forms, and asks for nothing
_ROOM_TOKENS = 200  # a chat's template, and a cut text's own: it may have more tokens than what it was cut from
_NUM_TIMED, _NUM_REPEATS = 50, 40  # of the proxy's part
_KV_CACHE_BYTES = 1 << 30  # all prompts stay in it
_BLOCK_TOKENS = 32  # the engine computes less than a block of a prompt again
_TIMEOUT_S = 300.0

_decode_answer = msgspec.json.Decoder(PrefillAnswer).decode


class Server:
    """An api server that answers on a kept connection."""

    def __init__(self, connection: HTTPConnection, pid: int) -> None:
        self._connection = connection
        self._cpu_clock = ~pid << 3 | 2  # as clock_getcpuclockid(3) has it; /proc counts in steps of 10 ms

    def send(self, route: str, body: bytes) -> bytes:
        """Its answer. Raises BenchmarkError: its status is not 200."""
        self._connection.request("POST", route, body, {"content-type": "application/json"})
        response = self._connection.getresponse()
        answer = response.read()
        if response.status != 200:
            raise BenchmarkError(f"{route}: {response.status} {answer.decode(errors='replace')}")
        return answer

    def cpu_s(self) -> float:
        """CPU seconds of its own process so far, without the engine's."""
        return time.clock_gettime(self._cpu_clock)


@dataclass(frozen=True)
class Figures:
    """Of one form, for each request."""

    num_bytes: int  # sent
    cpu_s: float  # of the api server
    latency_s: float


@dataclass(frozen=True)
class Row:
    """One prompt."""

    route: str
    num_tokens: int
    forms: Mapping[str, Figures]
    proxy_s: float  # how much longer the proxy's own part takes with token ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="an embedded model")
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES_TOKENS, metavar="TOKENS", help="of prompts")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8, help="requests of one form before it is the next one's turn")
    parser.add_argument("--log", type=Path, default=Path("logs/bench_tokenise_once.log"), help="what the server prints")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # as with Ctrl-C, leave nothing behind
    print(f"load average before: {os.getloadavg()[0]:.1f}", file=sys.stderr)
    model = ensure_embedded_model(options.model)
    prompts = texts(model / "tokenizer.json", options.sizes)
    try:
        with _serving(model, max(options.sizes) + _ROOM_TOKENS, options.log) as server:
            rows = [measure(server, route, text, options.rounds, options.batch) for route in ROUTES for text in prompts]
    except BenchmarkError as error:
        sys.exit(str(error))
    print("\n".join(table(rows)))
    print(f"\nMedians of {options.rounds} rounds of {options.batch} requests a form; {options.model}.")


def texts(tokenizer_json: Path, sizes_tokens: Sequence[int]) -> list[str]:
    """English texts of about so many tokens, none of which begins as another does."""
    tokenizer = Tokenizer.from_file(str(tokenizer_json))
    token_ids = tokenizer.encode("\n".join(topics.values()), add_special_tokens=False).ids
    if sum(sizes_tokens) > len(token_ids):
        sys.exit(f"--sizes: {sum(sizes_tokens)} tokens in all, and the text has {len(token_ids)}; ask for less")
    ends = [sum(sizes_tokens[: number + 1]) for number in range(len(sizes_tokens))]
    return [tokenizer.decode(token_ids[end - size : end]) for end, size in zip(ends, sizes_tokens, strict=True)]


def measure(server: Server, route: str, text: str, num_rounds: int, batch_size: int) -> Row:
    """Ask for one prompt in all forms. Raises BenchmarkError."""
    body = client_body(route, text)
    answer = server.send(route, body.prefill_json(PARAMS, want_token_ids=True))
    token_ids = read_ids(answer)
    check_that_ids_are_taken(server, route, body, token_ids)
    forms = {
        TEXT: body.decode_json(PARAMS),
        IDS: body.decode_json(PARAMS, token_ids),
        PREFILL: body.prefill_json(PARAMS),
        PREFILL_IDS: body.prefill_json(PARAMS, want_token_ids=True),
    }
    figures = alternate(server, route, forms, num_rounds, batch_size)
    proxy_s = extra_proxy_s(body, server.send(route, forms[PREFILL]), answer)
    return Row(route, len(json.loads(token_ids)), figures, proxy_s)


def client_body(route: str, text: str) -> RequestBody:
    prompt = {"prompt": text} if route == COMPLETION else {"messages": [{"role": "user", "content": text}]}
    return parse_body(json.dumps({"model": "m", **prompt, "max_tokens": 1, "temperature": 0}).encode(), max_n=1)


def read_ids(answer: bytes) -> bytes:
    """The prompt's token ids out of P's answer, where the proxy finds them. Raises BenchmarkError."""
    read = _decode_answer(answer)
    ids = read.choices[0].prompt_token_ids if read.choices else NULL
    if ids == NULL:
        ids = read.prompt_token_ids
    if ids == NULL:
        raise BenchmarkError("the server returns no token ids")
    return bytes(ids)


def check_that_ids_are_taken(server: Server, route: str, body: RequestBody, token_ids: bytes) -> None:
    """An engine that gets the ids of half the prompt must say that the prompt has half as many tokens."""
    half = json.loads(token_ids)
    half = half[: len(half) // 2]
    answer = json.loads(server.send(route, body.decode_json(PARAMS, json.dumps(half).encode())))
    if answer["usage"]["prompt_tokens"] != len(half):
        raise BenchmarkError(f"{route}: the server tokenises the text although it has got token ids")


def alternate(
    server: Server, route: str, forms: Mapping[str, bytes], num_rounds: int, batch_size: int
) -> dict[str, Figures]:
    """Medians: over all requests of a form, and for CPU over its batches, because a request's work may end after it.

    Each round begins with another form.
    """
    cpu_s: dict[str, list[float]] = {form: [] for form in forms}
    latencies_s: dict[str, list[float]] = {form: [] for form in forms}
    for body in forms.values():
        server.send(route, body)  # now its blocks are in the prefix cache
    names = list(forms)
    for number in range(num_rounds):
        first = number % len(names)
        for form in names[first:] + names[:first]:
            before_s = server.cpu_s()
            for _ in range(batch_size):
                sent_s = time.monotonic()
                server.send(route, forms[form])
                latencies_s[form].append(time.monotonic() - sent_s)
            cpu_s[form].append((server.cpu_s() - before_s) / batch_size)
    return {
        form: Figures(len(body), statistics.median(cpu_s[form]), statistics.median(latencies_s[form]))
        for form, body in forms.items()
    }


def extra_proxy_s(body: RequestBody, answer: bytes, answer_with_ids: bytes) -> float:
    """To read P's answer and write D's body, with token ids rather than without; best of a few repeats."""

    def best_s(part: Callable[[], object]) -> float:
        return min(timeit.repeat(part, number=_NUM_TIMED, repeat=_NUM_REPEATS)) / _NUM_TIMED

    with_ids_s = best_s(lambda: body.takes_token_ids and body.decode_json(PARAMS, read_ids(answer_with_ids)))
    return with_ids_s - best_s(lambda: body.decode_json(_decode_answer(answer).kv_transfer_params))


def table(rows: Sequence[Row]) -> list[str]:
    """For docs/performance.md."""
    lines = [
        "| prompt, tokens | leg 2, KB: text / ids | D's api server, CPU ms: text / ids / **saved** "
        "| D's latency p50, ms: text / ids / **saved** | P's api server, to return them, CPU ms | proxy, µs |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        text, ids, prefill, prefill_ids = (row.forms[form] for form in (TEXT, IDS, PREFILL, PREFILL_IDS))
        kind = "chat" if row.route == CHAT else "completion"
        lines.append(
            f"| {kind}, {row.num_tokens} | {text.num_bytes / 1000:.1f} / {ids.num_bytes / 1000:.1f} "
            f"| {_saved(text.cpu_s, ids.cpu_s)} | {_saved(text.latency_s, ids.latency_s)} "
            f"| {1e3 * (prefill_ids.cpu_s - prefill.cpu_s):+.2f} | {1e6 * row.proxy_s:+.0f} |"
        )
    return lines


def _saved(text_s: float, ids_s: float) -> str:
    return f"{1e3 * text_s:.2f} / {1e3 * ids_s:.2f} / **{1e3 * (text_s - ids_s):+.2f}**"


@contextmanager
def _serving(model: Path, max_model_len: int, log: Path) -> Iterator[Server]:
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="bench_tokenise_") as folder:
        key = Path(folder, "deployment.key")
        key.touch(mode=0o600)
        key.write_text(secrets.token_hex(32))
        transfer: dict[str, object] = {"kv_connector": "OmniConnector", "kv_role": "kv_consumer"}
        transfer["kv_connector_module_path"] = "kv_transfer.connector"
        transfer["kv_connector_extra_config"] = {"key_file": str(key)}
        command = [
            *(sys.executable, "-m", "omni.adaptors.vllm.api_server", "--model", str(model), "--served-model-name", "m"),
            *("--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--max-model-len", str(max_model_len)),
            *("--kv-cache-memory-bytes", str(_KV_CACHE_BYTES), "--block-size", str(_BLOCK_TOKENS)),
            *("--kv-transfer-config", json.dumps(transfer), "--shutdown-timeout", "5"),
        ]
        cores = sorted(os.sched_getaffinity(0))
        env = {"TORCH_COMPILE_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": str(cores[0])}
        with running(command, log, cores, env) as process:
            wait_until_healthy([f"http://127.0.0.1:{port}"], [process], _TIMEOUT_S)
            with closing(HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)) as connection:
                yield Server(connection, process.family()[0].pid)


if __name__ == "__main__":
    main()

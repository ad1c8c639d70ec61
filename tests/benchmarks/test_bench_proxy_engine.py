"""The stand-in engine byte for byte, and the load generator against answers cut at every place."""

import asyncio
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.bench_proxy.processes import Process, build, find_program

pytestmark = pytest.mark.skipif(find_program("gcc") is None, reason="needs gcc: make system-deps")

HEAD = b"HTTP/1.1 %s\r\ndate: Sat, 21 Nov 2026 12:00:00 GMT\r\nserver: uvicorn\r\n"
STREAM_HEAD = HEAD % b"200 OK" + b"content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
EVENT = (
    b'data: {"id":"cmpl-8b6f2f0d4c5e4f1a9d3c7e6b5a493827","object":"text_completion","created":1763740000,'
    b'"model":"instant","choices":[{"index":0,"text":" word","logprobs":null,"finish_reason":%s,"stop_reason":null,'
    b'"prompt_token_ids":%s,"token_ids":%s}]}\n\n'
)
STREAM_END = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
NUM_PROMPT_TOKENS = 200
PROMPT_IDS = json.dumps(list(range(1000, 1200)), separators=(",", ":")).encode()


def framed(event: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(event), event)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return build(tmp_path_factory.mktemp("programs"))


@pytest.fixture(scope="module")
def port(programs: tuple[Path, Path]) -> Iterator[int]:
    process = Process([programs[0]], os.sched_getaffinity(0))
    yield int(process.first_line())
    process.stop()


class Client:
    """One kept-alive connection, read to the byte."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), 10)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def read_until(self, ending: bytes) -> bytes:
        data = b""
        while not data.endswith(ending):
            more = self._socket.recv(65536)
            assert more, f"closed after {data!r}"
            data += more
        return data

    def exchange_whole(self, request: bytes) -> tuple[bytes, bytes]:
        """Head and body of an answer with a length."""
        self.send(request)
        data = b""
        while b"\r\n\r\n" not in data:
            data += self._socket.recv(65536)
        head, _, body = data.partition(b"\r\n\r\n")
        length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        while len(body) < length:
            body += self._socket.recv(65536)
        assert len(body) == length
        return head + b"\r\n\r\n", body

    def is_closed(self) -> bool:
        try:
            return self._socket.recv(1) == b""
        except ConnectionResetError:
            return True


def post(body: dict[str, object]) -> bytes:
    data = json.dumps(body, separators=(",", ":")).encode()
    return b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(data), data)


@pytest.fixture
def client(port: int) -> Iterator[Client]:
    with Client(port) as client:
        yield client


class TestInstantEngine:
    def test_a_stream_byte_for_byte(self, client: Client) -> None:
        client.send(post({"stream": True, "max_tokens": 3}))
        chunk, last = EVENT % (b"null", b"null", b"null"), EVENT % (b'"length"', b"null", b"null")
        assert client.read_until(b"\r\n0\r\n\r\n") == STREAM_HEAD + framed(chunk) * 2 + framed(last) + STREAM_END

    def test_token_ids_and_usage_if_asked_for(self, client: Client) -> None:
        options = {"return_token_ids": True, "stream_options": {"include_usage": True}}
        client.send(post({"stream": True, "max_tokens": 3, **options}))
        usage = (
            b'data: {"id":"cmpl-8b6f2f0d4c5e4f1a9d3c7e6b5a493827","object":"text_completion","created":1763740000,'
            b'"model":"instant","choices":[],'
            b'"usage":{"prompt_tokens":200,"total_tokens":203,"completion_tokens":3}}\n\n'
        )
        assert client.read_until(b"\r\n0\r\n\r\n") == STREAM_HEAD + (
            framed(EVENT % (b"null", PROMPT_IDS, b"[1234]"))
            + framed(EVENT % (b"null", b"null", b"[1234]"))
            + framed(EVENT % (b'"length"', b"null", b"[1234]"))
            + framed(usage)
            + STREAM_END
        )

    def test_paced_streams_bring_the_same_bytes(self, client: Client, port: int) -> None:
        streams = []
        with Client(port) as other:
            for connection in (client, other):
                connection.send(post({"stream": True, "max_tokens": 5, "model": "paced"}))
            streams = [connection.read_until(b"\r\n0\r\n\r\n") for connection in (client, other)]
            client.send(post({"stream": True, "max_tokens": 5}))
            assert streams == [client.read_until(b"\r\n0\r\n\r\n")] * 2

    @pytest.mark.parametrize("asks_for_ids", [False, True])
    def test_a_prefill_is_answered_with_nixls_parameters(self, client: Client, asks_for_ids: bool) -> None:
        params = {"do_remote_decode": True, "do_remote_prefill": False}
        request = post(
            {"kv_transfer_params": params, "max_tokens": 1, "stream": False, "return_token_ids": asks_for_ids}
        )
        head, body = client.exchange_whole(request)
        assert head == HEAD % b"200 OK" + b"content-length: %d\r\ncontent-type: application/json\r\n\r\n" % len(body)
        answer = json.loads(body)
        assert answer["choices"][0]["text"] == " word"
        assert answer["choices"][0]["prompt_token_ids"] == (json.loads(PROMPT_IDS) if asks_for_ids else None)
        assert answer["choices"][0]["token_ids"] == ([1234] if asks_for_ids else None)
        assert answer["usage"]["prompt_tokens"] == NUM_PROMPT_TOKENS
        assert answer["kv_transfer_params"].keys() == {
            *("do_remote_prefill", "do_remote_decode", "remote_block_ids", "remote_engine_id", "remote_request_id"),
            *("remote_host", "remote_port", "tp_size", "dcp_size", "pp_size", "remote_num_tokens"),
            *("remote_blocks_expiry_time", "transfer_mode", "remote_prefill_cached_tokens"),
        }
        assert answer["kv_transfer_params"]["do_remote_prefill"] is True

    @pytest.mark.parametrize("num_tokens", [1, 32, 4000])
    def test_a_whole_answer_has_as_many_words_as_asked_for(self, client: Client, num_tokens: int) -> None:
        _, body = client.exchange_whole(post({"max_tokens": num_tokens}))
        answer = json.loads(body)
        assert answer["choices"][0]["text"] == " word" * num_tokens
        assert answer["usage"]["total_tokens"] == NUM_PROMPT_TOKENS + num_tokens
        assert answer["kv_transfer_params"] is None

    @pytest.mark.filterwarnings("default")  # importing vLLM warns of what it uses
    def test_vllm_itself_would_have_written_the_same(self, client: Client) -> None:
        """Its own types read the stand-in's JSON and write it again, to the byte."""
        from vllm.entrypoints.openai.completion.protocol import CompletionResponse, CompletionStreamResponse

        _, body = client.exchange_whole(post({"max_tokens": 2, "return_token_ids": True}))
        assert CompletionResponse.model_validate_json(body).model_dump_json().encode() == body
        for ids in (b"null", b"[1234]"):
            event = (EVENT % (b"null", b"null", ids)).removeprefix(b"data: ").strip()
            chunk = CompletionStreamResponse.model_validate_json(event)
            assert chunk.model_dump_json(exclude_unset=True).encode() == event

    def test_requests_may_come_in_pieces_one_after_the_other(self, client: Client) -> None:
        request = post({"max_tokens": 1})
        for cut in (5, len(request) - 3, request.find(b"\r\n\r\n") + 2):
            client.send(request[:cut])
            client.send(b"")
            _, body = client.exchange_whole(request[cut:])
            assert json.loads(body)["choices"][0]["text"] == " word"

    def test_what_a_proxy_may_ask(self, client: Client) -> None:
        head, body = client.exchange_whole(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK\r\n")
        assert body == b""
        _, body = client.exchange_whole(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
        assert [model["id"] for model in json.loads(body)["data"]] == ["instant", "paced"]
        head, _ = client.exchange_whole(b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 404 Not Found\r\n")

    def test_counts_what_it_is_asked(self, client: Client) -> None:
        def counts() -> list[int]:
            _, body = client.exchange_whole(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            return [int(line.split()[1]) for line in body.decode().splitlines()]

        before = counts()
        client.exchange_whole(post({"max_tokens": 1, "kv_transfer_params": {"do_remote_decode": True}}))
        client.send(post({"stream": True, "max_tokens": 7}))
        client.read_until(b"\r\n0\r\n\r\n")
        assert [after - b for after, b in zip(counts(), before, strict=True)] == [1, 1, 7]

    def test_goes_on_after_a_client_that_left_or_sent_too_much(self, client: Client, port: int) -> None:
        for model in ("instant", "paced"):
            with Client(port) as leaving:
                leaving.send(post({"stream": True, "max_tokens": 5000, "model": model}))
                leaving.read_until(b"\n\n\r\n")
        with Client(port) as talking:
            talking.send(b"POST /v1/completions HTTP/1.1\r\nContent-Length: 999999\r\n\r\n")
            assert talking.is_closed()
        _, body = client.exchange_whole(post({"max_tokens": 1}))
        assert json.loads(body)["choices"]


class TestHttpLoad:
    """A server that answers as told, in pieces of a given size."""

    async def load(
        self, programs: tuple[Path, Path], answer: bytes, piece: int, tmp_path: Path, closes: bool = False
    ) -> dict[str, object]:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                while await reader.readuntil(b"\r\n\r\n{}"):
                    for at in range(0, len(answer), piece):
                        writer.write(answer[at : at + piece])
                        await asyncio.sleep(0)
                    if closes:
                        break
            except (asyncio.IncompleteReadError, ConnectionError):
                pass
            writer.close()

        body = tmp_path / "body"
        body.write_bytes(b"{}")
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            process = await asyncio.create_subprocess_exec(
                programs[1], str(port), "2", "20", "500", str(body), stdout=asyncio.subprocess.PIPE
            )
            async with asyncio.timeout(30):
                output, _ = await process.communicate()
        begin, end, last = output.splitlines()
        assert (begin, end) == (b"begin", b"end")
        result: dict[str, object] = json.loads(last)
        return result

    @pytest.mark.parametrize("piece", [1, 2, 3, 7, 64, 100_000])
    async def test_counts_events_wherever_they_are_cut(
        self, programs: tuple[Path, Path], piece: int, tmp_path: Path
    ) -> None:
        # Two events in one chunk, one in two, and lines of an event that are not its end.
        chunks = framed(b"data: a\n\ndata: b\n\n") + framed(b"data: c\n") + framed(b"data: d\n\n")
        answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"
        result = await self.load(programs, answer, piece, tmp_path)
        assert result["num_failed"] == 0
        num_requests, num_events = result["num_requests"], result["num_events"]
        assert isinstance(num_requests, int)
        assert isinstance(num_events, int)
        assert num_requests > 0
        # A stream that lies only partly within the window has events there, but is no request of it.
        assert abs(num_events - 3 * num_requests) <= 3 * 2 * 2

    @pytest.mark.parametrize("piece", [1, 5, 100_000])
    async def test_answers_with_a_length(self, programs: tuple[Path, Path], piece: int, tmp_path: Path) -> None:
        answer = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nabcd"
        result = await self.load(programs, answer, piece, tmp_path)
        assert (result["num_failed"], result["num_unfinished"], result["num_events"]) == (0, 0, 0)
        assert result["num_requests"] != 0
        assert result["latency_us"] is not None

    @pytest.mark.parametrize(
        "answer",
        [
            b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 4\r\n\r\nabcd",
            b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nabcd",
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nabcd\r\n",
        ],
        ids=["status", "short", "no_end"],
    )
    async def test_bad_answers_are_failures(self, programs: tuple[Path, Path], answer: bytes, tmp_path: Path) -> None:
        result = await self.load(programs, answer, 100_000, tmp_path, closes=True)
        assert result["num_requests"] == 0
        assert result["num_failed"] != 0

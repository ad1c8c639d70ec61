"""Requests a second through the proxy, whole and streamed: `python -m benchmarks.bench_proxy` (about 20 s).

Two instant stand-in engines, the proxy and the load generator run in a process each. The stand-ins and the load
generator are bare asyncio protocols, so that the proxy is what is measured. `--direct` leaves the proxy out.
"""

import argparse
import asyncio
import multiprocessing
import socket
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from typing import cast

import psutil
import uvloop

NUM_CHUNKS = 32  # of a streamed answer
PROMPT = b'{"model":"m","max_tokens":32,"prompt":"' + b"word " * 200 + b'"'
_CHUNK = b'data: {"id":"cmpl-1","object":"text_completion","choices":[{"index":0,"text":"word "}]}\n\n'
_PARAMS = b'{"do_remote_prefill":true,"remote_engine_id":"e","remote_block_ids":[[1,2,3]],"remote_host":"h"}'
_WHOLE = b'{"id":"cmpl-1","choices":[{"index":0,"text":"word"}],"kv_transfer_params":%s}' % _PARAMS


def _http_chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


WHOLE = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(_WHOLE), _WHOLE)
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
STREAM_CHUNK = _http_chunk(_CHUNK)
STREAM_END = _http_chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


def message_length(buffer: bytes) -> int:
    """Bytes of the first request in `buffer`; 0 if it is not all there."""
    head_end = buffer.find(b"\r\n\r\n")
    if head_end < 0:
        return 0
    field = buffer[:head_end].lower().find(b"content-length:")
    length = int(buffer[field + 15 : buffer.find(b"\r\n", field)])
    return head_end + 4 + length if len(buffer) >= head_end + 4 + length else 0


class InstantEngine(asyncio.Protocol):
    """Answers at once; a stream goes out one chunk per turn of the event loop, as tokens would."""

    transport: asyncio.Transport
    buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if length := message_length(self.buffer):
            streamed = b'"stream":true' in self.buffer
            self.buffer = self.buffer[length:]
            if streamed:
                self.transport.write(STREAM_HEAD)
                self._send_chunk(NUM_CHUNKS)
            else:
                self.transport.write(WHOLE)

    def _send_chunk(self, num_left: int) -> None:
        if self.transport.is_closing():
            return
        if num_left:
            self.transport.write(STREAM_CHUNK)
            asyncio.get_running_loop().call_soon(self._send_chunk, num_left - 1)
        else:
            self.transport.write(STREAM_END)


class LoadConnection(asyncio.Protocol):
    """Sends the next request as soon as the last one is answered."""

    transport: asyncio.Transport
    num_done = 0
    tail = b""

    def __init__(self, request: bytes, ends_with: bytes) -> None:
        self.request = request
        self.ends_with = ends_with

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.tail = (self.tail + data)[-len(self.ends_with) :]
        if self.tail == self.ends_with:
            self.num_done += 1
            self.tail = b""
            self.transport.write(self.request)


def serve_engine(port_to: Connection) -> None:
    async def serve() -> None:
        server = await asyncio.get_running_loop().create_server(InstantEngine, "127.0.0.1", 0)
        port_to.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    uvloop.run(serve())


async def load(port: int, num_connections: int, seconds: float, stream: bool) -> tuple[float, int]:
    """Returns requests a second, and how many were answered."""
    body = PROMPT + (b',"stream":true}' if stream else b"}")
    request = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
        % (len(body), body)
    )
    ends_with = b"\r\n0\r\n\r\n" if stream else _WHOLE[-20:]
    loop = asyncio.get_running_loop()
    started_s = time.monotonic()
    connections = [
        (await loop.create_connection(lambda: LoadConnection(request, ends_with), "127.0.0.1", port))[1]
        for _ in range(num_connections)
    ]
    await asyncio.sleep(seconds)
    elapsed_s = time.monotonic() - started_s
    num_done = sum(c.num_done for c in connections)
    for connection in connections:
        connection.transport.abort()
    return num_done / elapsed_s, num_done


def start_proxy(engine_ports: list[int]) -> tuple[subprocess.Popen[bytes], int]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = int(sock.getsockname()[1])
    prefill, decode = (f"http://127.0.0.1:{p}" for p in engine_ports)
    arguments = ["--port", str(port), "--prefill", prefill, "--decode", decode]
    process = subprocess.Popen(
        [sys.executable, "-m", "services.global_proxy", *arguments],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    for _ in range(200):
        try:
            socket.create_connection(("127.0.0.1", port), 0.1).close()
            return process, port
        except OSError:
            time.sleep(0.05)
    process.kill()
    raise RuntimeError("the proxy did not start")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=7.0, help="of each of the two runs")
    parser.add_argument("--direct", action="store_true", help="measure the stand-ins themselves")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    engines, ports = [], []
    for _ in range(2):
        receive, send = context.Pipe(duplex=False)
        engine = context.Process(target=serve_engine, args=(send,), daemon=True)
        engine.start()
        engines.append(engine)
        ports.append(receive.recv())
    proxy, port = (None, ports[1]) if options.direct else start_proxy(ports)
    try:
        for stream in (False, True):
            watched = psutil.Process(engines[1].pid if proxy is None else proxy.pid)
            cpu_s = sum(watched.cpu_times()[:2])
            per_s, num_done = uvloop.run(load(port, options.connections, options.seconds, stream))
            cpu_us = (sum(watched.cpu_times()[:2]) - cpu_s) / max(num_done, 1) * 1e6
            kind = f"streamed in {NUM_CHUNKS} chunks" if stream else "whole"
            print(f"{kind:24} {per_s:7.0f} requests/s  {cpu_us:6.0f} us of CPU a request")
    finally:
        if proxy is not None:
            proxy.terminate()
            proxy.wait(10)
        for engine in engines:
            engine.terminate()


if __name__ == "__main__":
    main()

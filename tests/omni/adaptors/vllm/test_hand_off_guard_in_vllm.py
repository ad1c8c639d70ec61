"""The guard in front of vLLM's own application, and that vLLM takes hand-off parameters nowhere else."""

import logging
import socket
import threading
import typing
import warnings
from collections.abc import Iterator
from typing import Any

import aiohttp
import pydantic
import pytest
import uvicorn

from omni.adaptors.vllm import hand_off_guard
from omni.adaptors.vllm.hand_off_guard import InstalledGuard, Rules

from ....kv_transfer.hand_off_strategies import KEY, as_received, hand_off

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's and vLLM's own, at import
    from fastapi import FastAPI
    from fastapi.routing import APIRoute
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

CARRIERS = ("kv_transfer_params", "vllm_xargs", "extra_args", "sampling_params")
GUARDED = {("kv_transfer_params",), ("vllm_xargs",), ("sampling_params",)}


@pytest.fixture(scope="module")
def vllm_app() -> Iterator[FastAPI]:
    """All of vLLM's routes, without an engine: /v1/completions says that the model cannot do it."""
    InstalledGuard.rules = Rules(key=KEY, is_producer=False, is_consumer=True)
    root_level = logging.root.level
    arguments = ["--model", "m", "--middleware", f"{hand_off_guard.__name__}.InstalledGuard"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args = make_arg_parser(FlexibleArgumentParser(prog="vllm serve")).parse_args(arguments)
        app = build_app(args, ("generate", "render", "transcription", "embed"), None)
    app.state.openai_serving_completion = None
    logging.root.setLevel(root_level)  # something that vLLM's app imports has raised it
    yield app
    del InstalledGuard.rules


def paths_of(annotation: Any, seen: tuple[Any, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Where, in a request of this type, the names stand that can carry hand-off parameters."""
    for argument in typing.get_args(annotation):
        yield from paths_of(argument, seen)
    if not isinstance(annotation, type) or not issubclass(annotation, pydantic.BaseModel) or annotation in seen:
        return
    for name, field in annotation.model_fields.items():
        if name in CARRIERS:
            yield (name,)
        else:
            yield from ((name, *path) for path in paths_of(field.annotation, (*seen, annotation)))


def test_vllm_takes_hand_off_parameters_where_the_guard_looks(vllm_app: FastAPI) -> None:
    found: dict[tuple[str, ...], set[str]] = {}
    for route in vllm_app.routes:
        if not isinstance(route, APIRoute) or route.path.endswith("/derender"):  # which makes text of tokens, here
            continue
        if route.body_field is not None:
            for path in paths_of(route.body_field.field_info.annotation):
                assert route.methods == {"POST"}
                found.setdefault(path, set()).add(route.path)
    assert set(found) == GUARDED, found
    assert {"/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"} <= found["kv_transfer_params",]
    assert found["sampling_params",] == {"/inference/v1/generate"}


@pytest.fixture(scope="module")
def url(vllm_app: FastAPI) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(vllm_app, log_config=None, lifespan="off", ws="none"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(20)
    assert not thread.is_alive()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/inference/v1/generate", "/invocations"])
async def test_a_client_s_parameters_do_not_get_in(url: str, path: str) -> None:
    async with aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(30)) as session:
        for fields in (
            {"kv_transfer_params": {"do_remote_prefill": True}},
            {"vllm_xargs": {"kv_transfer_params": 1}},
            {"sampling_params": {"extra_args": {"kv_transfer_params": {"do_remote_prefill": True}}}},
        ):
            async with session.post(path, json={"model": "m", "prompt": "x"} | fields) as response:
                assert response.status == 400
                error = (await response.json())["error"]
                assert (error["type"], error["code"]) == ("BadRequestError", 400)
                assert "leave kv_transfer_params out" in error["message"]


async def test_the_rest_does(url: str) -> None:
    """As far as a route, which has no engine."""
    async with aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(30)) as session:
        for fields in ({}, {"kv_transfer_params": as_received(hand_off())}):
            async with session.post(
                "/v1/completions", json={"model": "m", "prompt": "x" * 300_000} | fields
            ) as response:
                assert response.status == 501
        async with session.post("/v1/completions", json={"prompt": "x", "max_tokens": "x"}) as response:
            assert "max_tokens" in (await response.json())["error"]["message"], "vLLM's own refusal, of the same body"
        async with session.get("/version") as response:
            assert response.status == 200

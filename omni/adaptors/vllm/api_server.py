"""One vLLM OpenAI api server, with its EngineCore and workers, for one data-parallel rank.

`python -m omni.adaptors.vllm.api_server ARGS…` takes the arguments of `vllm serve`. Inside a supervisor the same
`serve(ARGS)` runs in a forked child.
"""

import argparse
import os
import sys
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from pathlib import Path
from typing import Any

from omni.adaptors.vllm import event_publisher, fork_start, hand_off_guard, queue_waits, seeded_chunks

Beside = Callable[[], AbstractAsyncContextManager[object]]


def serve(arguments: Sequence[str], beside: Beside = nullcontext) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        arguments: what follows `vllm serve` on a command line.
        beside: makes what is entered in the server's event loop before it serves, and left after.

    Raises:
        SystemExit: the arguments are not vLLM's; it has printed why. Or the deployment key cannot be had.
    """
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server

    args = _parsed(arguments)
    try:
        hand_off_guard.install(args)
        event_publisher.install(args)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    uvloop.run(_beside(beside, run_server(args)))


def work_for_another_host(arguments: Sequence[str]) -> None:
    """Run this host's workers of a DP rank whose api server is on another host, until SIGTERM.

    Args:
        arguments: those of that api server with this host's --node-rank, and --headless.
    """
    from vllm.entrypoints.cli.serve import run_headless

    args = _parsed(arguments)
    args.api_server_count = 0
    run_headless(args)


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """vLLM's arguments, with all set up that must be before an engine starts."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.logger import configure_logging_from_args
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    _hide_data_parallel_variables(arguments)
    fork_start.use_fork()
    # A package that vLLM's server imports sets the root logger, and so ours, to ERROR unless this names another level.
    os.environ.setdefault("SAGEMAKER_CONTAINER_LOG_LEVEL", "INFO")
    if current_platform.is_cpu():
        queue_waits.sleep_at_once()
        seeded_chunks.keep_engines_alive()
    parser = make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))
    args: argparse.Namespace = parser.parse_args(list(arguments))
    configure_logging_from_args(args)
    validate_parsed_serve_args(args)
    return args


async def _beside(beside: Beside, serving: Coroutine[Any, Any, None]) -> None:
    async with beside():
        await serving


def _hide_data_parallel_variables(arguments: Sequence[str]) -> None:
    """VLLM_DP_* tell where this rank stands. vLLM reads them too, and refuses a dense model that has a DP size above 1.

    The ranks of a dense model are independent, so vLLM is told of data parallelism by arguments only, where it matters.
    """
    if "--data-parallel-size" not in arguments:
        for name in [name for name in os.environ if name.startswith("VLLM_DP_")]:
            del os.environ[name]


def main() -> None:
    fork_start.exec_with(fork_start.exec_environment(eager="--enforce-eager" in sys.argv))
    model = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    model.add_argument("--model", type=Path, required=True)
    fork_start.import_vllm(model.parse_known_args()[0].model)
    serve(sys.argv[1:])


if __name__ == "__main__":
    main()

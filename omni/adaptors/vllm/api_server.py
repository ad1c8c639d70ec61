"""One vLLM OpenAI api server, with its EngineCore and workers, for one data-parallel rank.

`python -m omni.adaptors.vllm.api_server ARGS…` takes the arguments of `vllm serve`. Inside a supervisor the same
`serve(ARGS)` runs in a forked child.
"""

import sys
from collections.abc import Sequence

from omni.adaptors.vllm import fork_start


def serve(arguments: Sequence[str]) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        arguments: what follows `vllm serve` on a command line.

    Raises:
        SystemExit: the arguments are not vLLM's; it has printed why.
    """
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    fork_start.use_fork()
    args = make_arg_parser(FlexibleArgumentParser(prog="vllm serve")).parse_args(list(arguments))
    configure_logging_from_args(args)
    validate_parsed_serve_args(args)
    uvloop.run(run_server(args))


def main() -> None:
    fork_start.exec_with(fork_start.exec_environment(eager="--enforce-eager" in sys.argv))
    fork_start.import_vllm()
    serve(sys.argv[1:])


if __name__ == "__main__":
    main()

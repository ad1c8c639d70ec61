"""vLLM's load generator: `python -m omni.adaptors.vllm.bench_serve ARGS` is `vllm bench serve ARGS`.

It ends with the process that started it, and imports none of vLLM's servers.
"""

from omni.process import obey_parent


def main() -> None:
    obey_parent()
    from vllm.benchmarks.serve import add_cli_args
    from vllm.benchmarks.serve import main as run
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="vllm bench serve")
    add_cli_args(parser)
    run(parser.parse_args())


if __name__ == "__main__":
    main()

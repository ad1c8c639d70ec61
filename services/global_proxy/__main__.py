"""`python -m services.global_proxy --prefill URL --decode URL` (or `--mixed URL`): serve until told to stop."""

import gc
import logging
import resource
import socket
import sys

import uvloop

from omni.process import obey_parent
from services.global_proxy.arguments import parse_arguments
from services.global_proxy.membership.errors import WorkerStartError
from services.global_proxy.membership.worker_seat import WorkerSeat
from services.global_proxy.processes import run_alone, run_parent, run_worker, worker_command

_BACKLOG = 4096
_GC_THRESHOLDS = (20_000, 50, 100)  # few of a request's objects are in cycles, so looking often finds nothing
_SWITCH_INTERVAL_S = 0.0005  # the trace exporter's thread must not keep the event loop waiting for 5 ms


def main() -> None:
    obey_parent()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.raiseExceptions = False  # a full disk loses log lines, not requests
    _tune()
    host, port, settings = parse_arguments(sys.argv[1:])
    try:
        seat = WorkerSeat.taken()
        if seat is not None:
            uvloop.run(run_worker(settings, seat))
        elif settings.num_workers == 1:
            uvloop.run(run_alone(settings, host, listen(host, port)))
        else:
            uvloop.run(run_parent(settings, host, listen(host, port), worker_command(sys.argv[1:])))
    except (ValueError, OSError, WorkerStartError) as error:
        print(f"python -m services.global_proxy: {error}", file=sys.stderr)
        sys.exit(2)


def _tune() -> None:
    """For a process that holds thousands of connections and must not pause."""
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    gc.freeze()  # what was imported is never garbage
    gc.set_threshold(*_GC_THRESHOLDS)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises OSError."""
    try:
        return socket.create_server((host, port), backlog=_BACKLOG)
    except OSError as error:
        raise OSError(f"--host {host} --port {port}: {error.strerror}: choose others") from error


if __name__ == "__main__":
    main()

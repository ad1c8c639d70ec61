"""What a worker process inherits of its parent: file descriptors, told by one environment variable."""

import os
import socket
from dataclasses import dataclass
from typing import Self

from omni.process import parent_environment
from services.global_proxy.membership.load_table import LoadTable

_VARIABLE = "OMNI_PROXY_WORKER"


@dataclass(frozen=True, slots=True)
class WorkerSeat:
    """One worker's place.

    Attributes:
        index: from 0; its row of the load table.
        listener: the listening socket of all workers.
        table: of all workers; `table.writer(index)` is this one's alone.
        channel_end: to the registry; for ChannelClient.open.
        shared_fds: what else the parent shares with its workers, in its order.
    """

    index: int
    listener: socket.socket
    table: LoadTable
    channel_end: socket.socket
    shared_fds: tuple[int, ...] = ()

    @classmethod
    def taken(cls) -> Self | None:
        """This process's seat, if it was started as a worker. Ask once, after omni.process.obey_parent.

        Raises:
            ValueError: the variable is there, but this process was not started by a parent of workers.
        """
        text = os.environ.pop(_VARIABLE, None)
        if text is None:
            return None
        try:
            index, listener_fd, table_fd, channel_fd, *shared_fds = map(int, text.split(":"))
            for fd in (listener_fd, table_fd, channel_fd, *shared_fds):
                os.set_inheritable(fd, False)
            listener, channel_end = socket.socket(fileno=listener_fd), socket.socket(fileno=channel_fd)
            return cls(index, listener, LoadTable(table_fd), channel_end, tuple(shared_fds))
        except (ValueError, OSError) as error:
            raise ValueError(f"{_VARIABLE}={text!r}: only the parent of workers sets it: unset it ({error})") from error


def seat_environment(index: int, *fds: int) -> dict[str, str]:
    """For a process that shall be worker `index`: it inherits these fds: listener, table, channel, others."""
    return {**os.environ, **parent_environment(), _VARIABLE: ":".join(map(str, (index, *fds)))}

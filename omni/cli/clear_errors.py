"""What the user can mend is one message and exit code 2, without a traceback."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import typer

from omni.cli.plain_console import plain_console
from omni.deployment.errors import DeploymentError

errors = plain_console(stderr=True)

P = ParamSpec("P")
R = TypeVar("R")


def clear_errors(command: Callable[P, R]) -> Callable[P, R]:
    """For commands: DeploymentError and OSError are for the user."""

    @wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except DeploymentError as error:
            message = str(error)
        except BrokenPipeError:  # the reader of our output has left
            raise
        except OSError as error:  # a file, folder or disk that we cannot use
            message = str(error)
        errors.print(message, style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2)

    return wrapped

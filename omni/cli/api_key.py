"""A client's API key for the proxy, where the command line needs one."""

import os
from pathlib import Path

from omni.deployment.errors import ConfigError, Problem

_KEY_VARIABLE = "OMNI_API_KEY"


def api_key(file: Path | None) -> str | None:
    """From this file, else from $OMNI_API_KEY: on the command line every user of the machine could read it.

    Raises:
        ConfigError: the file has none.
    """
    place = str(file) if file is not None else f"${_KEY_VARIABLE}"
    try:
        key = file.read_text().strip() if file is not None else os.environ.get(_KEY_VARIABLE, "").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([Problem(place, f"cannot be read ({error})", "name a file with one API key")]) from None
    if not key and file is None:
        return None
    if not key or not key.isascii() or not key.isprintable() or " " in key:  # it is not shown: it may be a secret
        raise ConfigError([Problem(place, "has no API key", "write one key of printable characters, and nothing else")])
    return key

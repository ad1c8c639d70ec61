"""API keys: a file of names and hashes, one key a line; the keys themselves are nowhere.

    NAME SALT HASH [requests_per_minute=N] [tokens_per_minute=N] [priority=N]

SALT and HASH are hexadecimal, HASH is SHA-256 of salt and key. Blank lines and lines that begin with # do not count.
A plain fast hash is right here: a key holds 256 random bits, so there is nothing to guess that a slow one (scrypt)
would hinder, and a slow one would cost tens of milliseconds a request, for strangers' requests too. A key tells its
own name, so each request costs one hash, however many keys there are.

    python -m services.global_proxy.security.api_keys new NAME >> FILE      shows the key, once
"""

import argparse
import hashlib
import hmac
import logging
import os
import re
import secrets
import stat
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from services.global_proxy.admission.rate_limit import RateLimits
from services.global_proxy.security.errors import ApiKeysError, UnauthorizedError

logger = logging.getLogger(__name__)

_PREFIX = "omni-"
_SECRET_BYTES = 32
_SALT_BYTES = 16
_CHECK_EVERY_S = 1.0
_MAX_FILE_BYTES = 16 << 20
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}\Z")
_AUTHORIZATION = re.compile(rb"[Bb]earer +(omni-([A-Za-z0-9_.-]{1,64})-[0-9a-f]{64})\Z")
_LINE = f"NAME, {2 * _SALT_BYTES} hexadecimal digits, 64 more, and then only "
_NUMBERS = ("requests_per_minute", "tokens_per_minute", "priority")


@dataclass(frozen=True, slots=True, repr=False)
class ApiKey:
    """What is known of a key, and what its holder may do."""

    name: str
    salt: bytes
    digest: bytes
    limits: RateLimits = RateLimits()  # noqa: RUF009 (frozen)
    priority: int = 0  # added to a request's own; lower goes first

    def is_of(self, key: bytes) -> bool:
        """Whether it is this one, compared in constant time."""
        return hmac.compare_digest(hashlib.sha256(self.salt + key).digest(), self.digest)

    def line(self) -> str:
        """As it stands in the file."""
        numbers = {
            "requests_per_minute": self.limits.requests_per_minute,
            "tokens_per_minute": self.limits.tokens_per_minute,
            "priority": self.priority or None,
        }
        fields = [f"{name}={value}" for name, value in numbers.items() if value is not None]
        return " ".join([self.name, self.salt.hex(), self.digest.hex(), *fields])


_NOBODY = ApiKey("", bytes(_SALT_BYTES), bytes(32))  # no key has this hash: unknown names take as long as known ones


class ApiKeys:
    """The keys of a file, read again when it has changed: looked at when used, at most once a second.

    A file that has become unusable is logged, once, and the keys stay as they were.

    Raises:
        ApiKeysError: the file is unusable at first.
    """

    def __init__(self, path: Path, now_s: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._now_s = now_s
        self._version = _version(path)
        self._keys = load(path)
        self._look_at_s = now_s() + _CHECK_EVERY_S

    def check(self, authorization: bytes | None) -> ApiKey:
        """The key in an Authorization header.

        Raises:
            UnauthorizedError: it has none of ours.
        """
        if self._now_s() >= self._look_at_s:
            self._look()
        match = _AUTHORIZATION.match(authorization) if authorization is not None else None
        if match is None:
            raise UnauthorizedError
        key, name = match.groups()
        known = self._keys.get(name, _NOBODY)
        if not known.is_of(key):
            raise UnauthorizedError
        return known

    def reload(self) -> None:
        """Read the file now; for SIGHUP."""
        self._version = _version(self._path)
        try:
            self._keys = load(self._path)
        except ApiKeysError as error:
            logger.error("API keys stay as they were: %s", error)
        else:
            logger.info("API keys: %d read from %s", len(self._keys), self._path)

    def _look(self) -> None:
        self._look_at_s = self._now_s() + _CHECK_EVERY_S
        if _version(self._path) != self._version:
            self.reload()


def load(path: Path) -> dict[bytes, ApiKey]:
    """The keys of a file by their names.

    Raises:
        ApiKeysError: it cannot be read, others may write it, or a line is wrong; the message names it and the mend.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            text = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ApiKeysError(
            f"the file of API keys {path} cannot be read ({error.strerror}): name one that this user can read"
        ) from None
    if status.st_uid not in (0, os.geteuid()):
        raise ApiKeysError(f"the file of API keys {path} belongs to user {status.st_uid}: chown it, or name another")
    mode = stat.S_IMODE(status.st_mode)
    if mode & (stat.S_IWGRP | stat.S_IWOTH):  # it may be read: no key can be had from its hash
        raise ApiKeysError(f"the file of API keys {path} can be written by others (mode {mode:o}): chmod go-w {path}")
    if len(text) > _MAX_FILE_BYTES:
        raise ApiKeysError(f"the file of API keys {path} is larger than {_MAX_FILE_BYTES >> 20} MiB: name another")
    keys: dict[bytes, ApiKey] = {}
    for number, line in enumerate(text.decode("latin-1").split("\n"), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            key = _parse_line(line)
        except ValueError as error:
            raise ApiKeysError(f"{path}, line {number}: {error}") from None
        if keys.setdefault(key.name.encode(), key) is not key:
            raise ApiKeysError(f"{path}, line {number}: the name {key.name} is there already: give it another")
    return keys


def new_key(name: str, limits: RateLimits | None = None, priority: int = 0) -> tuple[str, ApiKey]:
    """A key, and what the file is to know of it.

    Raises:
        ValueError: the name cannot be one.
    """
    if not _NAME.match(name):
        raise ValueError(f"the name {name!r} must be 1 to 64 letters, digits, dots, dashes and underscores")
    key = f"{_PREFIX}{name}-{secrets.token_hex(_SECRET_BYTES)}"
    salt = secrets.token_bytes(_SALT_BYTES)
    digest = hashlib.sha256(salt + key.encode()).digest()
    return key, ApiKey(name, salt, digest, limits or RateLimits(), priority)


def _parse_line(line: str) -> ApiKey:
    name, *rest = line.split()
    if not _NAME.match(name):
        raise ValueError(f"the name {name!r} must be 1 to 64 letters, digits, dots, dashes and underscores")
    try:
        salt, digest = (bytes.fromhex(field) for field in rest[:2])
        numbers = {field: int(value) for field, _, value in (part.partition("=") for part in rest[2:])}
        if len(salt) != _SALT_BYTES or len(digest) != 32 or not numbers.keys() <= set(_NUMBERS):
            raise ValueError
    except ValueError:
        raise ValueError(f"must be {_LINE}{', '.join(f'{field}=N' for field in _NUMBERS)}; make it anew") from None
    priority = numbers.pop("priority", 0)
    return ApiKey(name, salt, digest, RateLimits(**numbers), priority)


def _version(path: Path) -> tuple[int, ...] | None:
    """Differs if the file does; None if it is not there."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m services.global_proxy.security.api_keys",
        description="API keys of the proxy. `new NAME >> FILE` adds one to a file, and shows it on the terminal, once.",
    )
    new = parser.add_subparsers(required=True).add_parser(
        "new", help="make a key; its line for the file goes to stdout"
    )
    new.add_argument("name")
    new.add_argument("--requests-per-minute", type=int)
    new.add_argument("--tokens-per-minute", type=int)
    new.add_argument("--priority", type=int, default=0, help="lower goes first")
    given = parser.parse_args(arguments)
    try:
        key, entry = new_key(given.name, RateLimits(given.requests_per_minute, given.tokens_per_minute), given.priority)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(entry.line())
    print(f"{key}\nThis is the only time that the key is shown.", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())

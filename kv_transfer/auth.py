"""The deployment key: whoever holds it belongs to the deployment. It signs hand-offs and control messages and is proven
when a block connection opens. It keeps strangers out; it does not hide bytes from those who can listen on the network.
"""

import hashlib
import hmac
import os
import secrets
import stat
from pathlib import Path

KEY_BYTES = 32
NONCE_BYTES = 16
MAC_BYTES = 32
_MAX_FILE_BYTES = 4096


class DeploymentKey:
    """HMAC-SHA256 under one key, for several purposes that cannot be taken for one another."""

    def __init__(self, key: bytes) -> None:
        if len(key) < KEY_BYTES:
            raise ValueError(f"a deployment key has at least {KEY_BYTES} bytes, this one {len(key)}")
        self._key = key

    def mac(self, purpose: str, *parts: bytes) -> bytes:
        """The authentication code of `parts`, 32 bytes; their borders count."""
        mac = hmac.new(self._key, digestmod=hashlib.sha256)
        for part in (purpose.encode(), *parts):
            mac.update(len(part).to_bytes(8, "little"))
            mac.update(part)
        return mac.digest()

    def is_mac(self, mac: bytes, purpose: str, *parts: bytes) -> bool:
        """Whether it is theirs, compared in constant time."""
        return hmac.compare_digest(mac, self.mac(purpose, *parts))


def load_key(path: Path) -> DeploymentKey:
    """Read a key file: 64 or more hexadecimal digits.

    Raises:
        ValueError: it cannot be read, others may read or have written it, or it holds no key; the message has the mend.
    """
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            text = file.read(_MAX_FILE_BYTES) if stat.S_ISREG(status.st_mode) else b""
    except OSError as error:
        raise ValueError(
            f"the deployment key {path} cannot be read ({error.strerror}): name one that this user can read"
        ) from None
    if status.st_uid not in (0, os.geteuid()):
        raise ValueError(f"the deployment key {path} belongs to user {status.st_uid}: chown it, or name another")
    if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        mode = stat.S_IMODE(status.st_mode)
        raise ValueError(f"the deployment key {path} is open to other users (mode {mode:o}): chmod 600 {path}")
    try:
        return DeploymentKey(bytes.fromhex(text.decode("ascii")))
    except ValueError:
        raise ValueError(
            f"{path} holds no deployment key: it must be {2 * KEY_BYTES} or more hexadecimal digits, as from "
            f"`openssl rand -hex {KEY_BYTES}`"
        ) from None


def load_or_make_key(path: Path) -> DeploymentKey:
    """The key in `path`, which is made, for this user alone, if it is not there. Raises ValueError like `load_key`."""
    try:
        if not path.exists():
            _make_key(path)
    except OSError as error:
        raise ValueError(
            f"the deployment key {path} cannot be made ({error.strerror}): make the folder writable, or name a key file"
        ) from None
    return load_key(path)


def _make_key(path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(KEY_BYTES) + "\n")
        os.link(new, path)
    except FileExistsError:  # another process was faster: its key holds
        pass
    finally:
        new.unlink(missing_ok=True)


def _open_without_waiting(path: str, flags: int) -> int:
    """A pipe that nobody writes into is opened at once, and then refused."""
    return os.open(path, flags | os.O_NONBLOCK)


def default_key_path() -> Path:
    """One key per user, beside the state of what this user runs."""
    if folder := os.environ.get("OMNI_STATE_DIR"):
        return Path(folder) / "deployment.key"
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "omni" / "deployment.key"

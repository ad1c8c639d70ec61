"""API keys: who is let in, and what is said of a broken file."""

import os
from pathlib import Path

import pytest

from services.global_proxy.admission.rate_limit import RateLimits
from services.global_proxy.security.api_keys import ApiKeys, load, main, new_key
from services.global_proxy.security.errors import ApiKeysError, UnauthorizedError


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.touch(0o600)
    return path


def add(path: Path, name: str) -> bytes:
    """Add a key to the file; returns the header that has it."""
    key, entry = new_key(name)
    with path.open("a") as file:
        file.write(entry.line() + "\n")
    return b"Bearer " + key.encode()


def test_only_the_keys_of_the_file_are_let_in(path: Path) -> None:
    path.write_text("# keys\n\n")
    alice, bob = add(path, "alice"), add(path, "b.o-b")
    keys = ApiKeys(path)
    assert keys.check(alice).name == "alice"
    assert keys.check(b"bearer  " + bob[7:]).name == "b.o-b"
    other_secret = b"0" if not alice.endswith(b"0") else b"1"
    for header in (
        None,
        b"",
        b"Bearer ",
        alice[7:],
        alice + b" ",
        alice + b"\n",
        alice[:-1],
        alice[:-1] + other_secret,
        b"Basic " + alice[7:],
        alice.replace(b"alice", b"b.o-b"),
        alice.replace(b"alice", b"carol"),
        alice.replace(b"alice", b"\xff"),
        b"Bearer omni--" + b"0" * 64,
        new_key("alice")[0].encode(),
    ):
        with pytest.raises(UnauthorizedError, match="Give a valid API key"):
            keys.check(header)


def test_no_key_is_in_the_file(path: Path) -> None:
    secret = add(path, "alice").rpartition(b"-")[2]
    assert secret not in path.read_bytes()


def test_command_writes_the_line_and_shows_the_key_once(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", "alice", "--requests-per-minute", "60", "--tokens-per-minute", "9", "--priority", "-1"]) == 0
    out, err = capsys.readouterr()
    path.write_text(out)
    key = ApiKeys(path).check(b"Bearer " + err.split("\n")[0].encode())
    assert (key.name, key.limits, key.priority) == ("alice", RateLimits(60, 9), -1)
    assert key.digest.hex() not in repr(key)
    assert main(["new", "a b"]) == 2
    assert main(["new", "alice", "--requests-per-minute", "0"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "requests_per_minute" in err


def test_file_is_read_again_when_it_changes(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    alice = add(path, "alice")
    keys = ApiKeys(path, clock)
    bob = add(path, "bob")
    with pytest.raises(UnauthorizedError):
        keys.check(bob)  # looked at less than a second ago
    clock.now_s = 1.0
    keys.check(bob)
    carol = add(path, "carol")
    keys.reload()
    keys.check(carol)

    path.write_text("nonsense\n")
    for clock.now_s in (2.0, 3.0, 4.0):
        keys.check(alice)
    assert len([r for r in caplog.records if r.levelname == "ERROR"]) == 1, "logged once"
    assert "line 1" in caplog.text
    path.unlink()
    clock.now_s = 5.0
    keys.check(alice)
    path.touch(0o600)
    clock.now_s = 6.0
    with pytest.raises(UnauthorizedError):
        keys.check(alice)


GOOD = new_key("a")[1].line()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "\n" + GOOD, "line 2: the name a is there already"),
        ("\nb\xe9 " + GOOD, "line 2: the name"),
        ("a", "line 1: must be NAME"),
        (GOOD[:-1], "line 1: must be NAME"),
        (GOOD.replace("a ", "a ff", 1), "line 1: must be NAME"),
        (GOOD + " priority=high", "line 1: must be NAME"),
        (GOOD + " colour=1", "line 1: must be NAME"),
        (GOOD + " requests_per_minute=0", "line 1: requests_per_minute: must be 1 or more"),
    ],
)
def test_broken_file_names_line_and_mend(path: Path, text: str, message: str) -> None:
    path.write_text(text, "latin-1")
    with pytest.raises(ApiKeysError, match=message):
        load(path)


def test_file_that_others_can_write_is_refused(path: Path, tmp_path: Path) -> None:
    path.chmod(0o644)
    assert load(path) == {}
    for mode in (0o620, 0o602):
        path.chmod(mode)
        with pytest.raises(ApiKeysError, match="chmod go-w"):
            load(path)
    with pytest.raises(ApiKeysError, match="cannot be read"):
        load(tmp_path)
    os.truncate(path, (16 << 20) + 1)
    path.chmod(0o600)
    with pytest.raises(ApiKeysError, match="larger"):
        load(path)

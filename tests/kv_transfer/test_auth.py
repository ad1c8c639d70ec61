import errno
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer import auth
from kv_transfer.auth import KEY_BYTES, MAC_BYTES, DeploymentKey, default_key_path, load_key, load_or_make_key

from .hand_off_strategies import fuzz

KEY = DeploymentKey(b"k" * KEY_BYTES)


def key_file(folder: Path, text: str | bytes = "ab" * KEY_BYTES + "\n", mode: int = 0o600) -> Path:
    path = folder / "deployment.key"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    path.chmod(mode)
    return path


def test_a_mac_is_of_one_key_and_purpose() -> None:
    mac = KEY.mac("hand-off", b"a", b"b")
    assert len(mac) == MAC_BYTES
    assert KEY.is_mac(mac, "hand-off", b"a", b"b")
    assert not KEY.is_mac(mac, "control", b"a", b"b")
    assert not KEY.is_mac(mac[:-1], "hand-off", b"a", b"b")
    assert not DeploymentKey(b"l" * KEY_BYTES).is_mac(mac, "hand-off", b"a", b"b")


@fuzz
@given(st.tuples(st.text(), st.lists(st.binary())), st.tuples(st.text(), st.lists(st.binary())))
def test_borders_count(one: tuple[str, list[bytes]], other: tuple[str, list[bytes]]) -> None:
    assert (KEY.mac(one[0], *one[1]) == KEY.mac(other[0], *other[1])) == (one == other)


def test_a_purpose_ends_where_it_ends() -> None:
    size = (1).to_bytes(8, "little")
    assert KEY.mac("a" + size.decode() + "b", b"c") != KEY.mac("a", b"b", b"c")


def test_a_short_key_is_none() -> None:
    with pytest.raises(ValueError, match="at least 32 bytes, this one 31"):
        DeploymentKey(b"k" * 31)


def test_the_key_is_not_shown() -> None:
    assert "kkk" not in f"{KEY!r} {KEY}"


@pytest.mark.parametrize("text", ["ab" * 32, "ab" * 32 + "\n", " AB" * 32 + "\r\n", "ab" * 64])
def test_key_files(tmp_path: Path, text: str) -> None:
    loaded = load_key(key_file(tmp_path, text))
    assert loaded.mac("") == DeploymentKey(bytes.fromhex(text)).mac("")


@pytest.mark.parametrize("text", ["", "ab" * 31, "a" * 65, "zz" * 32, b"\xff" * 64, "x" * (1 << 20), "ä" * 64])
def test_what_is_no_key(tmp_path: Path, text: str | bytes) -> None:
    path = key_file(tmp_path, text)
    with pytest.raises(ValueError, match=rf"^{path} holds no deployment key: .* 64 or more .* `openssl rand -hex 32"):
        load_key(path)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o601, 0o666])
def test_a_key_that_others_can_read_or_write(tmp_path: Path, mode: int) -> None:
    path = key_file(tmp_path, mode=mode)
    with pytest.raises(ValueError, match=rf"{path} is open to other users \(mode {mode:o}\): chmod 600 {path}$"):
        load_key(path)


def test_a_read_only_key(tmp_path: Path) -> None:
    load_key(key_file(tmp_path, mode=0o400))


def test_somebody_else_s_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = key_file(tmp_path)
    if os.geteuid() == 0:
        os.chown(path, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(ValueError, match=rf"{path} belongs to user \d+: chown it, or name another"):
        load_key(path)


def test_a_key_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{tmp_path / 'x'} cannot be read \(No such file or directory\): name one"):
        load_key(tmp_path / "x")


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "x")
    with pytest.raises(ValueError, match=r"cannot be read|open to other users|holds no deployment key"):
        load_key(tmp_path / "x")


def test_a_key_is_made_once(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "deployment.key"
    made = load_or_make_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert load_or_make_key(path).mac("x") == made.mac("x") == load_key(path).mac("x")
    assert os.listdir(path.parent) == ["deployment.key"]
    assert load_or_make_key(tmp_path / "other").mac("x") != made.mac("x")


def test_a_lax_umask_opens_nothing(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        load_or_make_key(tmp_path / "a" / "deployment.key")
    finally:
        os.umask(before)


def test_many_at_once_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deployment.key"
    barrier = threading.Barrier(8)
    make = auth._make_key

    def make_together(path: Path) -> None:
        barrier.wait(10)
        make(path)

    monkeypatch.setattr(auth, "_make_key", make_together)
    macs = []
    threads = [threading.Thread(target=lambda: macs.append(load_or_make_key(path).mac("x"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(macs) == 8
    assert len(set(macs)) == 1
    assert os.listdir(tmp_path) == ["deployment.key"]


@pytest.mark.parametrize("function", ["open", "link"])
def test_a_folder_that_takes_no_key(tmp_path: Path, function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    path = tmp_path / "deployment.key"
    with monkeypatch.context() as patched:
        patched.setattr(os, function, fail)
        with pytest.raises(ValueError, match=rf"{path} cannot be made \(Read-only file system\): make the folder writ"):
            load_or_make_key(path)
    assert os.listdir(tmp_path) == []


def test_where_the_key_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("OMNI_STATE_DIR", raising=False)
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    assert default_key_path() == tmp_path / ".local/state/omni/deployment.key"
    monkeypatch.setenv("XDG_STATE_HOME", "/x")
    assert default_key_path() == Path("/x/omni/deployment.key")
    monkeypatch.setenv("OMNI_STATE_DIR", "/y")
    assert default_key_path() == Path("/y/deployment.key")

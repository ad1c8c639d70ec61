"""The log on real files: rotation, a disk that gets full, a folder that goes away."""

import subprocess
import sys
from pathlib import Path

import pytest

from omni.rotating_log import RotatingLog

# A file that may grow to 10 bytes stands for a disk that gets full in the middle of a write.
FILLS_THE_DISK = """
import resource, sys
from pathlib import Path
from omni.rotating_log import RotatingLog
resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))
log = RotatingLog(Path(sys.argv[1]))
for data in (b"123456", b"789abc", b"def"):
    log.write(data)
full = log.num_dropped_bytes
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.write(b"room again")
print(full, log.num_dropped_bytes)
"""


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(folder.iterdir())}


def test_rotation_keeps_so_many(tmp_path: Path) -> None:
    log = RotatingLog(tmp_path / "new" / "a.log", max_bytes=8, num_old=2)
    for letter in "abcdefgh":
        log.write(letter.encode() * 3 + b"\n")
    log.close()
    assert contents(tmp_path / "new") == {"a.log": "ggg\nhhh\n", "a.log.1": "eee\nfff\n", "a.log.2": "ccc\nddd\n"}
    assert log.num_dropped_bytes == 0


def test_goes_on_where_an_earlier_run_stopped(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text("1234")
    log = RotatingLog(tmp_path / "a.log", max_bytes=8)
    log.write(b"5678")
    log.write(b"9")
    log.close()
    assert contents(tmp_path) == {"a.log": "9", "a.log.1": "12345678"}


def test_a_full_disk_drops_and_counts() -> None:
    log = RotatingLog(Path("/dev/full"))
    log.write(b"12345")
    log.write(b"678")
    log.close()
    assert log.num_dropped_bytes == 8


def test_a_disk_that_gets_full_takes_a_part(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FILLS_THE_DISK, str(tmp_path / "a.log")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["5", "5"]
    assert contents(tmp_path) == {"a.log": "123456789aroom again"}


@pytest.mark.parametrize("num_old", [1, 3])
def test_a_folder_that_was_removed_comes_back_with_the_next_file(tmp_path: Path, num_old: int) -> None:
    folder = tmp_path / "logs"
    log = RotatingLog(folder / "a.log", max_bytes=8, num_old=num_old)
    log.write(b"1234")
    (folder / "a.log").unlink()
    folder.rmdir()
    log.write(b"567890")
    log.close()
    assert contents(folder) == {"a.log": "567890"}


def test_a_file_that_cannot_be_opened_anew(tmp_path: Path) -> None:
    """What cannot be written is dropped; the log goes on when it can, and the older files stay."""
    folder = tmp_path / "logs"
    log = RotatingLog(folder / "a.log", max_bytes=4)
    log.write(b"old")
    folder.rename(tmp_path / "elsewhere")
    folder.touch()
    for data in (b"12", b"34"):
        log.write(data)
    assert log.num_dropped_bytes == 4
    folder.unlink()
    (tmp_path / "elsewhere").rename(folder)
    log.write(b"new")
    log.write(b"er")
    log.close()
    assert log.num_dropped_bytes == 4
    assert contents(folder) == {"a.log": "er", "a.log.1": "new", "a.log.2": "old"}


def test_a_rotation_that_was_cut_short_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Renamed, and then no descriptor for the new file: the old files must not move on with every further write."""
    log = RotatingLog(tmp_path / "a.log", max_bytes=5)
    log.write(b"first")

    def no_descriptor(*args: object, **kwargs: object) -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", no_descriptor)
        for _ in range(5):
            log.write(b"lost")
    assert log.num_dropped_bytes == 20
    log.write(b"next")
    log.close()
    assert contents(tmp_path) == {"a.log": "next", "a.log.1": "first"}

"""Parents, births and shared memory of real processes."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from omni import process
from omni.process import die_with_parent, obey_parent, parent_environment, remove_traces, start_ticks

TIMEOUT_S = 30
CHILD_THAT_OBEYS = """
import os, time
from omni.process import obey_parent
obey_parent()
print(os.getpid(), "OMNI_PARENT_PID" in os.environ, flush=True)
time.sleep(1000)
"""
STARTS_A_CHILD = """
import os, subprocess, sys
from omni.process import parent_environment
environment = {**os.environ, **parent_environment()}
subprocess.Popen([sys.executable, "-c", sys.argv[1]], env=environment).wait()
"""
LEAVES_SHARED_MEMORY = """
import os
from multiprocessing import resource_tracker, shared_memory
from omni.process import mark_traces
resource_tracker.register = lambda *args: None
mark_traces()
first = shared_memory.SharedMemory(create=True, size=8)
if os.fork():
    os.wait()
    print(os.getpid(), flush=True)
else:
    shared_memory.SharedMemory(create=True, size=8)
os._exit(0)
"""


def run_python(script: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)


def test_a_child_ends_with_its_killed_parent() -> None:
    command = [sys.executable, "-c", STARTS_A_CHILD, CHILD_THAT_OBEYS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid, passes_it_on = parent.stdout.readline().split()
        child = psutil.Process(int(pid))
        parent.kill()
    child.wait(TIMEOUT_S)
    assert passes_it_on == "False"


def test_a_parent_that_died_before_is_noticed() -> None:
    nobody = subprocess.Popen(["/bin/true"])
    nobody.wait()
    script = f"from omni.process import die_with_parent; die_with_parent({nobody.pid}); print('alive')"
    done = run_python(script)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "")


def test_a_living_parent_is_no_reason_to_die() -> None:
    script = f"from omni.process import die_with_parent; die_with_parent({os.getpid()}); print('alive')"
    assert run_python(script).stdout == "alive\n"


def test_a_program_that_nobody_asked_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMNI_PARENT_PID", raising=False)
    obey_parent()
    assert parent_environment() == {"OMNI_PARENT_PID": str(os.getpid())}


def test_a_kernel_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_PR_SET_PDEATHSIG", -1)
    with pytest.raises(OSError, match="PR_SET_PDEATHSIG"):
        die_with_parent(os.getppid())


def test_start_ticks() -> None:
    own = start_ticks(os.getpid())
    assert own is not None
    since_boot_s = own / os.sysconf("SC_CLK_TCK")
    assert abs(psutil.boot_time() + since_boot_s - psutil.Process().create_time()) < 1
    parent = start_ticks(os.getppid())
    assert parent is not None
    assert parent <= own


def test_start_ticks_of_a_zombie_and_of_nobody() -> None:
    child = subprocess.Popen(["/bin/true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is not collected
    assert start_ticks(child.pid) is None
    child.wait()
    assert start_ticks(child.pid) is None


def test_start_ticks_of_a_program_with_an_awkward_name(tmp_path: Path) -> None:
    program = tmp_path / ") R 1 2 ("
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([str(program), "1000"]) as child:
        try:
            ticks, own = start_ticks(child.pid), start_ticks(os.getpid())
            assert ticks is not None
            assert own is not None
            assert ticks >= own
        finally:
            child.kill()


def test_shared_memory_of_a_dead_process_is_found_and_removed() -> None:
    done = run_python(LEAVES_SHARED_MEMORY)
    assert done.returncode == 0, done.stderr
    pid = int(done.stdout)
    own = list(Path("/dev/shm").glob(f"omni_*_{pid}_*"))  # noqa: S108
    assert len(own) == 2, "one by the process, one by its fork"
    remove_traces(pid)
    assert not any(path.exists() for path in own)


def test_the_temporary_folder_goes_with_what_is_named_after_its_files() -> None:
    script = (
        "import os, pathlib, tempfile; from omni.process import mark_traces; mark_traces()\n"
        "folder = tempfile.gettempdir(); pathlib.Path(folder, 'vllm_dist_' + os.urandom(8).hex()).touch()\n"
        "print(os.getpid(), folder, *os.listdir(folder))"
    )
    pid, folder, store = run_python(script).stdout.split()
    shared, other = (Path("/dev/shm", name) for name in (f"{store}-tp:0-cpushm_0", f"{store}0"))  # noqa: S108
    try:
        for path in (shared, other):
            path.touch()
        remove_traces(int(pid))
        assert not Path(folder).exists()
        assert not shared.exists()
        assert other.exists()
    finally:
        other.unlink()


PLANTS_A_FOLDER = """
import os, tempfile
from pathlib import Path
from omni import process
folder = Path(tempfile.gettempdir(), process._prefix(os.getpid()))
{plant}
try:
    process.mark_traces()
except FileExistsError:
    print("refused")
else:
    print(os.listdir(folder), oct(folder.stat().st_mode & 0o777))
    folder.rmdir()
"""


def test_a_folder_of_an_earlier_process_with_this_pid_is_emptied() -> None:
    script = PLANTS_A_FOLDER.format(plant="folder.mkdir(); (folder / 'vllm_dist_old').touch()")
    assert run_python(script).stdout == "[] 0o700\n"


def test_a_folder_that_another_user_planted_is_not_used(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "file").touch()
    done = run_python(PLANTS_A_FOLDER.format(plant=f"folder.symlink_to({str(theirs)!r})") + "folder.unlink()")
    assert done.stdout == "refused\n"
    assert (theirs / "file").exists()


@pytest.fixture
def shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder, temporary = tmp_path / "shm", tmp_path / "tmp"
    folder.mkdir()
    temporary.mkdir()
    monkeypatch.setattr(process, "_SHARED_MEMORY", folder)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    return folder


@pytest.fixture
def dead_pid() -> int:
    with subprocess.Popen(["/bin/true"]) as child:
        pass
    return child.pid


def test_only_the_dead_lose_their_shared_memory(shared_memory: Path, dead_pid: int) -> None:
    namespace = os.stat("/proc/self/ns/pid").st_ino
    dead = [f"omni_{namespace}_{dead_pid}_1", f"omni_{namespace}_{dead_pid}_2"]
    kept = [
        f"omni_{namespace}_{os.getpid()}_1",  # alive
        f"omni_{namespace + 1}_{dead_pid}_1",  # of another container on the same /dev/shm, maybe alive there
        f"omni_{namespace}_x{dead_pid}_1",
        "psm_12345678",
        "omni_",
    ]
    for name in (*dead, *kept):
        (shared_memory / name).touch()
    remove_traces()
    assert sorted(path.name for path in shared_memory.iterdir()) == sorted(kept)


def test_one_pid_is_not_another_that_begins_alike(shared_memory: Path) -> None:
    namespace = os.stat("/proc/self/ns/pid").st_ino
    for pid in (12, 123):
        (shared_memory / f"omni_{namespace}_{pid}_a").touch()
    remove_traces(12)
    assert [path.name for path in shared_memory.iterdir()] == [f"omni_{namespace}_123_a"]


def test_what_another_user_left_is_no_obstacle(
    shared_memory: Path, dead_pid: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(1, "Operation not permitted", str(path))

    (shared_memory / f"omni_{os.stat('/proc/self/ns/pid').st_ino}_{dead_pid}_1").touch()
    monkeypatch.setattr(Path, "unlink", refuse)
    remove_traces()

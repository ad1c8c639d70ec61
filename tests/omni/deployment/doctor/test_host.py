"""The host: limits, memory, disks."""

import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from omni.deployment.doctor import host
from omni.deployment.memory import GIB
from tests.omni.deployment.samples import machine

TIMEOUT_S = 60


@pytest.mark.parametrize(
    ("flags", "is_used", "level"),
    [
        (("avx2",), True, "ok"),
        (("asimd",), True, "ok"),
        (("sse4_2",), True, "problem"),
        (("sse4_2",), False, "ok"),
    ],
)
def test_cpu(flags: tuple[str, ...], is_used: bool, level: str) -> None:
    assert host.cpu(machine(flags=flags), engines_on_cpu=is_used).level == level


def test_numa_library() -> None:
    assert host.numa_library("libc.so.6").level == "ok"
    missing = host.numa_library("libno-such.so.1")
    assert (missing.level, missing.mend) == ("problem", "apt-get install libnuma1")


@pytest.mark.parametrize(("gib", "level"), [(1.0, "problem"), (3.0, "warning"), (9.0, "ok")])
def test_memory(gib: float, level: str) -> None:
    finding = host.memory(replace(machine(), available_bytes=int(gib * GIB)))
    assert (finding.level, finding.found) == (level, f"{gib:.1f} GiB of 24.0 GiB available")


@pytest.mark.parametrize(
    ("hard", "level"), [(500, "problem"), (4096, "warning"), (65536, "ok"), (resource.RLIM_INFINITY, "ok")]
)
def test_open_files(hard: int, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, hard))
    assert host.open_files().level == level


def test_open_files_of_a_real_process_with_few() -> None:
    code = "from omni.deployment.doctor import host; print(host.open_files())"
    command = ["bash", "-c", f"ulimit -n 600 && exec '{sys.executable}' -c '{code}'"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT_S)
    assert "found='600 of at most 600', level='problem'" in done.stdout


class TestSharedMemory:
    def test_here(self) -> None:
        assert host.shared_memory().found.endswith("GiB free") or host.shared_memory().level == "warning"

    def test_docker_s_default(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(host, "_sizes", lambda folder: (64 << 20, 60 << 20))
        finding = host.shared_memory()
        assert finding.level == "warning"
        assert finding.found.startswith("0.06 GiB of 0.06 GiB free")
        assert "--shm-size" in finding.mend

    def test_none(self, tmp_path: Path) -> None:
        assert host.shared_memory(tmp_path / "shm").level == "problem"


class TestReadingMemory:
    def test_a_kernel_that_allows_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(host, "_probe_process_vm", lambda: None)
        assert host.reading_memory(tmp_path / "no yama").level == "ok"
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        levels = []
        for scope in range(4):
            (tmp_path / "yama").write_text(f"{scope}\n")
            levels.append(host.reading_memory(tmp_path / "yama").level)
        assert levels == ["ok", "ok", "warning", "warning"]

    def test_root_may_at_scope_2(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(host, "_probe_process_vm", lambda: None)
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        (tmp_path / "yama").write_text("2\n")
        assert host.reading_memory(tmp_path / "yama").level == "ok"

    def test_the_probe_itself(self) -> None:
        assert host._probe_process_vm() in (None, "Operation not permitted", "Function not implemented")

    def test_a_container_that_forbids_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(host, "_probe_process_vm", lambda: "Operation not permitted")
        finding = host.reading_memory()
        assert (finding.level, finding.found) == ("warning", "refused (Operation not permitted)")


class TestDisk:
    def test_a_folder_that_will_be_made(self, tmp_path: Path) -> None:
        finding = host.disk(tmp_path / "logs" / "demo")
        assert finding.subject == f"log_path {tmp_path}/logs/demo"
        assert "GiB free" in finding.found
        assert not (tmp_path / "logs").exists()

    @pytest.mark.parametrize(("mib", "level"), [(50, "problem"), (500, "warning"), (5000, "ok")])
    def test_room(self, mib: int, level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = type("Usage", (), {"free": mib << 20})
        monkeypatch.setattr(host.shutil, "disk_usage", lambda path: usage)
        assert host.disk(tmp_path).level == level

    def test_a_file_in_the_way(self, tmp_path: Path) -> None:
        (tmp_path / "logs").touch()
        finding = host.disk(tmp_path / "logs" / "demo")
        assert (finding.level, finding.found) == ("problem", f"{tmp_path}/logs is not a folder")

    def test_a_folder_of_another_user(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        assert host.disk(tmp_path).mend == f"chown {os.geteuid()} {tmp_path}"

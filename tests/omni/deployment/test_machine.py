"""What a machine offers, and a container's limits."""

from pathlib import Path

from omni.deployment.machine import _cgroup_available_bytes, _cpu_flags, this_machine

from .samples import machine


def test_this_machine() -> None:
    here = this_machine()
    assert here.cores
    assert 0 < here.available_bytes <= here.total_bytes
    assert here.cpu_dtype() in ("bfloat16", "float32")
    assert "127.0.0.1" in here.addresses


def test_the_dtype_follows_the_processor() -> None:
    assert machine(flags=("avx512_bf16",)).cpu_dtype() == "bfloat16"
    assert machine(flags=("amx_bf16",)).cpu_dtype() == "bfloat16"
    assert machine(flags=("avx512f", "avx2")).cpu_dtype() == "float32"


def test_hosts() -> None:
    assert machine().is_host("127.0.0.2")
    assert machine().is_host("198.51.100.7")
    assert not machine().is_host("198.51.100.8")


def test_cpu_flags(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor : 0\nflags\t\t: fpu amx_bf16\n")
    assert _cpu_flags(file) == {"fpu", "amx_bf16"}
    file.write_text("Features : fp bf16\n")
    assert _cpu_flags(file) == {"fp", "bf16"}
    file.write_text("processor : 0\n")
    assert _cpu_flags(file) == frozenset()


def test_a_container_s_limit(tmp_path: Path) -> None:
    assert _cgroup_available_bytes(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 200\n")
    assert _cgroup_available_bytes(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    assert _cgroup_available_bytes(tmp_path) == 500


def test_a_container_s_limit_in_the_older_form(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory/memory.limit_in_bytes").write_text("1000\n")
    (tmp_path / "memory/memory.usage_in_bytes").write_text("1200\n")
    (tmp_path / "memory/memory.stat").write_text("total_inactive_file 100\n")
    assert _cgroup_available_bytes(tmp_path) == 0

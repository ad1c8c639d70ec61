"""The proxy knows HTTP and what engines are told; never vLLM or torch."""

import ast
import subprocess
import sys
from pathlib import Path

import services.global_proxy

ALLOWED = {
    "kv_transfer.auth",
    "kv_transfer.control",
    "kv_transfer.errors",
    "kv_transfer.event_keys",
    "kv_transfer.hand_off",
    "kv_transfer.protocol",
    "kv_transfer.ticket",
    "omni.process",
}


def _imported(source: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(source.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}


def test_what_of_ours_is_imported() -> None:
    (folder,) = services.global_proxy.__path__
    imported = set().union(*(_imported(source) for source in Path(folder).rglob("*.py")))
    ours = {name for name in imported if name.partition(".")[0] in ("omni", "services", "kv_transfer")}
    assert {name for name in ours if not name.startswith("services.global_proxy")} <= ALLOWED


def test_neither_vllm_nor_torch_is_loaded() -> None:
    program = "import sys, services.global_proxy.__main__; sys.exit(bool({'vllm', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0

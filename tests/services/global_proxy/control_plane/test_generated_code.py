"""The generated code is that of the .proto file."""

import subprocess
import sys
from pathlib import Path

PROTO = Path("services/global_proxy/control_plane/control_plane.proto")
REPOSITORY = Path(__file__).parents[4]


def test_it_is_up_to_date(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "grpc_tools.protoc",
        "-I",
        ".",
        f"--python_out={tmp_path}",
        f"--pyi_out={tmp_path}",
    ]
    subprocess.run([*command, str(PROTO)], cwd=REPOSITORY, check=True, timeout=60)
    for ending in (".py", ".pyi"):
        name = f"{PROTO.stem}_pb2{ending}"
        assert (tmp_path / PROTO.with_name(name)).read_text() == (REPOSITORY / PROTO.with_name(name)).read_text(), (
            "`make proto` makes it anew"
        )

"""The tests of this folder once more, on an NPU.

Set OMNI_ASCEND_PYTHON to the interpreter of an environment with torch_npu, and, on a machine without an NPU,
OMNI_ASCEND_STANDIN to the folder of the stand-in for CANN, FAKE_CANN and LD_LIBRARY_PATH to its libraries.
"""

import os
import subprocess
from pathlib import Path

import pytest

from tests.kv_transfer.transports.prefill_rank import DEVICE


@pytest.mark.skipif(
    DEVICE != "cpu" or "OMNI_ASCEND_PYTHON" not in os.environ,
    reason="OMNI_ASCEND_PYTHON does not name the interpreter of an environment with torch_npu",
)
def test_all_of_this_on_an_npu(tmp_path: Path) -> None:
    """Checked against torch_npu's interface where CANN is a stand-in; then it has not run on Ascend hardware."""
    folder = str(Path(__file__).parent)
    environment = {"OMNI_TEST_DEVICE": "npu", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "TASK_QUEUE_ENABLE": "0"}
    subprocess.run(
        [os.environ["OMNI_ASCEND_PYTHON"], "-m", "pytest", "-q", "-c", os.devnull, "-p", "no:cacheprovider", folder],
        cwd=Path(__file__).parents[4],
        env={**os.environ, **environment, "TMPDIR": str(tmp_path)},  # the stand-in leaves its pipes there
        check=True,
        timeout=300,
    )

"""What the api server does before it imports vLLM."""

import json
import os
import warnings
from pathlib import Path

import pytest

from omni.adaptors.vllm import api_server, hand_off_guard, queue_waits
from omni.adaptors.vllm.api_server import _hide_data_parallel_variables


@pytest.mark.parametrize(
    ("arguments", "is_visible"), [(["--port", "1"], False), (["--port", "1", "--data-parallel-size", "2"], True)]
)
def test_vllm_reads_the_data_parallel_variables_of_an_moe_model_alone(
    arguments: list[str], is_visible: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_DP_SIZE", "2")
    monkeypatch.setenv("VLLM_DP_RANK", "1")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    _hide_data_parallel_variables(arguments)
    assert ("VLLM_DP_SIZE" in os.environ) is is_visible
    assert ("VLLM_DP_RANK" in os.environ) is is_visible
    assert os.environ["VLLM_LOGGING_LEVEL"] == "INFO"


def test_on_a_cpu_no_server_without_its_guard_and_its_queue_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM reads the arguments; then the key is missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's and vLLM's own, at import
        import vllm.entrypoints.launchers.api_server.entry as entry

    installed = []
    install = hand_off_guard.install
    monkeypatch.setattr(entry, "run_server", lambda args: pytest.fail("served"))
    monkeypatch.setattr(api_server.fork_start, "use_fork", lambda: None)
    monkeypatch.setattr(queue_waits, "sleep_at_once", lambda: installed.append(queue_waits))
    monkeypatch.setattr(hand_off_guard, "install", lambda args: installed.append(args) or install(args))
    transfer = {
        "kv_connector": "OmniConnector",
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {"key_file": str(tmp_path / "none")},
    }
    with pytest.raises(SystemExit, match=r"the deployment key .*none cannot be read"):
        api_server.serve(["--model", "m", "--kv-transfer-config", json.dumps(transfer)])
    assert len(installed) == 2

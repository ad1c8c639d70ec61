"""What the api server does before it imports vLLM."""

import os

import pytest

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

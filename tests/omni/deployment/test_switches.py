"""Multi-token prediction, graph mode and expert placement as engine arguments."""

import json
from pathlib import Path
from typing import Any

import pytest

from omni.deployment.errors import ConfigError
from omni.deployment.plan_types import ProcessPlan

from .samples import content, lines, model, planned, put


def engines(folder: Path, platform: str, *, is_moe: bool = False, **switches: Any) -> dict[str, ProcessPlan]:
    data = put(content(), "deployment/mixed/group1", {"base_api_port": 9900})
    data["services"] |= switches
    of = model(is_moe=is_moe, num_mtp_layers=1)
    plan = planned(folder, put(data, "platform", platform), of=of)
    return {process.role: process for process in plan.engines}


def given(process: ProcessPlan, flag: str) -> Any:
    command = process.command
    return json.loads(command[command.index(flag) + 1]) if flag in command else None


def test_multi_token_prediction_is_for_all(tmp_path: Path) -> None:
    for process in engines(tmp_path, "npu", multi_token_prediction=1).values():
        assert given(process, "--speculative-config") == {"method": "mtp", "num_speculative_tokens": 1}
    for process in engines(tmp_path, "npu").values():
        assert "--speculative-config" not in process.command


@pytest.mark.parametrize("platform", ["cpu", "cuda", "npu"])
def test_graphs_are_for_decode(tmp_path: Path, platform: str) -> None:
    of = engines(tmp_path, platform, graph_mode=True)
    assert "--enforce-eager" in of["prefill"].command
    for role in ("decode", "mixed"):
        assert "--no-enforce-eager" in of[role].command
        assert "--enforce-eager" not in of[role].command
    level = {"prefill": 0, "decode": 1, "mixed": 1}
    for role, process in of.items():
        additional = {"graph_model_compile_config": {"level": level[role]}}
        assert given(process, "--additional-config") == (additional if platform == "npu" else None)
    for process in engines(tmp_path, platform, graph_mode=False).values():
        assert "--enforce-eager" in process.command


def test_expert_placement_is_for_decode(tmp_path: Path) -> None:
    npu = engines(
        tmp_path, "npu", is_moe=True, expert_placement={"num_redundant_experts": 16, "config_path": "/pattern"}
    )
    assert given(npu["prefill"], "--additional-config") is None
    assert given(npu["decode"], "--additional-config") == {
        "use_omni_placement": True,
        "num_redundant_experts": 16,
        "omni_placement_config_path": "/pattern",
    }
    two = {"tensor_parallel_size": 2}
    cuda = engines(tmp_path, "cuda", is_moe=True, expert_placement=True, decode=two, mixed={"data_parallel_size": 2})
    for role in ("decode", "mixed"):  # the latter's ranks run in step
        assert cuda[role].command.count("--enable-expert-parallel") == 1, "vLLM wants it with --enable-eplb"
    assert "--enable-expert-parallel" not in cuda["prefill"].command
    assert "--enable-eplb" in cuda["decode"].command
    assert "--enable-eplb" not in cuda["prefill"].command
    assert given(cuda["decode"], "--eplb-config") == {"num_redundant_experts": 0}


def test_no_expert_placement(tmp_path: Path) -> None:
    assert "--enable-eplb" not in engines(tmp_path, "cuda", expert_placement=False)["decode"].command


@pytest.mark.parametrize(
    ("platform", "is_moe", "setting", "words"),
    [
        ("npu", False, True, "services.expert_placement: the model has no experts to place; delete it"),
        ("cpu", True, True, "services.expert_placement: vLLM cannot place experts on a CPU"),
        (
            "cuda",
            True,
            True,
            "services.decode.tensor_parallel_size: 1, and data_parallel_size 1: there is nothing to place experts on; "
            "write 2 or more in one of them, or delete services.expert_placement",
        ),
        ("cuda", True, True, "services.mixed.tensor_parallel_size: 1, and data_parallel_size 1: there is nothing"),
        ("cuda", True, {"config_path": "/p"}, "services.expert_placement.config_path: '/p': vLLM's own placement"),
    ],
)
def test_where_experts_cannot_be_placed(tmp_path: Path, platform: str, is_moe: bool, setting: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        engines(tmp_path, platform, is_moe=is_moe, expert_placement=setting)
    assert any(line.startswith(words) for line in lines(caught.value))


def test_a_switch_s_flag_is_the_plan_s(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'--speculative-config' is set by the plan"):
        engines(tmp_path, "npu", multi_token_prediction=1, decode={"extra_args": ["--speculative-config", "{}"]})


def test_stages_on_a_cpu_are_eager_in_their_own_way(tmp_path: Path) -> None:
    stages = {"pipeline_parallel_size": 2}
    of = engines(tmp_path, "cpu", graph_mode=True, prefill=stages, decode=stages)
    assert given(of["prefill"], "--compilation-config") == {"mode": 2, "backend": "eager"}
    assert "--enforce-eager" not in of["prefill"].command
    assert "--no-enforce-eager" in of["decode"].command
    assert "--enforce-eager" in engines(tmp_path, "npu", graph_mode=True, prefill=stages)["prefill"].command


def test_a_model_without_layers_for_multi_token_prediction(tmp_path: Path) -> None:
    data = put(content(), "services/multi_token_prediction", 1)
    with pytest.raises(ConfigError) as caught:
        planned(tmp_path, data)
    assert lines(caught.value) == ["services.multi_token_prediction: the model has no layers for it; delete it"]
    planned(tmp_path, data, of=model(is_known=False))

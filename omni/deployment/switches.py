"""The switches of `services` as engine arguments: multi-token prediction, graph mode, expert placement.

Checked against vLLM 0.32's arguments. What `--additional-config` holds is for our Ascend platform; it was not run on
Ascend hardware.
"""

import json
from collections.abc import Iterator, Sequence

from omni.deployment.errors import Problem
from omni.deployment.groups import GroupSettings
from omni.deployment.model import Platform, Services
from omni.deployment.model_info import ModelInfo

EAGER_STAGES = '{"mode": 2, "backend": "eager"}'


def switch_arguments(
    services: Services, group: GroupSettings, platform: Platform, *, is_in_step: bool
) -> Iterator[str]:
    role = group.role
    if services.multi_token_prediction is not None:
        # P as well: its MTP layers compute the KV that D's go on from.
        config = {"method": "mtp", "num_speculative_tokens": services.multi_token_prediction}
        yield from ("--speculative-config", json.dumps(config))
    if services.graph_mode is not None:
        # A prompt is computed at a different size each time: P gains nothing from graphs.
        yield from ("--no-enforce-eager",) if _has_graphs(services, group) else eager_arguments(group, platform)
    additional: dict[str, object] = {}
    if platform == "npu" and services.graph_mode is not None:
        additional["graph_model_compile_config"] = {"level": int(_has_graphs(services, group))}
    placement = services.expert_placement
    if placement is not None and role != "prefill":
        if platform == "npu":
            additional["use_omni_placement"] = True
            additional["num_redundant_experts"] = placement.num_redundant_experts
            if placement.config_path is not None:
                additional["omni_placement_config_path"] = placement.config_path
        else:
            if not is_in_step:  # ranks in step spread the experts anyway
                yield "--enable-expert-parallel"
            yield "--enable-eplb"
            yield from ("--eplb-config", json.dumps({"num_redundant_experts": placement.num_redundant_experts}))
    if additional:
        yield from ("--additional-config", json.dumps(additional))


def eager_arguments(group: GroupSettings, platform: Platform) -> tuple[str, ...]:
    if platform == "cpu" and group.pipeline_parallel_size > 1:
        # Eager too, but in a mode in which vLLM warms up: without that, its second stage on a CPU has no room for
        # what the first one sends (vLLM 0.32).
        return ("--compilation-config", EAGER_STAGES)
    return ("--enforce-eager",)


def switch_problems(
    services: Services, groups: Sequence[GroupSettings], platform: Platform, model: ModelInfo
) -> Iterator[Problem]:
    if services.multi_token_prediction is not None and not model.num_mtp_layers:
        yield Problem("services.multi_token_prediction", "the model has no layers for it", "delete it")
    yield from _placement_problems(services, groups, platform, is_moe=model.is_moe)


def _placement_problems(
    services: Services, groups: Sequence[GroupSettings], platform: Platform, *, is_moe: bool
) -> Iterator[Problem]:
    placement = services.expert_placement
    if placement is None:
        return
    field = "services.expert_placement"
    if not is_moe:
        yield Problem(field, "the model has no experts to place", "delete it")
    elif platform == "cpu":
        yield Problem(field, "vLLM cannot place experts on a CPU", "delete it, or write platform: npu or cuda")
    elif platform == "cuda" and placement.config_path is not None:
        text = f"{placement.config_path!r}: vLLM's own placement on CUDA reads no pattern"
        yield Problem(f"{field}.config_path", text, "delete it")
    if is_moe and platform == "cuda":
        for group in groups:
            if group.role != "prefill" and group.tensor_parallel_size * group.data_parallel_size == 1:
                text = "1, and data_parallel_size 1: there is nothing to place experts on"
                mend = f"write 2 or more in one of them, or delete {field}"
                yield Problem(group.field("tensor_parallel_size"), text, mend)


def _has_graphs(services: Services, group: GroupSettings) -> bool:
    return bool(services.graph_mode) and group.role != "prefill"

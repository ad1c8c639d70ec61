"""The switches of `services` as engine arguments: multi-token prediction, graph mode, expert placement.

Checked against vLLM 0.32's arguments. What `--additional-config` holds is for our Ascend platform; it was not run on
Ascend hardware.
"""

import json
from collections.abc import Iterator

from omni.deployment.errors import Problem
from omni.deployment.groups import Pool
from omni.deployment.model import Platform, Services


def switch_arguments(services: Services, role: Pool, platform: Platform) -> Iterator[str]:
    if services.multi_token_prediction is not None:
        # P as well: its MTP layers compute the KV that D's go on from.
        config = {"method": "mtp", "num_speculative_tokens": services.multi_token_prediction}
        yield from ("--speculative-config", json.dumps(config))
    if services.graph_mode is not None:
        # A prompt is computed at a different size each time: P gains nothing from graphs.
        yield "--no-enforce-eager" if _has_graphs(services, role) else "--enforce-eager"
    additional: dict[str, object] = {}
    if platform == "npu" and services.graph_mode is not None:
        additional["graph_model_compile_config"] = {"level": int(_has_graphs(services, role))}
    placement = services.expert_placement
    if placement is not None and role != "prefill":
        if platform == "npu":
            additional["use_omni_placement"] = True
            additional["num_redundant_experts"] = placement.num_redundant_experts
            if placement.config_path is not None:
                additional["omni_placement_config_path"] = placement.config_path
        else:
            yield "--enable-eplb"
            yield from ("--eplb-config", json.dumps({"num_redundant_experts": placement.num_redundant_experts}))
    if additional:
        yield from ("--additional-config", json.dumps(additional))


def switch_problems(services: Services, platform: Platform, *, is_moe: bool) -> Iterator[Problem]:
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


def _has_graphs(services: Services, role: Pool) -> bool:
    return bool(services.graph_mode) and role != "prefill"

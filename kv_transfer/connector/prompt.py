"""What identifies a request's prompt."""

from typing import TYPE_CHECKING

from kv_transfer.hand_off import prompt_digest

if TYPE_CHECKING:
    from vllm.v1.request import Request


def digest_of_prompt(request: "Request") -> str:
    images = [feature.identifier for feature in request.mm_features or ()]
    adapter = request.lora_request.lora_name if request.lora_request is not None else None
    return prompt_digest(request.prompt_token_ids or (), adapter, request.cache_salt, *images)

"""Which requests D serves alone, because one hand-off cannot carry them.

D alone is never wrong, only not disaggregated. A truthy value that the engine would read as false errs to that side.
"""

from collections.abc import Callable
from typing import Any

import msgspec

from services.global_proxy import json_shape

Body = dict[str, Any]  # RequestBody.fields: the prompt is msgspec.Raw


class _Tool(msgspec.Struct):
    type: str = ""


_parse_tools = msgspec.json.Decoder(list[_Tool]).decode


def _is_batch(body: Body) -> bool:
    """More than one prompt: a list of strings or of token lists. One list of tokens is one prompt."""
    prompt = body.get("prompt")
    return prompt is not None and json_shape.is_batch(memoryview(prompt))


def _echoes_logprobs(body: Body) -> bool:
    """The prompt's log-probabilities are computed with the prompt, so where the answer is made.

    A chat with echo always gets them in vLLM, a completion only with logprobs.
    """
    return bool(body.get("echo")) and (body.get("messages") is not None or body.get("logprobs") is not None)


def _truncates_to_fit(body: Body) -> bool:
    """The prompt is cut to leave room for the output, of which P is asked for less: it could cut another prompt."""
    cut = body.get("truncate_prompt_tokens")
    return (cut is not None and (type(cut) is not int or cut < 0)) or body.get("truncation") not in (None, "disabled")


def _has_history_on_decode(body: Body) -> bool:
    """/v1/responses: the conversation so far, or the answer to come, is kept by one engine."""
    return body.get("previous_response_id") is not None or bool(body.get("background"))


def _calls_tools_itself(body: Body) -> bool:
    """/v1/responses: the engine runs tools and prompts the model again, with other prompts under one hand-off."""
    tools = body.get("tools")
    if tools is None or body.get("input") is None:
        return False
    try:
        return any(tool.type != "function" for tool in _parse_tools(tools))
    except msgspec.ValidationError:
        return bool(tools != msgspec.Raw(b"null"))


def _is_refused_for(field: str) -> Callable[[Body], bool]:
    """Not a count. P is asked for one token of one choice and would not see it: D is left to refuse it."""

    def applies(body: Body) -> bool:
        value = body.get(field)
        return value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1)

    return applies


_COMMON_RULES: tuple[tuple[str, Callable[[Body], bool]], ...] = (
    ("batch", _is_batch),
    *(
        ("invalid", _is_refused_for(field))
        for field in ("n", "max_tokens", "max_completion_tokens", "max_output_tokens")
    ),
)
_RARE_FIELDS = frozenset(
    (
        "background",
        "echo",
        "previous_response_id",
        "prompt_embeds",
        "prompt_logprobs",
        "tools",
        "truncate_prompt_tokens",
        "truncation",
        "use_beam_search",
    )
)
DECODE_ONLY_RULES: tuple[tuple[str, Callable[[Body], bool]], ...] = (
    *_COMMON_RULES,
    # Each of the following looks at some of _RARE_FIELDS.
    ("prompt_logprobs", lambda body: body.get("prompt_logprobs") is not None),
    ("echo_logprobs", _echoes_logprobs),
    ("beam_search", lambda body: bool(body.get("use_beam_search"))),
    ("prompt_embeds", lambda body: body.get("prompt_embeds") is not None),
    ("truncation", _truncates_to_fit),
    ("stateful", _has_history_on_decode),
    ("server_tools", _calls_tools_itself),
)

# Not rules of a body:
SEVERAL_CHOICES = "several_choices"  # n is above 1, and the engines' connector hands off one sequence
PREFILL_REFUSED = "prefill_refused"  # P says 4xx of what it was sent; D judges what the client sent
NO_HANDOFF = "prefill_gave_no_params"  # P answered, with nothing to hand off


def decode_only_reason(body: Body) -> str | None:
    """Why D must serve `body` alone; None for the usual way."""
    for reason, applies in _COMMON_RULES if body.keys().isdisjoint(_RARE_FIELDS) else DECODE_ONLY_RULES:
        if applies(body):
            return reason
    return None

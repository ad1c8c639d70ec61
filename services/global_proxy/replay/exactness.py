"""Which streams can be continued so that nobody can tell.

A continued request is the prompt and the tokens that were sent, as one longer prompt. What depends on anything else of
the first D than those tokens, such as the state of a grammar or of a random generator, would not go on where it was.
Tokens drawn at random without a seed go on as any others would: nobody is owed the ones that were lost.

A value that the engine might read as another one errs to the side of not continuing.
"""

from collections.abc import Callable
from typing import Any

import msgspec

from services.global_proxy import json_shape
from services.global_proxy.request_body import RequestBody

_MAX_LOOKED_AT_BYTES = 1 << 12  # of a field that is not decoded yet; a longer one is never an empty one
_TEXT_PARTS = frozenset(("text", "input_text", "output_text", "refusal", "thinking", "tool_reference"))

_decode = msgspec.json.Decoder().decode


class _Message(msgspec.Struct):
    content: str | list[dict[str, msgspec.Raw]] | None = None


_decode_messages = msgspec.json.Decoder(list[_Message]).decode
_decode_string = msgspec.json.Decoder(str).decode


def _is_unset(value: Any) -> bool:
    return value is None


def _is_empty(value: Any) -> bool:
    return not value


def _is_one(value: Any) -> bool:
    return value is None or (type(value) is int and value == 1)


def _is_count(value: Any) -> bool:
    """Something to subtract from."""
    return value is None or type(value) is int


def _is_true(value: Any) -> bool:
    return value is None or value is True


def _is_free_text(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and value.get("type") == "text")


def _has_short_strings(value: Any) -> bool:
    """Of longer ones vLLM holds back the beginning, so that sent text and sent tokens do not line up."""
    strings = value if isinstance(value, list) else [value]
    return all(string is None or (isinstance(string, str) and len(string) == 1) for string in strings)


# What each field has to be; the others do not matter.
_EXACT_IF: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("n", "best_of"), _is_one),
    **dict.fromkeys(("max_tokens", "max_completion_tokens", "min_tokens"), _is_count),
    "use_beam_search": _is_empty,
    # State that is made of the output alone, which would begin anew.
    **dict.fromkeys(
        ("presence_penalty", "frequency_penalty", "bad_words", "vllm_xargs", "logits_processors"), _is_empty
    ),
    **dict.fromkeys(("structured_outputs", "thinking_token_budget", "repetition_detection", "watermarking"), _is_unset),
    "response_format": _is_free_text,
    "stop": _has_short_strings,
    "skip_special_tokens": _is_true,
    # What the answer holds beside text, and a rewritten event would have to hold too.
    **dict.fromkeys(("echo", "return_prompt_text", "return_tokens_as_token_ids", "return_token_offsets"), _is_empty),
    **dict.fromkeys(("return_token_ids", "return_mm_kwargs", "routed_experts_prompt_start", "top_logprobs"), _is_empty),
    **dict.fromkeys(("prompt_logprobs", "logprob_token_ids"), _is_unset),
    # Prompts that have no token ids, or others than they seem to.
    **dict.fromkeys(("prompt_embeds", "truncate_prompt_tokens", "input"), _is_unset),
}


def why_not_exact(body: RequestBody) -> str | None:
    """Why a stream of this request cannot be continued: a field's name. None: it can."""
    fields = body.fields
    for name, value in fields.items():
        exact_if = _EXACT_IF.get(name)
        if exact_if is not None and not exact_if(_value(value)):
            return name
    if _draws_from_a_seed(fields):
        return "seed"
    if _calls_tools(fields):
        return "tools"
    return _why_not_its_prompt(fields)


def _value(value: Any) -> Any:
    if type(value) is not msgspec.Raw:
        return value
    return _decode(value) if memoryview(value).nbytes <= _MAX_LOOKED_AT_BYTES else True


def _draws_from_a_seed(fields: dict[str, Any]) -> bool:
    """At temperature 0 nothing is drawn. Not to say it leaves it to the model's own configuration."""
    if _value(fields.get("seed")) is None:
        return False
    temperature = _value(fields.get("temperature"))
    return type(temperature) not in (int, float) or temperature != 0


def _calls_tools(fields: dict[str, Any]) -> bool:
    """A parser of tool calls cannot begin in the middle of one."""
    choice = _value(fields.get("tool_choice"))
    return choice != "none" and (choice is not None or bool(_value(fields.get("tools"))))


def _why_not_its_prompt(fields: dict[str, Any]) -> str | None:
    prompt, messages = fields.get("prompt"), fields.get("messages")
    if (prompt is None) == (messages is None):
        return "prompt"  # of two, the path decides which one counts
    if prompt is not None:
        # 0 and false stand for the same number to a completion.
        several = json_shape.is_batch(memoryview(prompt))
        return "prompt" if several else "logprobs" if fields.get("logprobs") is not None else None
    if fields.get("logprobs") not in (None, False):
        return "logprobs"
    assert messages is not None, "one of the two"
    return None if _is_all_text(messages) else "messages"


def _is_all_text(messages: msgspec.Raw) -> bool:
    """vLLM takes no token ids beside images or sound."""
    if bytes(messages).find(b"[", 1) < 0:
        return True  # no lists of parts
    try:
        return all(
            _is_text(part) for m in _decode_messages(messages) if isinstance(m.content, list) for part in m.content
        )
    except (msgspec.ValidationError, UnicodeError):
        return False


def _is_text(part: dict[str, msgspec.Raw]) -> bool:
    """Of a known type, and with nothing beside it that vLLM would take for something else."""
    kind = part.get("type")
    if kind is None or _decode_string(kind) not in _TEXT_PARTS:
        return False
    return part.keys() <= _TEXT_PARTS | {"type", "cache_control"}

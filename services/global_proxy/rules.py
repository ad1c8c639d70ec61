"""Which requests D serves alone, because one hand-off cannot carry them.

D alone is never wrong, only not disaggregated. A truthy value that the engine would read as false errs to that side.
"""

from collections.abc import Callable
from typing import Any

Body = dict[str, Any]


def _is_batch(body: Body) -> bool:
    """More than one prompt: a list of strings or of token lists. One list of tokens is one prompt."""
    prompt = body.get("prompt")
    return isinstance(prompt, list) and len(prompt) > 1 and isinstance(prompt[0], str | list)


def _echoes_logprobs(body: Body) -> bool:
    """The prompt's log-probabilities are computed with the prompt, so where the answer is made.

    A chat with echo always gets them in vLLM, a completion only with logprobs.
    """
    return bool(body.get("echo")) and ("messages" in body or body.get("logprobs") is not None)


def _is_refused_for(field: str) -> Callable[[Body], bool]:
    """Not a count. P is asked for one token of one choice and would not see it: D is left to refuse it."""

    def applies(body: Body) -> bool:
        value = body.get(field)
        return value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1)

    return applies


DECODE_ONLY_RULES: tuple[tuple[str, Callable[[Body], bool]], ...] = (
    ("batch", _is_batch),
    ("prompt_logprobs", lambda body: body.get("prompt_logprobs") is not None),
    ("echo_logprobs", _echoes_logprobs),
    ("beam_search", lambda body: bool(body.get("use_beam_search"))),
    ("prompt_embeds", lambda body: body.get("prompt_embeds") is not None),
    *(("invalid", _is_refused_for(field)) for field in ("n", "max_tokens", "max_completion_tokens")),
)

# Not rules of a body:
SEVERAL_CHOICES = "several_choices"  # n is above 1, and the engines' connector hands off one sequence
NO_HANDOFF = "prefill_gave_no_params"  # P answered, with nothing to hand off


def decode_only_reason(body: Body) -> str | None:
    """Why D must serve `body` alone; None for the usual way."""
    return next((reason for reason, applies in DECODE_ONLY_RULES if applies(body)), None)

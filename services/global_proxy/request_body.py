"""The request body: checked, cleaned, and rewritten for each leg.

Only what the proxy itself needs is understood here; the engines judge the rest.
"""

from dataclasses import dataclass
from typing import Any

import msgspec

from services.global_proxy.errors import InvalidRequestError

# Set by the proxy alone. From a client they would reach into an engine's connectors, or (request_id) let two clients
# collide inside an engine.
_NEVER_FROM_A_CLIENT = ("kv_transfer_params", "ec_transfer_params", "request_id")

# Fields that only shape or cut short the output, of which P makes one token that nobody sees. Left in, they cost P work
# (logprobs, grammars) or end the request with anything but "length", and then P's connector hands nothing off (a stop
# string, a grammar that allows nothing but the end). D gets them all and judges them. What can reach the chat template,
# such as tools, tool_choice and response_format, stays: P and D must render the same prompt.
_NOT_FOR_PREFILL = (
    "allowed_token_ids",
    "bad_words",
    "echo",
    "include_stop_str_in_output",
    "logit_bias",
    "logprob_token_ids",
    "logprobs",
    "repetition_detection",
    "return_token_ids",
    "return_tokens_as_token_ids",
    "seed",  # vLLM 0.32 on a CPU dies of it when it computes a prompt in several chunks
    "stop",
    "stop_token_ids",
    "stream_interval",
    "stream_options",
    "structured_outputs",
    "thinking_token_budget",
    "top_logprobs",
)

# One token, made whatever the model would say: an end-of-sequence token would not be handed off.
_PREFILL_OVERRIDES = {"max_tokens": 1, "min_tokens": 1, "ignore_eos": True, "n": 1, "stream": False}


@dataclass(frozen=True)
class RequestBody:
    """A JSON object without anything that a client must not set."""

    fields: dict[str, Any]
    n: int  # choices wanted, so sequences on D that read the prompt's blocks
    plain_json: bytes  # `fields`, for D alone

    def prefill_json(self, kv_transfer_params: dict[str, Any]) -> bytes:
        """The body of leg 1: compute the prompt, make one token, do with the blocks as the parameters say."""
        body = {key: value for key, value in self.fields.items() if key not in _NOT_FOR_PREFILL}
        body |= _PREFILL_OVERRIDES
        if "max_completion_tokens" in body:
            body["max_completion_tokens"] = 1
        body["kv_transfer_params"] = kv_transfer_params
        return _encode(body)

    def decode_json(self, kv_transfer_params: msgspec.Raw | bytes) -> bytes:
        """The body of leg 2: the client's own plus the parameters, byte for byte."""
        return b'{"kv_transfer_params":%b,%b' % (kv_transfer_params, self.plain_json[1:])


def parse_body(raw: bytes, max_n: int) -> RequestBody:
    """Read a client's body.

    Raises:
        InvalidRequestError: it is not a JSON object, or `n` is too large.
    """
    try:
        fields = msgspec.json.decode(raw)
    except (ValueError, RecursionError) as error:  # bad UTF-8 and bad JSON are ValueErrors
        raise InvalidRequestError(f"The request body is not valid JSON: {error}") from error
    if not isinstance(fields, dict) or not fields:
        raise InvalidRequestError("The request body must be a JSON object with at least one field")
    for name in _NEVER_FROM_A_CLIENT:
        fields.pop(name, None)
    _clean_vllm_xargs(fields)
    return RequestBody(fields, _count_choices(fields, max_n), _encode(fields))


def _clean_vllm_xargs(fields: dict[str, Any]) -> None:
    """vLLM copies vllm_xargs over the same dictionary that carries the transfer parameters."""
    xargs = fields.get("vllm_xargs")
    if isinstance(xargs, dict):
        for name in _NEVER_FROM_A_CLIENT:
            xargs.pop(name, None)


def _count_choices(fields: dict[str, Any], max_n: int) -> int:
    """`n`; 1 for what is no count, which D is left to refuse (rules.py)."""
    n = fields.get("n")
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        return 1
    if n > max_n:
        raise InvalidRequestError(f"n is {n}; at most {max_n} choices are made", param="n")
    return n


def _encode(body: dict[str, Any]) -> bytes:
    try:
        return msgspec.json.encode(body)
    except RecursionError as error:
        raise InvalidRequestError("The request body is nested too deeply") from error

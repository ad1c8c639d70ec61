"""The request body: checked, cleaned, and rewritten for each leg.

Only what the proxy itself needs is understood here; the engines judge the rest. Each field stays the client's own bytes
(`msgspec.Raw`) unless it is named in `_DECODED`: what is sent on is what came, and a body takes little more memory than
its own length, whatever is in it. Of a name given twice the last one counts, as in Python's own parser.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from services.global_proxy import json_shape
from services.global_proxy.errors import InvalidRequestError

MAX_DEPTH = 128  # of arrays and objects in one another; engines walk some fields recursively
MAX_PROMPTS = 1024  # of one batch, as in vLLM
MAX_STOP_STRINGS = 64  # vLLM takes 4 unless told otherwise, and says so itself
MAX_LOGPROBS = 1024  # the engine has its own limit (20 unless told otherwise), and says so itself
_MAX_DECODED_BYTES = 1 << 18  # of one field that becomes Python objects, which take up to 20 times as much

# Set by the proxy alone. From a client they would reach into an engine's connectors, or (request_id) let two clients
# collide inside an engine, or (kv_cache_report_mode) flood those who follow an engine's KV events.
NEVER_FROM_A_CLIENT = ("kv_transfer_params", "ec_transfer_params", "request_id", "kv_cache_report_mode")

# Fields that only shape or cut short the output, of which P makes one token that nobody sees. Left in, they cost P work
# (logprobs, grammars) or end the request with anything but "length", and then P's connector hands nothing off (a stop
# string, a grammar that allows nothing but the end). D gets them all and judges them. What can reach the chat template,
# such as tools, tool_choice and response_format, stays: P and D must render the same prompt.
_NOT_FOR_PREFILL = frozenset(
    (
        "allowed_token_ids",
        "bad_words",
        "best_of",
        "echo",
        "include_stop_str_in_output",
        "logit_bias",
        "logprob_token_ids",
        "logprobs",
        "repetition_detection",
        "return_prompt_text",
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
)
_NOT_FOR_PREFILL_OF_RESPONSES = _NOT_FOR_PREFILL | {"enable_response_messages", "include", "max_tool_calls", "text"}

# One token, made whatever the model would say: an end-of-sequence token would not be handed off.
_PREFILL_OVERRIDES = {"max_tokens": 1, "min_tokens": 1, "ignore_eos": True, "n": 1, "stream": False}
_PREFILL_OVERRIDES_OF_RESPONSES = {
    "max_output_tokens": 1,
    "ignore_eos": True,
    "stream": False,
    "background": False,
    "store": False,  # P would keep the answer for ever
}

_DECODED = frozenset(
    (
        "background",
        "best_of",
        "echo",
        "logprobs",
        "max_completion_tokens",
        "max_output_tokens",
        "max_tokens",
        "model",
        "n",
        "previous_response_id",
        "priority",
        "prompt_cache_key",
        "prompt_logprobs",
        "return_prompt_text",
        "session_id",
        "stop",
        "stream",
        "stream_options",
        "top_logprobs",
        "truncate_prompt_tokens",
        "truncation",
        "use_beam_search",
        "user",
        "vllm_xargs",
    )
)
_NEEDS_TEXT = frozenset(
    ("echo", "input", "messages", "prompt_embeds", "return_prompt_text", "truncate_prompt_tokens")  # or may do so
)
_LIMITED = frozenset(("best_of", "logprobs", "n", "prompt_logprobs", "stop", "top_logprobs"))
_PROMPT_FIELDS = ("messages", "input", "prompt")
_LARGE = (*_PROMPT_FIELDS, "prompt_embeds")  # never decoded; a null is None
_NULL = msgspec.Raw(b"null")
_parse_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_parse_value = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode


@dataclass(slots=True, eq=False)
class RequestBody:
    """A JSON object without anything that a client must not set.

    Attributes:
        fields: what the proxy looks at is decoded; everything else, the prompt too, is a `msgspec.Raw`.
        n: choices wanted, so sequences on D that read the prompt's blocks.
        sent: the same fields as they are sent on.
    """

    fields: dict[str, Any]
    n: int
    sent: dict[str, Any]  # the same fields as they are sent on

    @property
    def plain_json(self) -> bytes:
        """The body for D alone."""
        return _encode(self.sent)

    @property
    def prompt_text(self) -> bytes:
        """The JSON text of the prompt, messages or input; empty if there is none. A copy."""
        return bytes(self._prompt)

    @property
    def num_token_ids(self) -> int | None:
        """Of a prompt that is one list of token ids; None for any other."""
        text = self._prompt
        return json_shape.count_token_ids(bytes(text)) if json_shape.is_token_ids(memoryview(text)) else None

    @property
    def max_new_tokens(self) -> int | None:
        """How many the client will have at most, for one choice; None if it did not say."""
        for name in ("max_completion_tokens", "max_tokens", "max_output_tokens"):
            value = self.fields.get(name)
            if type(value) is int and value >= 0:
                return value
        return None

    @property
    def session(self) -> str | None:
        """What the client calls the conversation, or itself."""
        for name in ("session_id", "prompt_cache_key", "user"):
            value = self.fields.get(name)
            if isinstance(value, str) and value:
                return value
        return None

    @property
    def takes_token_ids(self) -> bool:
        """Whether D may get P's token ids instead of rendering and tokenising again.

        Not where D needs the text: to echo or return it, or to say how it was cut. Not for token ids, which D has
        already, nor for a batch, nor for /v1/responses, where P does not return them. Of a chat with images or sound
        vLLM ignores the ids by itself.
        """
        fields = self.fields
        if fields.keys().isdisjoint(_NEEDS_TEXT):
            return json_shape.is_string(memoryview(self._prompt))
        if fields.get("echo") or fields.get("return_prompt_text") or self._is_responses:
            return False
        if fields.get("truncate_prompt_tokens") is not None or fields.get("prompt_embeds") is not None:
            return False
        return fields.get("messages") is not None or json_shape.is_string(memoryview(self._prompt))

    def prefill_json(self, kv_transfer_params: Mapping[str, Any] | msgspec.Raw, want_token_ids: bool = False) -> bytes:
        """The body of leg 1: compute the prompt, make one token, do with the blocks as the parameters say.

        With `want_token_ids` the answer has the prompt's: `choices[0].prompt_token_ids` of a completion, and
        `prompt_token_ids` of a chat.
        """
        if self._is_responses:
            left_out, overrides = _NOT_FOR_PREFILL_OF_RESPONSES, _PREFILL_OVERRIDES_OF_RESPONSES
        else:
            left_out, overrides = _NOT_FOR_PREFILL, _PREFILL_OVERRIDES
        body = {key: value for key, value in self.sent.items() if key not in left_out}
        body |= overrides
        if "max_completion_tokens" in body:
            body["max_completion_tokens"] = 1
        if want_token_ids:
            body["return_token_ids"] = True
        body["kv_transfer_params"] = kv_transfer_params
        return _encode(body)

    def decode_json(self, kv_transfer_params: msgspec.Raw | bytes, prompt_token_ids: bytes | None = None) -> bytes:
        """The body of leg 2: the client's own plus the parameters, byte for byte.

        Args:
            prompt_token_ids: P's, as a JSON list, if `takes_token_ids`. A completion gets them as its prompt, a chat
                among the parameters, where vLLM looks for them (`_reused_prompt_token_ids`).
        """
        if prompt_token_ids is None:
            return _encode({"kv_transfer_params": msgspec.Raw(kv_transfer_params)} | self.sent)
        if self.fields.get("messages") is None:
            body = {"kv_transfer_params": msgspec.Raw(kv_transfer_params)} | self.sent
            body["prompt"] = msgspec.Raw(prompt_token_ids)
            return _encode(body)
        params = _parse_object(kv_transfer_params)
        params["prompt_token_ids"] = msgspec.Raw(prompt_token_ids)
        return _encode({"kv_transfer_params": params} | self.sent)

    @property
    def answer_may_be_kept(self) -> bool:
        """By the engine that gives it, for a later request to go on from (/v1/responses)."""
        return self._is_responses

    @property
    def _is_responses(self) -> bool:
        return self.fields.get("input") is not None and self._prompt is self.fields["input"]

    @property
    def _prompt(self) -> msgspec.Raw:
        for name in _PROMPT_FIELDS:
            value: msgspec.Raw | None = self.fields.get(name)
            if value is not None:
                return value
        return msgspec.Raw(b"")


def parse_body(raw: bytes | bytearray, max_n: int) -> RequestBody:
    """Read a client's body. It stays in memory for as long as the result does.

    Raises:
        InvalidRequestError: it is not a JSON object in UTF-8, or something in it is too large or nested too deeply.
    """
    if not isinstance(raw, bytes):
        raw = bytes(raw)  # the fields are views of it: it must not change
    try:
        sent: dict[str, Any] = _parse_object(raw)
        if not raw.isascii():
            raw.decode()  # only the values that are decoded below would be looked at otherwise
    except (ValueError, RecursionError) as error:  # bad UTF-8 and bad JSON are ValueErrors
        raise InvalidRequestError(_why_not_an_object(raw, error)) from error
    for name in NEVER_FROM_A_CLIENT:
        sent.pop(name, None)
    if not sent:
        raise InvalidRequestError("The request body must be a JSON object with at least one field")
    if json_shape.is_deeper_than(raw, MAX_DEPTH):
        raise InvalidRequestError(f"The request body is nested more than {MAX_DEPTH} levels deep")
    fields = sent.copy()
    for name in _DECODED & sent.keys():
        fields[name] = _decoded(name, sent[name])
    for name in _LARGE:
        if fields.get(name) == _NULL:
            fields[name] = None
    xargs = fields.get("vllm_xargs")
    if isinstance(xargs, dict) and any(name in xargs for name in NEVER_FROM_A_CLIENT):
        # vLLM copies vllm_xargs over the same dictionary that carries the transfer parameters.
        sent["vllm_xargs"] = fields["vllm_xargs"] = {k: v for k, v in xargs.items() if k not in NEVER_FROM_A_CLIENT}
    _check_limits(fields, max_n)
    n = fields.get("n")
    return RequestBody(fields, n if type(n) is int and n >= 1 else 1, sent)


def _why_not_an_object(raw: bytes, error: Exception) -> str:
    if isinstance(error, RecursionError):
        return f"The request body is nested more than {MAX_DEPTH} levels deep"
    if isinstance(error, msgspec.ValidationError):
        return "The request body must be a JSON object"
    return f"The request body is not valid JSON: {error}"


def _decoded(name: str, value: msgspec.Raw) -> Any:
    if memoryview(value).nbytes > _MAX_DECODED_BYTES:
        raise InvalidRequestError(f"{name} is too long; at most {_MAX_DECODED_BYTES} bytes are read", param=name)
    try:
        return _parse_value(value)
    except ValueError as error:  # a number that no computer's number holds
        raise InvalidRequestError(f"{name} is not valid JSON: {error}", param=name) from error


def _check_limits(fields: dict[str, Any], max_n: int) -> None:
    """What costs an engine, or us, in proportion. Values that are no numbers are left for D to refuse."""
    if not fields.keys().isdisjoint(_LIMITED):
        _check_counts(fields, max_n)
    prompt = fields.get("prompt")
    if (
        prompt is not None
        and json_shape.is_batch(memoryview(prompt))
        and json_shape.has_more_prompts_than(bytes(prompt), MAX_PROMPTS)
    ):
        raise InvalidRequestError(f"prompt has more than {MAX_PROMPTS} prompts", param="prompt")


def _check_counts(fields: dict[str, Any], max_n: int) -> None:
    for name, most in (
        ("n", max_n),
        ("best_of", max_n),
        ("logprobs", MAX_LOGPROBS),
        ("top_logprobs", MAX_LOGPROBS),
        ("prompt_logprobs", MAX_LOGPROBS),
    ):
        if _as_number(fields.get(name)) > most:
            raise InvalidRequestError(f"{name}: at most {most} are given", param=name)
    stop = fields.get("stop")
    if isinstance(stop, list) and len(stop) > MAX_STOP_STRINGS:
        raise InvalidRequestError(f"stop has {len(stop)} strings; at most {MAX_STOP_STRINGS} are taken", param="stop")


def _as_number(value: object) -> float:
    """What the engines may take it for: to vLLM "9" and 9.0 are integers, too. 0 if it is no number."""
    if not isinstance(value, int | float | str):
        return 0
    try:
        return float(value)
    except ValueError:
        return 0
    except OverflowError:  # an integer that no float holds
        return math.inf

"""Every value that a label may have. What is not listed counts as "other", so that no client can make new series."""

from http import HTTPStatus

OTHER = "other"

ENDPOINTS = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/embeddings",
    "/v1/models",
    "/tokenize",
    "/detokenize",
    "/version",
    "/health",
    "/live",
    "/metrics",
    "/openapi.json",
    "/docs",
)
STATUS_CODES = (*(int(status) for status in HTTPStatus), 499)  # 499 is nginx's: the client left

ROLES = ("prefill", "decode", "mixed")

# Why D served a request alone.
DECODE_ONLY_REASONS = (
    "batch",
    "prompt_logprobs",
    "echo_logprobs",
    "beam_search",
    "prompt_embeds",
    "truncation",
    "stateful",
    "server_tools",
    "invalid",
    "several_choices",
    "prefill_gave_no_params",
    "prefill_refused",
    "short_prompt",
    "no_prefill_up",
)

# Why a mixed instance served a request.
MIXED_REASONS = ("alone", "sooner", "even_share", "look_again", "others_down")

# How an instance let a leg down.
FAILURE_REASONS = (
    "unreachable",
    "died",
    "timeout",
    "nonsense",
    "load_failed",
    "status_500",
    "status_501",
    "status_502",
    "status_503",
    "status_504",
)
RETRY_REASONS = FAILURE_REASONS

# Why a request was turned away before any engine saw it.
REFUSED_REASONS = (
    "rate_limited",
    "overloaded",
    "queue_timeout",
    "draining",
    "no_instance_up",
    "unauthorized",
    "unknown_route",
    "invalid",
)

JOIN_REFUSALS = ("not_genuine", "refused", "too_many")  # on the control plane

TRACE_OUTCOMES = ("recorded", "exported", "failed")  # recorded, but neither of the others: dropped or still queued

"""The OpenAPI description of every route, those that never reach FastAPI included.

It promises what the proxy itself checks. What it does not check has no type here: an engine judges that, and its answer
is passed on as it comes.
"""

from typing import Any, Final

from services.global_proxy.request_body import MAX_DEPTH, MAX_LOGPROBS, MAX_PROMPTS, MAX_STOP_STRINGS
from services.global_proxy.security.routes import ROUTES
from services.global_proxy.settings import Settings

Json = dict[str, Any]

SUMMARY: Final = (
    "One address for a deployment of prefill and decode instances, of mixed ones, or of both. Errors are in OpenAI's"
    " shape."
)
_ERROR_REF: Final[Json] = {"$ref": "#/components/responses/Error"}
_ENGINE_JSON: Final[Json] = {"application/json": {"schema": {}}}

_SCHEMAS: Final[Json] = {
    "Error": {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": {
                        "type": "string",
                        "description": "What happened and, where there is something, a mend.",
                    },
                    "type": {"type": "string", "examples": ["BadRequestError"]},
                    "param": {"type": ["string", "null"], "description": "The field of the body at fault."},
                    "code": {"type": "integer", "description": "The status once more."},
                },
            }
        },
    }
}

_REQUEST_ID: Final[Json] = {
    "description": "The client's own X-Request-Id, or one made for the request. Engines are given another.",
    "schema": {"type": "string"},
}
_RETRY_AFTER: Final[Json] = {
    "description": "Seconds; with 429 and 503, when nothing of the request was begun.",
    "schema": {"type": "string", "pattern": "^[0-9]+$"},
}
_PATH: Final[Json] = {
    "description": "Whether prefill and decode were done by two instances, or both by a decode or a mixed instance.",
    "schema": {"type": "string", "enum": ["disaggregated", "decode_only", "mixed"]},
}
_CONTINUABLE: Final[Json] = {
    "description": "Of a stream: if its decode instance is lost, another goes on with it, token by token the same.",
    "schema": {"type": "string", "enum": ["exact"]},
}
_ERROR: Final[Json] = {
    "description": (
        "400: the body; 401: the API key; 404, 405: the route; 408, 413, 431: too slow or too large; 429: over the"
        " key's rates; 502, 503, 504: no instance could do it. An instance's own 4xx come as it gave them, its 5xx in"
        " fixed words."
    ),
    "headers": {"retry-after": _RETRY_AFTER},
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
}

_REQUEST_HEADERS: Final[list[Json]] = [
    {
        "name": "x-request-id",
        "in": "header",
        "description": "Comes back with the answer, and is in the log (256 bytes of it).",
        "schema": {"type": "string"},
    },
    {
        "name": "x-session-id",
        "in": "header",
        "description": "Requests of one session go to one instance where the policy looks at it.",
        "schema": {"type": "string"},
    },
]


def _at_most(most: int, what: str) -> Json:
    return {"maximum": most, "description": f"{what} More than {most} are refused."}


_LIMITED: Final[Json] = {
    "n": _at_most(Settings.max_n, "Choices."),
    "logprobs": _at_most(MAX_LOGPROBS, "Log-probabilities of the most likely tokens."),
    "prompt_logprobs": _at_most(MAX_LOGPROBS, "The same, of the prompt's tokens."),
    "stop": {"maxItems": MAX_STOP_STRINGS, "description": f"At most {MAX_STOP_STRINGS} strings."},
}
_STREAM: Final[Json] = {"description": "true: server-sent events, each passed on as it comes."}
_PRIORITY: Final[Json] = {"description": "Above 0: later than others, if requests have to wait."}
_SHARED: Final[Json] = _LIMITED | {"model": {}, "stream": _STREAM, "priority": _PRIORITY}
_TOKENS: Final[Json] = {"description": "The most new tokens; counted against the key's rates before they are made."}
_FIELDS: Final[dict[str, Json]] = {
    "/v1/completions": {
        "prompt": {"description": f"A string, token ids, or a batch of either, of {MAX_PROMPTS} prompts at most."},
        "max_tokens": _TOKENS,
        "best_of": _at_most(Settings.max_n, "Sequences to choose from."),
        **_SHARED,
    },
    "/v1/chat/completions": {
        "messages": {},
        "max_completion_tokens": _TOKENS,
        "top_logprobs": _at_most(MAX_LOGPROBS, "Alternatives to each token."),
        **_SHARED,
    },
    "/v1/responses": {
        "input": {},
        "max_output_tokens": _TOKENS,
        "top_logprobs": _at_most(MAX_LOGPROBS, "Alternatives to each token."),
        "model": {},
        "stream": _STREAM,
        "priority": _PRIORITY,
    },
    "/v1/embeddings": {"model": {}, "input": {}},
    "/tokenize": {"model": {}, "prompt": {}, "messages": {}},
    "/detokenize": {"model": {}, "tokens": {}},
}
_SUMMARIES: Final = {
    "/v1/completions": "Continue a prompt",
    "/v1/chat/completions": "Answer a chat",
    "/v1/responses": "Answer by OpenAI's Responses API, where the engines have it",
    "/v1/embeddings": "Embeddings, where the engines have them",
    "/tokenize": "The tokens of a prompt or a chat",
    "/detokenize": "The text of tokens",
    "/v1/models": "The models that the engines serve",
    "/version": "The engines' version",
}


def complete(schema: Json, needs_keys: bool) -> Json:
    """FastAPI's own description, with the routes that the proxy answers without it.

    Args:
        needs_keys: the proxy has API keys; without, engines get the Authorization header, and may ask for one.
    """
    components = schema.setdefault("components", {})
    components.setdefault("schemas", {}).update(_SCHEMAS)
    components.setdefault("responses", {})["Error"] = _ERROR
    components.setdefault("securitySchemes", {})["ApiKey"] = {"type": "http", "scheme": "bearer"}
    key: list[Json] = [{"ApiKey": []}] if needs_keys else [{"ApiKey": []}, {}]
    paths: Json = {}
    for route in ROUTES:
        if route.kind == "local":
            continue
        (method,) = route.methods
        operation = _completion(route.path) if route.kind == "completion" else _relayed(route.path, method)
        if route.needs_key:
            operation["security"] = key
        operation["operationId"] = route.path.strip("/").replace("/", "_")
        operation["summary"] = _SUMMARIES[route.path]
        operation["responses"]["default"] = _ERROR_REF
        paths[route.path] = {method.lower(): operation}
    for path in schema["paths"].values():
        for operation in path.values():
            operation["responses"].setdefault("default", _ERROR_REF)
    schema["paths"] = paths | schema["paths"]
    return schema


def _completion(path: str) -> Json:
    whole = {"x-request-id": _REQUEST_ID | {"required": True}, "x-omni-path": _PATH | {"required": True}}
    return {
        "tags": ["openai"],
        "parameters": _REQUEST_HEADERS,
        "requestBody": _body(path),
        "responses": {
            "200": {
                "description": "A decode instance's answer, as it gave it.",
                "headers": whole | {"x-omni-continuable": _CONTINUABLE},
                "content": _ENGINE_JSON | {"text/event-stream": {"schema": {"type": "string"}}},
            }
        },
    }


def _relayed(path: str, method: str) -> Json:
    answer = {
        "description": "One instance's answer, as it gave it.",
        "headers": {"x-request-id": _REQUEST_ID | {"required": True}},
        "content": _ENGINE_JSON,
    }
    operation: Json = {"tags": ["openai"], "parameters": _REQUEST_HEADERS[:1], "responses": {"200": answer}}
    if method == "POST":
        operation["requestBody"] = _body(path)
    return operation


def _body(path: str) -> Json:
    schema = {
        "type": "object",
        "minProperties": 1,
        "properties": _FIELDS[path],
        "description": (
            f"Any fields that the engines know, nested at most {MAX_DEPTH} levels deep. kv_transfer_params,"
            " ec_transfer_params, request_id and kv_cache_report_mode are the proxy's own to set: they are dropped."
        ),
    }
    return {"required": True, "content": {"application/json": {"schema": schema}}}

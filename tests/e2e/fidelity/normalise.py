"""What two right answers may differ in, and how they are compared.

`comparable` takes from an answer what must differ between two servers, and nothing else; each field with its reason.
`folded` makes one answer of a stream, for vLLM puts several tokens into one event whenever its writer is late.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

# Field -> why two servers that answer alike differ in it.
MUST_DIFFER: Mapping[str, str] = {
    "id": "made up for each request, tool call and output item",
    "item_id": "the id of an output item",
    "call_id": "the id of a tool call",
    "created": "the server's clock",
    "created_at": "the server's clock",
    "system_fingerprint": "a digest of the engine's configuration, in which D has a KV connector",
    # The prompt's blocks that were new to the prefix cache. P made them; D, which answers, made none. vLLM hands P's
    # `cached_tokens` on to D, but not this.
    "created_cache_tokens": "counted by D, which computed no prompt",
    "cache_write_tokens": "counted by D, which computed no prompt",
}

# A token's probability comes out of other shapes of the same sums: D computes the last token alone, a plain server all.
LOGPROB_TOLERANCE = 1e-3

_DELTAS = frozenset({"text", "content", "reasoning", "arguments"})  # strings that a stream gives piece by piece
_KEPT = frozenset({"id", "object", "model", "role", "type"})  # said in every event alike


def comparable(value: Any) -> Any:
    """The same JSON without what must differ. Whether a field is there, null or of a kind, is still compared."""
    if isinstance(value, Mapping):
        return {
            key: _kind(item) if key in MUST_DIFFER and not isinstance(item, Mapping | list) else comparable(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [comparable(item) for item in value]
    return value


def _kind(value: Any) -> str:
    """A number or none: the counts are null where a server counts nothing."""
    return "text" if isinstance(value, str) else "number or null"


def differences(ours: Any, theirs: Any, where: str = "") -> list[str]:
    """Where two answers differ, as lines to read; numbers with a fraction may differ by `LOGPROB_TOLERANCE`."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        found = [f"{where}: ours has no {key!r}" for key in theirs.keys() - ours.keys()]
        found += [f"{where}: only ours has {key!r}" for key in ours.keys() - theirs.keys()]
        for key in ours.keys() & theirs.keys():
            found += differences(ours[key], theirs[key], f"{where}.{key}")
        return sorted(found)
    if isinstance(ours, list) and isinstance(theirs, list):
        if len(ours) != len(theirs):
            return [f"{where}: {len(ours)} items, not {len(theirs)}: {ours!r}, not {theirs!r}"]
        pairs = enumerate(zip(ours, theirs, strict=True))
        return [line for index, (a, b) in pairs for line in differences(a, b, f"{where}[{index}]")]
    if isinstance(ours, float) and isinstance(theirs, float):
        same = math.isclose(ours, theirs, rel_tol=0, abs_tol=LOGPROB_TOLERANCE)
    else:
        same = type(ours) is type(theirs) and ours == theirs
    return [] if same else [f"{where}: {ours!r}, not {theirs!r}"]


def folded(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """One answer of a stream's events: text and lists put together, of everything else the last word.

    Raises:
        AssertionError: events of one stream have several ids, models or times.
    """
    whole: dict[str, Any] = {"choices": {}}
    said: set[tuple[Any, ...]] = set()
    for event in events:
        said.add((event["id"], event["model"], event["created"], event["object"]))
        for choice in event["choices"]:
            whole["choices"][choice["index"]] = _joined(whole["choices"].get(choice["index"]), choice)
        whole = _joined(whole, {key: value for key, value in event.items() if key != "choices"})
    assert len(said) == 1, f"one stream speaks of several answers: {said}"
    whole["choices"] = [whole["choices"][index] for index in sorted(whole["choices"])]
    return whole


def _joined(so_far: Any, more: Any, key: str = "") -> Any:
    if so_far is None or more is None:
        return so_far if more is None else more
    if isinstance(so_far, dict) and isinstance(more, dict):
        if key == "usage":  # the newest is the whole truth
            return more
        return {k: _joined(so_far.get(k), more.get(k), k) for k in {**so_far, **more}}
    if isinstance(so_far, list) and isinstance(more, list):
        return _tool_calls_joined(so_far, more) if key == "tool_calls" else so_far + more
    if isinstance(so_far, str) and key in _DELTAS:
        return so_far + more
    return so_far if key in _KEPT else more


def _tool_calls_joined(so_far: list[Any], more: list[Any]) -> list[Any]:
    calls = {call["index"]: call for call in so_far}
    for call in more:
        calls[call["index"]] = _joined(calls.get(call["index"]), call)
    return [calls[index] for index in sorted(calls)]

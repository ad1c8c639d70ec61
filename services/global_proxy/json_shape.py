"""What can be told of JSON text without making objects of it: a hostile body costs no memory beyond its own bytes.

Every function takes text that a JSON parser has found well-formed.
"""

import re

import numpy as np

_NOT_BRACKETS_OR_QUOTES = bytes(set(range(256)) - set(b'[]{}"'))
_STEPS = np.zeros(256, np.int32)  # by how much each byte changes the depth
_STEPS[list(b"[{")] = 1
_STEPS[list(b"]}")] = -1

Buffer = bytes | memoryview

_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_STRINGS = re.compile(_STRING, re.DOTALL)
_SEVERAL_PROMPTS = re.compile(rb"\s*\[\s*(?:" + _STRING + rb"|\[[^\]]*\])\s*,", re.DOTALL)
_TOKEN_IDS = re.compile(rb"\s*\[\s*\d")


def is_deeper_than(text: bytes, max_depth: int) -> bool:
    """Whether arrays and objects are nested more than `max_depth` deep."""
    if text.count(b"{") + text.count(b"[") <= max_depth:
        return False
    if b"\\" in text:
        text = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    # What is left of a string is quotes around brackets. Two quotes side by side can go, whosesoever they are: nothing
    # else changes from inside a string to outside.
    text = text.translate(None, _NOT_BRACKETS_OR_QUOTES).replace(b'""', b"")
    if b'"' in text:
        text = b"".join(text.split(b'"')[::2])
    depths = np.cumsum(_STEPS[np.frombuffer(text, np.uint8)])
    return bool(depths.size) and int(depths.max()) > max_depth


def is_string(text: Buffer) -> bool:
    return bytes(text[:1]) == b'"'


def is_token_ids(text: Buffer) -> bool:
    """Whether it is a list that begins with a number: one prompt, as token ids."""
    return _TOKEN_IDS.match(text) is not None


def is_batch(text: Buffer) -> bool:
    """Whether it is several prompts: a list of strings or of token lists."""
    return _SEVERAL_PROMPTS.match(text) is not None


def has_more_prompts_than(text: bytes, max_prompts: int) -> bool:
    """Whether a batch is larger than `max_prompts`. Looks no further than it must."""
    if _STRINGS.search(text) is None:
        return text.count(b"[") - 1 > max_prompts
    return any(number > max_prompts for number, _ in enumerate(_STRINGS.finditer(text), start=1))


def count_token_ids(text: bytes) -> int:
    """How many there are in a list of token ids that is not empty."""
    return text.count(b",") + 1

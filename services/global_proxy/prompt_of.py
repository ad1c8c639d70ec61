"""What a request's prompt is to the policies: its size, its session, its bytes."""

from services.global_proxy.policies.base import Prompt
from services.global_proxy.request_body import RequestBody

_FIRST_GUESS = 4.0  # bytes a token, before any prompt has been counted
_WEIGHT = 0.05  # of each newly counted prompt
_FEWEST_BYTES = 64  # of a prompt that says something about the ratio: chat templates add to all of them
_DEFAULT_NEW_TOKENS = 256  # a guess where the client sets no limit


class PromptReader:
    """Estimates the size of text prompts; learns bytes per token from what P counts."""

    def __init__(self) -> None:
        self._bytes_per_token = _FIRST_GUESS

    def read(self, body: RequestBody, session: bytes | None) -> Prompt:
        """Args: session: the client's own header for it."""
        text = body.prompt_text
        num_tokens = body.num_token_ids or max(round(len(text) / self._bytes_per_token), 1)
        max_new_tokens = body.max_new_tokens
        if max_new_tokens is None or max_new_tokens >= 2**31:
            max_new_tokens = _DEFAULT_NEW_TOKENS
        if session is None and (name := body.session) is not None:
            session = name.encode("utf-8", "replace")
        return Prompt(num_tokens, max_new_tokens * body.n, session, text)

    def learn(self, prompt: Prompt, num_tokens: int) -> None:
        """P has counted the tokens of a text prompt, which from now on has this size."""
        if len(prompt.text) >= _FEWEST_BYTES:
            self._bytes_per_token += _WEIGHT * (len(prompt.text) / num_tokens - self._bytes_per_token)
        prompt.num_tokens = num_tokens

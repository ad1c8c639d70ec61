"""How long a request is expected to take until the last token of its answer, from the costs that were observed."""

from services.global_proxy.policies.base import Candidate, Prompt


def answer_s(candidate: Candidate, prompt: Prompt, num_cached_tokens: int = 0) -> float:
    """Of one engine that computes the prompt and the answer, behind and beside what it has to do."""
    num_there = candidate.num_tokens
    num_computed = max(prompt.num_tokens - num_cached_tokens, 0)
    return candidate.costs.prefill_s(num_computed, num_there) + tokens_s(candidate, prompt)


def tokens_s(candidate: Candidate, prompt: Prompt) -> float:
    """Of the answer's tokens, from the first to the last, on one engine."""
    num_new = num_new_tokens(prompt)
    num_tokens = candidate.num_tokens + prompt.num_tokens + num_new
    return num_new * candidate.costs.seconds_per_token(candidate.num_requests + 1, num_tokens)


def num_new_tokens(prompt: Prompt) -> int:
    return prompt.max_new_tokens if prompt.num_expected is None else prompt.num_expected

"""The blocks of a request, as vLLM's KV cache manager gives them."""

from typing import TypeAlias

BlockTables: TypeAlias = tuple[tuple[int, ...], ...]  # for each KV cache group, a request's blocks from token 0 on

NULL_BLOCK = 0  # vLLM's: no KV is kept of these tokens, they lie outside the attention window

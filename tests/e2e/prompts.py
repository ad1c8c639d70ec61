"""Prompts whose lengths and characters have tripped others: around the KV block's edges, and outside ASCII."""

from collections.abc import Callable

BLOCK_SIZE = 128  # vLLM's KV block on the CPU, tokens

_TEXT = (
    "A ship sailed from the old harbour before dawn, with a crew of nine and a hold full of salt. The captain kept "
    "a log of every cloud, every bird and every change of the wind; on the third day she wrote that the sea was calm. "
)

_OTHERS = (
    "The capital of France is",
    "1, 2, 3, 4,",
    "def fibonacci(n):\n    ",
    "从前有一座山，山上有一座庙，庙里有一个老和尚在讲故事。他说：",
    "日本の首都は東京です。中国の首都は",
    "🙂🚀🌍 Emoji are characters too: 🎉",
    "naïve café, Straße, Ελλάδα, Привет, שלום",
    "\n\n\t  leading white space",
    "A" * 64,
    '{"name": "Ada", "born": 1815, "works": ["',
)


def prompts(count_tokens: Callable[[str], int]) -> list[str]:
    """Twenty prompts of 1 to 1500 tokens, some of exactly one block and one token more or less."""
    lengths = (1, 2, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 2 * BLOCK_SIZE, 2 * BLOCK_SIZE + 1, 500, 1000, 1500)
    return [*_OTHERS, *(_of_length(length, count_tokens) for length in lengths)]


def _of_length(length: int, count_tokens: Callable[[str], int]) -> str:
    """A text of exactly so many tokens, beginning with its own length so that no two share a prefix."""
    if length == 1:
        return "A"
    text = f"{length} " + _TEXT * (1 + length // 20)
    low, high = 1, len(text)
    while low < high:  # the shortest text of at least that length
        middle = (low + high) // 2
        if count_tokens(text[:middle]) < length:
            low = middle + 1
        else:
            high = middle
    for cut in range(low, low + 40):
        if count_tokens(text[:cut]) == length:
            return text[:cut]
    raise AssertionError(f"no text of {length} tokens")

"""Where commands print: what a user has named is shown as it is, `[brackets]` and `:words:` too."""

from rich.console import Console


def plain_console(*, stderr: bool = False) -> Console:
    """Without markup: rich would take parts of paths and model names for it, or fail."""
    return Console(stderr=stderr, markup=False, emoji=False)

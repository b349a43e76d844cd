"""The form of messages about datasets."""

from collections.abc import Callable, Sequence

# A function that takes the text of a warning.
Warn = Callable[[str], None]

# The number of entries that a message names; it counts the others.
MAX_NAMED = 5


def named(items: Sequence[str]) -> str:
    """List the first few items, and count the rest."""
    rest = len(items) - MAX_NAMED
    return ", ".join(items[:MAX_NAMED]) + (f" and {rest} more" if rest > 0 else "")

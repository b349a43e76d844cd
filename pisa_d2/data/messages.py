from collections.abc import Callable, Sequence

# Takes the text of a warning.
Warn = Callable[[str], None]

# Entries of a kind that a message names; the others are counted.
MAX_NAMED = 5


def named(items: Sequence[str]) -> str:
    """The first few items, and how many more there are."""
    rest = len(items) - MAX_NAMED
    return ", ".join(items[:MAX_NAMED]) + (f" and {rest} more" if rest > 0 else "")

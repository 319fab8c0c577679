"""Texts to be recognised in a text that comes in pieces: what may still become one of them."""

from collections.abc import Collection


def num_undecided(text: str, markers: Collection[str]) -> int:
    """Length of the longest end of `text` that some marker starts with, and is longer than."""
    longest = max((len(marker) for marker in markers), default=0)
    for size in range(min(longest - 1, len(text)), 0, -1):
        if any(marker.startswith(text[-size:]) for marker in markers):
            return size
    return 0

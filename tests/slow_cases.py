"""Parameters of a test of which only some are quick."""

from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def with_slow(quick: Sequence[Any], all_of_them: Iterable[Any]) -> list[Any]:
    """What is not among the quick ones is a slow test."""
    others = [pytest.param(case, marks=pytest.mark.slow) for case in all_of_them if case not in quick]
    return [*quick, *others]

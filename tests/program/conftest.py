"""--update-snapshots rewrites the Program dumps beside these tests; look at the diff before it is committed."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-snapshots", action="store_true", help="rewrite tests/program/snapshots")

"""Options of ``pytest bench``."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.cases import OPERATIONS


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="every shape that fits, not only the quick ones")
    parser.addoption("--operation", choices=OPERATIONS, help="this one only")
    parser.addoption("--medians", type=Path, metavar="FILE", help="add each median at once, a line of JSON")

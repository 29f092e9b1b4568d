"""Options of ``pytest bench/kernels``."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="every shape that fits, not only the quick ones")

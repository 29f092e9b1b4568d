"""A pytest plugin: with ``--keep K``, every model that a test makes is routed at that budget."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import reroute


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--keep", type=float, help="budget at which all models are routed")


@pytest.fixture(autouse=True)
def _routing(request: pytest.FixtureRequest) -> Iterator[None]:
    keep = request.config.getoption("--keep")
    if keep is not None:
        reroute.enable(keep=keep)
    yield
    if keep is not None:
        reroute.disable()

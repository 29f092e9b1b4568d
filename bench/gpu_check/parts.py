"""A plugin of pytest: with ``-p bench.gpu_check.parts --part 0/3``, every third test, the first included.

So a file of tests that compile much can run in several programs at a time.
"""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", required=True, metavar="I/N", help="test I, I + N, I + 2 N, …")


@pytest.hookimpl(trylast=True)  # after the tests that do not run on a device are gone
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    part, parts = map(int, config.getoption("--part").split("/"))
    others = [item for i, item in enumerate(items) if i % parts != part]
    config.hook.pytest_deselected(items=others)
    items[:] = items[part::parts]

"""Waits for the kernel tests on each executor (executor_runs.py), which conftest.py starts before all other tests.

``--sample`` runs the first case of each test, on some executors.
"""

from __future__ import annotations

import pytest
from executor_runs import why_not
from executors import NAMES


@pytest.mark.parametrize("name", NAMES)
def test_kernels(name: str, request: pytest.FixtureRequest, pytestconfig: pytest.Config) -> None:
    if (why := why_not(name, sample=pytestconfig.getoption("--sample", False))) is not None:
        pytest.skip(why)
    if (failure := request.getfixturevalue("executor_runs")[name].failure()) is not None:
        pytest.fail(failure, pytrace=False)

"""``pytest tests/kernels --executor NAME`` chooses how Triton kernels run in a process (executors.py).

A test runs on executors if it uses the fixture ``executor`` or ``device``. Without --executor those tests are
left to test_executors.py, which starts a process for each executor that can run here.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from executors import NAMES, SCHEDULES, Executor, poisoned
from hypothesis import HealthCheck, settings

HERE = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--executor", choices=NAMES, help="how Triton kernels run in this process")
    parser.addoption("--examples", type=int, help="random cases for each property of a kernel: 4, or 2 of a sample")
    parser.addoption("--schedules", type=int, default=SCHEDULES, help="under how many simt runs each launch")
    parser.addoption("--all-executors", action="store_true", help="every test on every executor that can run here")
    parser.addoption("--sample", action="store_true", help="only the first case of each test that runs on executors")


def chosen(config: pytest.Config) -> Executor | None:
    # Of a run over all of tests/ this is not an initial conftest, and the option is unknown.
    name = config.getoption("--executor", None)
    return None if name is None else Executor(name)


def pytest_configure(config: pytest.Config) -> None:
    if (executor := chosen(config)) is not None:
        try:
            executor.start(config.getoption("--schedules"))
        except RuntimeError as error:
            raise pytest.UsageError(f"--executor {executor.name}: {error}") from None
        # A new shape compiles, so a first example may take seconds.
        settings.register_profile(
            "executor",
            settings(),
            max_examples=config.getoption("--examples") or (2 if config.getoption("--sample") else 4),
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        settings.load_profile("executor")


def pytest_report_header(config: pytest.Config) -> str | None:
    executor = chosen(config)
    return f"kernels run on: {executor.name}" if executor else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests that use an executor if there is one, and the others if there is none."""
    wanted = chosen(config) is not None
    kept = [i for i in items if HERE not in i.path.parents or ("executor" in getattr(i, "fixturenames", ())) == wanted]
    if wanted and config.getoption("--sample"):
        first = {_function(item): item for item in reversed(kept)}
        kept = [item for item in kept if first[_function(item)] is item]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = sorted(kept, key=lambda item: item.path != HERE / "test_executors.py")  # the longest ones first


def _function(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[0]


@pytest.fixture(scope="session")
def executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    """How kernels run: ``.name``, ``.kind`` and ``.device``. Uninitialised memory is poisoned."""
    executor = chosen(request.config)
    assert executor is not None
    with poisoned(executor):
        yield executor


@pytest.fixture(scope="session")
def device(executor: Executor) -> torch.device:
    """Where the tensors go."""
    return executor.device


@pytest.fixture(scope="session")
def ops(executor: Executor) -> Any:
    """The operations as PyTorch operators, which launch the kernels."""
    from reroute_kernels import ops

    return ops


@pytest.fixture(scope="module")
def kernel(executor: Executor, request: pytest.FixtureRequest) -> Any:
    """The module of the kernel that a file tests, which names it in ``KERNEL``."""
    return import_module(f"reroute_kernels.triton_kernels.{request.module.KERNEL}")


@pytest.fixture
def seeded() -> None:
    """PyTorch draws the same values in every run."""
    torch.manual_seed(0)


@pytest.fixture
def launches(executor: Executor) -> Iterator[list[Any]]:
    """simt's reports of the launches of a test; skipped where nothing counts traffic."""
    if executor.kind != "simt":
        pytest.skip("only simt counts traffic")
    from simt.driver import capture

    with capture() as reports:
        yield reports

"""A pytest plugin: with ``--keep K``, every model that a test makes is routed at that budget.

The report of a test has how many prefills were seen (``prefills``), and why a model was not routed (``refused``).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest

import reroute
from reroute.handle import Handle


class Refusals(logging.Handler):
    """What the logger ``reroute`` says of models that are not routed."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "is not routed" in record.getMessage():
            self.messages.append(record.getMessage())


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--keep", type=float, help="budget at which all models are routed")


@pytest.fixture(autouse=True)
def _routing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    keep = request.config.getoption("--keep")
    if keep is None:
        yield
        return
    refusals, handles, attach = Refusals(), list[Handle](), Handle.attach

    def noted(handle: Handle, *args: Any) -> None:
        handles.append(handle)  # the model, by which it could be found, may be gone when the test has ended
        attach(handle, *args)

    monkeypatch.setattr(Handle, "attach", noted)
    logging.getLogger("reroute").addHandler(refusals)
    reroute.enable(keep=keep)
    try:
        yield
    finally:
        reroute.disable()
        logging.getLogger("reroute").removeHandler(refusals)
    request.node.user_properties.append(("prefills", sum(handle.totals().prefills for handle in handles)))
    request.node.user_properties.extend(("refused", message) for message in refusals.messages)

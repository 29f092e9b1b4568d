"""Methods by name: a policy of schedules and a ranker. One file each; see ``Method`` for how to write another."""

from __future__ import annotations

from ..errors import RerouteError, unknown
from .base import Method
from .fastv import FastV
from .pdrop import PDrop
from .random import Random

__all__ = ["METHODS", "FastV", "Method", "PDrop", "Random", "get"]

METHODS: dict[str, type[Method]] = {method.name: method for method in (FastV, PDrop, Random)}
"""Every method that can be asked for by name. Register your own here."""


def get(method: str | Method) -> Method:
    """The method itself, or the one of this name with its default settings.

    Raises:
        RerouteError: no such method; lists the known ones.
    """
    if isinstance(method, Method):
        return method
    if not isinstance(method, str):
        raise RerouteError(
            f"method must be one of the names {', '.join(sorted(METHODS))} or a Method such as "
            f"FastV(ratio=0.25), not {method!r}."
        )
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    return METHODS[method]()

"""Methods by name: a policy of schedules and a ranker. One file each; see ``Method`` for how to write another."""

from __future__ import annotations

from ..checks import shown
from ..errors import RerouteError
from ..rankers import RANKERS, Ranker
from ..registry import Registry
from .base import Method
from .fastv import FastV
from .pdrop import PDrop
from .random import Random

__all__ = ["METHODS", "FastV", "Method", "PDrop", "Random", "get"]

METHODS: Registry[Method] = Registry(
    "method", "reroute.methods", {method.name: method for method in (FastV, PDrop, Random)}, RANKERS
)
"""Every method that can be asked for by name. Register your own here."""


def get(method: str | Method) -> Method:
    """The method itself, or the one of this name with its default settings.

    Raises:
        RerouteError: no such method, which lists the known ones; or one whose ranker is none.
    """
    if isinstance(method, Method):
        if not isinstance(method.ranker, Ranker):
            raise RerouteError(
                f"The ranker of {type(method).__name__} must be a Ranker such as RandomScores(), not "
                f"{shown(method.ranker)}."
            )
        return method
    if not isinstance(method, str):
        raise RerouteError(
            f"method must be one of the names {', '.join(sorted(METHODS))} or a Method such as "
            f"FastV(ratio=0.25), not {shown(method)}."
        )
    return METHODS.find(method)()

"""Methods by name: one file each; see ``Method`` for how to write another."""

from __future__ import annotations

from ..checks import shown
from ..errors import RerouteError
from ..rankers import RANKERS
from ..registry import Registry
from .base import Method
from .cdpruner import CDPruner
from .dart import DART
from .diverse import Diverse
from .divprune import DivPrune
from .fastv import FastV
from .nuwa import Nuwa
from .oracle import Oracle
from .pdrop import PDrop
from .random import Random
from .sparsevlm import SparseVLM
from .visionzip import VisionZip
from .vscan import VScan

__all__ = [
    "DART",
    "METHODS",
    "CDPruner",
    "DivPrune",
    "Diverse",
    "FastV",
    "Method",
    "Nuwa",
    "Oracle",
    "PDrop",
    "Random",
    "SparseVLM",
    "VScan",
    "VisionZip",
    "get",
]

METHODS: Registry[Method] = Registry(
    "method",
    "reroute.methods",
    {
        method.name: method
        for method in (CDPruner, DART, DivPrune, Diverse, FastV, Nuwa, PDrop, Random, SparseVLM, VisionZip, VScan)
    },
    RANKERS,
)
"""Every method that can be asked for by name. Register your own here. ``Oracle`` is none, as it needs a record."""


def get(method: str | Method) -> Method:
    """The method itself, or the one of this name with its default settings.

    Raises:
        RerouteError: no such method, which lists the known ones.
    """
    if isinstance(method, Method):
        return method
    if not isinstance(method, str):
        raise RerouteError(
            f"method must be one of the names {', '.join(sorted(METHODS))} or a Method such as "
            f"FastV(ratio=0.25), not {shown(method)}."
        )
    return METHODS.find(method)()

"""Recoverable visual-token routing: faster prefill for vision-language models, no cut final.

``reroute.enable(model, keep=0.33)`` switches it on; see ``enable`` for the rest.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import errors

if TYPE_CHECKING:
    from . import calibration, methods, rankers
    from .api import disable, enable, handle_of
    from .calibration import calibrate
    from .config import RoutingConfig
    from .core.schedule import Schedule
    from .graphs import Graphs
    from .handle import Handle
    from .oracle import record_attention
    from .process_handle import ProcessHandle

__all__ = [
    "Graphs",
    "Handle",
    "ProcessHandle",
    "RoutingConfig",
    "Schedule",
    "calibrate",
    "calibration",
    "disable",
    "enable",
    "errors",
    "handle_of",
    "methods",
    "rankers",
    "record_attention",
]

__version__ = "0.1.0"

# Torch and Transformers take seconds to import: only when something needs them, so that `reroute --help` is instant.
_LAZY = {
    "Graphs": ".graphs",
    "Handle": ".handle",
    "ProcessHandle": ".process_handle",
    "RoutingConfig": ".config",
    "Schedule": ".core.schedule",
    "calibrate": ".calibration",
    "disable": ".api",
    "enable": ".api",
    "handle_of": ".api",
    "record_attention": ".oracle",
}


def __getattr__(name: str) -> Any:
    if name in ("calibration", "methods", "rankers"):
        return import_module(f".{name}", __name__)
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Recoverable visual-token routing: faster prefill for vision-language models, nothing lost.

``reroute.enable(model, method="pdrop", keep=0.33)`` switches it on; see ``enable`` for the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import errors, methods
from .schedule import Schedule
from .switch import disable, enable

if TYPE_CHECKING:
    from .handle import Handle

__all__ = ["Handle", "Schedule", "disable", "enable", "errors", "methods"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Transformers takes seconds to import: only when a model is there to be routed.
    if name == "Handle":
        from .handle import Handle

        return Handle
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""What can go wrong, always with a sentence that says what to do instead."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["RerouteError", "UnsupportedCacheError", "UnsupportedModelError", "unknown"]


class RerouteError(ValueError):
    """A request that cannot be carried out correctly; the message says what to do instead."""


class UnsupportedModelError(RerouteError):
    """The model, or a part of it, is of a kind that cannot be routed."""


class UnsupportedCacheError(RerouteError):
    """The KV cache cannot hold layers of different lengths."""


def unknown(kind: str, name: object, known: Iterable[str]) -> RerouteError:
    """The error for a ``name`` that is not among ``known``: lists these and suggests the closest."""
    known = sorted(known)
    close = get_close_matches(str(name).lower(), known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return RerouteError(f"Unknown {kind} {name!r}; known: {', '.join(known)}.{hint}")

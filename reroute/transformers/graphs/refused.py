"""What a capture finds out that no fact has told."""

from __future__ import annotations

__all__ = ["CannotCapture"]


class CannotCapture(Exception):
    """A prefill cannot be captured; its text is a clause that says why."""

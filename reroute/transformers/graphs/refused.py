"""What a capture finds out that no fact has told."""

from __future__ import annotations

__all__ = ["CannotCapture", "CaptureFails"]


class CannotCapture(Exception):
    """A prefill cannot be captured; its text is a clause that says why."""


class CaptureFails(CannotCapture):
    """CUDA has refused something that the decoder does, so it will with prompts of any class."""

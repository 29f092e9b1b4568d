"""What a capture finds out that no fact has told."""

from __future__ import annotations

__all__ = ["CannotCapture", "CaptureFails", "LacksMemory", "NotNow"]


class CannotCapture(Exception):
    """A prefill cannot be captured; its text is a clause that says why."""


class CaptureFails(CannotCapture):
    """CUDA has refused something that the decoder does, so it will with prompts of any class."""


class LacksMemory(CannotCapture):
    """There is no memory for it. What was taken until then has to be given back, or eager prefills lack it too."""


class NotNow(CannotCapture):
    """Others keep the device from being captured; it may be at the next prompt."""

"""What becomes of visual tokens that are not kept. Imports nothing: the command line knows it without PyTorch."""

from __future__ import annotations

from typing import Literal

__all__ = ["Action"]

Action = Literal["route", "remove"]
"""``route`` defers them, ``remove`` deletes them."""

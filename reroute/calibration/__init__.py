"""Which layers decide and how many visual tokens they keep, found on prompts of one's own without labels."""

from __future__ import annotations

from .driver import calibrate
from .report import Calibration, Comparison

__all__ = ["Calibration", "Comparison", "calibrate"]

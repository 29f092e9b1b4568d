"""Processes that must be over."""

from __future__ import annotations

import time
from pathlib import Path


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def assert_ends(process: int) -> None:
    """It has been sent the signal."""
    for _ in range(1000):
        if not is_running(process):
            return
        time.sleep(0.01)
    raise AssertionError(f"{process} still runs")

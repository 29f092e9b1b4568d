"""What a Triton kernel launches and moves, counted by simt (find_simt.py)."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

from .find_simt import SIMT_CACHE, import_simt

__all__ = ["ARCH", "Traffic", "count_traffic"]

ARCH = 90


@dataclass(frozen=True)
class Traffic:
    """Sums over the launches of one operation.

    requested: bytes that threads ask for. minimal: distinct bytes, read and written. sectors: of 32 bytes, repeats
    included. instructions: of warps.
    """

    launches: int
    requested: int
    minimal: int
    sectors: int
    instructions: int


def count_traffic(run: Callable[[], object]) -> Traffic:
    """Execute the launches of ``run`` on CPU tensors and count; RuntimeError without simt. Imports triton."""
    simt, quick = import_simt(), {"check_races": False, "check_uninit": False}
    with mock.patch.dict(os.environ, SIMT_CACHE), simt.installed(arch=ARCH, **quick) as reports:
        run()
    return Traffic(
        launches=len(reports),
        requested=sum(r.bytes_requested for r in reports),
        minimal=sum(r.minimal_bytes for r in reports),
        sectors=sum(r.bytes_moved for r in reports) // 32,
        instructions=sum(r.warp_instructions for r in reports),
    )

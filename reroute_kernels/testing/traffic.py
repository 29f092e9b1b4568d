"""What a Triton kernel launches and moves, counted by simt, which executes compiled kernels on the CPU.

simt is a tool of its own and optional; it is found at $SIMT_PATH or beside the repository at ../shared/simt.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

__all__ = ["MISSING", "SIMT_CACHE", "Counts", "count", "simt_path"]

ROOT = Path(__file__).parents[1]
MISSING = "simt is neither at $SIMT_PATH nor at ../shared/simt"
ARCH = 90
SIMT_CACHE = {"TRITON_CACHE_DIR": str(Path.home() / ".triton" / "cache-simt")}
"""Environment under which simt compiles: Triton 3.6 would take its cached PTX for machine code."""


def simt_path() -> Path | None:
    """The folder to import simt from."""
    folder = Path(os.environ.get("SIMT_PATH") or ROOT.parent / "shared" / "simt")
    return folder if (folder / "simt" / "__init__.py").exists() else None


@dataclass(frozen=True)
class Counts:
    """Sums over the launches of one operation.

    requested: bytes that threads ask for. minimal: distinct bytes, read and written. sectors: of 32 bytes, repeats
    included. instructions: of warps.
    """

    launches: int
    requested: int
    minimal: int
    sectors: int
    instructions: int


def count(run: Callable[[], object]) -> Counts:
    """Execute the launches of ``run`` on CPU tensors and count; RuntimeError without simt. Imports triton."""
    path = simt_path()
    if path is None:
        raise RuntimeError(MISSING)
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))
    import simt

    quick = {"check_races": False, "check_uninit": False}
    with mock.patch.dict(os.environ, SIMT_CACHE), simt.installed(arch=ARCH, **quick) as reports:
        run()
    return Counts(
        launches=len(reports),
        requested=sum(r.bytes_requested for r in reports),
        minimal=sum(r.minimal_bytes for r in reports),
        sectors=sum(r.bytes_moved for r in reports) // 32,
        instructions=sum(r.warp_instructions for r in reports),
    )

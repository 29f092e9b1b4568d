"""simt, which executes compiled kernels on the CPU: a tool of its own, and optional.

It is found at $SIMT_PATH or beside the repository at ../shared/simt.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

__all__ = ["MISSING", "SIMT_CACHE", "import_simt", "simt_path"]

ROOT = Path(__file__).parents[2]
MISSING = "simt is neither at $SIMT_PATH nor at ../shared/simt"
SIMT_CACHE = {"TRITON_CACHE_DIR": str(Path.home() / ".triton" / "cache-simt")}
"""Environment under which simt compiles: Triton 3.6 would take its cached PTX for machine code."""


def simt_path() -> Path | None:
    """The folder to import simt from."""
    folder = Path(os.environ.get("SIMT_PATH") or ROOT.parent / "shared" / "simt")
    return folder if (folder / "simt" / "__init__.py").exists() else None


def import_simt() -> Any:
    """The module; RuntimeError without it. Imports triton."""
    path = simt_path()
    if path is None:
        raise RuntimeError(MISSING)
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))
    return importlib.import_module("simt")

"""Where results come from: the machine, the versions and the code."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from typing import Any

from .plan import ROOT

__all__ = ["difference", "machine", "printed", "source", "versions"]

COMMON = ("gpu", "cuda", "torch", "triton", "transformers", "python")
"""What all results of one folder have in common."""
CARD = "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,temperature.gpu,power.limit"
MODELLED = "for an H100 SXM (bench.kernels.roofline)"


def versions() -> dict[str, Any]:
    """Of a process that has a GPU. The other functions need none, and do not import torch."""
    import torch

    gpu = torch.cuda.get_device_properties(0)
    return {
        "gpu": gpu.name,
        "memory": gpu.total_memory,
        "processors": gpu.multi_processor_count,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": metadata.version("triton"),
        "transformers": metadata.version("transformers"),
        "python": platform.python_version(),
        "modelled": MODELLED if "H100" in gpu.name else f"{MODELLED}, which this is not",
    }


def printed(output: str) -> dict[str, Any]:
    """The versions in what the smoke test printed; none if it did not come so far."""
    for line in output.splitlines():
        if line.startswith('{"gpu"'):
            found: dict[str, Any] = json.loads(line)
            return found
    return {}


def difference(known: dict[str, Any], here: dict[str, Any]) -> str:
    """What keeps results apart; nothing, if either is unknown."""
    pairs = {name: (known[name], here[name]) for name in COMMON if name in known and name in here}
    return ", ".join(f"{name} {old}, here {new}" for name, (old, new) in pairs.items() if old != new)


def machine() -> dict[str, Any]:
    """What can be told without torch."""
    card = _output("nvidia-smi", f"--query-gpu={CARD}", "--format=csv,noheader")
    return {
        CARD: card,
        "cores": len(os.sched_getaffinity(0)),
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def source() -> str:
    """A digest of the packages, for where there is no git."""
    digest = hashlib.sha256()
    for package in ("reroute", "reroute_kernels"):
        for file in sorted((ROOT / package).rglob("*.py")):
            digest.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def _commit() -> str | None:
    """Of the working tree, with ``+`` if it has changes; None if that is not known."""
    commit = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    return commit and commit + ("+" if _output("git", "-C", str(ROOT), "status", "--porcelain") else "")


def _output(*command: str) -> str | None:
    """What a program prints, if it is there and does not fail."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=15, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None

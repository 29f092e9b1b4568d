"""The kernel package under another name, as a kernel hub loads it, beside the installed one."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CODE = """
import sys, torch
import reroute_kernels.ops, hub_copy.ops
from hub_copy import PagedPool, SelectMetadata
assert torch.ops.hub_copy.defer.default is hub_copy.ops.defer
assert torch.ops.reroute_kernels.defer.default is reroute_kernels.ops.defer
assert hub_copy.ops.defer is not reroute_kernels.ops.defer
files = {getattr(module, "__file__", None) for name, module in sys.modules.items() if name.startswith("hub_copy")}
assert not any("/reroute_kernels/" in file for file in files if file), files
"""


def test_two_copies_are_apart(tmp_path: Path) -> None:
    """Each imports itself only, and registers operators under its own name."""
    shutil.copytree(ROOT / "reroute_kernels", tmp_path / "hub_copy", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": f"{tmp_path}:{ROOT}"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_absolute_import_of_itself() -> None:
    for file in (ROOT / "reroute_kernels").rglob("*.py"):
        lines = [line.strip() for line in file.read_text().splitlines()]
        assert not [line for line in lines if line.startswith(("from reroute", "import reroute"))], file

"""Files that are written as a whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from .errors import RerouteError

__all__ = ["check_writable", "write_text"]


def check_writable(path: Path) -> None:
    """Find out early, and without leaving a trace, whether ``path`` can be written.

    Raises:
        RerouteError: it cannot; says why.
    """
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "not a regular file"
        raise RerouteError(f"Cannot write {path}: it is {kind}. Name a file, such as page.html.")
    if not path.parent.is_dir():
        raise RerouteError(f"Cannot write {path}: the folder {path.parent} does not exist.")
    if not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise RerouteError(f"Cannot write {path}: no permission. Choose another place with --out.")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise RerouteError(f"Cannot write {path}: {error.strerror}. Choose another place with --out.") from None


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, which has its former content until all of it is there.

    Raises:
        RerouteError: the file cannot be written.
    """
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise RerouteError(f"Cannot write {path}: {error.strerror}. Choose another place with --out.") from None

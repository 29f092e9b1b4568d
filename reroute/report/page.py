"""The page: one HTML file that holds its style, its script, its pictures and its numbers."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from ..errors import RerouteError
from .scene import Scene

__all__ = ["Page", "check_writable", "write"]


@dataclass(frozen=True)
class Page:
    """What the page shows.

    Plain text, but for ``table`` and ``charts``, which are HTML. ``facts`` are (figure, what it is) pairs.
    """

    title: str
    lead: str
    scenes: Sequence[Scene]
    scenes_lead: str
    table: str
    notes: Sequence[str]
    charts: str = ""
    findings: Sequence[str] = ()
    facts: Sequence[tuple[str, str]] = ()

    def render(self) -> str:
        """The HTML text. It refers to nothing outside itself."""
        data = json.dumps({"scenes": [scene.to_json() for scene in self.scenes]}, separators=(",", ":"))
        return Template(_part("page.html")).substitute(
            title=escape(self.title),
            lead=escape(self.lead),
            findings="".join(f"<p>{escape(sentence)}</p>" for sentence in self.findings),
            facts="".join(f"<li><b>{escape(figure)}</b> {escape(what)}</li>" for figure, what in self.facts),
            scenes_lead=escape(self.scenes_lead),
            table=self.table,
            charts=self.charts,
            notes="".join(f"<li>{escape(note)}</li>" for note in self.notes),
            css=_part("page.css"),
            js=_part("page.js"),
            data=data.replace("<", "\\u003c"),  # or "</script>" in a question would end the block
        )


def _part(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


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


def write(page: Page, path: Path) -> None:
    """Write the page as a whole or not at all.

    Raises:
        RerouteError: the file cannot be written.
    """
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fresh.write_text(page.render(), encoding="utf-8")
        fresh.replace(path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise RerouteError(f"Cannot write {path}: {error.strerror}. Choose another place with --out.") from None

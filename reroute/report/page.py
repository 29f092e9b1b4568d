"""The page: one HTML file that holds its style, its script, its pictures and its numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from ..files import write_text
from .scene import Scene

__all__ = ["Page", "write"]


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


def write(page: Page, path: Path) -> None:
    """Write the page as a whole or not at all.

    Raises:
        RerouteError: the file cannot be written.
    """
    write_text(path, page.render())

"""What a run showed, as a table for the terminal and as one self-contained HTML page."""

from __future__ import annotations

from .chart import charts
from .findings import findings
from .page import Page, write
from .results import Cost, Difference, Results, Row, Setup, paired
from .scene import Answer, Routed, Scene, Stage
from .table import html_costs, html_cuts, html_table, text_costs, text_cuts, text_table

__all__ = [
    "Answer",
    "Cost",
    "Difference",
    "Page",
    "Results",
    "Routed",
    "Row",
    "Scene",
    "Setup",
    "Stage",
    "charts",
    "findings",
    "html_costs",
    "html_cuts",
    "html_table",
    "paired",
    "text_costs",
    "text_cuts",
    "text_table",
    "write",
]

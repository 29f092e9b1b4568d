"""docs/reference/api.md is what docs/reference/generate.py writes today."""

from __future__ import annotations

import runpy
from pathlib import Path

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"


def test_the_api_page_is_up_to_date() -> None:
    page = runpy.run_path(str(REFERENCE / "generate.py"))["page"]
    stale = "run python docs/reference/generate.py"
    assert (REFERENCE / "api.md").read_text() == page(), stale

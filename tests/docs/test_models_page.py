"""docs/reference/models.md has every type of Transformers, and says of each what is so today."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from reroute.transformers import REFUSED, ROUTED

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/reference/models.md").read_text()
ROWS = {row[0]: row[2:] for row in re.findall(r"^\| (\S+) \| `(\w+)` \| (\S+) \| (.+) \|$", PAGE, re.MULTILINE)}
IS_OF_THIS_RELEASE = f"Transformers {transformers.__version__};" in PAGE
of_this_release = pytest.mark.skipif(not IS_OF_THIS_RELEASE, reason="the page is of another release of Transformers")


@of_this_release
def test_every_type_is_on_the_page() -> None:
    assert ROWS.keys() == dict(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES).keys()


def test_the_page_says_what_the_package_says() -> None:
    assert {kind for kind, (status, _) in ROWS.items() if status == "**routed**"} == set(ROUTED)
    assert {kind: why for kind, (status, why) in ROWS.items() if status == "refused"} == REFUSED
    assert f"**{len(ROUTED)} of {len(ROWS)} are routed**" in PAGE
    for page in ("README.md", "docs/reference/limits.md"):
        assert f"[{len(ROUTED)} of the {len(ROWS)} image-text-to-text types]" in (ROOT / page).read_text()


@pytest.mark.slow
@of_this_release
def test_the_page_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every type is built and asked."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "tests/families"), *sys.path])
    page: Any = runpy.run_path(str(ROOT / "docs/reference/generate_models.py"))["page"]
    assert page() == PAGE, "run python docs/reference/generate_models.py"

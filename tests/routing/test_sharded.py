"""Models whose weights FSDP2 shards: each of two processes gets what it would get alone, or a refusal.

The processes run once, and each test looks at what became of one check.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import sharded_checks
from two_processes import Outcomes, in_two_processes


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    folder: Path = tmp_path_factory.mktemp("sharded")
    return in_two_processes("sharded_checks", folder)


@pytest.mark.parametrize("check", sharded_checks.CHECKS)
def test_in_two_processes(check: str, outcomes: Outcomes) -> None:
    assert check in outcomes, "a check before it failed"
    assert not outcomes[check], outcomes[check]

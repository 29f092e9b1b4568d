"""Models that two processes share: the tokens and logits of one process, or a refusal in both.

The processes run once, and each test looks at what became of one check.
"""

from __future__ import annotations

from pathlib import Path

import parallel_checks
import pytest
from two_processes import Outcomes, in_two_processes


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    pytest.importorskip("accelerate")  # with which Transformers loads weights where they belong
    folder: Path = tmp_path_factory.mktemp("parallel")
    return in_two_processes("parallel_checks", folder)


@pytest.mark.parametrize("check", parallel_checks.CHECKS)
def test_in_two_processes(check: str, outcomes: Outcomes) -> None:
    assert check in outcomes, "a check before it failed"
    assert not outcomes[check], outcomes[check]

"""Types of models, each spread over two processes: see ``split_types``."""

from __future__ import annotations

from pathlib import Path

import pytest
import split_types
from models import TRANSFORMERS
from two_processes import Outcomes, in_two_processes


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    pytest.importorskip("accelerate")
    if TRANSFORMERS < (5, 24):
        pytest.skip("of some types this release splits other parts")
    folder: Path = tmp_path_factory.mktemp("types")
    return in_two_processes("split_types", folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", split_types.CHECKS)
def test_a_type_in_two_processes(kind: str, outcomes: Outcomes) -> None:
    assert kind in outcomes, "a type before it failed"
    assert not outcomes[kind], outcomes[kind]

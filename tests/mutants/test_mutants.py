"""The list of mutants fits the kernels as they are, and what runs it (``python tests/mutants``) judges rightly."""

from __future__ import annotations

import ast
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from mutants import MUTANTS
from mutation import KERNELS, NO_EXECUTOR, ROOT, Mutant
from runner import Tree, judge


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_it_can_be_planted(mutant: Mutant) -> None:
    """What it changes is there once, the file is Python still, and its tests and executors exist."""
    ast.parse(mutant.applied((ROOT / KERNELS / mutant.file).read_text()))
    assert mutant.old != mutant.new
    assert (ROOT / shlex.split(mutant.tests)[0]).exists()
    assert mutant.executors
    assert not (mutant.equivalent and mutant.unseen)


def test_the_list_is_long_and_hardly_any_mutant_lives() -> None:
    assert not [name for name, count in Counter(mutant.name for mutant in MUTANTS).items() if count > 1]
    assert not [mutant for mutant in MUTANTS if MUTANTS.count(mutant) > 1]
    changing = [mutant for mutant in MUTANTS if not mutant.equivalent]
    assert len(changing) >= 30
    assert sum(bool(mutant.unseen) for mutant in changing) <= 0.05 * len(changing)


FUSED = next(mutant for mutant in MUTANTS if mutant.name == "score-fp-fusion")
PROBE = """
from pathlib import Path
def test_other(): pass
def test_fault(): assert "enable_fp_fusion=True" not in Path("reroute_kernels/triton_kernels/score.py").read_text()
"""


def test_planting(tmp_path: Path) -> None:
    """The fault is there while its tests run, and only then; a run of no test says nothing."""
    tree, mutant = Tree(tmp_path), replace(FUSED, executors=(NO_EXECUTOR,))
    (tmp_path / "tests/test_probe.py").write_text(PROBE)
    assert tree.killer(replace(mutant, tests="tests/test_probe.py")) == ("tests/test_probe.py::test_fault", NO_EXECUTOR)
    assert tree.failure(["tests/test_probe.py"], NO_EXECUTOR) == ""
    with pytest.raises(RuntimeError, match="says nothing about the kernels"):
        tree.killer(replace(mutant, tests="tests/test_probe.py -k no_such_test"))


class Judged(Tree):
    """A mutant was killed or not, by a test that passes otherwise or not."""

    def __init__(self, killed: bool, passes: bool) -> None:
        self._killed, self._passes = killed, passes

    def killer(self, mutant: Mutant) -> tuple[str, str]:
        return ("a.py::test", "simt:90") if self._killed else ("", "")

    def failure(self, tests: Sequence[str], executor: str) -> str:
        return "" if self._passes else "a.py::test"


@pytest.mark.parametrize(
    ("killed", "passes", "equivalent", "wrong"),
    [
        (True, True, "", []),
        (False, True, "", ["score-fp-fusion: SURVIVED"]),
        (False, True, "a reason", []),
        (True, True, "a reason", ["score-fp-fusion: simt:90: a.py::test"]),
        (True, False, "", ["a.py::test on simt:90 fails where nothing was planted"]),
    ],
)
def test_verdicts(killed: bool, passes: bool, equivalent: str, wrong: list[str]) -> None:
    assert judge(Judged(killed, passes), [replace(FUSED, equivalent=equivalent)], lambda _: None) == wrong

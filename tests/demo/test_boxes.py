from __future__ import annotations

import pytest

from reroute.demo.tinyvlm.boxes import BIN, answer_box, overlap
from reroute.demo.tinyvlm.vocabulary import tokens


def test_answer_box() -> None:
    assert answer_box("<3> <10> <8> <15>") == (3 * BIN, 10 * BIN, 9 * BIN, 16 * BIN)
    assert answer_box("<3> <10> <8> <15> </s> <1>") == answer_box("<3> <10> <8> <15>")
    assert answer_box(tokens(["<3>", "<10>", "<8>", "<15>", "</s>"])) == (9.0, 30.0, 27.0, 48.0)
    for text in ("", "seven", "<3> <10> <8>", "<3> <10> seven <15>", "<8> <1> <3> <2>"):
        assert answer_box(text) is None
    assert answer_box("<32> <1> <40> <2>") is None


def test_overlap() -> None:
    assert overlap((0, 0, 2, 2), (0, 0, 2, 2)) == 1
    assert overlap((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert overlap((0, 0, 2, 2), (2, 0, 3, 2)) == 0

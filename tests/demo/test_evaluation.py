from __future__ import annotations

import numpy as np
import pytest

from reroute.demo.tinyvlm import probes
from reroute.demo.tinyvlm.evaluation import Outcome, score, summarise, summarise_kinds, tally
from reroute.demo.tinyvlm.examples import COUNTS, Example, examples
from reroute.demo.tinyvlm.questions import KINDS

FEW = dict.fromkeys(COUNTS, 4)


@pytest.fixture(scope="module")
def few() -> list[Example]:
    return examples("validation", FEW)


def test_examples_are_deterministic(few: list[Example]) -> None:
    again = examples("validation", FEW)
    for a, b in zip(few, again, strict=True):
        assert (a.question, a.answer, a.box, a.digits) == (b.question, b.answer, b.box, b.digits)
        np.testing.assert_array_equal(np.asarray(a.image), np.asarray(b.image))
    other = examples("validation", FEW, seed=1)
    assert [e.box for e in other] != [e.box for e in few]
    assert [e.box for e in examples("train", FEW)] != [e.box for e in few]


def test_fewer_examples_are_the_first_ones(few: list[Example]) -> None:
    hops = [e for e in few if e.kind == "hop"]
    alone = examples("validation", {"hop": 2})
    assert [(e.question, e.box) for e in alone] == [(e.question, e.box) for e in hops[:2]]


def test_examples_say_what_they_are(few: list[Example]) -> None:
    assert [e.kind for e in few] == [kind for kind in FEW for _ in range(4)]
    assert {e.family for e in few} == {
        *("one-hop grounding", "two-hop grounding", "one-hop VQA", "two-hop VQA"),
        *("riddle grounding", "riddle VQA"),
    }
    for e in few:
        assert e.image.size == (96, 96)
        assert e.image.mode == "RGB"
        assert (e.box is None) == (e.target is None)
        assert (e.referent is not None) == (KINDS[e.kind].hops == 2)
        if e.target is not None:
            assert e.box == tuple(e.digits[e.target].box)


def test_unknown_kind_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="known kinds are attr, ext, hop"):
        examples("validation", {"nonsense": 1})


def test_gold_answers_are_right(few: list[Example]) -> None:
    for e in few:
        outcome = score(e, e.answer)
        assert outcome.correct
        if KINDS[e.kind].answer == "box":
            assert outcome.iou is not None
            assert outcome.iou > 0.6
            assert probes.pointed_at(e, e.answer) == "target"
        else:
            assert outcome.iou is None


def test_wrong_answers_are_wrong(few: list[Example]) -> None:
    for e in few:
        for text in ("", "?", "<1> <2>", "<31> <31> <31> <31>", "<9> <9> <3> <3>", "dots dots"):
            if not text.startswith(e.answer):
                assert not score(e, text).correct
    hop = next(e for e in few if e.kind == "hop")
    swapped = Example(**{**vars(hop), "target": hop.referent, "referent": hop.target})
    assert probes.pointed_at(swapped, hop.answer) == "referent"
    assert probes.pointed_at(hop, "seven") == "no object"


def test_tally_and_summaries(few: list[Example]) -> None:
    counted = tally([Outcome(True, 0.8), Outcome(False, 0.2), Outcome(True, 0.6), Outcome(True, 1)])
    assert (counted.n, counted.accuracy) == (4, 0.75)
    assert counted.standard_error == pytest.approx((0.75 * 0.25 / 4) ** 0.5)
    assert counted.mean_iou == pytest.approx(0.65)
    assert tally([Outcome(True), Outcome(False)]).mean_iou is None
    outcomes = [score(e, e.answer if e.kind == "attr" else "") for e in few]
    families = summarise(few, outcomes)
    assert families["one-hop grounding"].n == 8
    assert families["one-hop grounding"].accuracy == 0.5
    assert families["riddle VQA"].accuracy == 0
    assert summarise_kinds(few, outcomes)["attr"].accuracy == 1


def test_baselines(few: list[Example]) -> None:
    found = probes.baselines(few)
    assert set(found) == {"attr", "ext", "hop", "hopext", "riddle"}
    attr = [e for e in few if e.kind == "attr"]
    mean = sum(1 / len(e.digits) for e in attr) / len(attr)
    assert found["attr"]["any object"] == pytest.approx(mean)
    assert found["hop"]["coin flip between the pair"] == 0.5
    assert found["hop"]["any object"] <= found["hop"]["ignores the referent"] <= 0.5
    assert "ignores the referent" not in found["riddle"]


def test_tables(few: list[Example]) -> None:
    texts = [e.answer for e in few]
    outcomes = [score(e, text) for e, text in zip(few, texts, strict=True)]
    assert "| one-hop VQA | 20 | 100.0 ± 0.0 |  |" in probes.accuracy_table("family", summarise(few, outcomes))
    assert "| hop | 100 | 0 | 0 | 0 |" in probes.confusion_table(few, texts)
    assert "| hop | coin flip between the pair | 50.0 |" in probes.baseline_table(few)
    depth = {("one-hop grounding", "target"): [0.25, 1.0]}
    assert "| one-hop grounding: target | 25 | 100 |" in probes.depth_table(depth)

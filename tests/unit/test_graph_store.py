"""Which graph serves a prompt, by modelled time, and which classes are captured."""

from __future__ import annotations

import pytest

from reroute import Graphs, Schedule
from reroute.core.cost import ModelShape
from reroute.graphs import GraphStore, ShapeClass, waste

SHAPE = ModelShape(num_layers=8, hidden=4096, intermediate=11008, heads=32, kv_heads=32, head_dim=128, vocab=100)
SCHEDULE = Schedule((2, 5), (0.5, 0.25))
NEEDED = (640, 384, 256)
OWN = ShapeClass(1, NEEDED)


def store(**limits: float) -> GraphStore[str]:
    return GraphStore(Graphs(**limits), SHAPE)  # type: ignore[arg-type]


def test_the_cheapest_that_dominates() -> None:
    """Of a class with long dense layers, of which there are two, and one with a long last stage, of three."""
    graphs = store(max_waste=9)
    for name, rows in (("dense", (768, 384, 256)), ("last", (640, 384, 512)), ("small", (640, 320, 256))):
        graphs.put("key", ShapeClass(1, rows), name)
    graphs.put("key", ShapeClass(2, NEEDED), "two prompts")
    graphs.put("other", OWN, "another key")
    assert graphs.best("key", OWN, SCHEDULE, NEEDED) == "dense"
    assert graphs.best("key", ShapeClass(1, (704, 320, 256)), SCHEDULE, NEEDED) == "dense"
    assert graphs.best("key", ShapeClass(1, (640, 320, 512)), SCHEDULE, NEEDED) == "last"
    assert graphs.best("key", ShapeClass(1, (832, 320, 256)), SCHEDULE, NEEDED) is None
    assert graphs.best("other", OWN, SCHEDULE, NEEDED) == "another key"


def test_no_more_waste_than_allowed() -> None:
    large = ShapeClass(1, (704, 448, 320))
    share = waste(SHAPE, SCHEDULE, large.rows, NEEDED, 1).seconds
    assert 0.05 < share < 0.5
    for limit, served in ((share * 0.99, None), (share * 1.01, "large")):
        graphs = store(max_waste=limit)
        graphs.put("key", large, "large")
        assert graphs.best("key", OWN, SCHEDULE, NEEDED) == served
        assert bool(graphs.why_not("key", large, SCHEDULE, NEEDED, at_once=True)) is (served is None)


def test_the_second_prompt_is_captured() -> None:
    graphs = store()
    assert "first prompt of its class (640, 384, 256)" in graphs.why_not("key", OWN, SCHEDULE, NEEDED)
    assert graphs.why_not("key", OWN, SCHEDULE, NEEDED) == ""
    assert "first prompt" in graphs.why_not("other", OWN, SCHEDULE, NEEDED)
    assert graphs.why_not("third", OWN, SCHEDULE, NEEDED, at_once=True) == ""
    graphs.note("key", OWN, "it fails")
    assert graphs.why_not("key", OWN, SCHEDULE, NEEDED) == "it fails"
    graphs.clear()
    assert "first prompt" in graphs.why_not("key", OWN, SCHEDULE, NEEDED)


def test_those_that_are_seen_are_forgotten_at_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reroute.graphs.store.MOST_SEEN", 2)
    graphs = store()
    firsts = [bool(graphs.why_not(key, OWN, SCHEDULE, NEEDED)) for key in ("a", "b", "a", "c", "a", "b")]
    assert firsts == [True, True, False, True, False, True]


def test_the_least_recently_used_leaves() -> None:
    graphs = store(max_graphs=2, max_waste=9)
    classes = [ShapeClass(batch, NEEDED) for batch in (1, 2, 3)]
    for batch, its in enumerate(classes[:2]):
        graphs.put("key", its, f"{batch}")
    assert graphs.best("key", classes[0], SCHEDULE, NEEDED) == "0"
    graphs.put("key", classes[2], "2")
    found = [graphs.best("key", its, SCHEDULE, NEEDED) for its in classes]
    assert found == ["0", None, "2"]
    assert len(graphs) == 2

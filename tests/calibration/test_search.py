from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from random import Random
from typing import Any

import pytest

from reroute.calibration import proposal as proposal_module
from reroute.calibration.proposal import MAX_DECISIONS, Proposal, Space, Step
from reroute.calibration.search import Evaluation, best_of, climb
from reroute.core.schedule import Action, Schedule
from reroute.core.solver import budget_of
from reroute.errors import RerouteError
from reroute.methods import Diverse, FastV, PDrop
from reroute.rankers import Diversity, LastTokenAttention, Ranker

WANTED = (Step(1, 0.02), Step(3, 0.12), Step(5, 0.0076))


def distance(schedule: Schedule, action: Action) -> tuple[float, ...]:
    """From WANTED, layer by layer, as if each layer were a prompt."""
    wanted, own = Proposal(WANTED).schedule.per_layer(1000, 12), schedule.per_layer(1000, 12)
    return tuple(abs(a - b) / 1000 for a, b in zip(wanted, own, strict=True))


def climbed(space: Space, evaluations: int, seed: int = 0, history: Sequence[Evaluation] = ()) -> list[Evaluation]:
    told: list[int] = []
    found = climb(
        space, distance, evaluations=evaluations, seed=seed, history=history, done=lambda x: told.append(len(x))
    )
    assert told == list(range(len(history) + 1, len(found) + 1))
    return found


@pytest.mark.parametrize("action", ["route", "remove"])
@pytest.mark.parametrize(
    ("keep", "layers", "visual"), [(1 / 9, 12, (144,)), (0.33, 32, (100, 576)), (0.05, 28, (900,))]
)
def test_all_proposals_meet_the_budget(action: Action, keep: float, layers: int, visual: tuple[int, ...]) -> None:
    space = Space(keep, layers, action, visual)
    random, found = Random(1), space.starts()
    known: set[Any] = set()
    for _ in range(150):
        new = space.near(found[-6:], known, random)
        assert new is not None
        assert space.key(new) not in known
        known.add(space.key(new))
        found.append(new)
    for made in found:
        schedule = made.schedule
        schedule.validate(layers, action)
        assert budget_of(schedule.layers, schedule.ratios, layers) == pytest.approx(keep, abs=1e-12)
        assert schedule.layers[0] <= space.last_first_layer
        assert Proposal.read(made.written()) == made
    for made in found[len(space.starts()) :]:
        for n in visual:  # rounding up to a token would exceed the budget
            assert sum(made.schedule.per_layer(n, layers)) <= keep * n * layers + 1e-9
        if action == "remove":
            assert all(a >= b for a, b in pairwise(made.schedule.ratios))
        assert len(made.steps) <= MAX_DECISIONS
    sizes = {len(made.steps) for made in found}
    assert min(sizes) <= 3
    assert max(sizes) >= 5


def test_starts_are_the_published_schedules(space: Space) -> None:
    assert list(space.published()) == ["pdrop", "fastv", "diverse"]
    assert [start.schedule for start in space.starts()] == list(space.published().values())
    # Neither gets there: the layers before their first decision cost more.
    low = Space(0.03, 32, "route", (576,), (PDrop(), FastV()))
    assert low.published() == {}
    (start,) = low.starts()
    assert budget_of(start.schedule.layers, start.schedule.ratios, 32) == pytest.approx(0.03)


def test_decisions_are_tried_only_where_they_may_be_made() -> None:
    """As in a model of which most layers slide; not every ranker may decide where another one may."""
    full = (2, 5, 8, 11)

    def may_decide(layer: int, ranker: Ranker) -> bool:
        return layer in full and (layer < 8 or ranker != Diversity())

    space = Space(1 / 3, 12, "route", (144,), may_decide=may_decide)
    made = space.starts()
    for _ in range(40):
        new = space.near(made[-6:], {space.key(start) for start in made}, Random(len(made)))
        assert new is not None
        made.append(new)
    steps = [step for proposal in made for step in proposal.steps]
    assert {step.layer for step in steps} == set(full)
    assert all(may_decide(step.layer, step.ranker) for step in steps)
    assert all(budget_of(p.schedule.layers, p.schedule.ratios, 12) == pytest.approx(1 / 3) for p in made)
    low = Space(0.2, 12, "route", (144,), (FastV(layer=6),), may_decide=lambda layer, ranker: layer in full)
    assert low.published() == {}
    assert low.starts()[0].schedule.layers == (2, 5)


def test_rankers_are_those_of_the_methods() -> None:
    space = Space(1 / 9, 12, "route", (144,), (PDrop(), Diverse()))
    assert list(space.published()) == ["pdrop", "diverse"]
    assert space.rankers == (LastTokenAttention(), Diversity())
    made = space.starts()
    known = {space.key(start) for start in made}
    for _ in range(60):
        new = space.near(made[-6:], known, Random(len(made)))
        assert new is not None
        assert Proposal.read(json.loads(json.dumps(new.written()))) == new
        known.add(space.key(new))
        made.append(new)
    pairs = {(step.layer, type(step.ranker)) for proposal in made for step in proposal.steps}
    assert {layer for layer, ranker in pairs if ranker is Diversity} > {0}
    start = space.starts()[0]
    other = Proposal(tuple(step._replace(ranker=Diversity()) for step in start.steps))
    assert space.key(other) != space.key(start)
    assert "Diversity" not in str(start)
    assert str(space.starts()[1]).startswith("0: ")
    assert " Diversity, 4: " in str(space.starts()[1])


def test_a_climb_gets_closer(space: Space) -> None:
    found = climbed(space, 120)
    starts = found[:3]
    assert [entry.proposal for entry in starts] == space.starts()
    assert best_of(found).mean < 0.5 * best_of(starts).mean
    keys = [space.key(entry.proposal) for entry in found]
    assert len(set(keys)) == len(found) == 120


def test_a_climb_depends_on_its_seed_alone_and_can_be_continued(space: Space) -> None:
    found = climbed(space, 30)
    assert climbed(space, 30) == found
    assert climbed(space, 30, seed=1) != found
    for done in (1, 2, 17, 30):
        assert climbed(space, 30, history=found[:done]) == found


def test_a_climb_ends_where_nothing_is_new() -> None:
    space = Space(0.6, 2, "route", (3,))
    found = climbed(space, 100)
    assert 2 <= len(found) < 30


def test_stages_of_nothing_can_be_allowed(space: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RerouteError, match="out of reach"):
        space.refilled([Step(1, 0.0), Step(4, 0.0)])
    filled = space.refilled([Step(1, 0.0), Step(4, 1.0), Step(5, 0.0)])
    assert [step.ratio for step in filled.steps] == pytest.approx([0, 1 / 3, 0])
    monkeypatch.setattr(proposal_module, "ALLOW_NONE", True)
    assert space._is_sound(filled)
    monkeypatch.setattr(proposal_module, "ALLOW_NONE", False)
    assert not space._is_sound(filled)

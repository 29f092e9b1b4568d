"""Shape classes, what their fillers cost, and the table of a prompt in the shapes of a class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reroute import Schedule
from reroute.core.action import Action
from reroute.core.cost import ModelShape, layer_flops
from reroute.core.decision import Decision
from reroute.core.plan import Plan, make_plan
from reroute.graphs import TILE, PromptTable, Roofline, ShapeClass, in_tiles, waste
from reroute_kernels import SelectMetadata, SelectRows
from reroute_kernels.reference import select

VISUAL = 9
SCHEDULES: tuple[tuple[Schedule, Action], ...] = (
    (Schedule((1, 3), (0.5, 0.25)), "route"),
    (Schedule((1, 3), (0.5, 0.25)), "remove"),
    (Schedule((1, 3, 4), (0.5, 0.25, 0.0), actions=("remove", "route", "route")), "route"),
    (Schedule((1,), (1.0,)), "route"),
)


def plan_of(prompts: list[list[int]], which: int, sides: list[bool]) -> tuple[Plan | None, np.ndarray[Any, Any]]:
    """The plan of prompts that are padded on the left where ``sides`` says so, and the ids."""
    length = max(map(len, prompts))
    ids, valid = np.zeros((len(prompts), length), dtype=np.int64), np.zeros((len(prompts), length), dtype=bool)
    for b, (prompt, left) in enumerate(zip(prompts, sides, strict=True)):
        span = slice(length - len(prompt), None) if left else slice(len(prompt))
        ids[b, span], valid[b, span] = prompt, True
    schedule, action = SCHEDULES[which]
    return make_plan(ids, valid, [VISUAL], schedule, action), ids


@st.composite
def drawn(draw: st.DrawFn) -> tuple[list[list[int]], int, list[bool]]:
    """Prompts of text and pictures in any order, one with a picture at least; all end in text."""
    parts = st.lists(st.tuples(st.booleans(), st.integers(1, 50)), max_size=4)
    prompts = []
    for _ in range(draw(st.integers(1, 3))):
        ids = [VISUAL if visual else 1 for visual, count in draw(parts) for _ in range(count)]
        prompts.append([*ids, 2, 3])
    prompts[0] = [VISUAL] * draw(st.integers(1, 90)) + prompts[0]
    return prompts, draw(st.integers(0, len(SCHEDULES) - 1)), [draw(st.booleans()) for _ in prompts]


def table_of(shape_class: ShapeClass, plan: Plan, gap: int = 0) -> PromptTable:
    """Samples one after the other, with ``gap`` rows between them."""
    step = shape_class.rows[0] + gap
    return PromptTable(shape_class, tuple(b * step for b in range(plan.batch)), plan.batch * step)


def made(plan: Plan) -> Sequence[Decision]:
    """The decisions that a graph makes: none where all of them keep everything."""
    return () if plan.changes_nothing else plan.decisions


def larger(shape_class: ShapeClass) -> ShapeClass:
    return replace(shape_class, rows=tuple(rows + TILE for rows in shape_class.rows))


@settings(deadline=None)
@given(drawn())
def test_a_class_holds_every_stage_in_tiles(case: Any) -> None:
    plan, _ = plan_of(*case)
    assert plan is not None
    own = ShapeClass.of(plan)
    stages = [plan.lengths, *(plan.active(decision.stage) for decision in made(plan))]
    for rows, active in zip(own.rows, stages, strict=True):
        assert rows == in_tiles(max(active), plan.batch)
    assert own == ShapeClass.of(plan_of(case[0], case[1], [not side for side in case[2]])[0])  # type: ignore[arg-type]


@given(st.integers(1, 3000), st.integers(1, 100))
def test_tiles(rows: int, batch: int) -> None:
    """One prompt has whole tiles. In a batch few rows are filled up by no more than makes whole tiles of all samples,
    or than the least part; many rows by less than a tenth.
    """
    got = in_tiles(rows, batch)
    assert got % 8 == 0
    assert 0 <= got - rows < TILE
    if batch == 1:
        assert got % TILE == 0
    assert got - rows < max(rows / 10, 8, TILE / (batch if batch & (batch - 1) == 0 else batch / 2))
    assert in_tiles(got, batch) == got
    assert got <= in_tiles(rows + 1, batch)  # so that a prompt within another's is of a class within its class


def test_tiles_by_hand() -> None:
    """Of a budget of a ninth of 576 visual tokens and 60 of text, which whole tiles would fill up by a quarter."""
    assert [in_tiles(rows, 8) for rows in (636, 106, 83, 71)] == [640, 112, 88, 72]
    assert [in_tiles(rows, 4) for rows in (636, 319, 106, 71)] == [640, 320, 112, 80]
    assert [in_tiles(rows, 3) for rows in (640, 639, 106)] == [640, 640, 112]
    assert [in_tiles(rows, 64) for rows in (1, 9, 700)] == [8, 16, 704]


rows_of_classes = st.lists(st.integers(1, 3), min_size=2, max_size=2).map(tuple)


@given(rows_of_classes, rows_of_classes, rows_of_classes)
def test_domination_is_a_partial_order(a: Any, b: Any, c: Any) -> None:
    first, second, third = (ShapeClass(2, rows) for rows in (a, b, c))
    assert first.dominates(first)
    assert not (first.dominates(second) and second.dominates(first)) or first == second
    assert not (first.dominates(second) and second.dominates(third)) or first.dominates(third)
    assert not first.dominates(replace(first, batch=1))
    assert not first.dominates(ShapeClass(2, first.rows[:1]))
    joined = ShapeClass(2, tuple(map(max, a, b)))
    assert joined.dominates(first)
    assert joined.dominates(second)


@settings(deadline=None)
@given(drawn(), st.booleans(), st.integers(0, 5))
def test_a_table_puts_every_token_in_its_row(case: Any, is_larger: bool, gap: int) -> None:
    plan, ids = plan_of(*case)
    assert plan is not None
    shape_class = larger(ShapeClass.of(plan)) if is_larger else ShapeClass.of(plan)
    table, length = table_of(shape_class, plan, gap), shape_class.rows[0]
    packed = table.packed(plan)
    assert packed.shape == (table.size,)
    parts = table.views(torch.from_numpy(packed))
    gathered = ids.ravel()[parts["sources"]]
    used = set()
    for b, prompt in enumerate(case[0]):
        count, start = len(prompt), table.starts[b]
        assert gathered[b].tolist() == prompt + [prompt[-1]] * (length - count)
        assert parts["beyond"][b].tolist() == [0] * count + list(range(1, length - count + 1))
        assert parts["rows"][b].tolist() == list(range(start, start + count)) + [-1] * (length - count)
        for name, wanted in (("candidates", [VISUAL]), ("text_rows", [1, 2, 3])):
            own = [row for row, token in enumerate(prompt) if token in wanted]
            assert parts[name][b].tolist() == own + [-1] * (length - len(own))
        for row in range(count):
            assert parts["inverse_index"][start + row] == parts["tokens"][start + row] == b * length + row
            assert ids[b, parts["positions"][start + row]] == prompt[row]
        used |= set(range(start, start + count))
    unused = [row for row in range(table.num_rows) if row not in used]
    assert parts["inverse_index"][unused].eq(-1).all()
    assert parts["tokens"][unused].eq(0).all()


@settings(deadline=None)
@given(drawn(), st.booleans())
def test_selections_within_the_class_are_those_of_the_plan(case: Any, is_larger: bool) -> None:
    """Of each decision that ranks the prompt in the pool; of one behind a removal the counts are the same."""
    plan, _ = plan_of(*case)
    assert plan is not None
    shape_class = larger(ShapeClass.of(plan)) if is_larger else ShapeClass.of(plan)
    table, device = table_of(shape_class, plan), torch.device("cpu")
    parts = table.views(torch.from_numpy(table.packed(plan)))
    exact = plan.tensors(table.starts, table.num_rows, device)
    most = shape_class.rows[0]
    for decision in made(plan):
        stage, counts = decision.stage, parts["counts"][decision.stage]
        own = exact.metadata[stage].counts(device)
        assert torch.equal(counts[1:], own[1:])
        assert torch.equal(parts["queries"][stage] - counts[0], exact.queries[stage] - own[0])
        assert torch.equal(parts["dropped"][stage], exact.dropped[stage])
        width = shape_class.rows[decision.left_by + 1]
        assert counts[0].tolist() == [b * width for b in range(plan.batch)]
        if not decision.from_pool:
            continue
        capacities = (table.starts, *[(most,) * plan.batch] * 4)
        within = SelectMetadata(*capacities, on_device=counts, static_length=shape_class.rows[stage + 1])
        lists = SelectRows(parts["candidates"], parts["text_rows"], parts["positions"], within)
        scores = torch.rand(plan.batch, most)
        got = select(scores, lists)
        wanted = select(
            scores[:, : exact.candidates.shape[1]],
            SelectRows(exact.candidates, exact.text_rows, exact.positions, exact.metadata[stage]),
        )
        for b in range(plan.batch):
            for mine, its in ((got.kept, wanted.kept), (got.active_positions, wanted.active_positions)):
                assert mine[b][mine[b] >= 0].tolist() == its[b][its[b] >= 0].tolist()


def test_a_prompt_that_does_not_fit_is_refused() -> None:
    small, large = (plan_of([[VISUAL] * count + [2]], 0, [True])[0] for count in (20, 100))
    assert small is not None
    assert large is not None
    with pytest.raises(ValueError, match="cannot serve"):
        table_of(ShapeClass.of(small), small).packed(large)


SHAPE = ModelShape(num_layers=6, hidden=64, intermediate=172, heads=8, kv_heads=2, head_dim=8, vocab=100)


def test_waste_by_hand() -> None:
    """Two dense layers, three in the first stage and one in the second."""
    schedule = Schedule((2, 5), (0.5, 0.25))
    got = waste(SHAPE, schedule, (128, 64, 64), (100, 60, 30), 1)
    spent, least = (
        2 * layer_flops(SHAPE, a) + 3 * layer_flops(SHAPE, b) + layer_flops(SHAPE, c)
        for a, b, c in ((128, 64, 64), (100, 60, 30))
    )
    assert got.flops == pytest.approx(spent / least - 1)
    assert waste(SHAPE, schedule, (64, 64, 64), (64, 64, 64), 3) == waste(SHAPE, schedule, (9, 9, 9), (9, 9, 9), 1)


def test_a_layer_in_seconds_by_hand() -> None:
    """Of a large shape: products of whole tiles, causal attention, moves and launches; weights where rows are few."""
    shape = replace(SHAPE, hidden=4096, intermediate=11008, heads=32, kv_heads=32, head_dim=128)
    roofline = Roofline(flops=1e12, bandwidth=1e12, launch=1e-6, launches=30, moves=10)
    weights = 4 * 4096**2 + 3 * 4096 * 11008
    moved = 2 * 10 * 4096 * 2 / 1e12
    many = 2 * weights * 704 / 1e12 + 2 * 4096 * 700**2 / 1e12 + 350 * moved + 30e-6
    assert roofline.layer_seconds(shape, 700, 1) == pytest.approx(many)
    few = replace(roofline, flops=1e18)
    assert few.layer_seconds(shape, 2, 1) == pytest.approx(2 * weights / 1e12 + moved + 30e-6)


@given(st.lists(st.integers(1, 900), min_size=3, max_size=3), st.lists(st.integers(0, 90), min_size=3, max_size=3))
def test_more_rows_never_cost_less(needed: list[int], more: list[int]) -> None:
    rows = [a + b for a, b in zip(needed, more, strict=True)]
    got = waste(SHAPE, Schedule((2, 5), (0.5, 0.25)), rows, needed, 2)
    assert got.seconds >= 0
    assert got.flops >= 0
    assert (got.flops == 0) == (rows == needed)

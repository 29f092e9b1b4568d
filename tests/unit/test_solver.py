from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from reroute.core.cost import average_tokens
from reroute.core.schedule import Schedule
from reroute.core.solver import RatioFamily, budget_of, scale_layers, scale_ratios, solve
from reroute.errors import RerouteError


@pytest.mark.parametrize(
    ("layers", "depth", "scaled"),
    [
        ((3, 7, 15, 23), 32, (3, 7, 15, 23)),
        ((3, 7, 15, 23), 28, (3, 6, 13, 20)),
        ((2, 7, 15, 23), 28, (2, 6, 13, 20)),
        ((3, 7, 15, 23), 12, (1, 2, 5, 8)),
        ((2, 7, 15, 23), 12, (1, 2, 5, 8)),
        ((3, 7, 15, 23), 8, (1, 3, 5)),
        ((2, 7, 15, 23), 8, (1, 3, 5)),
        ((2, 7, 15, 23), 4, (1, 2)),
        ((2, 7, 15, 23), 80, (2, 17, 37, 57)),
        ((3,), 12, (3,)),
    ],
)
def test_scale_layers(layers: tuple[int, ...], depth: int, scaled: tuple[int, ...]) -> None:
    assert scale_layers(layers, depth) == scaled


@given(st.integers(3, 200))
def test_scaled_layers_fit_the_model(depth: int) -> None:
    for layers in (3, 7, 15, 23), (2, 7, 15, 23):
        Schedule(scaled := scale_layers(layers, depth), (0.5,) * len(scaled)).validate(depth, "route")


@pytest.mark.parametrize(
    ("shape", "depth", "first", "counts"),
    [
        ("uniform", 32, (0.264368, 0.141762, 0.019157), ((152,), (81,), (11,))),
        (
            "pyramid",
            32,
            (0.450216, 0.265512, 0.080808),
            ((259, 259, 129, 64), (152, 152, 76, 38), (46, 46, 23, 11)),
        ),
        (
            "geometric",
            32,
            (0.596510, 0.456962, 0.216211),
            ((343, 204, 122, 72), (263, 120, 54, 25), (124, 26, 5, 1)),
        ),
        ("uniform", 28, (0.2533, 0.1289, 0.0044), ((145,), (74,), (2,))),
        # a = 4/9 gives 192 of 576 exactly; cut to 0.4444 it would lose a token per stage
        ("pyramid", 28, (0.4444, 0.2559, 0.0673), ((256, 256, 128, 64), (147, 147, 73, 36), (38, 38, 19, 9))),
        ("geometric", 28, (0.5949, 0.4522, 0.1952), ((342, 203, 121, 72), (260, 117, 53, 24), (112, 21, 4, 1))),
    ],
)
def test_solved_tiers(
    shape: RatioFamily, depth: int, first: tuple[float, ...], counts: tuple[tuple[int, ...], ...]
) -> None:
    layers = (3,) if shape == "uniform" else scale_layers((2, 7, 15, 23), depth)
    for tier, expected, kept in zip((192, 128, 64), first, counts, strict=True):
        ratios = solve(shape, layers, depth, tier / 576)
        assert ratios[0] == pytest.approx(expected, abs=1e-6 if depth == 32 else 5e-5)
        assert Schedule(layers, ratios).counts(576) == kept


def test_solver_is_exact_where_a_lost_ulp_would_lose_a_token() -> None:
    assert solve("uniform", (2,), 32, (2 + 30 * 0.5) / 32) == (0.5,)
    assert solve("uniform", (0,), 28, 1 / 3) == (1 / 3,)
    assert solve("geometric", (8, 16, 24), 32, 0.46875) == (0.5, 0.25, 0.125)
    assert solve("pyramid", (2, 7, 15, 23), 32, 1.0) == (1.0,) * 4


SHAPES: tuple[RatioFamily, ...] = ("uniform", "pyramid", "geometric")


@st.composite
def problems(draw: st.DrawFn) -> tuple[RatioFamily, tuple[int, ...], int]:
    depth = draw(st.integers(2, 64))
    layers = sorted(draw(st.sets(st.integers(0, depth - 1), min_size=1, max_size=min(6, depth - 1))))
    return draw(st.sampled_from(SHAPES)), tuple(layers), depth


def average(layers: tuple[int, ...], depth: int, ratios: tuple[float, ...]) -> float:
    widths = [end - start for start, end in pairwise((*layers, depth))]
    return (layers[0] + sum(w * r for w, r in zip(widths, ratios, strict=True))) / depth


@given(problems(), st.floats(0.01, 1.0), st.integers(1, 3000))
def test_solver_hits_the_budget(problem: tuple[RatioFamily, tuple[int, ...], int], keep: float, n: int) -> None:
    shape, layers, depth = problem
    assume(keep > layers[0] / depth + 1e-9)
    ratios = solve(shape, layers, depth, keep)
    assert average(layers, depth, ratios) == pytest.approx(keep, abs=1e-9)
    schedule = Schedule(layers, ratios)
    assert keep == 1 or all(a >= b for a, b in pairwise(ratios))
    floored = average_tokens(schedule.per_layer(n, depth))
    assert keep * n - 1 - 1e-6 < floored < keep * n + 1 + 1e-6


@given(problems(), st.floats(0.01, 1.0), st.floats(0.01, 1.0))
def test_solver_is_monotone(problem: tuple[RatioFamily, tuple[int, ...], int], a: float, b: float) -> None:
    shape, layers, depth = problem
    assume(min(a, b) > layers[0] / depth + 1e-9)
    low, high = (solve(shape, layers, depth, keep) for keep in sorted((a, b)))
    assert all(x <= y + 2e-12 for x, y in zip(low, high, strict=True))


def test_impossible_budgets() -> None:
    with pytest.raises(RerouteError, match=r"from layer 8 on, 32 layers cannot get down to 8/32 = 0\.25.*larger keep"):
        solve("uniform", (8, 16), 32, 0.25)
    for keep in (0.0, -1.0, 1.1, float("nan")):
        with pytest.raises(RerouteError, match=r"above 0 and at most 1"):
            solve("uniform", (3,), 32, keep)
    shape: Any = "pyramids"
    with pytest.raises(RerouteError, match=r"Unknown ratio family 'pyramids'; .* Did you mean 'pyramid'\?"):
        solve(shape, (3,), 32, 0.5)
    with pytest.raises(RerouteError, match="does not exist"):
        solve("uniform", (3,), 3, 0.5)
    with pytest.raises(RerouteError, match="strictly increasing"):
        solve("uniform", (3, 3), 32, 0.5)


# --- one factor for given ratios --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratios", "layers", "num_layers", "keep", "expected"),
    [
        ((0.4, 0.2), (2, 6), 10, 0.5, (0.5, 0.25)),  # 2 + 4 * 2r + 4 * r = 5
        ((1.0, 0.1), (0, 5), 10, 0.75, (1.0, 0.5)),  # the first is clipped, the second makes up for it
        ((0.0, 0.3, 0.0), (1, 4, 5), 12, 1 / 9, (0.0, 1 / 3, 0.0)),
        ((0.3, 0.3), (0, 2), 4, 1.0, (1.0, 1.0)),
    ],
)
def test_ratios_are_scaled_to_the_budget(
    ratios: tuple[float, ...], layers: tuple[int, ...], num_layers: int, keep: float, expected: tuple[float, ...]
) -> None:
    found = scale_ratios(ratios, layers, num_layers, keep)
    assert found == pytest.approx(expected, abs=1e-12)
    assert budget_of(layers, found, num_layers) == pytest.approx(keep, abs=1e-12)


@pytest.mark.parametrize("family", ["uniform", "pyramid"])
def test_scaling_what_was_solved_changes_nothing(family: RatioFamily) -> None:
    solved = solve(family, (2, 7, 15, 23), 32, 1 / 9)
    assert scale_ratios(solved, (2, 7, 15, 23), 32, 1 / 9) == pytest.approx(solved, rel=1e-12)


@pytest.mark.parametrize(
    ("ratios", "layers", "keep", "said"),
    [
        ((0.0, 0.0), (1, 4), 0.5, "stages that keep nothing stay as they are"),
        ((0.5, 0.0), (0, 5), 0.6, "stages that keep nothing stay as they are"),
        ((0.5, 0.5), (5, 6), 0.5, "layers before the first routing layer run all"),
        ((0.5, 0.5), (1, 6), 0, "must be a number above 0"),
    ],
)
def test_budgets_that_no_factor_reaches(
    ratios: tuple[float, ...], layers: tuple[int, ...], keep: float, said: str
) -> None:
    with pytest.raises(RerouteError, match=said):
        scale_ratios(ratios, layers, 10, keep)

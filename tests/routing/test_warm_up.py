"""After ``handle.warm_up`` no prefill compiles anything, and it has compiled nothing that none needs."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any, NamedTuple

import models
import pytest
import torch
from models import CACHE, Sample, Tiny
from support import NoWaiting, cache_of, generate

pytest.importorskip("triton")

import reroute
from reroute.errors import RerouteError
from reroute.methods import FastV, PDrop, Random
from reroute.rankers import LastTokenAttention, RandomScores
from reroute_kernels import Backend, PagedPool
from reroute_kernels.testing.compile_only import new_device

VISUAL, BATCH = 288, 4
LAYERS, KEEP = (1, 2, 3), (0.5, 0.5, 0.25)
SCHEDULE = reroute.Schedule(LAYERS, KEEP)


class Setup(NamedTuple):
    """A model and how it is routed; ``kernels``: how many it can need."""

    model: str
    settings: dict[str, Any]
    kernels: int


# All need defer, two variants of admit (in the end it moves hidden states alone) and five of the selection.
SETUPS = {
    "route": Setup("llava-gqa", {"schedule": SCHEDULE}, 8 + 3),  # defer with the norm; scores of one prompt, of more
    "remove": Setup("llava-mha", {"schedule": SCHEDULE, "action": "remove"}, 8 + 3),
    "renumbered": Setup(
        "llava-gqa", {"method": PDrop(LAYERS, KEEP[:1] * 3, "floor0", "renumbered"), "action": "remove"}, 8 + 3
    ),
    "scores of the layer before": Setup(
        "llava-gqa", {"schedule": reroute.Schedule(LAYERS, KEEP, (LastTokenAttention(-1),))}, 8 + 3
    ),
    "own scores": Setup("llava-gqa", {"method": Random(1, 0.3)}, 8),
    "three position ids": Setup("qwen", {"method": FastV(1, 0.3)}, 8 + 3 + 1),  # admit without ids in a plain forward
}


@pytest.fixture(params=SETUPS)
def setup(request: pytest.FixtureRequest) -> Setup:
    return SETUPS[request.param]


@pytest.fixture(autouse=True)
def _short_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small model reaches every class of rows that has a kernel."""
    from reroute_kernels.triton_kernels import select

    for name, value in (("MIN_CHUNK", 16), ("MAX_ONE_PROGRAM", 64), ("CHUNK", 32)):
        monkeypatch.setattr(select, name, value)
    assert select.row_classes(VISUAL) == [1, 17, 33, 65, 257]


def routed(setup: Setup, **settings: Any) -> tuple[Tiny, Any]:
    """By the Triton kernels, although tensors are on the CPU."""
    from reroute_kernels import ops

    tiny = models.BUILDERS[setup.model](layers=4)
    handle = reroute.enable(tiny.model, **setup.settings, **settings)
    handle.backend = Backend.of("triton", "of a test", ops)
    return tiny, handle


def prompt(tiny: Tiny, visual: int, text: int, seed: int) -> Sample:
    """Of ``visual`` tokens in pictures, with LLaVA a multiple of 16, and text around and behind them."""
    pictures: list[Any] = [(2, visual // 2)] if tiny.is_qwen else [tiny.grid] * (visual // 16)
    return tiny.prompt(seed, text, *(pictures if visual else []), text + 1)


def prefill(tiny: Tiny, visual: list[int], text: int, seed: int, *, call: str, side: str = "left") -> Any:
    """A batch, with padding where lengths differ."""
    given = tiny.inputs([prompt(tiny, n, text, seed + b) for b, n in enumerate(visual)], side)
    if call == "generate":
        return cache_of(generate(tiny, given, 2))
    return cache_of(tiny.model(**given, use_cache=True))


def test_it_compiles_what_prefills_need_and_nothing_else(setup: Setup) -> None:
    tiny, handle = routed(setup)
    with new_device() as needed:
        for call in ("forward", "generate") if tiny.is_qwen else ("forward",):
            for visual in ([16], [32], [64], [256], [288], [16, 48], [272, 0, 16]):
                prefill(tiny, visual, 3, 0, call=call)
    with new_device() as compiled:
        report = handle.warm_up(visual=VISUAL, batch=BATCH)
    assert {c.key for c in compiled} == {c.key for c in needed}
    assert len(compiled) == len(report.kernels) == setup.kernels
    listed = Counter(f"_{kernel.name.partition(',')[0]}_kernel" for kernel in report.kernels)
    assert listed == Counter(c.kernel for c in compiled)
    assert len({kernel.name for kernel in report.kernels}) == len(report.kernels)


def test_later_prefills_compile_nothing(setup: Setup) -> None:
    """Of any size up to what was asked for, padded or not, and in later turns of a conversation."""
    tiny, handle = routed(setup)
    draw = random.Random(0)
    with new_device() as compiled:
        handle.warm_up(visual=VISUAL, batch=BATCH)
        compiled.clear()
        for seed in range(8):
            visual = [16 * draw.randint(0, VISUAL // 16) for _ in range(draw.randint(1, BATCH))]
            side, call = draw.choice(["left", "right"]), draw.choice(["forward", "generate"])
            side = "left" if call == "generate" else side
            prefill(tiny, visual, draw.randint(1, 40), seed, call=call, side=side)
        if handle.schedule.position_mode == "preserved":
            before = [prompt(tiny, 48, 3, 50), prompt(tiny, 32, 3, 51)]
            cache = cache_of(tiny.model(**tiny.inputs(before), use_cache=True))
            tiny.model(**tiny.follow(before, [prompt(tiny, 80, 2, 52), prompt(tiny, 80, 2, 53)]), **{CACHE: cache})
    assert compiled == []
    assert handle.totals().prefills > 5


@pytest.mark.parametrize(
    ("visual", "kernels"),
    [([64], ["_select_kernel"]), ([16, 16], ["_score_kernel"])],
)
def test_what_it_was_not_asked_for_is_left_out(visual: list[int], kernels: list[str]) -> None:
    tiny, handle = routed(SETUPS["route"])
    with new_device() as compiled:
        handle.warm_up(visual=32)
        compiled.clear()
        prefill(tiny, visual, 3, 0, call="forward")
    assert [c.kernel for c in compiled] == kernels


def test_a_second_time_everything_is_there() -> None:
    _, handle = routed(SETUPS["route"])
    with new_device() as compiled:
        first = handle.warm_up(visual=16)
        compiled.clear()
        second = handle.warm_up(visual=16)
    assert compiled == []
    assert [k.name for k in second.kernels] == [k.name for k in first.kernels]
    assert {k.source for k in second.kernels} == {"loaded before"}


@pytest.mark.parametrize("name", ["remove", "own scores"])
def test_it_leaves_no_trace_and_waits_for_nothing(name: str) -> None:
    pool = PagedPool(64, torch.float32, "cpu", page_size=16)
    tiny, handle = routed(SETUPS[name], pool=pool, trace=True)
    with new_device():
        prefill(tiny, [32], 3, 0, call="forward")
        stats, totals, trace = handle.stats(), handle.totals(), handle.trace
        with NoWaiting():
            handle.warm_up(visual=16, batch=2)
    assert (handle.stats(), handle.totals(), handle.trace) == (stats, totals, trace)
    assert pool.stats().leases == 0


def test_scores_of_a_method_of_ones_own_are_not_asked_for() -> None:
    class Fails(RandomScores):
        def scores(self, inputs: Any) -> Any:
            pytest.fail("there is no prompt to score")

    _, handle = routed(Setup("llava-gqa", {"method": FastV(1, 0.3, ranker=Fails())}, 8))
    with new_device():
        assert len(handle.warm_up(visual=16).kernels) == 4


def test_the_torch_backend_compiles_nothing(tiny: Tiny) -> None:
    with reroute.enable(tiny.model, keep=0.5) as handle:
        report = handle.warm_up(visual=VISUAL, batch=BATCH)
    assert report.kernels == ()
    assert str(report).startswith("nothing to compile on backend torch (triton cannot run: ")


def test_a_schedule_that_keeps_everything_needs_nothing() -> None:
    _, handle = routed(Setup("llava-gqa", {"keep": 1.0}, 0))
    with new_device() as compiled:
        report = handle.warm_up(visual=16)
    assert compiled == []
    assert str(report) == "nothing to compile on backend triton (every visual token is kept)"


@pytest.mark.parametrize("sizes", [{"visual": 0}, {"visual": 16, "batch": 0}])
def test_sizes_below_one(sizes: dict[str, int]) -> None:
    with (
        reroute.enable(models.tiny("llava-gqa").model, keep=0.5) as handle,
        pytest.raises(RerouteError, match=r"at least one visual token and one prompt, not visual="),
    ):
        handle.warm_up(**sizes)


def test_of_a_handle_that_is_disabled() -> None:
    handle = reroute.enable(models.tiny("llava-gqa").model, keep=0.5)
    handle.disable()
    with pytest.raises(RerouteError, match="was disabled"):
        handle.warm_up(visual=16)

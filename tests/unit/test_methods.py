from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import reroute.methods
from reroute.core.schedule import Action, Schedule
from reroute.errors import RerouteError
from reroute.methods import (
    METHODS,
    CDPruner,
    Diverse,
    DivPrune,
    FastV,
    Method,
    Nuwa,
    Oracle,
    PDrop,
    Random,
    VisionZip,
    VScan,
    get,
)
from reroute.rankers import (
    ClipRelevance,
    ConditionalDiversity,
    DominantContextual,
    LastTokenAttention,
    Norm,
    RandomScores,
    Ranker,
    RankInputs,
    ScoreRanker,
)


def inputs(*counts: int, stage: int = 0) -> RankInputs:
    hidden = [torch.zeros(n, 4) for n in counts]
    return RankInputs(hidden, torch.zeros(len(counts), 4), layer=3, stage=stage)


@pytest.mark.parametrize("depth", [32, 28])
def test_fastv_is_the_released_pair(depth: int) -> None:
    later = (7, 15, 23) if depth == 32 else (6, 13, 20)
    assert FastV().schedule(depth, "remove") == Schedule((3,), (0.2644,))
    assert FastV().schedule(depth, "route") == Schedule((3, *later), (0.2644,) * 4)


def test_fastv_takes_an_explicit_layer_literally() -> None:
    assert FastV(layer=2).schedule(12, "remove").layers == (2,)
    assert FastV(layer=2).schedule(12, "route").layers == (2, 5, 8)
    assert FastV(layer=10).schedule(32, "route").layers == (10, 15, 23)
    assert FastV(layer=0).schedule(32, "route").layers == (0, 7, 15, 23)


def test_official_fastv() -> None:
    schedule = FastV.official().schedule(32, "remove")
    assert schedule == Schedule((2,), (0.5,), (LastTokenAttention(-1),), "half_even")
    assert schedule.counts(5) == (2,)
    cheaper = FastV.official().with_budget(0.25, 32, "remove").schedule(32, "remove")
    assert (cheaper.rounding, cheaper.rankers, cheaper.ratios) == ("half_even", (LastTokenAttention(-1),), (0.2,))


def test_pdrop_is_the_released_pair() -> None:
    removing = PDrop().schedule(32, "remove")
    assert removing.layers == (2, 7, 15, 23)
    assert removing.ratios == pytest.approx((0.5965, 0.3558, 0.2123, 0.1266), abs=5e-5)
    assert removing.counts(576) == (343, 204, 122, 72)
    routing = PDrop().schedule(32, "route")
    assert routing.layers == (2, 7, 15, 23)
    assert routing.ratios == pytest.approx((0.4502, 0.4502, 0.2251, 0.1126), abs=6e-5)
    assert routing.counts(576) == (259, 259, 129, 64)
    assert PDrop().schedule(28, "route").layers == (2, 6, 13, 20)
    assert PDrop().schedule(8, "route").layers == (1, 3, 5)


def test_pdrop_takes_explicit_values_literally() -> None:
    explicit = PDrop(layers=(4, 8), ratios=(0.5, 0.1), rounding="half_even")
    for action in ("route", "remove"):
        assert explicit.schedule(12, action) == Schedule((4, 8), (0.5, 0.1), rounding="half_even")
    assert PDrop(ratios=(0.1, 0.2, 0.3, 0.4)).schedule(32, "route").ratios == (0.1, 0.2, 0.3, 0.4)
    assert PDrop(layers=(2, 0.5, 0.8)).schedule(12, "route").layers == (2, 6, 9)
    with pytest.raises(RerouteError, match=r"one ratio per routing layer: .* \(1, 3, 5\)"):
        PDrop(ratios=(0.1, 0.2, 0.3, 0.4)).schedule(8, "route")
    ratio: Any = 0.5
    with pytest.raises(RerouteError, match=r"sequence of ratios.* got .* ratios=0\.5"):
        PDrop(ratios=ratio).schedule(32, "route")


def test_official_pdrop() -> None:
    schedule = PDrop.official().schedule(32, "remove")
    assert schedule == Schedule((8, 16, 24), (0.5, 0.25, 0.125), rounding="floor0", position_mode="renumbered")
    assert schedule.counts(8) == (4, 2, 1)
    assert schedule.counts(4) == (2, 1, 0)
    assert PDrop.official().schedule(28, "remove").layers == (7, 14, 21)


@pytest.mark.parametrize(
    "method", [FastV(), FastV(layer=2), PDrop(), PDrop(layers=(1, 4)), Random(), Diverse(), DivPrune()]
)
@pytest.mark.parametrize("action", ["route", "remove"])
@pytest.mark.parametrize("depth", [8, 12, 28, 32])
@pytest.mark.parametrize("keep", [0.4, 1.0])
def test_budget_is_met_whatever_the_depth(method: Method, action: Action, depth: int, keep: float) -> None:
    schedule = method.with_budget(keep, depth, action).schedule(depth, action)
    schedule.validate(depth, action)
    assert all(ratio == 1 for ratio in schedule.ratios) == (keep == 1)
    n = 100_000
    assert sum(schedule.per_layer(n, depth)) / depth / n == pytest.approx(keep, abs=1e-5)


def test_official_nuwa() -> None:
    """T11; of shares, whatever the number of tokens, as the authors count."""
    for average, counts in ((64, (112, 16)), (128, (224, 32)), (192, (336, 48))):
        assert Nuwa.official(average).schedule(32, "remove").counts(576) == counts
        assert Nuwa.official(average).schedule(32, "remove").layers == (0, 16)
    for share_of_all, share, of_these in ((0.25, 0.35, 0.42), (0.5, 0.6, 0.66), (0.75, 0.85, 0.7)):
        schedule = Nuwa.official(share_of_all).schedule(28, "remove")
        assert schedule.layers == (0, 15)
        for n in range(1, 3000):
            anchors = math.ceil(n * share)
            assert schedule.counts(n) == (anchors, max(1, math.floor(anchors * of_these)))
    assert Nuwa().schedule(32, "remove").counts(576) == (112, 16)
    assert Nuwa.official(0.25).schedule(28, "route").layers == (0, 15, 18, 21, 24)
    assert Nuwa.official(64).schedule(32, "route").layers == (0, 16, 20, 24, 28)
    assert Nuwa.official(64).schedule(32, "route").counts(576) == (112, 16, 16, 16, 16)
    with pytest.raises(RerouteError, match=r"released for the averages 64, 128, 192, 0\.25, 0\.5, 0\.75, not for 100"):
        Nuwa.official(100)


def test_official_vscan() -> None:
    """T15; for Qwen2.5-VL counts are shares of what is left, both rounded down."""
    llava = VScan.official(64).schedule(32, "remove")
    assert (llava.layers, llava.counts(576), llava.position_mode) == ((0, 16), (96, 32), "renumbered")
    assert sum(llava.per_layer(576, 32)) / 32 == 64
    qwen = VScan.official(0.111).schedule(28, "remove")
    assert qwen.layers == (0, 14)
    for n in range(1, 3000):
        first = max(1, math.floor(n * 0.167))
        assert qwen.counts(n) == (first, max(1, math.floor(first * 0.333)))
    assert VScan().schedule(32, "route").layers == (0, 16, 20, 24, 28)
    assert VScan().schedule(32, "route").actions == ("remove", *["route"] * 4)
    assert VScan(discards=False).schedule(32, "route").counts(576) == (96, 32, 32, 32, 32)
    with pytest.raises(RerouteError, match=r"VScan was released for the averages 64 and 0\.111, not for 96"):
        VScan.official(96)
    with pytest.raises(RerouteError, match=r"VScan takes two ratios .* got ratios=\(0\.5,\)"):
        VScan((0.5,))  # type: ignore[arg-type]


def test_official_visionzip() -> None:
    for tokens, contextual in ((64, 10), (128, 20), (192, 30)):
        schedule = VisionZip.official(tokens).schedule(32, "remove")
        assert (schedule.layers, schedule.counts(576), schedule.position_mode) == ((0,), (tokens,), "renumbered")
        assert schedule.rankers[0]._counts(tokens) == (tokens - contextual - 1, contextual)  # type: ignore[attr-defined]
    assert VisionZip().schedule(32, "remove").counts(576) == (64,)
    assert CDPruner(first=ConditionalDiversity(Norm())).schedule(32, "remove").counts(576) == (64,)
    assert VisionZip().schedule(32, "route").layers == Diverse().schedule(32, "route").layers == (0, 11, 19)
    with pytest.raises(RerouteError, match=r"VisionZip was released for 64, 128 and 192 tokens, not for 100"):
        VisionZip.official(100)


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        (DominantContextual, {"contextual": 1.0}, r"a share of contextual tokens below 1, .* not contextual=1\.0"),
        (DominantContextual, {"contextual": "much"}, r"not contextual='much'"),
        (DominantContextual, {"as_released": 1}, r"as_released=1"),
        (ConditionalDiversity, {"relevance": LastTokenAttention()}, r"a ScoreRanker, .* not LastTokenAttention"),
        (LastTokenAttention, {"rotates": 0}, r"rotates is True or False, not 0"),
    ],
)
def test_settings_of_rankers(kind: type[Ranker], options: dict[str, Any], says: str) -> None:
    with pytest.raises(RerouteError, match=says):
        kind(**options)


def test_a_ranker_may_be_the_option_of_another() -> None:
    schedule = CDPruner((0.5,), first=ConditionalDiversity(Norm())).schedule(32, "remove")
    assert Schedule.from_json(schedule.to_json()) == schedule
    given = ConditionalDiversity(ClipRelevance(torch.relu, torch.zeros(1, 2)))
    with pytest.raises(RerouteError, match="ClipRelevance cannot be stored"):
        CDPruner((0.5,), first=given).schedule(32, "remove").to_json()


def test_unreachable_budget() -> None:
    with pytest.raises(RerouteError, match=r"3/32 = 0\.09375"):
        FastV().with_budget(0.05, 32, "remove")


def test_registry() -> None:
    exported = [getattr(reroute.methods, name) for name in reroute.methods.__all__]
    kinds = [kind for kind in exported if isinstance(kind, type) and issubclass(kind, Method)]
    known = [kind for kind in kinds if kind not in (Method, Oracle)]  # an oracle needs a record
    assert {kind.name: kind for kind in known} == dict(METHODS)
    assert all(get(name) == kind() for name, kind in METHODS.items())
    method = FastV(layer=5)
    assert get(method) is method
    with pytest.raises(RerouteError, match=r"Unknown method 'FastVV'; known: cdpruner, .*, vscan\. .*'fastv'\?"):
        get("FastVV")
    kind: Any = FastV
    with pytest.raises(RerouteError, match=r"one of the names cdpruner, .*, vscan or a Method such as FastV\("):
        get(kind)


def test_methods_rank_by_attention() -> None:
    assert FastV().ranker == PDrop().ranker == LastTokenAttention()
    assert Random().ranker == RandomScores()


def test_random_ignores_neighbours_and_varies_with_seed_and_stage() -> None:
    rank = RandomScores()
    alone, (_, batched) = rank.scores(inputs(9)), rank.scores(inputs(5, 9))
    assert torch.equal(alone[0], batched)
    assert batched.dtype == torch.float32
    assert len(set(batched.tolist())) == 9
    assert not torch.equal(batched, RandomScores(seed=1).scores(inputs(9))[0])
    assert not torch.equal(batched, rank.scores(inputs(9, stage=1))[0])
    assert Random().schedule(32, "route") == replace(FastV().schedule(32, "route"), rankers=(RandomScores(),) * 4)


def test_random_leaves_the_global_generator_alone_and_needs_no_data() -> None:
    before = torch.get_rng_state()
    RandomScores().scores(inputs(9))
    assert torch.equal(before, torch.get_rng_state())
    with FakeTensorMode():
        assert RandomScores().scores(inputs(9))[0].shape == (9,)


def test_random_reaches_a_gpu_without_waiting() -> None:
    """From pinned memory; fake tensors need no GPU."""
    calls: dict[str, dict[str, Any]] = {}

    class Recording(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls[func.overloadpacket.__name__] = kwargs
            return func(*args, **kwargs)

    with FakeTensorMode():
        on_gpu = RankInputs([torch.empty(9, 4, device="cuda")], torch.empty(1, 4, device="cuda"), 3, 0)
        with Recording():  # type: ignore[no-untyped-call]
            (scores,) = RandomScores().scores(on_gpu)
    assert scores.device.type == "cuda"
    assert calls["rand"]["pin_memory"]
    assert calls["_to_copy"]["non_blocking"]


def test_a_ranker_of_ones_own_keeps_its_place() -> None:
    @dataclass(frozen=True)
    class Norm(ScoreRanker):
        def scores(self, inputs: RankInputs) -> list[torch.Tensor]:
            return [hidden.float().norm(dim=-1) for hidden in inputs.hidden]

    method = FastV(layer=2, ranker=Norm()).with_budget(0.25, 32, "route")
    assert method.schedule(32, "route").rankers == (Norm(),) * 4


def test_a_ranker_without_annotation_is_refused() -> None:
    """A dataclass would take it for no field and go on with attention."""
    with pytest.raises(TypeError, match=r"write 'ranker: … = …'"):

        class Silent(FastV):
            ranker = RandomScores()


def test_methods_do_not_import_transformers() -> None:
    code = "import reroute.methods, sys; raise SystemExit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

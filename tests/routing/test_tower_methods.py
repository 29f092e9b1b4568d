"""VisionZip, VScan and CDPruner on whole models: against loops over each picture, and the oracle behind them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import models
import pytest
import torch
from models import Sample, Tiny, text
from oracle import MARGIN, Rules, predict
from support import NoWaiting, close, generate
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize
from towers import outputs_of_tower, tower_of

import reroute
from reroute.errors import RerouteError
from reroute.methods import CDPruner, VisionZip, VScan
from reroute.rankers import (
    ClipRelevance,
    ConditionalDiversity,
    DominantContextual,
    LastTokenAttention,
    LocalGlobal,
    Norm,
    RankInputs,
    ScoreRanker,
)
from reroute.transformers.context import RoutedPrefill

Made = tuple[list[int], Tensor]
"""What is kept of a picture, and the embeddings (k, C) with which it goes on."""

RATIO = 0.15
METHODS: dict[str, Any] = {
    "visionzip": VisionZip((RATIO,), first=DominantContextual(0.4)),
    "vscan": VScan((RATIO, 0.05)),
    "cdpruner": CDPruner((RATIO,), first=ConditionalDiversity(Norm())),
}
CASES = [("visionzip", "llava"), ("vscan", "llava"), ("vscan", "qwen"), ("cdpruner", "llava"), ("cdpruner", "qwen")]


@functools.cache
def model(family: str) -> Tiny:
    """Towers whose early layer is not the late one, and pictures of several windows."""
    return (
        models.llava(side=13, layers=4, tower_layers=6) if family == "llava" else models.qwen(layers=4, tower_layers=4)
    )


@pytest.fixture(params=CASES, ids="-".join)
def its(request: pytest.FixtureRequest) -> tuple[str, Tiny]:
    return request.param[0], model(request.param[1])


@pytest.fixture(params=["llava", "qwen"])
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return model(request.param)


def batch(tiny: Tiny) -> list[Sample]:
    """One picture, two, none; of odd sizes where the model takes them."""
    first, second, third = ((9, 7), (4, 5), (2, 3)) if tiny.is_qwen else [tiny.grid] * 3
    return [tiny.prompt(0, 5, first, 4), tiny.prompt(1, 2, second, 3, third, 2), tiny.prompt(2, 6)]


def all_routed(name: str, action: Any) -> Any:
    """With a ratio for each decision."""
    method = METHODS[name]
    return method if action == "remove" or name == "vscan" else replace(method, ratios=(RATIO, 0.3, 0.15))


# --- by loops ---------------------------------------------------------------------------------------------------------


def best(scores: Tensor, k: int, among: Any = None) -> list[int]:
    """In descending order."""
    return sorted(range(len(scores)) if among is None else among, key=lambda i: (-float(scores[i]), i))[:k]


def visionzip(
    tiny: Tiny, tower: Any, embeds: Tensor, grid: Any, k: int, *, share: float = 0.4, cls: bool = False
) -> Made:
    states, attention = tower[:2]
    contextual = round(k * share)
    layer = tower_of(tiny).encoder.layers[4]
    salience = attention[4].sum(0)
    dominant = sorted(best(salience, k - contextual - cls))
    rest = [i for i in range(len(salience)) if i not in dominant]
    targets = [rest[len(rest) // contextual * i] for i in range(contextual)]
    keys = layer.self_attn.k_proj(layer.layer_norm1(states[4])).view(len(salience), 2, -1).mean(1)
    members: dict[int, list[int]] = {target: [] for target in targets}
    for i in rest:
        if targets and i not in targets:
            members[max(targets, key=lambda j: float(cosine_similarity(keys[i], keys[j], dim=0)))].append(i)
    made = {j: states[5][j] + states[5][of_it].sum(0) / max(1, len(of_it)) for j, of_it in members.items()}
    project = tiny.model.model.multi_modal_projector
    if cls:
        kept = sorted([*dominant, *targets, *best(salience, 1, set(rest) - set(targets))])
        return kept, torch.stack([project(tower[2]), *embeds[dominant], *(project(made[j]) for j in targets)])
    kept = sorted([*dominant, *targets])
    return kept, torch.stack([project(made[i]) if i in made else embeds[i] for i in kept])


def vscan(tiny: Tiny, tower: Any, embeds: Tensor, grid: Any, k: int) -> Made:
    local, late = (tower[1][layer].mean(0) for layer in ((1, 3) if tiny.is_qwen else (1, 4)))
    side = 4 if tiny.is_qwen else 6
    down, across = (max(1, length // side) for length in grid)
    windows: dict[Any, list[int]] = {}
    for i in range(len(local)):
        windows.setdefault((min(i // grid[1] // side, down - 1), min(i % grid[1] // side, across - 1)), []).append(i)
    chosen: list[int] = []
    if tiny.is_qwen:
        counts = dict.fromkeys(windows, 0)
        for i in best(local, len(local)):
            window = next(window for window, members in windows.items() if i in members)
            if len(chosen) < k // 2 and counts[window] < -(-(k // 2) // len(windows)):
                counts[window] += 1
                chosen.append(i)
    else:
        chosen = [i for members in windows.values() for i in best(local, k // 2 // len(windows), members)]
    kept = sorted([*chosen, *best(late, k - len(chosen), set(range(len(late))) - set(chosen))])
    sums = {i: [embeds[i]] for i in kept}
    for i in range(len(embeds)):
        if i not in sums:
            sums[kept[int((normalize(embeds[kept], dim=-1) @ normalize(embeds[i], dim=0)).argmax())]].append(embeds[i])
    return kept, torch.stack([torch.stack(taken).mean(0) for taken in sums.values()])


def cdpruner(tiny: Tiny, tower: Any, embeds: Tensor, grid: Any, k: int, *, relevance: Tensor | None = None) -> Made:
    relevance = (embeds.norm(dim=-1) if relevance is None else relevance).double()
    relevance = (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min())
    unit = normalize(embeds.double(), dim=-1)
    kernel = relevance[:, None] * (unit @ unit.T) * relevance
    picks: list[int] = []
    for _ in range(k):
        rest = [i for i in range(len(embeds)) if i not in picks]
        among, across = kernel[picks][:, picks], kernel[picks][:, rest]
        whole = kernel.diagonal()[rest]
        left = whole - (across * torch.linalg.solve(among, across)).sum(0)
        is_spanned = bool((left < 1e-9 * whole).all())
        picks.append(rest[int((relevance[rest] if is_spanned else left).argmax())])
    return sorted(picks), embeds[sorted(picks)]


LOOPS: dict[str, Callable[..., Made]] = {"visionzip": visionzip, "vscan": vscan, "cdpruner": cdpruner}


def by_loops(name: str, tiny: Tiny, sample: Sample, ratio: float = RATIO, **settings: Any) -> Made:
    """All pictures of a sample, of which each keeps its share."""
    sizes = [(rows // 2, columns // 2) for _, rows, columns in sample.grids] or [tiny.grid] * len(sample.pixels)
    kept, made, start = [], [], 0
    budget = max(1, int(len(sample.visual) * ratio))
    embeds = tiny.embeds(sample)[list(sample.visual)]
    for grid, pixels, outputs in zip(sizes, sample.pixels, outputs_of_tower(tiny, sample), strict=True):
        tower: Any = outputs
        if not tiny.is_qwen:
            tower = (*tower, tower_of(tiny)(pixels, output_hidden_states=True).hidden_states[5][0, 0])
        end = start + grid[0] * grid[1]
        k = budget * end // len(embeds) - budget * start // len(embeds)
        if k in (0, end - start):
            some, states = list(range(k)), embeds[start:end][:k]
        else:
            some, states = LOOPS[name](tiny, tower, embeds[start:end], grid, k, **settings)
        kept += [start + i for i in some]
        made.append(states)
        start = end
    return kept, torch.cat(made)


def compact(tiny: Tiny, sample: Sample, kept: list[int], tokens: list[int]) -> tuple[Sample, list[int]]:
    """The prompt with the visual tokens that are left; and where it and ``tokens`` behind it are in the whole one."""
    gone = {place for i, place in enumerate(sample.visual) if i not in kept}
    places = [place for place in range(len(sample)) if place not in gone]
    visual = tuple(i for i, place in enumerate(places) if place in sample.visual)
    return Sample(tuple(sample.ids[place] for place in places), visual), [
        *places,
        *range(len(sample), len(sample) + len(tokens)),
    ]


REMOVING = [
    (case, action) for case in CASES for action in ("remove", "route") if case[0] == "vscan" or action == "remove"
]


@pytest.mark.parametrize(("its", "action"), REMOVING, indirect=["its"])
def test_the_oracle_goes_on_with_what_loops_make(its: tuple[str, Tiny], action: Any) -> None:
    """In a batch, and with generated tokens: where the first decision removes, the rest is of the compact prompt."""
    name, tiny = its
    samples = batch(tiny)
    with reroute.enable(tiny.model, method=METHODS[name], action=action, trace=True) as handle:
        out, trace = generate(tiny, samples, 3), handle.trace
    assert trace is not None
    tokens = out.sequences[:, -3:].tolist()
    for b, sample in enumerate(samples[:2]):
        kept, made = by_loops(name, tiny, sample)
        assert trace[0].kept[b].tolist() == kept
        prompt, places = compact(tiny, sample, kept, tokens[b][:2])
        whole = sample + text(*tokens[b][:2])
        embeds = tiny.embeds(whole)[places]
        embeds[list(prompt.visual)] = made
        later = [(stage.layer, len(stage.kept[b]) / len(kept)) for stage in trace[1:]]
        rules = Rules(tuple(x for x, _ in later), tuple(r + 1e-9 for _, r in later), action)
        positions = tiny.positions(whole)[..., places]
        result = predict(tiny, prompt, rules, then=tokens[b][:2], embeds=embeds, positions=positions)
        assert result.margin > MARGIN
        for stage, decision in zip(trace[1:], result.decisions[0], strict=True):
            assert stage.kept[b].tolist() == [kept[i] for i in decision.kept]
        close(torch.stack(out.logits, 1)[b], result.logits[len(prompt) - 1 :])


@dataclass(frozen=True)
class Given(ScoreRanker):
    """Keeps what it is told to."""

    tokens: tuple[int, ...]

    def scores(self, inputs: RankInputs) -> list[Tensor]:
        return [torch.zeros(len(inputs.hidden[0])).index_fill(0, torch.tensor(self.tokens), 1)]


def test_a_first_decision_that_defers(its: tuple[str, Tiny]) -> None:
    """What is kept goes on as loops make it, and all compete later, as they were or as they were made."""
    name, tiny = its
    method = all_routed(name, "route")
    if isinstance(method, VScan):
        method = replace(method, discards=False)
    sample = batch(tiny)[1]
    given = tiny.inputs([sample])
    with reroute.enable(tiny.model, method=method, action="route", trace=True) as handle:
        logits, trace = tiny.model(**given).logits, handle.trace
    assert trace is not None
    kept, made = by_loops(name, tiny, sample)
    embeds = tiny.embeds(sample)[None].clone()
    embeds[0, [sample.visual[i] for i in kept]] = made
    schedule = method.schedule(tiny.num_layers, "route")
    schedule = replace(schedule, rankers=(Given(tuple(kept)), *schedule.rankers[1:]))
    with (
        reroute.enable(tiny.model, schedule=schedule, action="route", trace=True) as handle,
        handle.using(handle.plan(given["input_ids"])),
    ):
        expected = tiny.model(inputs_embeds=embeds, position_ids=tiny.positions(sample)[..., None, :]).logits
    assert handle.trace is not None
    assert [stage.kept[0].tolist() for stage in trace] == [stage.kept[0].tolist() for stage in handle.trace]
    assert len(trace[1].candidates[0]) == len(sample.visual)
    close(logits, expected)


@pytest.mark.parametrize("tokens", [64, 192])
def test_visionzip_as_released(tokens: int) -> None:
    """CLS first, then dominant and then contextual ones, at positions without gaps, also of generated tokens."""
    tiny = model("llava")
    method, samples = VisionZip.official(tokens), batch(tiny)
    (ratio,) = method.ratios or ()
    with reroute.enable(tiny.model, method=method, action="remove", trace=True) as handle:
        out, trace = generate(tiny, samples, 3), handle.trace
    assert trace is not None
    for b, sample in enumerate(samples[:2]):
        kept, made = by_loops("visionzip", tiny, sample, ratio, share=10 / 64, cls=True)
        assert trace[0].kept[b].tolist() == kept
        generated = out.sequences[b, -3:-1].tolist()
        prompt, places = compact(tiny, sample, kept, generated)
        embeds = tiny.embeds(sample + text(*generated))[places]
        embeds[list(prompt.visual)] = made
        result = predict(
            tiny, prompt, Rules((), ()), then=generated, embeds=embeds, positions=torch.arange(len(places))
        )
        close(torch.stack(out.logits, 1)[b], result.logits[len(prompt) - 1 :])


@contextmanager
def beginnings(tiny: Tiny) -> Iterator[list[Tensor]]:
    """What the decoder's layers begin with, in calls within."""
    began: list[Tensor] = []
    hook = tiny.model.model.language_model.layers[0].register_forward_pre_hook(lambda m, args: began.append(args[0]))
    try:
        yield began
    finally:
        hook.remove()


def test_cls_may_be_all_that_is_left() -> None:
    """Of one token of a picture, however many of them would be contextual."""
    tiny = model("llava")
    method = VisionZip((1 / 169,), position_mode="renumbered", first=DominantContextual(0.9, as_released=True))
    sample = tiny.prompt(0, 5, tiny.grid, 4)
    with beginnings(tiny) as began, reroute.enable(tiny.model, method=method, action="remove"):
        tiny.model(**tiny.inputs([sample]))
    states = tower_of(tiny)(sample.pixels[0], output_hidden_states=True).hidden_states[5]
    close(began[0][0, 5], tiny.model.model.multi_modal_projector(states[0, 0]))
    assert began[0].shape[1] == 10


def test_a_picture_of_which_all_is_kept_stays_as_it_is() -> None:
    tiny = model("llava")
    rankers = (DominantContextual(as_released=True), LastTokenAttention())
    sample = tiny.prompt(0, 5, tiny.grid, 4)
    schedule = reroute.Schedule((0, 2), (1.0, 0.5), rankers)
    with beginnings(tiny) as began, reroute.enable(tiny.model, schedule=schedule, action="remove"):
        tiny.model(**tiny.inputs([sample]))
    assert torch.equal(began[0][0], tiny.embeds(sample))


def test_relevance_by_clip(tiny: Tiny) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn((128 if tiny.is_qwen else 32), 6, generator=generator)
    texts = torch.randn(2, 6, generator=generator)
    sample, other = batch(tiny)[0], batch(tiny)[2]
    ranker = ConditionalDiversity(ClipRelevance(lambda x: x @ matrix, [texts, texts[:1]]))
    method = CDPruner((RATIO,), first=ranker)
    with reroute.enable(tiny.model, trace=True) as handle, handle.at(method=method, action="remove"):
        generate(tiny, [sample, other], 2)
        trace = handle.trace
        with pytest.raises(RerouteError, match="texts for 2 samples, and the call has 1"):
            tiny.model(**tiny.inputs([sample]))
    assert trace is not None
    (states, _), *_ = outputs_of_tower(tiny, sample)
    embedded = states[-1 if tiny.is_qwen else -2] @ matrix
    relevance = -torch.stack([cosine_similarity(embedded, row, dim=-1) for row in texts]).mean(0)
    assert trace[0].kept[0].tolist() == by_loops("cdpruner", tiny, sample, relevance=relevance)[0]


# --- promises ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["route", "remove"])
def test_a_row_of_a_batch_is_the_sample_alone(its: tuple[str, Tiny], action: Any) -> None:
    name, tiny = its
    samples = batch(tiny)
    with reroute.enable(tiny.model, method=all_routed(name, action), action=action, trace=True):
        together = torch.stack(generate(tiny, samples, 3).logits, 1)
        alone = [torch.stack(generate(tiny, [sample], 3).logits, 1)[0] for sample in samples]
    for row, expected in zip(together, alone, strict=True):
        close(row, expected)


def test_text_is_left_alone(its: tuple[str, Tiny]) -> None:
    name, tiny = its
    given = tiny.inputs(batch(tiny)[2:])
    plain = tiny.model(**given).logits
    with reroute.enable(tiny.model, method=METHODS[name], action="remove"):
        assert torch.equal(tiny.model(**given).logits, plain)


@pytest.mark.parametrize("ratio", [0.0, 0.006, 0.99, 1.0])
def test_budgets_at_the_border(its: tuple[str, Tiny], ratio: float) -> None:
    """None of a picture, one of two pictures, all but one, all: those are as they were."""
    name, tiny = its
    method, sample = METHODS[name], tiny.prompt(0, 5, tiny.grid, 2, tiny.grid, 4)
    ratios = (ratio, 0.0) if name == "vscan" else (ratio,)
    method = replace(method, ratios=ratios)
    with beginnings(tiny) as began, reroute.enable(tiny.model, method=method, action="remove") as handle:
        assert tiny.model(**tiny.inputs([sample])).logits.isfinite().all()
    k = 0 if not ratio else max(1, int(len(sample.visual) * ratio))
    if ratio < 1 or name == "vscan":
        assert handle.stats().kept[0][0] == k
    assert began[0].shape[1] == sample.texts + k
    if ratio == 1:
        close(began[0][0], tiny.embeds(sample))
    if ratio:
        expected = by_loops(name, tiny, sample, ratio)[1]
        close(began[0][0, 5 : 5 + k // 2], expected[: k // 2])


@pytest.mark.parametrize("action", ["route", "remove"])
def test_no_operation_waits(its: tuple[str, Tiny], action: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name, tiny = its
    original, ran = RoutedPrefill.before_layer, []

    def guarded(*args: Any) -> Any:
        ran.append(args[1])
        with NoWaiting():
            return original(*args)

    monkeypatch.setattr(RoutedPrefill, "before_layer", guarded)
    with reroute.enable(tiny.model, method=all_routed(name, action), action=action):
        tiny.model(**tiny.inputs(batch(tiny)))
    assert len(ran) == tiny.num_layers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("name", "family"), CASES)
def test_half_precision(name: str, family: str, dtype: torch.dtype) -> None:
    tiny = models.llava(layers=2) if family == "llava" else models.qwen(layers=2)
    tiny.model.to(dtype)
    given: dict[str, Any] = tiny.inputs([tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(2, 6)])
    given["pixel_values"] = given["pixel_values"].to(dtype)
    method = replace(METHODS[name], ratios=(0.5, 0.3) if name == "vscan" else (0.5,))
    with reroute.enable(tiny.model, method=method, action="remove") as handle:
        assert tiny.model(**given).logits.isfinite().all()
    assert [sample[0] for sample in handle.stats().kept] == [8, 0]


@pytest.mark.parametrize("action", ["route", "remove"])
def test_gradients_reach_the_pixels(its: tuple[str, Tiny], action: Any) -> None:
    name, tiny = its
    given: dict[str, Any] = tiny.inputs([batch(tiny)[0]])
    given["pixel_values"] = given["pixel_values"].clone().requires_grad_()
    with reroute.enable(tiny.model, method=all_routed(name, action), action=action):
        expected = tiny.model(**given).logits
        (gradient,) = torch.autograd.grad(expected[0, -1].square().sum(), given["pixel_values"])
        with torch.no_grad():
            close(tiny.model(**given).logits, expected)
    assert gradient.abs().sum() > 0


def test_what_it_costs(its: tuple[str, Tiny]) -> None:
    name, tiny = its
    sample = tiny.prompt(0, 5, tiny.grid, 4)
    with reroute.enable(tiny.model, method=METHODS[name], action="remove") as handle:
        tiny.model(**tiny.inputs([sample]))
    n, hidden, width, text_tokens = len(sample.visual), 64, 32, 9
    k = int(n * RATIO)
    attention = 4 * 4 * n * width**2 + 2 * (4 * n) ** 2 * width
    if not tiny.is_qwen:
        attention = 2 * n * width**2 + 2 * width**2 + 2 * n * width
    c, projector = round(k * 0.4), width * 64 + 64 * 64
    q, kv, rows = 64, 32, text_tokens + k
    expected = {
        "visionzip": attention + 2 * n * width**2 + 2 * c * n * (16 + width) + 2 * c * projector,
        "vscan": 2 * attention + 4 * k * n * hidden + 2 * hidden * q + 2 * rows * hidden * kv + 2 * q * rows,
        "cdpruner": 2 * n * k * hidden + n * k * (k - 1),
    }
    assert handle.stats().scoring_flops == expected[name]


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ranker", [DominantContextual(), LocalGlobal(), ConditionalDiversity(Norm())], ids=lambda r: type(r).__name__
)
def test_they_decide_before_the_decoder(ranker: Any) -> None:
    tiny = model("llava")
    with (
        reroute.enable(tiny.model, schedule=reroute.Schedule((1,), (0.5,), (ranker,))),
        pytest.raises(
            RerouteError, match=f"{type(ranker).__name__} .* has to decide before layer 0, not before layer 1"
        ),
    ):
        tiny.model(**tiny.inputs([tiny.prompt(0, 5, tiny.grid, 4)]))


def test_what_cannot_be_computed_is_refused() -> None:
    with pytest.raises(RerouteError, match="this vision tower has no CLS row"):
        reroute.enable(model("qwen").model, method="visionzip", keep=0.3)
    for family in ("llava", "qwen"):
        with pytest.raises(RerouteError, match="this model has no text tower to make them"):
            reroute.enable(model(family).model, method="cdpruner", keep=0.3)
        reroute.enable(model(family).model, method="cdpruner", keep=1.0).disable()

"""VisionZip, VScan and CDPruner on whole models: against loops over each picture, and the oracle behind them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import models
import pytest
import torch
from models import Sample, Tiny, text
from oracle import MARGIN, Rules, predict
from support import close, generate, never_waits
from torch import Tensor
from torch.nn.functional import cosine_similarity
from tower_loops import CASES, METHODS, RATIO, all_routed, batch, by_loops, model
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


@pytest.fixture(params=CASES, ids="-".join)
def its(request: pytest.FixtureRequest) -> tuple[str, Tiny]:
    return request.param[0], model(request.param[1])


@pytest.fixture(params=["llava", "qwen"])
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return model(request.param)


def compact(sample: Sample, kept: list[int], tokens: list[int]) -> tuple[Sample, list[int]]:
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
        prompt, places = compact(sample, kept, tokens[b][:2])
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
        prompt, places = compact(sample, kept, generated)
        embeds = tiny.embeds(sample + text(*generated))[places]
        embeds[list(prompt.visual)] = made
        result = predict(
            tiny, prompt, Rules((), ()), then=generated, embeds=embeds, positions=torch.arange(len(places))
        )
        close(torch.stack(out.logits, 1)[b], result.logits[len(prompt) - 1 :])


def test_vscan_as_released_for_llava() -> None:
    """Positions without gaps from the first decision on, and again from the second one on."""
    tiny = model("llava")
    sample = batch(tiny)[0]
    with reroute.enable(tiny.model, method=VScan.official(64), action="remove", trace=True) as handle:
        out, trace = generate(tiny, [sample], 3), handle.trace
    assert trace is not None
    kept, made = by_loops("vscan", tiny, sample, 1 / 6)
    generated = out.sequences[0, -3:-1].tolist()
    prompt, places = compact(sample, kept, generated)
    embeds = tiny.embeds(sample + text(*generated))[places]
    embeds[list(prompt.visual)] = made
    rules = Rules((2,), (len(trace[1].kept[0]) / len(kept) + 1e-9,), "remove", position_mode="renumbered")
    result = predict(tiny, prompt, rules, then=generated, embeds=embeds, positions=torch.arange(len(places)))
    assert (len(kept), len(trace[1].kept[0])) == (169 // 6, 169 // 18)
    assert trace[1].kept[0].tolist() == [kept[i] for i in result.decisions[0][0].kept]
    close(torch.stack(out.logits, 1)[0], result.logits[len(prompt) - 1 :])


def test_vscan_as_released_for_qwen() -> None:
    """The second decision is by attention without rotation: of query and keys as the layer projects them."""
    tiny = model("qwen")
    sample, hidden = batch(tiny)[0], []
    layer = tiny.model.model.language_model.layers[2]
    plain = reroute.Schedule((0, 2), (0.167, 0.167), (LocalGlobal(), LastTokenAttention()))
    hook = layer.register_forward_pre_hook(lambda m, args: hidden.append(args[0]))
    try:
        with reroute.enable(tiny.model, schedule=plain, action="remove"):
            tiny.model(**tiny.inputs([sample]))
    finally:
        hook.remove()
    attn, states = layer.self_attn, layer.input_layernorm(hidden[0][0])
    query = attn.q_proj(states[-1]).view(4, 1, -1)
    keys = attn.k_proj(states).view(len(states), 2, -1).transpose(0, 1).repeat_interleave(2, 0)
    weights = (query @ keys.transpose(1, 2) * attn.scaling).softmax(-1).mean(0)[0, 5:-4]
    with reroute.enable(tiny.model, method=VScan.official(0.111), action="remove", trace=True) as handle:
        generate(tiny, [sample], 3)
    assert handle.trace is not None
    first, second = handle.trace
    assert (len(first.kept[0]), len(second.kept[0])) == (10, 3)
    close(second.scores[0], weights)
    assert second.kept[0].tolist() == sorted(first.kept[0][weights.topk(3).indices].tolist())


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
    ran = never_waits(monkeypatch, ["before_layer"], RoutedPrefill)
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
        with pytest.raises(RerouteError, match="this model has no text tower to make them"):
            reroute.enable(model(family).model, schedule=reroute.Schedule((0,), (0.5,), (ConditionalDiversity(),)))

"""Nüwa on whole models: against stage 1 in loops, in batches, with several pictures, removed, routed and deferred."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import Any

import models
import pytest
import torch
from models import Sample, Tiny
from support import close, generate, never_waits
from torch import Tensor
from torch.nn.functional import cosine_similarity
from towers import UNROLLED, outputs_of_tower, tower_of

import reroute
from reroute.errors import RerouteError
from reroute.methods import Nuwa
from reroute.rankers import LastRowsAttention, LastTokenAttention, RegionAnchors
from reroute.transformers.context import RoutedPrefill

NUWA = Nuwa((0.25, 0.125))


@pytest.fixture(params=["llava-gqa", "qwen"])
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return models.tiny(request.param)


def batch(tiny: Tiny) -> list[Sample]:
    """One picture, two, none."""
    return [tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(1, 2, tiny.grid, 3, tiny.grid, 2), tiny.prompt(2, 6)]


def by_loops(tiny: Tiny, sample: Sample, k: int, *, paper: bool = False) -> tuple[list[int], Tensor]:
    """Anchors and their embeddings, picture by picture of 4 x 4 tokens, ``k`` of each."""
    anchors, merged = [], []
    embeds = tiny.embeds(sample)[list(sample.visual)].split(16)
    for i, (states, attention) in enumerate(outputs_of_tower(tiny, sample)):
        cells = [(r, c) for r in range(4) for c in range(4)]
        depth = len(states) - 1
        layer = depth - 1 if tiny.is_qwen else depth - 2
        salience = attention[layer].sum(0)
        if tiny.is_qwen:
            compared = project(tiny, torch.stack(states[depth // 4 : depth * 3 // 4 + 1]).mean(0)[UNROLLED])
            source, reach, q, whole = embeds[i], 0.8 * 18**0.5, 0.1, False
        else:
            compared = torch.stack(states[depth * 2 // 3 :]).mean(0)
            source, reach, q, whole = states[-2], (18 * 280 / 1058) ** 0.5, 0.55, True
        prominence = salience
        if paper:
            prominence = keys(tiny, states[layer], layer).norm(dim=-1)
            salience = salience * prominence
            reach, q, whole = 0.26 * 18**0.5, 0.75, False
        regions = [[(r + y) * 4 + c + x for y in (0, 1) for x in (0, 1)] for r in (0, 2) for c in (0, 2)]
        firsts = [max(region, key=lambda j: float(salience[j])) for region in regions]
        chosen = sorted(sorted(firsts, key=lambda j: -float(salience[j]))[:k])
        pillar = prominence[chosen] >= prominence[chosen].quantile(q)
        for anchor, is_pillar in zip(chosen, pillar, strict=True):
            weights = []
            for j, (row, column) in enumerate(cells):
                apart = ((row - cells[anchor][0]) ** 2 + (column - cells[anchor][1]) ** 2) ** 0.5
                like = float(cosine_similarity(compared[anchor], compared[j], dim=0))
                weights.append(max(0.0, like) * (1 - min(1.0, apart / reach)) * (not is_pillar or j == anchor))
            shares = torch.tensor(weights) / sum(weights)
            if whole:
                shares[anchor] = 1
            merged.append(shares @ source)
        anchors += [16 * i + anchor for anchor in chosen]
    taken = torch.stack(merged)
    return anchors, taken if tiny.is_qwen else project(tiny, taken)


def project(tiny: Tiny, features: Tensor) -> Tensor:
    if tiny.is_qwen:
        projected: Tensor = tower_of(tiny).merger(features.view(-1, 32))
    else:
        projected = tiny.model.model.multi_modal_projector(features)
    return projected


def keys(tiny: Tiny, states: Tensor, layer: int) -> Tensor:
    """(N, F) of a layer, from its input."""
    if tiny.is_qwen:
        block = tower_of(tiny).blocks[layer]
        of_patches: Tensor = block.attn.qkv(block.norm1(states.view(-1, 32))).chunk(3, -1)[1]
        return of_patches.view(16, 4, 32).mean(1)
    block = tower_of(tiny).encoder.layers[layer]
    of_tokens: Tensor = block.self_attn.k_proj(block.layer_norm1(states))
    return of_tokens


@pytest.mark.parametrize("paper", [False, True])
@pytest.mark.parametrize("action", ["route", "remove"])
def test_anchors_take_up_what_is_around_them(tiny: Tiny, action: Any, paper: bool) -> None:
    """In a batch: the decoder begins with what loops make of each picture by itself."""
    samples, began = batch(tiny), []
    layer = tiny.model.model.language_model.layers[0]
    hook = layer.register_forward_pre_hook(lambda module, args: began.append(args[0]))
    method = replace(NUWA, first=RegionAnchors(convention="paper" if paper else "code"))
    try:
        with reroute.enable(tiny.model, method=method, action=action, trace=True) as handle:
            tiny.model(**tiny.inputs(samples))
    finally:
        hook.remove()
    assert handle.trace is not None
    for b, sample in enumerate(samples[:2]):
        anchors, merged = by_loops(tiny, sample, 4, paper=paper)
        assert handle.trace[0].kept[b].tolist() == anchors
        compact = [i for i in range(len(sample)) if i not in sample.visual or sample.visual.index(i) in anchors]
        states = began[0][b, -len(compact) :]
        visual = [place for place, i in enumerate(compact) if i in sample.visual]
        close(states[visual], merged)
        texts = [place for place in range(len(compact)) if place not in visual]
        close(states[texts], tiny.embeds(sample)[[compact[place] for place in texts]])


@pytest.mark.parametrize("discards", [True, False])
@pytest.mark.parametrize("action", ["route", "remove"])
def test_a_row_of_a_batch_is_the_sample_alone(tiny: Tiny, action: Any, discards: bool) -> None:
    samples = batch(tiny)
    with reroute.enable(tiny.model, method=replace(NUWA, discards=discards), action=action, trace=True):
        together = torch.stack(generate(tiny, samples, 4).logits, 1)
        alone = [torch.stack(generate(tiny, [sample], 4).logits, 1)[0] for sample in samples]
        tiny.model.set_attn_implementation("eager")
        try:
            eager = torch.stack(generate(tiny, samples, 4).logits, 1)
        finally:
            tiny.model.set_attn_implementation("sdpa")
    close(eager, together)
    for row, expected in zip(together, alone, strict=True):
        close(row, expected)


def test_later_decisions_are_among_the_anchors(tiny: Tiny) -> None:
    """The budget of the published method, and other tokens; without discarding all compete."""
    sample = tiny.prompt(0, 5, tiny.grid, 4)
    budgets = []
    for action, discards in (("remove", True), ("route", True), ("route", False)):
        settings: dict[str, Any] = {"action": action, "method": replace(NUWA, discards=discards)}
        with reroute.enable(tiny.model, trace=True, **settings) as handle:
            tiny.model(**tiny.inputs([sample]), use_cache=True)
        trace, stats = handle.trace, handle.stats()
        assert trace is not None
        budgets.append((stats.avg_tokens, stats.kv_bytes, stats.prefill_flops - stats.scoring_flops))
        assert [len(stage.kept[0]) for stage in trace] == [4, 2] if action == "remove" else [4, *[2] * 4]
        assert [stage.layer for stage in trace] == [0, 4] if action == "remove" else [0, 4, 5, 6, 7]
        for stage in trace[1:]:
            expected = trace[0].kept[0].tolist() if discards else list(range(16))
            assert stage.candidates[0].tolist() == expected
    assert budgets[0] == budgets[1] == budgets[2]


def test_what_was_deferred_comes_back(tiny: Tiny) -> None:
    """Not where it was discarded."""
    sample = tiny.prompt(0, 5, tiny.grid, 4)
    back = {}
    for discards in (True, False):
        with reroute.enable(tiny.model, method=replace(NUWA, discards=discards), trace=True) as handle:
            tiny.model(**tiny.inputs([sample]))
        assert handle.trace is not None
        anchors, *later = (set(stage.kept[0].tolist()) for stage in handle.trace)
        back[discards] = set().union(*later) - anchors
    assert not back[True]
    assert back[False]


def test_text_is_left_alone(tiny: Tiny) -> None:
    given = tiny.inputs([tiny.prompt(2, 6)])
    plain = tiny.model(**given).logits
    with reroute.enable(tiny.model, method="nuwa", action="remove") as handle:
        tiny.model(**tiny.inputs([tiny.prompt(0, 5, tiny.grid, 4)]))
        assert torch.equal(tiny.model(**given).logits, plain)
        assert handle.stats().prefills == 1


def test_pictures_share_a_budget_by_their_size() -> None:
    tiny = models.tiny("qwen")
    grids = ((4, 4), (3, 5), (1, 2))
    sample = tiny.prompt(0, 5, grids[0], 2, grids[1], 2, grids[2], 4)
    with reroute.enable(tiny.model, method=Nuwa((0.5, 0.25)), action="remove", trace=True) as handle:
        tiny.model(**tiny.inputs([sample]))
    assert handle.trace is not None
    ends = list(accumulate(rows * columns for rows, columns in grids))
    kept = handle.trace[0].kept[0]
    assert [int((kept < end).sum()) for end in ends] == [7, 15, 16]


@pytest.mark.parametrize("convention", ["code", "paper"])
def test_pictures_of_one_token(convention: Any) -> None:
    """Of two of them one is kept, as it is, and the other has no share."""
    tiny = models.llava(side=1, layers=4)
    sample, began = tiny.prompt(0, 3, tiny.grid, 2, tiny.grid, 4), []
    hook = tiny.model.model.language_model.layers[0].register_forward_pre_hook(lambda m, args: began.append(args[0]))
    try:
        method = Nuwa((0.5, 0.5), first=RegionAnchors(convention=convention))
        with reroute.enable(tiny.model, method=method, action="remove", trace=True) as handle:
            tiny.model(**tiny.inputs([sample]))
    finally:
        hook.remove()
    assert handle.trace is not None
    assert handle.trace[0].kept[0].tolist() == [1]
    close(began[0][0, 5], tiny.embeds(sample)[6])


def test_features_of_windows_are_compared_as_released_or_by_rows() -> None:
    tiny = models.tiny("qwen")
    given, logits = tiny.inputs([tiny.prompt(0, 5, (4, 4), 4)]), []
    for by_rows in (False, True):
        method = replace(NUWA, first=RegionAnchors(by_rows=by_rows))
        with reroute.enable(tiny.model, method=method, action="remove", trace=True):
            logits.append(tiny.model(**given).logits[0, -1])
    assert not torch.allclose(logits[0], logits[1], atol=1e-3)


@pytest.mark.parametrize("action", ["route", "remove"])
def test_gradients_reach_the_pixels_of_what_was_taken_up(tiny: Tiny, action: Any) -> None:
    given: dict[str, Any] = tiny.inputs([tiny.prompt(0, 5, tiny.grid, 4)])
    given["pixel_values"] = given["pixel_values"].clone().requires_grad_()
    with reroute.enable(tiny.model, method=NUWA, action=action):
        expected = tiny.model(**given).logits
        (gradient,) = torch.autograd.grad(expected[0, -1].square().sum(), given["pixel_values"])
        with torch.no_grad():
            close(tiny.model(**given).logits, expected)
    assert gradient.abs().sum() > 0


def test_what_it_costs(tiny: Tiny) -> None:
    sample = tiny.prompt(0, 5, tiny.grid, 4)
    with reroute.enable(tiny.model, method=NUWA, action="remove") as handle:
        tiny.model(**tiny.inputs([sample]))
    width = 32
    if tiny.is_qwen:  # attention of 64 patches, 16 tokens projected, and compared and taken up 64 wide
        projector = 128 * 128 + 128 * 64
        stage_1 = 4 * 64 * width**2 + 2 * 64**2 * width + 2 * 16 * projector + 2 * 4 * 16 * (64 + 64)
    else:
        projector = width * 64 + 64 * 64
        stage_1 = 2 * 16 * width**2 + 2 * width**2 + 2 * 16 * width + 2 * 4 * projector + 2 * 4 * 16 * 2 * width
    q, kv, rows = 64, 32, 9 + 4
    stage_2 = 2 * 64 * q + 2 * rows * 64 * kv + 2 * q * rows
    assert handle.stats().scoring_flops == stage_1 + stage_2


@pytest.mark.parametrize("action", ["route", "remove"])
def test_no_operation_waits(tiny: Tiny, action: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a decision or behind it; the tower itself reads its grids on the host."""
    ran = never_waits(monkeypatch, ["before_layer"], RoutedPrefill)
    for second in (LastTokenAttention(layer_offset=-1), LastRowsAttention(layer_offset=-1)):
        with reroute.enable(tiny.model, method=replace(NUWA, second=second), action=action):
            tiny.model(**tiny.inputs(batch(tiny)))
    assert len(ran) == 2 * tiny.num_layers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["llava", "qwen"])
def test_half_precision(family: str, dtype: torch.dtype) -> None:
    tiny = models.llava() if family == "llava" else models.qwen()
    tiny.model.to(dtype)
    given: dict[str, Any] = tiny.inputs(batch(tiny))
    given["pixel_values"] = given["pixel_values"].to(dtype)
    with reroute.enable(tiny.model, method=NUWA, action="remove") as handle:
        assert tiny.model(**given).logits.isfinite().all()
    assert handle.stats().kept == ((4, 2), (8, 4), (0, 0))


def test_it_warms_up(tiny: Tiny) -> None:
    with reroute.enable(tiny.model, method="nuwa") as handle:
        assert not handle.warm_up(visual=64).kernels


def test_anchors_are_made_before_the_decoder(tiny: Tiny) -> None:
    schedule = reroute.Schedule((1,), (0.5,), (RegionAnchors(),))
    with (
        reroute.enable(tiny.model, schedule=schedule),
        pytest.raises(RerouteError, match="has to decide before layer 0, not before layer 1"),
    ):
        tiny.model(**tiny.inputs([tiny.prompt(0, 5, tiny.grid, 4)]))


# --- attention of the last rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, -1])
@pytest.mark.parametrize("action", ["route", "remove"])
def test_attention_of_the_last_rows(tiny: Tiny, action: Any, offset: int) -> None:
    """Of the plain model, as it returns it; in a batch, and with a decision before that."""
    samples, rows = batch(tiny)[:2], 3
    tiny.model.set_attn_implementation("eager")
    try:
        given = tiny.inputs(samples)
        attentions = tiny.model(**given, output_attentions=True).attentions
    finally:
        tiny.model.set_attn_implementation("sdpa")
    schedule = reroute.Schedule((3,), (0.5,), (LastRowsAttention(rows, offset),))
    with reroute.enable(tiny.model, schedule=schedule, action=action, trace=True) as handle:
        tiny.model(**given)
    assert handle.trace is not None
    for b, sample in enumerate(samples):
        visual = [given["input_ids"].shape[1] - len(sample) + i for i in sample.visual]
        expected = attentions[3 + offset][b, :, -rows:, visual].mean(1).amax(0)
        close(handle.trace[0].scores[b], expected)


def test_prompts_shorter_than_the_rows() -> None:
    """They are ranked by all the rows that they have."""
    tiny = models.llava(side=2, layers=4)
    sample = tiny.prompt(0, tiny.grid, 1)
    scores = []
    for rows in (5, 9):
        schedule = reroute.Schedule((1,), (0.5,), (LastRowsAttention(rows),))
        with reroute.enable(tiny.model, schedule=schedule, trace=True) as handle:
            tiny.model(**tiny.inputs([sample, tiny.prompt(1, 3, tiny.grid, 9)]))
        assert handle.trace is not None
        scores.append(handle.trace[0].scores[0])
    close(*scores)

"""SparseVLM on whole models: raters of each prompt, at every stage; clusters of what is pruned."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import models
import pytest
import torch
from models import Sample, Tiny
from support import close, generate, never_waits
from torch import Tensor

import reroute
from reroute.errors import RerouteError
from reroute.methods import SparseVLM
from reroute.rankers import RaterAttention, rater_attention
from reroute.rankers.recycling import recycle
from reroute.transformers.context import RoutedPrefill

METHOD = SparseVLM((0.75, 0.5))
"""Of 16 tokens 12 and 8: at the first decision 11 and a cluster, at the second 7 and a cluster."""


@pytest.fixture(params=["llava-gqa", "qwen"])
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return models.tiny(request.param)


def batch(tiny: Tiny) -> list[Sample]:
    """One picture, two, of which one token follows, none."""
    return [tiny.prompt(0, 5, tiny.grid, 6), tiny.prompt(1, 2, tiny.grid, 3, tiny.grid, 1), tiny.prompt(2, 6)]


def rotated(tiny: Tiny, x: Tensor, positions: Tensor) -> Tensor:
    """(L, heads, D)."""
    cos, sin = tiny.model.model.language_model.rotary_emb(x, positions.unsqueeze(-2))
    first, second = x.chunk(2, -1)
    turned: Tensor = x * cos[0][:, None] + torch.cat([-second, first], -1) * sin[0][:, None]
    return turned


def by_loops(
    tiny: Tiny, sample: Sample, states: tuple[Tensor, ...], layer: int, there: list[int], plus: bool
) -> Tensor:
    """Scores of the visual tokens ``there``, by the ``states`` (L, C) of each layer's input."""
    embeds, last = states[0], max(sample.visual)
    question = list(range(last + 1, len(sample)))
    weights = [0.0] * len(question)
    for i in sample.visual:
        products = [math.exp(float(embeds[i] @ embeds[t])) for t in question]
        weights = [w + product / sum(products) for w, product in zip(weights, products, strict=True)]
    average = sum(weights) / len(weights)
    raters = [t for t, w in zip(question, weights, strict=True) if w > average + 1e-6] or question
    rows = [i for i in range(len(sample)) if i not in sample.visual or sample.visual.index(i) in there]
    module = tiny.model.model.language_model.layers[layer]
    attention, normed, positions = module.self_attn, module.input_layernorm(states[layer]), tiny.positions(sample)
    width = attention.head_dim
    queries = rotated(tiny, attention.q_proj(normed).unflatten(-1, (-1, width)), positions)
    keys = rotated(tiny, attention.k_proj(normed).unflatten(-1, (-1, width)), positions)
    keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], 1)
    ones = rotated(tiny, torch.ones(len(sample), 1, width), positions)[:, 0]
    visual = [sample.visual[i] for i in there]
    per_head = []
    for head in range(queries.shape[1]):
        total = torch.zeros(len(there))
        for rater in raters:
            seen = [i for i in rows if i <= rater]
            row = (keys[seen, head] @ queries[rater, head] / width**0.5).softmax(0)
            paid = row[[seen.index(i) for i in visual]]
            total += paid / (ones[visual] @ ones[rater] / width**0.5) if plus else paid
        per_head.append(total / len(raters))
    return torch.stack(per_head).mean(0)


@pytest.mark.parametrize("offset", [-1, 0])
@pytest.mark.parametrize("version", ["1.5", "2.0"])
@pytest.mark.parametrize("action", ["route", "remove"])
def test_raters_rank(tiny: Tiny, action: Any, version: Any, offset: int) -> None:
    """Every decision, by the states that the same forward returns; in a batch that is padded."""
    samples = batch(tiny)
    given = tiny.inputs(samples)
    method = replace(METHOD, ranker=RaterAttention(version, offset))
    with reroute.enable(tiny.model, method=method, action=action, trace=True) as handle:
        states = tiny.model(**given, output_hidden_states=True).hidden_states
    assert handle.trace is not None
    assert [stage.layer for stage in handle.trace] == [1, 4]
    for b, sample in enumerate(samples[:2]):
        own = tuple(state[b, given["input_ids"].shape[1] - len(sample) :] for state in states)
        for stage in handle.trace:
            there = stage.candidates[b].tolist()
            expected = by_loops(tiny, sample, own, stage.layer + offset, there, version == "2.0")
            close(stage.scores[b], expected)
            best = sorted(range(len(there)), key=lambda i: -float(stage.scores[b][i]))[: len(stage.kept[b])]
            assert stage.kept[b].tolist() == sorted(there[i] for i in best)


def test_heads_of_version_2(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those whose raters attend to the picture most; the models have no more than four."""
    given, scores = tiny.inputs([tiny.prompt(0, 5, tiny.grid, 6)]), {}
    for heads in (1, 2, 4):
        monkeypatch.setattr(rater_attention, "HEADS", heads)
        schedule = reroute.Schedule((2,), (0.5,), (RaterAttention("2.0"),))
        with reroute.enable(tiny.model, schedule=schedule, trace=True) as handle:
            tiny.model(**given)
        assert handle.trace is not None
        scores[heads] = handle.trace[0].scores[0].sum()
    assert scores[1] > scores[2] > scores[4]


@pytest.mark.parametrize(("action", "version"), [("route", "1.5"), ("remove", "1.5"), ("remove", "2.0")])
def test_what_is_pruned_goes_on_in_clusters(tiny: Tiny, action: Any, version: Any) -> None:
    """In the place of the last ones that are kept, at both decisions; not where it is deferred, nor in version 2.0."""
    samples, began = batch(tiny), {}
    given, layers = tiny.inputs(samples), tiny.model.model.language_model.layers
    hooks = [layers[i].register_forward_pre_hook(lambda module, args, i=i: began.update({i: args[0]})) for i in (1, 4)]
    try:
        method = replace(METHOD, ranker=RaterAttention(version))
        with reroute.enable(tiny.model, method=method, action=action, trace=True) as handle:
            states = tiny.model(**given, output_hidden_states=True).hidden_states
    finally:
        for hook in hooks:
            hook.remove()
    assert handle.trace is not None
    for stage in handle.trace:
        for b, sample in enumerate(samples[:2]):
            own = states[stage.layer][b, given["input_ids"].shape[1] - len(sample) :].clone()
            there, kept = stage.candidates[b].tolist(), stage.kept[b].tolist()
            places = [sample.visual[i] for i in there]
            if (action, version) == ("remove", "1.5"):
                order = stage.scores[b].sort(descending=True, stable=True).indices
                after = recycle(own[places], order, len(kept))
                assert not torch.equal(after, own[places])
                own[places] = after
            rows = [i for i in range(len(sample)) if i not in sample.visual or sample.visual.index(i) in kept]
            close(began[stage.layer][b, -len(rows) :], own[rows])


@pytest.mark.parametrize("ratios", [(0.75, 0.5), (0.1, 0.05), (0.5, 0.0), (0.0, 0.0), (1.0, 0.6)])
@pytest.mark.parametrize("action", ["route", "remove"])
def test_a_row_of_a_batch_is_the_sample_alone(tiny: Tiny, action: Any, ratios: tuple[float, float]) -> None:
    samples = batch(tiny)
    with reroute.enable(tiny.model, method=SparseVLM(ratios), action=action):
        together = torch.stack(generate(tiny, samples, 3).logits, 1)
        alone = [torch.stack(generate(tiny, [sample], 3).logits, 1)[0] for sample in samples]
    for row, expected in zip(together, alone, strict=True):
        close(row, expected)


@pytest.mark.parametrize("version", ["1.5", "2.0"])
def test_the_released_method(version: Any) -> None:
    """Of 32 layers; renumbered, or not."""
    tiny = models.llava(layers=32)
    samples = batch(tiny)
    with reroute.enable(tiny.model, method=SparseVLM.official(192, version), action="remove", trace=True) as handle:
        together = torch.stack(generate(tiny, samples, 3).logits, 1)
        assert handle.trace is not None
        assert [(stage.layer, len(stage.kept[0])) for stage in handle.trace] == [(3, 8), (7, 5), (16, 3)]
        alone = [torch.stack(generate(tiny, [sample], 3).logits, 1)[0] for sample in samples]
    for row, expected in zip(together, alone, strict=True):
        close(row, expected)


def test_raters_are_chosen_once(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a prompt, and anew of the next one."""
    chosen: list[Any] = []
    note = RaterAttention.note

    def watched(ranker: RaterAttention, context: Any) -> Any:
        chosen.append(note(ranker, context))
        return chosen[-1]

    monkeypatch.setattr(RaterAttention, "note", watched)
    schedule = METHOD.schedule(8, "remove")
    assert len(schedule.rankers) == 2
    with reroute.enable(tiny.model, schedule=reroute.Schedule.from_json(schedule.to_json()), action="remove"):
        for sample in batch(tiny)[:2]:
            tiny.model(**tiny.inputs([sample]))
    assert [len(raters) for (raters,) in chosen] == [6, 1]


@pytest.mark.parametrize("version", ["1.5", "2.0"])
def test_no_operation_waits(tiny: Tiny, version: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = never_waits(monkeypatch, ["before_layer"], RoutedPrefill)
    with reroute.enable(tiny.model, method=replace(METHOD, ranker=RaterAttention(version)), action="remove"):
        tiny.model(**tiny.inputs(batch(tiny)))
    assert len(ran) == tiny.num_layers


def test_gradients_pass_clusters(tiny: Tiny) -> None:
    """Of the embeddings of what is pruned: they reach the answer in a cluster."""
    given: dict[str, Any] = tiny.inputs([tiny.prompt(0, 5, tiny.grid, 6)])
    given["pixel_values"] = given["pixel_values"].clone().requires_grad_()
    with reroute.enable(tiny.model, method=METHOD, action="remove"):
        expected = tiny.model(**given).logits
        (gradient,) = torch.autograd.grad(expected[0, -1].square().sum(), given["pixel_values"])
        with torch.no_grad():
            close(tiny.model(**given).logits, expected)
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    tiny = models.llava()
    tiny.model.to(dtype)
    given: dict[str, Any] = tiny.inputs(batch(tiny))
    given["pixel_values"] = given["pixel_values"].to(dtype)
    with reroute.enable(tiny.model, method=METHOD, action="remove") as handle:
        assert tiny.model(**given).logits.isfinite().all()
    assert handle.stats().kept == ((12, 8), (24, 16), (0, 0))


def test_what_it_costs(tiny: Tiny) -> None:
    """Once the raters; at each decision keys, the rows of the text, and distances of what is recycled."""
    sample = tiny.prompt(0, 5, tiny.grid, 6)
    with reroute.enable(tiny.model, method=METHOD, action="remove") as handle:
        tiny.model(**tiny.inputs([sample]))
    text, expected = 11, 2 * 11 * 16 * 64
    for rows, recycled in ((27, 2), (23, 2)):
        expected += 2 * text * 64 * 64 + 2 * rows * 64 * 32 + 2 * text * 64 * rows + 2 * recycled**2 * 64
    assert handle.stats().scoring_flops == expected
    estimate = reroute.core.cost.estimate_cost(handle._shape, handle.schedule, "remove", 16, 11)
    assert estimate.scoring_flops == expected


def test_settings() -> None:
    for wrong, message in (
        (lambda: RaterAttention("1.0"), "Unknown version '1.0'"),  # type: ignore[arg-type]
        (lambda: RaterAttention(layer_offset=1), "layer_offset of 0 or -1, not 1"),
        (lambda: SparseVLM(0.5), "SparseVLM takes a sequence of ratios"),  # type: ignore[arg-type]
        (lambda: SparseVLM.official(100), "released for 192, 128, 96, 64 tokens, not for 100"),
    ):
        with pytest.raises(RerouteError, match=message):
            wrong()

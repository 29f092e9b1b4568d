"""DART on whole models, and what rankers note ahead of their decisions."""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakSet

import models
import pytest
import torch
from models import Sample, Tiny
from oracle import _rope
from support import close, generate, never_waits
from torch import Tensor
from torch.nn.functional import cosine_similarity

import reroute
from reroute.errors import RerouteError
from reroute.methods import DART
from reroute.rankers import Duplication, RandomScores, RankContext, Ranker
from reroute.transformers.context import RoutedPrefill
from reroute_kernels import Selection


@pytest.fixture(params=["llava-mha", "qwen"])
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return models.tiny(request.param)


def batch(tiny: Tiny) -> list[Sample]:
    """One picture, two of which a short question follows, none."""
    return [tiny.prompt(0, 5, tiny.grid, 6), tiny.prompt(1, 2, tiny.grid, 3, tiny.grid, 2), tiny.prompt(2, 6)]


def by_loops(tiny: Tiny, sample: Sample, states: tuple[Tensor, ...], layer: int, there: list[int], k: int) -> list[int]:
    """Which of the visual tokens ``there`` stay before ``layer``, by the ``states`` (L, C) of each layer's input."""
    decoder = tiny.model.model.language_model
    attention, normed = (
        decoder.layers[layer - 1].self_attn,
        decoder.layers[layer - 1].input_layernorm(states[layer - 1]),
    )
    cos, sin = _rope(decoder, normed, tiny.positions(sample))
    keys = attention.k_proj(normed).unflatten(-1, (-1, attention.head_dim))
    first, second = keys.chunk(2, -1)
    turned = keys * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]
    size = [float(key.abs().sum()) for key in turned]
    last = max(sample.visual)
    visual = sorted(there, key=lambda i: -size[sample.visual[i]])[: min(4, k)]
    question = sorted(range(last + 1, len(sample)), key=lambda i: -size[i])[:4]
    final = decoder.norm(states[layer])
    kept, pivots = list(visual), [*(sample.visual[i] for i in visual), *question]
    for number, pivot in enumerate(pivots):
        alike = {i: float(cosine_similarity(final[pivot], final[sample.visual[i]], dim=0)) for i in there}
        rest = sorted(set(there) - set(kept), key=lambda i: alike[i])
        share = (k - len(visual)) // len(pivots) + (number < (k - len(visual)) % len(pivots))
        kept += rest[:share]
    return sorted(kept)


@pytest.mark.parametrize(("layer", "ratio"), [(None, 0.6), (3, 0.6), (3, 0.15)])
@pytest.mark.parametrize("action", ["route", "remove"])
def test_pivots_and_what_is_unlike_them(tiny: Tiny, action: Any, layer: int | None, ratio: float) -> None:
    """Every decision, by the states that the same forward returns; in a batch that is padded."""
    samples = batch(tiny)
    given = tiny.inputs(samples)
    with reroute.enable(tiny.model, method=DART(layer=layer, ratio=ratio), action=action, trace=True) as handle:
        states = tiny.model(**given, output_hidden_states=True).hidden_states
    assert handle.trace is not None
    assert [stage.layer for stage in handle.trace][1:] == ([] if action == "remove" else [3, 5] if not layer else [5])
    for b, sample in enumerate(samples[:2]):
        own = tuple(state[b, given["input_ids"].shape[1] - len(sample) :] for state in states)
        n = len(sample.visual)
        for stage in handle.trace:
            assert stage.kept[b].tolist() == by_loops(tiny, sample, own, stage.layer, list(range(n)), int(n * ratio))


@pytest.mark.parametrize("layer", [3, 5])
def test_among_what_a_removal_left(tiny: Tiny, layer: int) -> None:
    """Notes are made before a removal on the same input and read after it, or made of what it left."""
    samples = batch(tiny)
    given, rankers = tiny.inputs(samples), (RandomScores(), Duplication())
    plan = reroute.Schedule((2, layer), (0.75, 0.5), rankers)
    with reroute.enable(tiny.model, schedule=plan, action="remove", trace=True) as handle:
        states = tiny.model(**given, output_hidden_states=True).hidden_states
    assert handle.trace is not None
    for b, sample in enumerate(samples[:2]):
        own = tuple(state[b, given["input_ids"].shape[1] - len(sample) :] for state in states)
        there = handle.trace[0].kept[b].tolist()
        expected = by_loops(tiny, sample, own, layer, there, len(sample.visual) // 2)
        assert handle.trace[1].kept[b].tolist() == expected


@pytest.mark.parametrize("ratio", [0.0, 0.05, 0.15, 0.3, 1.0])
@pytest.mark.parametrize("action", ["route", "remove"])
def test_a_row_of_a_batch_is_the_sample_alone(tiny: Tiny, action: Any, ratio: float) -> None:
    samples = batch(tiny)
    with reroute.enable(tiny.model, method=DART(ratio=ratio), action=action):
        together = torch.stack(generate(tiny, samples, 3).logits, 1)
        alone = [torch.stack(generate(tiny, [sample], 3).logits, 1)[0] for sample in samples]
    for row, expected in zip(together, alone, strict=True):
        close(row, expected)


def test_random_pivots(tiny: Tiny) -> None:
    """By the seed alone, and with nothing noted."""
    sample, kept = tiny.prompt(0, 5, tiny.grid, 6), []
    for seed in (1, 1, 2):
        method = DART(ratio=0.3, ranker=Duplication(visual=3, seed=seed))
        with reroute.enable(tiny.model, method=method, action="remove", trace=True) as handle:
            assert not handle.schedule.looks
            tiny.model(**tiny.inputs([sample]))
        assert handle.trace is not None
        kept.append(handle.trace[0].kept[0].tolist())
    assert kept[0] == kept[1] != kept[2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    tiny = models.llava()
    tiny.model.to(dtype)
    given: dict[str, Any] = tiny.inputs(batch(tiny))
    given["pixel_values"] = given["pixel_values"].to(dtype)
    with reroute.enable(tiny.model, method=DART(ratio=0.5)) as handle:
        assert tiny.model(**given).logits.isfinite().all()
    assert handle.stats().kept[:2] == ((8, 8, 8), (16, 16, 16))


def test_no_operation_waits(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = never_waits(monkeypatch, ["before_layer"], RoutedPrefill)
    for ranker in (Duplication(), Duplication(seed=1)):
        with reroute.enable(tiny.model, method=DART(ranker=ranker)):
            tiny.model(**tiny.inputs(batch(tiny)))
    assert len(ran) == 2 * tiny.num_layers


def test_what_it_costs(tiny: Tiny) -> None:
    """Keys of all tokens in the layer before, and cosines with eight pivots."""
    sample, q, kv = tiny.prompt(0, 5, tiny.grid, 6), 64, 64 if not tiny.is_qwen else 32
    with reroute.enable(tiny.model, method=DART(layer=2, ratio=0.5), action="remove") as handle:
        tiny.model(**tiny.inputs([sample]))
    expected = 2 * 27 * 64 * kv + 2 * 16 * q * 8
    assert handle.stats().scoring_flops == expected
    shape = handle._shape
    assert reroute.core.cost.estimate_cost(shape, handle.schedule, "remove", 16, 11).scoring_flops == expected


def test_there_is_a_layer_before() -> None:
    with pytest.raises(RerouteError, match=r"Duplication cannot decide before layer 0: it looks at the input of .*-1"):
        reroute.enable(models.tiny("llava-mha").model, method=DART(layer=0))
    for wrong in ({"visual": 0, "text": 0}, {"visual": -1}, {"seed": 0.5}):
        with pytest.raises(RerouteError, match="Duplication takes numbers of pivots"):
            Duplication(**wrong)


# --- notes of any ranker ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Diary(Ranker):
    """Notes which visual tokens compete and what their states are; what its decisions find goes into ``read``."""

    layers: tuple[int, ...] = ()
    read: Any = None
    layer_offset: int = 0

    def looks_before(self, layer: int) -> list[int]:
        return [own for own in self.layers if own < layer]

    def note(self, context: RankContext) -> Any:
        assert context.decision.score_layer in self.layers
        assert context.decision.ranker is self
        return context.visual_indices.clone(), context.candidates_of(context.hidden()), context.questions

    def select(self, context: RankContext) -> Selection:
        self.read.append((context.decision.layer, dict(context.notes)))
        return context.backend.select(context.rows.candidates.float(), context.rows)


@pytest.mark.parametrize("offset", [0, -1])
@pytest.mark.parametrize("action", ["route", "remove"])
def test_notes_of_one_prefill(tiny: Tiny, action: Any, offset: int) -> None:
    """Each is made once, on the input of its layer, before a decision there; none is found by a later call."""
    read: list[Any] = []
    samples = batch(tiny)
    diary = Diary((0, 3), read, offset)
    plan = reroute.Schedule((3 - offset, 5), (0.5, 0.25), (diary, replace(diary)))
    given = tiny.inputs(samples)
    with reroute.enable(tiny.model, schedule=plan, action=action):
        states = tiny.model(**given, output_hidden_states=True).hidden_states
        tiny.model(**tiny.inputs(samples[:1]))
    assert [layer for layer, _ in read] == [3 - offset, 5] * 2
    (_, first), (_, second), (_, third), _ = read
    assert first.keys() == second.keys() == {0, 3}
    assert second[0] is first[0]
    assert third[0] is not first[0]
    for layer in (0, 3):
        indices, hidden, questions = second[layer]
        assert indices.shape[1] == 32
        assert questions == (6, 2, 0)
        for b, sample in enumerate(samples):
            places = [given["input_ids"].shape[1] - len(sample) + i for i in sample.visual]
            assert torch.equal(hidden[b], states[layer][b, places])


def test_each_ranker_has_its_own_notes(tiny: Tiny) -> None:
    read: list[Any] = []
    rankers = Diary((0,), read), Diary((0, 1), read)
    with reroute.enable(tiny.model, schedule=reroute.Schedule((2, 4), (0.5, 0.25), rankers)):
        tiny.model(**tiny.inputs(batch(tiny)))
    (_, first), (_, second) = read
    assert (first.keys(), second.keys()) == ({0}, {0, 1})
    assert first[0] is not second[0]


class Note:
    """Something that a weak reference can be made to."""


@dataclass(frozen=True)
class Passing(Diary):
    """Knows its notes for as long as somebody else holds them."""

    def note(self, context: RankContext) -> Note:
        self.read.add(note := Note())
        return note

    def select(self, context: RankContext) -> Selection:
        assert set(context.notes.values()) == set(self.read)
        return context.backend.select(context.rows.candidates.float(), context.rows)


def test_nothing_holds_notes_after_the_call(tiny: Tiny) -> None:
    notes: WeakSet[Note] = WeakSet()
    schedule = reroute.Schedule((2, 4), (0.5, 0.25), (Passing((0, 1), notes),))
    with reroute.enable(tiny.model, schedule=schedule, trace=True):
        for _ in range(2):
            output = tiny.model(**tiny.inputs(batch(tiny)), use_cache=True)
            gc.collect()
            assert not notes
    assert output.logits.isfinite().all()


def test_notes_of_a_call_that_fails_are_gone(tiny: Tiny) -> None:
    read: list[Any] = []
    diary = Diary((0,), read)
    given = tiny.inputs(batch(tiny))
    with reroute.enable(tiny.model, schedule=reroute.Schedule((2, 4), (0.5, 0.25), (diary,))) as handle:
        layer = tiny.model.model.language_model.layers[3]
        hook = layer.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tiny.model(**given)
        hook.remove()
        tiny.model(**given)
        assert handle.stats().prefills == 1
    assert read[0][1][0] is not read[1][1][0]
    assert read[1][1][0] is read[2][1][0]

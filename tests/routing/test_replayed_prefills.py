"""A replayed prefill is the eager one, whatever prompt its graph was captured with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import models
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from models import Sample, Tiny
from oracle import Rules
from replays import GRAPHS, capture, is_clear, replayed, route, same_outputs
from support import RULES, any_prompt, any_rules, enable, mixed_batch, tiny_models
from tape import Tape
from tape_recorder import record_on_tapes
from torch import Tensor

from reroute.graphs import Arena
from reroute.rankers import RankContext, Ranker
from reroute_kernels import Backend, Selection

tiny = tiny_models("llava-gqa", "qwen")

EARLY = [Rules((2, 4), (0.5, 0.3), action, score_layer_offset=-1) for action in ("route", "remove")]


def others(tiny: Tiny) -> list[Sample]:
    """Three prompts, as ``mixed_batch`` has, arranged otherwise, in other lengths."""
    return [tiny.prompt(7, 1, tiny.grid, 1, tiny.grid, 9), tiny.prompt(8, 3), tiny.prompt(9, 8, tiny.grid, 2)]


def compare(tiny: Tiny, rules: Rules, seen: Sequence[Sample], new: Sequence[Sample], side: str = "left") -> None:
    """``new`` prompts by a graph that was captured for ``seen`` ones."""
    inputs = tiny.inputs(new, side)
    with enable(tiny, rules) as handle:
        eager = tiny.model(**inputs)
        assert is_clear(handle.trace), "choose another seed"
    with route(tiny, rules) as handle:
        capture(tiny, seen)
        output = replayed(handle, tiny, inputs)
    valid = inputs["attention_mask"].bool()
    same_outputs(output, eager, valid)
    assert torch.equal(output.logits[~valid], eager.logits[~valid])  # zero


@pytest.mark.usefixtures("tapes")
@pytest.mark.parametrize("rules", [*RULES, *EARLY])
def test_one_prompt(tiny: Tiny, rules: Rules) -> None:
    compare(tiny, rules, mixed_batch(tiny)[:1], others(tiny)[:1])


@pytest.mark.usefixtures("tapes")
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rules", [*RULES, *EARLY])
def test_a_batch(tiny: Tiny, rules: Rules, side: str) -> None:
    compare(tiny, rules, mixed_batch(tiny), others(tiny), side)


@pytest.mark.usefixtures("tapes")
@pytest.mark.parametrize("samples", [1, 3])
def test_keep_one(tiny: Tiny, samples: int) -> None:
    inputs = tiny.inputs(others(tiny)[:samples])
    valid = inputs["attention_mask"].bool()
    eager = tiny.model(**inputs)
    with route(tiny, Rules((2,), (1.0,))) as handle:
        capture(tiny, mixed_batch(tiny)[:samples])
        same_outputs(replayed(handle, tiny, inputs), eager, valid)
        assert handle.stats().keep == 1


@pytest.mark.usefixtures("tapes")
def test_a_mask_of_ones_own_with_keep_one(tiny: Tiny) -> None:
    """It is an input: the graph was captured with another."""

    def inputs(seed: int) -> dict[str, Tensor]:
        given = tiny.inputs(others(tiny)[:1], positions=True)
        length = given["input_ids"].shape[1]
        mask = torch.rand(1, 1, length, length, generator=torch.Generator().manual_seed(seed)) < 0.5
        return {**given, "attention_mask": mask | torch.eye(length, dtype=torch.bool)}

    eager = tiny.model(**inputs(1))
    with route(tiny, Rules((2,), (1.0,))) as handle:
        for _ in range(2):
            tiny.model(**inputs(0))
        output = replayed(handle, tiny, inputs(1))
    same_outputs(output, eager, torch.ones(output.logits.shape[:2], dtype=torch.bool))


def full(tiny: Tiny, seed: int) -> Sample:
    """64 tokens of text and 128 visual ones: whole tiles, in every stage of ``TILES`` too."""
    parts: list[Any] = [8]
    for _ in range(8):
        parts += [tiny.grid, 7]
    return tiny.prompt(seed, *parts)


@pytest.mark.usefixtures("tapes")
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("rules", [RULES[0], RULES[2], RULES[3], EARLY[1]])
def test_stages_of_other_sizes(tiny: Tiny, rules: Rules, batch: int) -> None:
    """Three tiles of dense rows, two of stages; the second prompt of a batch is in other rows than the first."""
    parts: list[Any] = [11] + [tiny.grid, 9] * 6 + [tiny.grid, 5]
    new = [tiny.prompt(20 + b, *parts[: len(parts) - 4 * b], 1) for b in range(batch)]
    compare(tiny, rules, [full(tiny, b) for b in range(batch)], new)


TILES = Rules((2, 5), (0.5, 0.0), rounding="floor0")


@pytest.mark.usefixtures("tapes")
def test_without_fillers_bit_for_bit(tiny: Tiny) -> None:
    first, second = full(tiny, 0), full(tiny, 1)
    inputs = tiny.inputs([second])
    for rules in (TILES, Rules((2,), (1.0,))):
        with enable(tiny, rules):
            eager = tiny.model(**inputs)
        with route(tiny, rules) as handle:
            capture(tiny, [first])
            output = replayed(handle, tiny, inputs)
            spent = handle.stats()
        same_outputs(output, eager, inputs["attention_mask"].bool(), exactly=True)
        assert spent.graph.waste.flops == 0


@pytest.mark.parametrize(("batch", "text", "pictures"), [(3, 16, 2), (8, 24, 1)])
def test_parts_of_tiles(tiny: Tiny, batch: int, text: int, pictures: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a batch whose rows are whole tiles together, or are nearly so, and end within a page of its home."""
    record_on_tapes(monkeypatch, least=8)

    def prompts(seed: int) -> list[Sample]:
        parts: list[Any] = [tiny.grid, 1] * pictures
        return [tiny.prompt(seed + b, text - pictures - b, *parts, b) for b in range(batch)]

    inputs = tiny.inputs(prompts(0))
    with enable(tiny, TILES):
        eager = tiny.model(**inputs)
    with route(tiny, TILES) as handle:
        capture(tiny, prompts(50))
        output = replayed(handle, tiny, inputs)
        assert handle.stats().graph.waste.flops == 0
    same_outputs(output, eager, inputs["attention_mask"].bool(), exactly=True)


@pytest.mark.usefixtures("tapes")
def test_renumbered_positions() -> None:
    tiny = models.tiny("llava-gqa")
    for batch in (1, 3):
        rules = Rules((2, 4), (0.5, 0.25), "remove", position_mode="renumbered")
        compare(tiny, rules, mixed_batch(tiny)[:batch], others(tiny)[:batch])


class Tied(Ranker):
    """All candidates are alike, or all of one half of them."""

    def within_capacities(self, backend: Backend) -> bool:
        return True

    def select(self, context: RankContext) -> Selection:
        context.hidden()
        candidates = context.rows.candidates
        scores = torch.arange(candidates.shape[1], device=candidates.device) % 2
        return context.backend.select(scores.float().expand(candidates.shape), context.rows)


@pytest.mark.usefixtures("tapes")
@pytest.mark.parametrize("rules", [RULES[0], RULES[2]])
def test_ties_go_to_the_first(rules: Rules) -> None:
    tiny, ranker = models.tiny("llava-gqa"), Tied()
    inputs = tiny.inputs(others(tiny))
    with enable(tiny, rules, ranker):
        eager = tiny.model(**inputs)
    with route(tiny, rules, ranker) as handle:
        capture(tiny, mixed_batch(tiny))
        same_outputs(replayed(handle, tiny, inputs), eager, inputs["attention_mask"].bool())


class LikeTheSum(Ranker):
    """By the product with the sum of all rows that there are, whatever they are."""

    def within_capacities(self, backend: Backend) -> bool:
        return True

    def select(self, context: RankContext) -> Selection:
        states, rows = context.hidden(), context.rows
        starts = rows.metadata.counts(states.device)[0]
        scores = states[rows.candidates.clamp(min=0) + starts[:, None]] @ states.sum(0)
        return context.backend.select(scores, rows)


@pytest.mark.usefixtures("tapes")
def test_nothing_is_left_of_the_prompt_before() -> None:
    """Rows behind a prompt are zero, as in the pool."""
    tiny, ranker = models.tiny("llava-gqa"), LikeTheSum()
    long, short = tiny.prompt(0, 9, tiny.grid, tiny.grid, 9), tiny.prompt(1, 2, tiny.grid, 3)
    with enable(tiny, RULES[0], ranker) as handle:
        eager = tiny.model(**tiny.inputs([short]))
        assert is_clear(handle.trace)
    with route(tiny, RULES[0], ranker) as handle:
        capture(tiny, [long])
        same_outputs(replayed(handle, tiny, tiny.inputs([short])), eager, torch.ones(1, len(short), dtype=torch.bool))


@pytest.mark.usefixtures("tapes")
def test_a_larger_graph_serves_smaller_prompts(tiny: Tiny) -> None:
    """The cheapest of those that can."""
    rules = RULES[0]
    huge, large = tiny.prompt(0, 150, tiny.grid, 3), tiny.prompt(1, 70, tiny.grid, 3)
    small = tiny.prompt(2, 5, tiny.grid, 9)
    inputs = tiny.inputs([small])
    with enable(tiny, rules):
        eager = tiny.model(**inputs)
    with route(tiny, rules) as handle:
        arena = Arena.shared(torch.device("cpu"))
        with arena.turn():
            arena.views([((1 << 21,), torch.uint8)])  # has room for all
        capture(tiny, [large], [huge])
        assert handle.stats().graph.graphs == 2
        output = replayed(handle, tiny, inputs)
        assert handle.stats().graph.graphs == 2
        assert handle.stats().prefill_flops == cost_of(handle, tiny, large)
    same_outputs(output, eager, inputs["attention_mask"].bool())


def cost_of(handle: Any, tiny: Tiny, sample: Sample) -> float:
    tiny.model(**tiny.inputs([sample]))
    flops: float = handle.stats().prefill_flops
    return flops


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
@pytest.mark.parametrize("name", ["llava-gqa", "qwen"])
def test_any_arrangement(name: str, tapes: list[Tape], data: st.DataObject) -> None:
    tiny, rules = models.tiny(name), data.draw(any_rules())
    batch = data.draw(st.integers(1, 3))
    with_picture = any_prompt(name, pictures=(1, 3))
    prompts = st.tuples(with_picture, *[any_prompt(name)] * (batch - 1)).map(list)
    seen, new = data.draw(prompts), data.draw(prompts)
    inputs = tiny.inputs(new, data.draw(st.sampled_from(["left", "right"])))
    with enable(tiny, rules) as handle:
        eager = tiny.model(**inputs)
        assume(is_clear(handle.trace))
    with route(tiny, rules) as handle:
        capture(tiny, seen)
        if handle.stats().graph.is_replayed:
            tiny.model(**inputs)
            assume(handle.stats().graph.is_replayed)  # else it is of another class: it may be dense
            output = replayed(handle, tiny, inputs)
            same_outputs(output, eager, inputs["attention_mask"].bool())


def test_two_recordings_of_a_class_are_one(tiny: Tiny, tapes: list[Tape]) -> None:
    """Nothing of a prompt is baked in; what a tape reads besides its own is weights and the arena."""
    for rules in (RULES[0], RULES[3], EARLY[0], Rules((2,), (1.0,))):
        for batch in (1, 3):
            tapes.clear()
            for samples in (mixed_batch(tiny)[:batch], others(tiny)[:batch]):
                with route(tiny, rules):
                    capture(tiny, samples)
            first, second = tapes
            assert first.signature == second.signature


def test_a_tape_reads_weights_and_the_arena_alone(tiny: Tiny, tapes: list[Tape]) -> None:
    with route(tiny, RULES[0]) as handle:
        capture(tiny, mixed_batch(tiny))
        arena = handle._router._replays._arena
        known = {_memory(t) for t in (*tiny.model.parameters(), *tiny.model.buffers(), arena.memory)}
        others = [t for t in tapes[0].external if _memory(t) not in known]
    # The table of pages, and the numbers of visual tokens; both are of the class.
    assert sorted(map(tuple, (t.shape for t in others))) == [(1, 64), (3,)]


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@pytest.mark.usefixtures("tapes")
def test_fillers_are_in_order_and_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all that a decoder might look at: positions that fall would look like the beginning of another sequence."""
    tiny, seen = models.tiny("llava-gqa"), []
    rotary = type(tiny.model.model.language_model.rotary_emb)
    tables = rotary.forward

    def watched(self: Any, x: Tensor, position_ids: Tensor) -> Any:
        seen.append((x.clone(), position_ids.clone()))
        return tables(self, x, position_ids)

    monkeypatch.setattr(rotary, "forward", watched)
    with route(tiny, RULES[0]):
        capture(tiny, mixed_batch(tiny))
    embeds, positions = seen[-2]  # of the rehearsal: what is on the tape is poisoned
    assert embeds.shape[:2] == positions.shape == (3, 64)
    assert embeds.isfinite().all()
    assert positions.diff().eq(1).all()


def test_more_waste_than_allowed_runs_eagerly(tapes: list[Tape]) -> None:
    tiny = models.tiny("llava-gqa")
    inputs = tiny.inputs([tiny.prompt(0, 5, tiny.grid, 4)])
    with route(tiny, RULES[0], graphs=type(GRAPHS)(max_waste=0.0)) as handle:
        for _ in range(3):
            tiny.model(**inputs)
        assert "fillers would add" in handle.stats().graph.why
    assert not tapes

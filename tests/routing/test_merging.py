"""Tokens that are kept take up others: as if a hook on the layer before had made it of their states."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from models import Tiny
from oracle import Rules
from support import close, enable, generate
from torch import Tensor

import reroute
from reroute.rankers import Merge, RankContext, RankInputs, ScoreRanker
from reroute_kernels import Selection


@dataclass(frozen=True)
class LastOnes(ScoreRanker):
    """The last ones are the best."""

    layer_offset: int = 0

    def scores(self, inputs: RankInputs) -> list[Tensor]:
        return [torch.arange(len(hidden), dtype=torch.float32) for hidden in inputs.hidden]


@dataclass(frozen=True)
class Gathering(LastOnes):
    """Each of them takes up the mean of all candidates."""

    def decide(self, context: RankContext) -> tuple[Selection, Merge]:
        selection, rows = self.select(context), context.rows

        def merge(hidden: Tensor) -> Tensor:
            merged = hidden.new_zeros(*selection.kept.shape, hidden.shape[-1])
            counts = rows.metadata
            for b, (start, n, k) in enumerate(zip(counts.starts, counts.num_candidates, counts.k, strict=True)):
                candidates = hidden[start + rows.candidates[b, :n]]
                merged[b, :k] = gathered(candidates, k)
            return merged

        return selection, merge


def gathered(candidates: Tensor, k: int) -> Tensor:
    """The states (k, C) of the last ``k`` of ``candidates`` (N, C)."""
    return candidates[len(candidates) - k :] + candidates.mean(0)


@contextmanager
def merging_by_hand(tiny: Tiny, before: int, spans: list[tuple[int, int, int]]) -> Iterator[None]:
    """``spans``: per sample, where its candidates are in the input of layer ``before``, and how many are kept."""

    def change(module: Any, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        for sample, (start, end, k) in zip(output, spans, strict=True):
            sample[end - k : end] = gathered(sample[start:end].clone(), k)
        return output

    hook = tiny.model.model.language_model.layers[before - 1].register_forward_hook(change)
    try:
        yield
    finally:
        hook.remove()


RULES = [
    Rules((2, 5), (0.25, 0.5)),
    Rules((2, 5), (0.5, 0.25), "remove"),
    Rules((2,), (0.5,), score_layer_offset=-1),
    Rules((2, 5), (0.5, 0.25), "remove", score_layer_offset=-1),
]


@pytest.mark.parametrize("rules", RULES)
def test_the_first_decision_merges(tiny: Tiny, rules: Rules) -> None:
    given = tiny.inputs([tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(1, 5, tiny.grid, 4)])
    k = int(16 * rules.ratios[0])
    plain = LastOnes(rules.score_layer_offset)
    rankers = (Gathering(rules.score_layer_offset), plain)[: len(rules.layers)]
    schedule = reroute.Schedule(rules.layers, rules.ratios, rankers)
    with reroute.enable(tiny.model, schedule=schedule, action=rules.action):
        merged = tiny.model(**given).logits
    with enable(tiny, rules, plain), merging_by_hand(tiny, 2, [(5, 21, k)] * 2):
        by_hand = tiny.model(**given).logits
    with enable(tiny, rules, plain):
        assert not torch.allclose(tiny.model(**given).logits, merged, atol=1e-3)
    close(merged, by_hand)


@pytest.mark.parametrize("offset", [0, -1])
def test_a_later_decision_merges_what_is_left(tiny: Tiny, offset: int) -> None:
    rules = Rules((1, 4), (0.5, 0.25), "remove", score_layer_offset=offset)
    given = tiny.inputs([tiny.prompt(0, 5, tiny.grid, 4)])
    schedule = reroute.Schedule(rules.layers, rules.ratios, (LastOnes(offset), Gathering(offset)))
    with reroute.enable(tiny.model, schedule=schedule, action="remove"):
        merged = tiny.model(**given).logits[:, -4:]
    with enable(tiny, rules, LastOnes(offset)), merging_by_hand(tiny, 4, [(5, 13, 4)]):
        close(merged, tiny.model(**given).logits[:, -4:])


@pytest.mark.parametrize("action", ["route", "remove"])
def test_samples_merge_by_themselves(tiny: Tiny, action: Any) -> None:
    """Of different sizes, with a text-only one among them, and generated tokens behind."""
    samples = [tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(1, 2, tiny.grid, 3, tiny.grid, 2), tiny.prompt(2, 6)]
    with enable(tiny, Rules((1, 3), (0.5, 0.25), action), Gathering()):
        together = torch.stack(generate(tiny, samples, 3).logits, 1)
        alone = [torch.stack(generate(tiny, [sample], 3).logits, 1)[0] for sample in samples]
    for row, expected in zip(together, alone, strict=True):
        close(row, expected)


@pytest.mark.parametrize("action", ["route", "remove"])
def test_gradients_pass_what_is_merged(tiny: Tiny, action: Any) -> None:
    """Of the embeddings of a token that nobody keeps: they reach the answer in the mean alone."""
    sample = tiny.prompt(0, 5, tiny.grid, 4)
    given = tiny.inputs([sample])
    embeds = tiny.embeds(sample)[None].detach().requires_grad_()
    gradients = []
    for ranker in (Gathering(), LastOnes()):
        with enable(tiny, Rules((0,), (0.25,), action), ranker) as handle:
            plan = handle.plan(given["input_ids"])
            with handle.using(plan):
                logits = tiny.model(inputs_embeds=embeds, position_ids=tiny.positions(sample)[..., None, :]).logits
        gradients.append(torch.autograd.grad(logits[0, -1].square().sum(), embeds)[0][0, 5:17])
    assert (gradients[0].abs().sum(1) > 0).all()
    assert not gradients[1].any()

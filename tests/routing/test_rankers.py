"""Rankers of one's own: what they ask for is theirs, what comes of it is not."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from models import Tiny
from oracle import Rules
from support import RULES, enable
from torch import Tensor

from reroute.rankers import RankContext, Ranker, RankInputs, ScoreRanker
from reroute_kernels import Selection


@dataclass(frozen=True)
class InOrder(ScoreRanker):
    """The first ones are the best."""

    layer_offset: int = 0

    def scores(self, inputs: RankInputs) -> list[Tensor]:
        return [-torch.arange(len(hidden), dtype=torch.float32) for hidden in inputs.hidden]


@dataclass(frozen=True)
class Blind(Ranker):
    """The same without a look at hidden states."""

    layer_offset: int = 0

    def select(self, context: RankContext) -> Selection:
        return context.backend.select(-context.rows.candidates.float(), context.rows)


@dataclass(frozen=True)
class Curious(Ranker):
    """The same after a look at all there is, several times."""

    layer_offset: int = 0

    def select(self, context: RankContext) -> Selection:
        assert torch.equal(context.hidden(), context.hidden())
        assert context.normed().shape == context.hidden().shape
        return Blind().select(context)


@pytest.mark.parametrize("rules", [*RULES, replace(RULES[0], score_layer_offset=-1)])
def test_states_are_home_whatever_a_ranker_asks_for(tiny: Tiny, rules: Rules) -> None:
    given = tiny.inputs([tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(1, 2, tiny.grid, 3)])
    logits, kept = [], []
    for ranker in (InOrder(), Blind(), Curious()):
        own = replace(ranker, layer_offset=rules.score_layer_offset)
        with enable(tiny, rules, own) as handle:
            logits.append(tiny.model(**given).logits)
            assert handle.trace is not None
            kept.append([stage.kept[0].tolist() for stage in handle.trace])
            assert handle.stats().scoring_flops == 0
    assert kept[0] == kept[1] == kept[2]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])

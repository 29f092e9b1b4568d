"""FoldedAttention: what it says where a run shares a rotation, exact where each candidate has its own, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import CACHE, Tiny
from oracle import Rules
from support import RULES, close, enable
from torch import Tensor, nn
from transformers import DynamicCache

import reroute
from reroute.errors import RerouteError
from reroute.rankers import FoldedAttention, LastTokenAttention, RankContext, Ranker
from reroute_kernels import Selection
from reroute_kernels.reference import rotate


def scores(tiny: Tiny, given: dict[str, Any], rules: Rules, ranker: Ranker) -> list[Tensor]:
    with torch.no_grad(), enable(tiny, rules, ranker) as handle:
        tiny.model(**given)
        assert handle.trace is not None
        return [score for stage in handle.trace for score in stage.scores]


@pytest.mark.parametrize("rules", RULES)
def test_alone_in_its_run_a_candidate_has_its_attention(tiny: Tiny, rules: Rules) -> None:
    given = tiny.inputs([tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(1, 2, tiny.grid, 3, tiny.grid, 2)])
    expected = scores(tiny, given, rules, LastTokenAttention())
    for score, exact in zip(scores(tiny, given, rules, FoldedAttention(run=1)), expected, strict=True):
        close(score, exact)


class Slowly(Ranker):
    """The same by the keys: each rotated by the mean of the rotations of its run."""

    def select(self, context: RankContext) -> Selection:
        layer, rows = context.decision.score_layer, context.rows
        adapter, spec, (cos, sin, last) = context.adapter, context.adapter.attention_spec(layer), context.tables
        queries, keys = adapter.project(layer, context.normed(), context.tables)
        queries, cos, sin, scores = rotate(queries, cos[last], sin[last], spec.rope), cos.clone(), sin.clone(), []
        for start, its, n in zip(rows.metadata.starts, rows.candidates, rows.metadata.num_candidates, strict=True):
            for run in (start + its[:n]).split(5):
                cos[run], sin[run] = cos[run].mean(0), sin[run].mean(0)
        keys = rotate(keys, cos, sin, spec.rope).repeat_interleave(queries.shape[1] // keys.shape[1], 1)
        logits = torch.einsum("bhd,rhd->bhr", queries, keys) * spec.scale
        for b, (start, length) in enumerate(zip(rows.metadata.starts, rows.metadata.kv_lens, strict=True)):
            attention = logits[b, :, start : start + length].softmax(1).mean(0)
            scores.append(attention[rows.candidates[b, : rows.metadata.num_candidates[b]]])
        return context.best(scores)


def test_a_run_shares_its_mean_rotation(tiny: Tiny) -> None:
    rules = Rules((1, 3), (0.5, 0.3))
    given = tiny.inputs([tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(1, 2, tiny.grid, 3, tiny.grid, 2)])
    expected, exact = scores(tiny, given, rules, Slowly()), scores(tiny, given, rules, LastTokenAttention())
    assert not torch.allclose(expected[0], exact[0], atol=1e-3)
    for score, slow in zip(scores(tiny, given, rules, FoldedAttention(run=5)), expected, strict=True):
        close(score, slow)


def test_what_follows_the_prompt_takes_no_attention(tiny: Tiny) -> None:
    """Labels say that the answer is not the prompt's."""
    rules = Rules((1, 3), (0.5, 0.3))
    given = tiny.inputs([tiny.prompt(0, 5, tiny.grid, 4)])
    labels = given["input_ids"].clone()
    labels[:, :-2] = -100
    labelled = {**given, "labels": labels}
    expected = scores(tiny, labelled, rules, LastTokenAttention())
    assert not torch.allclose(expected[0], scores(tiny, given, rules, LastTokenAttention())[0])
    for score, exact in zip(scores(tiny, labelled, rules, FoldedAttention(1)), expected, strict=True):
        close(score, exact)


def test_keys_of_more_than_one_matrix(tiny: Tiny) -> None:
    """Refused before anything runs, so that a cache stays as it was; and at ``enable``."""
    given, rules, says = tiny.inputs([tiny.prompt(0, 5, tiny.grid, 4)]), Rules((1, 2), (0.5, 0.3)), "Layer 2 makes keys"
    projection: nn.Module = tiny.model.model.language_model.layers[2].self_attn.k_proj
    with torch.no_grad(), enable(tiny, rules, FoldedAttention()):
        hook, cache = projection.register_forward_hook(lambda *_: None), DynamicCache(config=tiny.model.config)
        with pytest.raises(RerouteError, match=rf"{says} by more than one matrix \(Linear, hooks"):
            tiny.model(**given, **{CACHE: cache})
        assert cache.get_seq_length() == 0
        hook.remove()
        tiny.model(**given, **{CACHE: cache})
    hook = projection.register_forward_hook(lambda *_: None)
    with pytest.raises(RerouteError, match=says):
        enable(tiny, rules, FoldedAttention())
    assert reroute.handle_of(tiny.model) is None
    hook.remove()


@pytest.mark.parametrize("run", [0, -1, 2.5, None])
def test_runs(run: Any) -> None:
    with pytest.raises(RerouteError, match="a number of tokens from 1 on"):
        FoldedAttention(run)

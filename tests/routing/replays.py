"""Prefills that are replayed beside the same ones that run eagerly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from models import Sample, Tiny
from oracle import Rules
from support import cache_of, schedule
from torch import Tensor

import reroute
from reroute.rankers import Ranker

GRAPHS = reroute.Graphs(max_waste=10)
"""Prompts of tests are small beside a tile of rows, so most of a class is fillers."""


def route(tiny: Tiny, rules: Rules, ranker: Ranker | None = None, **settings: Any) -> Any:
    """A handle; of replays, unless told otherwise."""
    given = {"graphs": GRAPHS, **settings}
    model: torch.nn.Module = tiny.model
    return reroute.enable(model, schedule=schedule(rules, ranker), action=rules.action, **given)


def replayed(handle: Any, tiny: Tiny, inputs: dict[str, Tensor], **settings: Any) -> Any:
    """What the model returns, which has to come from a graph."""
    output = tiny.model(**inputs, **settings)
    assert handle.stats().graph.is_replayed, handle.stats().graph
    return output


def capture(tiny: Tiny, *batches: Sequence[Sample], **settings: Any) -> None:
    """Have the classes of these batches captured: their second prompts come."""
    for samples in batches:
        for _ in range(2):
            tiny.model(**tiny.inputs(samples), **settings)


def eagerly(tiny: Tiny, handle: Any, inputs: Any) -> Tensor:
    """Logits of the same prompt, as it runs where it is not replayed."""
    with handle.using(handle.plan(inputs["input_ids"], inputs["attention_mask"])):
        logits: Tensor = tiny.model(**inputs).logits
    assert not handle.stats().graph.is_replayed
    return logits


def same_outputs(mine: Any, eager: Any, valid: Tensor, *, exactly: bool = False) -> None:
    """Logits where there are tokens, and caches; within what other shapes of products explain, or ``exactly``."""
    _close(mine.logits[valid], eager.logits[valid], exactly)
    same_caches(cache_of(mine), cache_of(eager), valid, exactly=exactly)


def same_caches(mine: Any, eager: Any, valid: Tensor, *, exactly: bool = False) -> None:
    """Layer by layer the same kind with the same rows, of which those of fillers and padding may hold anything finite.

    ``valid`` (B, L): what dense layers hold tokens of. Static ones have room besides.
    """
    assert [type(layer) for layer in mine.layers] == [type(layer) for layer in eager.layers]
    for its, other in zip(mine.layers, eager.layers, strict=True):
        assert its.keys.shape == other.keys.shape
        real = valid
        if hasattr(other, "rows"):
            _same_rows(its.rows, other.rows)
            real = other.all_positions_until(int(other.get_seq_length())) >= 0
        for name in ("keys", "values"):
            states, others = getattr(its, name), getattr(other, name)
            assert states.isfinite().all()
            assert states.is_contiguous()
            stored, expected = (each[:, :, : real.shape[1]].transpose(1, 2)[real] for each in (states, others))
            _close(stored, expected, exactly)


def _same_rows(mine: Any, eager: Any) -> None:
    for name, value in vars(eager).items():
        its = getattr(mine, name)
        assert torch.equal(its, value) if isinstance(value, Tensor) else its == value, name


def _close(actual: Tensor, expected: Tensor, exactly: bool) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0 if exactly else 1e-4)


def is_clear(trace: Any) -> bool:
    """Whether no selection is a matter of rounding: products of other shapes have other last bits."""
    for stage in trace or ():
        for scores, kept in zip(stage.scores, stage.kept, strict=True):
            ordered = scores.sort(descending=True).values
            if 0 < len(kept) < len(scores) and ordered[len(kept) - 1] - ordered[len(kept)] < 1e-6:
                return False
    return True

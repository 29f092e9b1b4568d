"""Replayed prefills through the Triton kernels: on CUDA as graphs, elsewhere as tapes; against eager ones."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from tape_recorder import record_on_tapes

import reroute
from reroute.rankers import Diversity, LastTokenAttention, Ranker
from reroute_kernels import Backend

DECISIONS = (
    (LastTokenAttention(), "remove"),
    (LastTokenAttention(-1), "route"),
    (Diversity(), "route"),
)
"""One decision of each, in the pool, and one more among what it has left."""


@pytest.fixture
def backend(executor: Any, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """See test_routing.py."""
    from reroute_kernels import ops

    record_on_tapes(monkeypatch, least=8)
    return Backend.of("triton", "under test", ops)


@pytest.mark.parametrize(("ranker", "action"), DECISIONS)
@pytest.mark.parametrize("batch", [1, 3])
def test_replays(ranker: Ranker, action: Any, batch: int, backend: Backend, device: torch.device) -> None:
    """By a graph that was captured with another prompt: the same rows in the cache, logits to rounding.

    Rows of a batch are parts of tiles, and end within a page.
    """
    tiny = models.llava(layers=4, side=3)
    tiny.model.to(device)
    schedule = reroute.Schedule((1, 3), (0.5, 0.25), (ranker, LastTokenAttention()))
    seen, new = (
        {key: value.to(device) for key, value in tiny.inputs([tiny.prompt(*parts)] * batch).items()}
        for parts in ((0, 5, tiny.grid, 1, tiny.grid, 7), (1, 2, tiny.grid, 1, tiny.grid, 6))
    )
    outputs = []
    for graphs in (False, reroute.Graphs(max_waste=10)):
        with reroute.enable(tiny.model, schedule=schedule, action=action, graphs=graphs, backend="torch") as handle:
            handle.backend = backend
            for given in (seen, seen, new) if graphs else (new,):
                output = tiny.model(**given)
            outputs.append(output)
            use = handle.stats().graph
            assert (use is not None and use.is_replayed) is bool(graphs), use
    eager, replayed = outputs
    torch.testing.assert_close(replayed.logits, eager.logits, rtol=0, atol=1e-4)
    for mine, its in zip(replayed[models.CACHE].layers[1:], eager[models.CACHE].layers[1:], strict=True):
        assert torch.equal(mine.rows.key_positions, its.rows.key_positions)

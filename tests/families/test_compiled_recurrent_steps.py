"""Compiled steps of models of which some layers keep a state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense import near
from models import CACHE
from test_types import ONE, batch
from tiny_types import build
from torch._dynamo.utils import counters
from transformers import DynamicCache, StaticCache

import reroute
from reroute.errors import UnsupportedCacheError

SCHEDULE = reroute.Schedule((2, 6), (0.4, 0.7))
ROOM = 64


pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("cache", "graphs"), [("static", 1), ("dynamic", 2)])
@pytest.mark.parametrize("kind", ["qwen3_5", "lfm2_vl"])
def test_one_graph(kind: str, cache: str, graphs: int) -> None:
    """As without routing: a graph, and on a dynamic cache one more for any length. States stay guarded after it."""
    tiny = build(kind, layers=8)
    given = batch(tiny, ONE)
    axes = given["position_ids"].shape[:-2] if "position_ids" in given else ()

    def steps(handle: Any, call: Any) -> tuple[torch.Tensor, Any]:
        config = tiny.text.config
        its: Any = StaticCache(config, ROOM) if cache == "static" else DynamicCache(config=config)
        with handle.using(handle.plan(given["input_ids"])):
            tiny.model(**{**given, CACHE: its}, use_cache=True)
        logits = []
        for position, token in enumerate((5, 6, 7), start=len(ONE)):
            more = {"position_ids": torch.full((*axes, 1, 1), position)}
            if cache == "static":
                more["attention_mask"] = torch.arange(ROOM)[None, None, None] <= position
            logits.append(call(input_ids=torch.tensor([[token]]), use_cache=True, **more, **{CACHE: its}).logits)
        return torch.cat(logits, 1), its

    with reroute.enable(tiny.model, schedule=SCHEDULE) as handle:
        expected, _ = steps(handle, tiny.model)
        compiled, filled = steps(handle, torch.compile(tiny.model.__call__, fullgraph=True, backend="eager"))
        assert counters["stats"]["unique_graphs"] == graphs
    near(compiled, expected)
    with pytest.raises(UnsupportedCacheError, match="this forward runs without it"):
        tiny.model(input_ids=torch.tensor([[5]]), use_cache=True, **{CACHE: filled})

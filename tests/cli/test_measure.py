from __future__ import annotations

import pytest

from reroute.cli.measure import costs
from reroute.demo import tinyvlm
from reroute.demo.tinyvlm.evaluation import prompts
from reroute.demo.tinyvlm.examples import examples
from reroute.report import Setup


def test_costs_are_means_over_prompts() -> None:
    """The dense model needs no other setup to be counted; nothing is timed less often than it."""
    model, processor = tinyvlm.load()
    single = [prompts(model, processor, [example]) for example in examples("test", {"attr": 2})]
    done: list[int] = []
    (dense,) = costs(model, single, [Setup()], "torch", rounds=1, progress=done.append)
    assert (dense.visual, dense.avg_tokens, dense.time_ratio) == (144, 144, 1)
    assert len(done) == 2 * (1 + 1)
    again, routed = costs(model, single, [Setup(), Setup("pdrop", keep=1 / 3)], "torch", rounds=1, limit_s=0)
    assert (again.flops, again.kv_bytes) == (dense.flops, dense.kv_bytes)
    assert routed.avg_tokens == pytest.approx(48, abs=1)
    assert 0.3 < routed.kv_bytes / dense.kv_bytes < 0.5
    assert 0.3 < routed.flops / dense.flops < 0.5

"""Whatever is in ``METHODS`` keeps its budget and the promises: a new method is tested by its registration alone."""

from __future__ import annotations

import pytest
import torch
from models import Tiny

import reroute
from reroute.core.schedule import Action
from reroute.methods import METHODS, CDPruner, Method
from reroute.rankers import ConditionalDiversity, Norm

pytestmark = pytest.mark.parametrize("name", METHODS)


def method_for(name: str, tiny: Tiny | None = None) -> Method:
    """With its default settings, and what it has to be given."""
    if name == "visionzip" and tiny is not None and tiny.is_qwen:
        pytest.skip("it needs a CLS row, and says so")
    return CDPruner(first=ConditionalDiversity(Norm())) if name == "cdpruner" else METHODS[name]()


@pytest.mark.parametrize("action", ["route", "remove"])
@pytest.mark.parametrize("depth", [8, 12, 28, 32])
@pytest.mark.parametrize("keep", [0.4, 1.0])
def test_ratios_are_solved_for_any_depth(name: str, action: Action, depth: int, keep: float) -> None:
    method = method_for(name)
    assert method.name == name
    schedule = method.with_budget(keep, depth, action).schedule(depth, action)
    schedule.validate(depth, action)
    n = 100_000
    assert sum(schedule.per_layer(n, depth)) / depth / n == pytest.approx(keep, abs=1e-5)


@pytest.mark.parametrize("action", ["route", "remove"])
def test_the_measured_budget_is_the_one_asked_for(name: str, action: Action, tiny: Tiny) -> None:
    sample = tiny.prompt(0, 5, tiny.grid, 4)
    with reroute.enable(tiny.model, method=method_for(name, tiny), action=action, keep=0.5) as handle:
        tiny.model(**tiny.inputs([sample]), use_cache=True)
    stats = handle.stats()
    assert stats.method == name
    assert 0.5 * len(sample.visual) - 1 < stats.avg_tokens <= 0.5 * len(sample.visual)
    assert stats.kv_bytes < stats.kv_bytes_dense


def test_keeping_everything_is_bit_identical(name: str, tiny: Tiny) -> None:
    given = tiny.inputs([tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(1, 3)])
    plain = tiny.model(**given).logits
    with reroute.enable(tiny.model, method=method_for(name), keep=1.0):
        assert torch.equal(tiny.model(**given).logits, plain)


@pytest.mark.parametrize("action", ["route", "remove"])
def test_a_sample_is_treated_alike_alone_and_in_a_batch(name: str, action: Action, tiny: Tiny) -> None:
    samples = [tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(1, 2, tiny.grid, 3, tiny.grid, 2)]
    kept = []
    with reroute.enable(tiny.model, method=method_for(name, tiny), action=action, keep=0.5, trace=True) as handle:
        for batch in (samples, samples[:1], samples[1:]):
            tiny.model(**tiny.inputs(batch))
            assert handle.trace is not None
            kept.append([[k.tolist() for k in stage.kept] for stage in handle.trace])
    together, first, second = kept
    assert [[one, two] for (one,), (two,) in zip(first, second, strict=True)] == together

"""Times of whole prefills by formula."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from bench.end_to_end.flops import DECODERS
from bench.kernels import prefill_roofline
from bench.kernels.prefill_roofline import HOST, dense, routed, schedule_of
from bench.kernels.roofline import BANDWIDTH
from reroute_kernels.testing.cases import TEXT

LLAVA = DECODERS["LLaVA-1.5-7B"]


def test_long_prompts_run_at_the_rate_of_large_products() -> None:
    """Of the products alone; no time is below what FLOPs or weights take."""
    for shape in DECODERS.values():
        for visual in (576, 2880, 16384):
            rows = visual + TEXT
            ideal = shape.num_layers * 2 * rows * weights(shape) / prefill_roofline.RATE
            modelled = dense(shape, visual).products
            assert ideal < modelled
            if visual == 16384:
                assert modelled < 1.1 * ideal
            assert modelled > shape.num_layers * 2 * weights(shape) / BANDWIDTH


def weights(shape: Any) -> int:
    """Of a layer."""
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return int(2 * shape.hidden * (query + key) + 3 * shape.hidden * shape.intermediate)


def test_one_row_takes_as_long_as_its_weights() -> None:
    one = prefill_roofline._products(LLAVA, 1)
    assert one == pytest.approx(2 * weights(LLAVA) / BANDWIDTH, rel=0.15)


def test_routing_adds_its_decisions_to_its_lengths() -> None:
    schedule = schedule_of(32, "route", 1 / 3)
    ours = routed(LLAVA, schedule, 576)
    low, high = ours.decisions
    assert 0 < low < high
    assert ours.graph == (ours.layers_alone + ours.head + low, ours.layers_alone + ours.head + high)
    everything = routed(LLAVA, replace(schedule, ratios=(1.0,) * 4), 576)
    assert everything.layers_alone == dense(LLAVA, 576).layers_alone
    assert ours.layers_alone < everything.layers_alone


def test_the_host_limits_short_eager_prefills() -> None:
    short, long = dense(LLAVA, 16), dense(LLAVA, 16384)
    assert short.eager == (32 * HOST[0], 32 * HOST[1])
    assert long.eager == long.graph


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    prefill_roofline.main()
    printed = capsys.readouterr().out
    assert "not measured" in printed
    assert "Qwen2.5-VL-32B | 16384 | 1 | 1/3" in printed

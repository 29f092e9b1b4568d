from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import Step3p7Config

from reroute.core.cost import (
    CostEstimate,
    ModelShape,
    average_tokens,
    estimate_cost,
    kv_bytes,
    layer_flops,
    prefill_cost,
)
from reroute.core.schedule import Action, Schedule
from reroute.errors import RerouteError
from reroute.rankers import LastTokenAttention, RandomScores

LLAVA = ModelShape(32, 4096, 11008, 32, 32, 128, 32064)
QWEN = ModelShape(28, 3584, 18944, 28, 4, 128, 152064)
TOY = ModelShape(4, 8, 16, 2, 1, 4, 10)

LAYERS: dict[str, dict[int, tuple[int, ...]]] = {
    "fastv": {32: (3,), 28: (3,)},
    "ours_vs_fastv": {32: (3, 7, 15, 23), 28: (3, 6, 13, 20)},
    "pdrop": {32: (2, 7, 15, 23), 28: (2, 6, 13, 20)},
    "ours_vs_pdrop": {32: (2, 7, 15, 23), 28: (2, 6, 13, 20)},
    "official_pdrop": {32: (8, 16, 24), 28: (7, 14, 21)},
    "official_fastv": {32: (2,), 28: (2,)},
}

# The released schedules at N=576: name, tier, ratios, counts, avg_T on LLaVA and Qwen,
# and with M=60: TFLOP on both, KV MiB on both.
RELEASED: list[tuple[str, int, tuple[float, ...], tuple[int, ...], tuple[float, ...], tuple[float, ...]]] = [
    ("fastv", 192, (0.2644,), (152,), (191.75, 197.43), (3.3019, 3.3931, 125.9, 14.1)),
    ("ours_vs_fastv", 192, (0.2644,) * 4, (152,) * 4, (191.75, 197.43), (3.3019, 3.3931, 125.9, 14.1)),
    (
        "pdrop",
        192,
        (0.5965, 0.3558, 0.2123, 0.1266),
        (343, 204, 122, 72),
        (191.34, 192.21),
        (3.2980, 3.3248, 125.7, 13.8),
    ),
    (
        "ours_vs_pdrop",
        192,
        (0.4502, 0.4502, 0.2251, 0.1126),
        (259, 259, 129, 64),
        (191.47, 193.43),
        (3.2989, 3.3404, 125.7, 13.9),
    ),
    ("fastv", 128, (0.1418,), (81,), (127.41, 134.04), (2.4566, 2.5568, 93.7, 10.6)),
    ("ours_vs_fastv", 128, (0.1418,) * 4, (81,) * 4, (127.41, 134.04), (2.4566, 2.5568, 93.7, 10.6)),
    (
        "pdrop",
        128,
        (0.4570, 0.2088, 0.0954, 0.0436),
        (263, 120, 54, 25),
        (127.63, 129.36),
        (2.4589, 2.4942, 93.8, 10.4),
    ),
    (
        "ours_vs_pdrop",
        128,
        (0.2655, 0.2655, 0.1328, 0.0664),
        (152, 152, 76, 38),
        (127.44, 130.71),
        (2.4544, 2.5106, 93.7, 10.4),
    ),
    ("fastv", 64, (0.01916,), (11,), (63.97, 71.54), (1.6279, 1.7358, 62.0, 7.2)),
    ("ours_vs_fastv", 64, (0.01916,) * 4, (11,) * 4, (63.97, 71.54), (1.6279, 1.7358, 62.0, 7.2)),
    ("pdrop", 64, (0.2789, 0.0937, 0.0315, 0.0106), (160, 53, 18, 6), (80.44, 83.46), (1.8393, 1.8891, 70.2, 7.8)),
    (
        "ours_vs_pdrop",
        64,
        (0.1392, 0.1392, 0.0696, 0.0348),
        (80, 80, 40, 20),
        (84.13, 88.29),
        (1.8864, 1.9516, 72.1, 8.1),
    ),
    ("official_pdrop", 0, (0.5, 0.25, 0.125), (288, 144, 72), (270.0, 270.0), (4.3508, 4.3654, 165.0, 18.0)),
    ("official_fastv", 50, (0.5,), (288,), (306.0, 308.57), (4.8132, 4.8668, 183.0, 20.2)),
    ("official_fastv", 75, (0.25,), (144,), (171.0, 174.86), (3.0256, 3.0921, 115.5, 12.8)),
]


def released(name: str, tier: int, shape: ModelShape) -> Schedule:
    (ratios,) = (row[2] for row in RELEASED if row[:2] == (name, tier))
    return Schedule(LAYERS[name][shape.num_layers], ratios)


def scoring_flops(shape: ModelShape, rows: int) -> int:
    return LastTokenAttention().flops(shape, rows, rows, 1)


def layers_of(cost: CostEstimate) -> int:
    return cost.prefill_flops - cost.scoring_flops


def cost(name: str, tier: int, shape: ModelShape, text: int = 60, **options: Any) -> CostEstimate:
    action: Action = "route" if name.startswith("ours") else "remove"
    return estimate_cost(shape, released(name, tier, shape), action, 576, text, **options)


@pytest.mark.parametrize(("name", "tier", "ratios", "counts", "averages", "costs"), RELEASED)
@pytest.mark.parametrize(("column", "shape"), [(0, LLAVA), (1, QWEN)], ids=["llava", "qwen"])
def test_released_schedules(
    name: str,
    tier: int,
    ratios: tuple[float, ...],
    counts: tuple[int, ...],
    averages: tuple[float, ...],
    costs: tuple[float, ...],
    column: int,
    shape: ModelShape,
) -> None:
    schedule = Schedule(LAYERS[name][shape.num_layers], ratios)
    result = cost(name, tier, shape)
    assert schedule.counts(576) == counts
    assert result.avg_tokens == pytest.approx(averages[column], abs=0.005)
    assert result.keep == result.avg_tokens / 576
    assert layers_of(result) / 1e12 == pytest.approx(costs[column], abs=6e-5)
    assert result.kv_bytes / 2**20 == pytest.approx(costs[2 + column], abs=0.051)


def test_full_model() -> None:
    for shape, flops, size in (LLAVA, 8.4496, 318.0), (QWEN, 8.4625, 34.8):
        lengths = [636] * shape.num_layers
        full = prefill_cost(shape, lengths)
        assert full.prefill_flops / 1e12 == pytest.approx(flops, abs=5e-5)
        assert full.kv_bytes / 2**20 == pytest.approx(size, abs=0.05)
    assert layer_flops(LLAVA, 1) - 4 * 4096 == 404_750_336
    assert layer_flops(QWEN, 1) - 4 * 3584 == pytest.approx(466.09e6, abs=5e3)


def test_without_text() -> None:
    def teraflops(name: str, tier: int) -> float:
        return layers_of(cost(name, tier, LLAVA, text=0)) / 1e12

    assert prefill_cost(LLAVA, [576] * 32).prefill_flops / 1e12 == pytest.approx(7.6343, abs=5e-5)
    assert teraflops("fastv", 192) == pytest.approx(2.5108, abs=5e-5)
    assert teraflops("fastv", 128) == pytest.approx(1.6696, abs=5e-5)
    assert teraflops("fastv", 64) == pytest.approx(0.8449, abs=5e-5)
    assert teraflops("pdrop", 64) == pytest.approx(1.0552, abs=5e-5)
    assert teraflops("ours_vs_pdrop", 64) == pytest.approx(1.1021, abs=5e-5)


@pytest.mark.parametrize(
    ("shape", "text", "tier", "percent"),
    [
        (LLAVA, 60, 192, 0.03),
        (LLAVA, 60, 128, -0.18),
        (LLAVA, 60, 64, 2.6),
        (QWEN, 60, 192, 0.47),
        (QWEN, 60, 128, 0.66),
        (QWEN, 60, 64, 3.3),
        (LLAVA, 0, 64, 4.4),
        (QWEN, 0, 64, 5.7),
    ],
)
def test_agreement_of_the_released_pairs(shape: ModelShape, text: int, tier: int, percent: float) -> None:
    ours, theirs = (layers_of(cost(name, tier, shape, text)) for name in ("ours_vs_pdrop", "pdrop"))
    assert 100 * (ours / theirs - 1) == pytest.approx(percent, abs=0.05)
    pair = [layers_of(cost(name, tier, shape, text)) for name in ("ours_vs_fastv", "fastv")]
    assert pair[0] == pair[1]


def test_scoring_is_part_of_the_budget() -> None:
    assert scoring_flops(LLAVA, 636) / 1e9 == pytest.approx(21.4, abs=0.05)
    route, remove = cost("ours_vs_fastv", 192, LLAVA), cost("fastv", 192, LLAVA)
    assert route.scoring_flops / 1e9 == pytest.approx(85.5, abs=0.05)
    assert remove.scoring_flops == scoring_flops(LLAVA, 636)
    assert route.prefill_flops - route.scoring_flops == remove.prefill_flops - remove.scoring_flops
    assert cost("pdrop", 192, LLAVA).scoring_flops == sum(
        scoring_flops(LLAVA, 60 + pool) for pool in (576, 343, 204, 122)
    )


def test_nothing_is_scored_where_nothing_is_deferred() -> None:
    dense, schedule = Schedule((1, 3), (1.0, 1.0)), Schedule((1, 3), (0.5, 0.25))
    assert estimate_cost(TOY, dense, "route", 8, 3).scoring_flops == 0
    assert estimate_cost(TOY, dense, "route", 8, 3).keep == 1
    text_only = estimate_cost(TOY, schedule, "route", 0, 3)
    assert text_only.scoring_flops == 0
    assert text_only.keep == 1
    assert estimate_cost(TOY, replace(schedule, rankers=(RandomScores(),)), "route", 8, 3).scoring_flops == 0
    with pytest.raises(RerouteError, match="does not exist"):
        estimate_cost(TOY, Schedule((4,), (0.5,)), "route", 8, 3)


def test_toy_budget() -> None:
    schedule = Schedule((1, 3), (0.5, 0.25))
    lengths = [11, 7, 7, 5]
    assert [layer_flops(TOY, n) for n in lengths] == [16544, 9632, 9632, 6560]
    assert [layer_flops(TOY, n, attention="causal") for n in lengths] == [14784, 8960, 8960, 6240]
    assert prefill_cost(TOY, lengths, attention="causal", lm_head=True).prefill_flops == 38944 + 2 * 8 * 10
    # q row 2*8*8, keys 2*P*8*4, logits 2*8*P, twice with P = 11
    expected = CostEstimate(42368 + 2 * 1008, 2 * 1008, 480, avg_tokens=4.5, keep=4.5 / 8)
    assert estimate_cost(TOY, schedule, "route", 8, 3) == expected
    assert estimate_cost(TOY, schedule, "remove", 8, 3).scoring_flops == 1008 + 128 + 7 * 80
    assert estimate_cost(TOY, schedule, "route", 8, 3, bytes_per_element=4).kv_bytes == 960
    assert average_tokens([8, 4, 4, 2]) == 4.5
    attention: Any = "sparse"
    with pytest.raises(RerouteError, match=r"Unknown attention 'sparse'; known: causal, dense"):
        layer_flops(TOY, 3, attention=attention)


def test_earlier_turns_are_keys() -> None:
    """5 tokens after 3: 5 * 8 pairs, of which a causal mask leaves 4 + 5 + 6 + 7 + 8; a pair costs 2 * (8 + 8)."""
    weights = layer_flops(TOY, 5) - 32 * 25
    assert layer_flops(TOY, 5, 8) == weights + 32 * 40
    assert layer_flops(TOY, 5, 8, attention="causal") == weights + 32 * 30
    cost = prefill_cost(TOY, [5, 3, 3, 2], [8, 6, 4, 2], scoring=scoring_flops(TOY, 5) + scoring_flops(TOY, 4), batch=2)
    layers = sum(layer_flops(TOY, t, k) for t, k in zip([5, 3, 3, 2], [8, 6, 4, 2], strict=True))
    assert cost.scoring_flops == scoring_flops(TOY, 5) + scoring_flops(TOY, 4)
    assert cost.prefill_flops == 2 * layers + cost.scoring_flops
    assert cost.kv_bytes == 2 * kv_bytes(TOY, [20])


def test_shape_from_config() -> None:
    fields = {"num_hidden_layers": 28, "hidden_size": 3584, "intermediate_size": 18944, "vocab_size": 152064}
    config = SimpleNamespace(**fields, num_attention_heads=28, num_key_value_heads=4)
    assert ModelShape.from_config(config) == QWEN
    assert ModelShape.from_config(SimpleNamespace(**vars(config), head_dim=64)).head_dim == 64
    assert ModelShape.from_config(SimpleNamespace(**fields, num_attention_heads=28)).kv_heads == 28
    with pytest.raises(RerouteError, match=r"hidden_size.*model\.config\.get_text_config\(\)"):
        ModelShape.from_config(SimpleNamespace(text_config=config))


def test_a_shape_whose_layers_differ() -> None:
    """The mean: sliding layers of this type have heads of their own number."""
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    config: Any = Step3p7Config().text_config
    config = type(config)(
        num_hidden_layers=4, layer_types=kinds, num_attention_heads=4, num_sliding_attention_heads=8, sliding_window=8
    )
    assert ModelShape.from_config(config).heads == 6


def test_a_removal_leaves_less_to_rank() -> None:
    """Routing among what it left ranks that alone, at each decision."""
    ranked: dict[tuple[str, ...], int] = {}
    each: list[tuple[Action, ...]] = [("route",) * 3, ("remove", "route", "route"), ("remove",) * 3]
    for actions in each:
        schedule = Schedule((1, 2, 3), (0.5, 0.25, 0.25), actions=actions)
        ranked[actions[:2]] = estimate_cost(TOY, schedule, "route", 8, 3).scoring_flops
    ranker = LastTokenAttention()
    whole, left, rest = (ranker.flops(TOY, n + 3, n, 0) for n in (8, 4, 2))
    assert ranked == {
        ("route", "route"): 3 * whole,
        ("remove", "route"): whole + 2 * left,
        ("remove", "remove"): whole + left + rest,
    }


def test_layers_that_keep_a_state_have_no_keys() -> None:
    sizes: dict[str, int] = {
        "hidden_size": 8,
        "num_attention_heads": 2,
        "vocab_size": 10,
        "num_hidden_layers": 3,
        "head_dim": 4,
    }
    experts = {"num_experts_per_tok": 2, "moe_intermediate_size": 5, "shared_expert_intermediate_size": 7}
    kinds = ["linear_attention", "full_attention", "conv", "full_attention"]
    shape = ModelShape.from_config(SimpleNamespace(**sizes, **experts, layer_types=kinds))
    assert (shape.intermediate, shape.recurrent) == (2 * 5 + 7, (0, 2))
    assert kv_bytes(shape, [6, 4, 3]) == kv_bytes(replace(shape, recurrent=()), [4])
    counted = prefill_cost(shape, [6, 4, 3]).prefill_flops
    assert counted == layer_flops(shape, 6, 0) + layer_flops(shape, 4) + layer_flops(shape, 3, 0)

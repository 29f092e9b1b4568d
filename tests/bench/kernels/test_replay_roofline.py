"""Times of replays beside eager prefills, by formula."""

from __future__ import annotations

from fractions import Fraction

import pytest

from bench.end_to_end.flops import DECODERS
from bench.gpu_check.report import ABOUT_GRAPHS
from bench.kernels import replay_roofline
from bench.kernels.prefill_roofline import ATTENTION_RATE, FUSED, MODULES, dense, prefill_time, routed, schedule_of
from bench.kernels.replay_roofline import PROBLEMS, REPLAY_HOST, TOWERS, compare, comparisons, replayed
from bench.kernels.roofline import BANDWIDTH, GRAPH_LAUNCH, ITEM
from reroute.core.cost import kv_bytes
from reroute.graphs import Graphs
from reroute_kernels.testing.cases import TEXT

LLAVA = DECODERS["LLaVA-1.5-7B"]
THIRD = Fraction(1, 3)


def test_a_dense_replay_is_the_graph_and_what_is_around_it() -> None:
    """580 visual tokens and 60 of text are ten whole tiles."""
    rows = 640
    least, most = replayed(LLAVA, None, rows - TEXT, 1)
    states, cache = ITEM * rows * LLAVA.hidden, kv_bytes(LLAVA, [rows] * 32, ITEM)
    around = REPLAY_HOST + (2 * states + 2 * cache + 4 * states) / BANDWIDTH + 7 * GRAPH_LAUNCH
    assert least == most == pytest.approx(around + dense(LLAVA, rows - TEXT).graph[0])


def test_rows_are_those_of_a_class() -> None:
    one, more = (replayed(LLAVA, None, visual, 1)[0] for visual in (581, 580 + 64))
    assert prefill_time(LLAVA, [704] * 32, 1).layers_alone < one < more < 1.01 * one  # copies are of what there is
    assert replayed(LLAVA, None, 580, 1)[0] < 0.99 * one
    few, tiles = (replayed(LLAVA, None, visual, 8)[0] for visual in (65, 68))
    assert few == pytest.approx(tiles, rel=0.01)  # 125 and 128 rows, of 8 at a time: 128


def test_a_routed_replay_has_its_decisions() -> None:
    schedule = schedule_of(32, "route", 1 / 3)
    ours, eager = replayed(LLAVA, schedule, 576, 1), routed(LLAVA, schedule, 576)
    assert ours[1] - ours[0] == pytest.approx(eager.decisions[1] - eager.decisions[0])
    assert REPLAY_HOST < ours[0] - eager.graph[0] < 1.5 * REPLAY_HOST  # few fillers, few copies


def test_what_a_compiler_joins() -> None:
    """Reads each operand once, writes each result once, and launches once; products and attention stay."""
    plain, joined = (prefill_time(LLAVA, [640] * 32, 1, between=its) for its in (MODULES, FUSED))
    assert (plain.products, plain.attention) == (joined.products, joined.attention)
    features = 2 * 4 * LLAVA.hidden + 2 * 2 * LLAVA.heads * LLAVA.head_dim + 3 * LLAVA.intermediate + 4 * LLAVA.hidden
    assert joined.elementwise == pytest.approx(32 * (640 * features * ITEM / BANDWIDTH + 6 * GRAPH_LAUNCH))
    assert joined.elementwise < plain.elementwise / 3
    assert (
        compare("LLaVA-1.5-7B", 576, 1, THIRD, FUSED).dense_eager == compare("LLaVA-1.5-7B", 576, 1, THIRD).dense_eager
    )


def test_towers() -> None:
    """FLOPs of five pictures of CLIP ViT-L/14, and of Qwen2.5-VL's layers that see a whole picture."""
    clip, qwen = TOWERS["LLaVA-1.5-7B"], TOWERS["Qwen2.5-VL-7B"]
    assert sum(columns * depth for columns, depth in clip.matrices) == 12 * 1024**2
    assert clip.seconds(2880, 1) == clip.seconds(5 * 576, 1) == clip.seconds(5 * 576 - 1, 1)
    assert clip.seconds(16384, 8)[0] == pytest.approx(8 * clip.seconds(16384, 1)[0], rel=0.05)
    assert clip.seconds(576, 1)[0] < clip.seconds(576, 1)[1]  # the host is late
    apart, together = qwen.seconds(16384, 4)[0], qwen.seconds(4 * 16384, 1)[0]
    pairs = 4 * 1280 * 4 * (4 * 65536) * (4 * 65536 - 65536)
    assert together - apart == pytest.approx(pairs / ATTENTION_RATE, rel=0.02)


def test_verdicts() -> None:
    """One for each aim, model and budget, and for each speed-up at a ninth."""
    said = list(replay_roofline.verdicts())
    assert len(said) == 2 * 2 * 2 + 2 * 3
    assert said[0].startswith("LLaVA-1.5-7B, N = 576, 1/3: 0.1")
    assert all(line.endswith((": met", ": **missed**")) for line in said)
    assert [line.endswith("met") for line in said if "16384" in line and "above" in line] == [True] * 4


def test_what_the_page_says() -> None:
    """Of what a graph wins and loses."""
    every = list(comparisons())
    assert len(every) == 2 * 2 * len(PROBLEMS)
    slower = [its.dense_graph[0] / its.dense_eager[0] - 1 for its in every]
    said = f"{100 * min(slower):.1g} to {100 * max(slower):.0f} %"
    assert said in ABOUT_GRAPHS
    short = compare("LLaVA-1.5-7B", 576, 1, THIRD)
    beside_fast, beside_slow = (1e3 * (a - b) for a, b in zip(short.routed_eager, short.routed_graph, strict=True))
    text = ABOUT_GRAPHS.replace("\n", " ")
    assert f"gains {beside_slow:.1f} ms beside a slow" in text
    assert f"loses {-beside_fast:.1f} ms beside a fast" in text
    launches = sum(its[1] for its in vars(MODULES).values()) + 7
    assert f"{1e3 * 32 * launches * GRAPH_LAUNCH:.1f} ms are gaps between its launches, {launches} a layer" in text


def test_fillers_are_few() -> None:
    """Nothing that is shown runs eagerly, short stages of a batch least of all."""
    assert max(its.waste for its in comparisons()) < Graphs().max_waste / 2
    assert compare("LLaVA-1.5-7B", 576, 8, Fraction(1, 9)).waste < 0.01


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    replay_roofline.main()
    printed = capsys.readouterr().out
    assert "not measured" in printed
    assert "Qwen2.5-VL-7B | 16384 | 8 | 1/9" in printed

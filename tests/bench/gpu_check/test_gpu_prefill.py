"""End-to-end prefills for a GPU, as far as a CPU can run them: tiny models, and stand-ins for graphs and profilers."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from tape_recorder import record_on_tapes

import reroute
from bench.gpu_check import measure, prefill
from bench.gpu_check.lines import Deadline, Key, Lines, OutOfTime, keys
from bench.gpu_check.measure import Session, Wrong
from bench.gpu_check.record import read_lines
from bench.gpu_check.shapes import SHAPES
from bench.kernels.prefill_roofline import schedule_of
from reroute.core.cost import Attention, estimate_cost, prefill_cost
from reroute.core.prefill import Prefill
from reroute_kernels.testing.cases import TEXT

CPU = torch.device("cpu")
TINY = ("tiny-llava", "tiny-qwen")
ROUTE = Key("prefill", "tiny-llava", 36, 1, "route", "torch", "eager")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ROUNDS", "LEAST"):
        monkeypatch.setattr(measure, name, 1)


def rerun(run: Callable[[], Any]) -> Callable[[], Any]:
    """In place of a capture: a warm-up, and every replay runs again."""
    run()
    return run


def session(model: str = "tiny-llava", capture: Any = rerun) -> Session:
    return Session(model, CPU, Deadline(600), capture)


@pytest.fixture(scope="module")
def tiny() -> Session:
    return session()


def call(file: Path, model: str = "tiny-llava", seconds: float = 600) -> int:
    return prefill.main(["--model", model, "--device", "cpu", "--seconds", str(seconds), "--out", str(file)])


# --- all lines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", TINY)
def test_everything_is_measured(model: str, tmp_path: Path) -> None:
    file = tmp_path / "folder" / "measured.jsonl"
    assert call(file, model) == 0
    lines = list(read_lines(file))
    assert [Key(*list(line.values())[:7]) for line in lines] == keys(model, cuda=False)
    assert all(next(iter(line)) == "kind" for line in lines)
    for line in lines:
        assert not {"error", "skipped"} & line.keys()
        assert line["layers"] == line["of_layers"] == SHAPES[model].num_layers
        assert 0 < line["min_ms"] <= line["median_ms"]
        assert 0 < line["host_ms"] <= line["median_ms"]
        is_dense = line["variant"].startswith("dense")
        assert ("ratio" in line) == ("dense_ms" in line) == (not is_dense)
        assert ("flop_ratio" in line) == ("plan_ms" in line) == (line["kind"] == "prefill" and not is_dense)


@pytest.mark.parametrize("model", TINY)
def test_graphs_of_it_all(model: str) -> None:
    """With a stand-in for the capture; the kernels need a GPU."""
    wanted = [key for key in keys(model, cuda=False, modes=("graph",)) if key.batch == 1]
    assert {key.kind for key in wanted} == {"prefill", "layers"}
    measured = session(model)
    for key in wanted:
        values = measured.measure(key)
        assert values["median_ms"] > 0
        assert not {"host_ms", "plan_ms"} & values.keys()


@pytest.mark.parametrize("model", TINY)
def test_replays_of_it_all(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tapes."""
    record_on_tapes(monkeypatch)
    measured = session(model)
    for variant, backend in (("dense", ""), ("route", "torch"), ("route 1/9", "torch")):
        key = Key("replay", model, 36, 1, variant, backend, "graph")
        values = measured.measure(key)
        assert values["ratio"] == pytest.approx(values["median_ms"] / values["dense_ms"], rel=1e-3)
        assert values["eager_ms"] > 0
        assert values["held_gib"] >= 0
        assert values["waste"] > 0
        measured.clear()


def test_a_prefill_that_is_not_replayed_is_no_number(tiny: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    record_on_tapes(monkeypatch)
    monkeypatch.setattr("reroute.transformers.graphs.replays.why_not_call", lambda *_: "it is a test")
    with pytest.raises(Wrong, match="was not replayed: ran eagerly: it is a test"):
        tiny.measure(replace(ROUTE, kind="replay", mode="graph"))


def test_flop_ratios(tiny: Session) -> None:
    values, shape = tiny.measure(ROUTE), SHAPES["tiny-llava"]
    schedule = schedule_of(12, "route", 1 / 3)
    assert (schedule.layers, schedule.counts(36)) == ((1, 2, 5, 8), (16, 16, 8, 4))
    ratios: dict[str, Attention] = {"flop_ratio": "dense", "flop_ratio_causal": "causal"}
    for name, attention in ratios.items():
        ours = estimate_cost(shape, schedule, "route", 36, TEXT, attention=attention)
        dense = prefill_cost(shape, [36 + TEXT] * 12, attention=attention)
        assert values[name] == round(ours.prefill_flops / dense.prefill_flops, 4) < 1
    assert values["flop_ratio"] != values["flop_ratio_causal"]
    assert values["avg_tokens"] == round((36 + 16 + 3 * 16 + 3 * 8 + 4 * 4) / 12, 4)


def test_ratios_are_those_of_each_round(tiny: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs of (ours, dense): the second is so slow that medians over all rounds would say something else."""
    rounds = [[(1.0, 2.0), (3.0, 4.0)], [(5.0, 30.0), (5.0, 20.0)], [(1.0, 3.0), (2.0, 3.0)]]
    monkeypatch.setattr(Session, "_rounds", lambda self, runs: iter(rounds))
    assert tiny._compared(ROUTE, [lambda: None] * 2) == {
        "median_ms": 3000.0,
        "min_ms": 2000.0,
        "rounds": 3,
        "host_ms": 1000.0,
        "dense_ms": 4000.0,
        "ratio": 1.0,
    }


def test_rounds_alternate(tiny: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    monkeypatch.setattr(measure, "ROUNDS", 3)
    rounds = list(tiny._rounds([lambda: ran.append("ours"), lambda: ran.append("dense")]))
    assert len(rounds) == 3
    assert ran == ["ours", "dense"] * 4  # the first warms up
    assert all(0 <= returned <= ended for pair in rounds for returned, ended in pair)


# --- time -------------------------------------------------------------------------------------------------------------


def test_without_time_nothing_is_measured(tmp_path: Path) -> None:
    file = tmp_path / "measured.jsonl"
    assert call(file, seconds=-1) == 3
    assert not file.exists()


def test_a_later_call_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    file, wanted = tmp_path / "measured.jsonl", keys("tiny-llava", cuda=False)
    measured: list[Key] = []

    def measured_or_late(self: Session, key: Key) -> dict[str, Any]:
        if len(measured) == 2:
            raise OutOfTime
        measured.append(key)
        return {"median_ms": 1.0}

    monkeypatch.setattr(Session, "measure", measured_or_late)
    assert call(file) == 3
    assert measured == wanted[:2]
    assert f"{len(wanted) - 2} lines left, the next of them {wanted[2]}" in capsys.readouterr().out
    measured.clear()
    assert call(file) == 3
    assert measured == wanted[2:4]
    monkeypatch.setattr(Session, "measure", lambda self, key: {"median_ms": 1.0})
    assert call(file) == 0
    assert len(list(read_lines(file))) == len(wanted)
    monkeypatch.setattr(Session, "__init__", mock.Mock(side_effect=AssertionError("nothing is left to build it for")))
    assert call(file) == 0


def test_no_round_begins_that_would_end_late(tiny: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def rounds(seconds: float, *takes: float) -> int:
        """Of a run that takes so long at first, and 0.1 s from then on."""
        coming = iter(takes)

        def run() -> None:
            now[0] += next(coming, 0.1)

        tiny._deadline = Deadline(seconds)
        return len(list(tiny._rounds([run])))

    monkeypatch.setattr(tiny, "_deadline", None)
    monkeypatch.setattr(measure, "LEAST", 3)
    monkeypatch.setattr(measure, "ROUNDS", 15)
    assert rounds(100) == pytest.approx(measure.SECONDS / 0.1, abs=1)
    assert rounds(0.75) == 5  # after the sixth run there are 0.15 s left, and one takes 0.1
    assert rounds(1.0, 0.1, 0.1, 0.1, 0.4) == 3  # nor one that may take as long as the slowest
    with pytest.raises(OutOfTime):
        rounds(0.35)
    monkeypatch.setattr(measure, "ROUNDS", 7)
    assert rounds(100) == 7


def test_a_line_that_was_cut_off_is_measured_again(tmp_path: Path) -> None:
    file = tmp_path / "measured.jsonl"
    lines = Lines(file)
    lines.add(ROUTE, {"median_ms": 1.0})
    file.write_text(file.read_text() + '{"kind": "pref')
    again = Lines(file)
    assert again.wanted([ROUTE]) == []
    again.add(ROUTE, {"median_ms": 2.0})
    assert [line["median_ms"] for line in read_lines(file)] == [1.0, 2.0]


def test_what_failed_comes_last(tmp_path: Path) -> None:
    lines, every = Lines(tmp_path / "measured.jsonl"), keys("tiny-llava", cuda=False)
    for key, values in ((every[0], {"error": "x"}), (every[1], {"error": "x"}), (every[2], {}), (every[1], {})):
        lines.add(key, values)
    assert Lines(tmp_path / "measured.jsonl").wanted(every) == [*every[3:], every[0]]


def test_lines_of_others_are_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "measured.jsonl"
    other = json.dumps({"kind": "operation", "operation": "step", "problem": "LLaVA", "backend": "torch"})
    file.write_text(other + "\n")
    Lines(file).add(ROUTE, {"median_ms": 1.0})
    assert [line["kind"] for line in read_lines(file)] == ["operation", "prefill"]


def test_the_most_telling_come_first() -> None:
    wanted = keys("llava-7b", cuda=True)
    assert len({*wanted}) == len(wanted)
    first = [(key.variant, key.backend, key.mode) for key in wanted if key.kind == "prefill"][:6]
    modes = ("eager", "graph")
    assert first == [(v, b, m) for v, b in (("dense", ""), ("route", "triton"), ("remove", "triton")) for m in modes]

    def of(visual: int, batch: int, variant: str, backend: str = "triton", **more: Any) -> int:
        backend = "" if variant.startswith("dense") else backend
        usual = Key("prefill", "llava-7b", visual, batch, variant, backend, "eager")
        return wanted.index(replace(usual, **more))

    assert of(576, 1, "dense again", mode="graph") < of(2880, 1, "dense") < of(16384, 1, "dense")
    assert of(16384, 1, "dense again") < of(576, 1, "route", kind="kernels") < of(16384, 1, "route", kind="kernels")
    assert of(16384, 1, "route", kind="kernels") < of(576, 1, "route", backend="torch") < of(576, 8, "dense")
    assert of(576, 8, "route") < of(16384, 1, "dense", mode="graph")
    for visual in (576, 2880, 16384):
        for batch in (1, 8):
            for mode in modes:
                route = of(visual, batch, "route", mode=mode)
                assert of(visual, batch, "dense", mode=mode) < route < of(visual, batch, "dense again", mode=mode)


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_an_error_in_one_variant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The others are measured; a later call measures only what failed."""
    file = tmp_path / "measured.jsonl"
    enable: Any = reroute.enable

    def planted(*args: Any, action: str, **given: Any) -> Any:
        if action == "remove":
            raise torch.OutOfMemoryError("planted")
        return enable(*args, action=action, **given)

    with monkeypatch.context() as patch:
        patch.setattr(reroute, "enable", planted)
        assert call(file) == 1
    assert "planted" in capsys.readouterr().err
    lines, wanted = list(read_lines(file)), keys("tiny-llava", cuda=False)
    assert len(lines) == len(wanted)
    for line in lines:
        if line["variant"] == "remove":
            assert line["error"] == "OutOfMemoryError: planted"
            assert "median_ms" not in line
        else:
            assert "error" not in line
    assert call(file) == 0
    again = list(read_lines(file))[len(wanted) :]
    assert [line["variant"] for line in again] == ["remove", "remove"]
    assert all("median_ms" in line for line in again)


def test_a_device_that_no_longer_answers_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "measured.jsonl"
    monkeypatch.setattr(Session, "measure", mock.Mock(side_effect=RuntimeError("illegal address")))
    monkeypatch.setattr(Session, "clear", mock.Mock(side_effect=RuntimeError("CUDA error")))
    with pytest.raises(RuntimeError, match="CUDA error"):
        call(file)
    assert [line["error"] for line in read_lines(file)] == ["RuntimeError: illegal address"]


def test_wrong_tokens_are_no_number(tiny: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row more than was planned."""
    lengths = Session._lengths
    with monkeypatch.context() as patch:
        patch.setattr(Session, "_lengths", lambda self, key: [n + (n < 96) for n in lengths(self, key)])
        with pytest.raises(Wrong, match="the lengths of the cache"):
            tiny.measure(ROUTE)
    tiny.measure(ROUTE)


def test_infinite_logits_are_no_number(tiny: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    restore = Prefill.restore
    monkeypatch.setattr(Prefill, "restore", lambda self, hidden: restore(self, hidden) * math.inf)
    with pytest.raises(Wrong, match="not finite"):
        tiny.measure(ROUTE)


def test_a_graph_with_other_bits_is_no_number() -> None:
    def stale(run: Callable[[], Any]) -> Callable[[], Any]:
        result = run()
        if hasattr(result, "logits"):
            result.logits = result.logits + 1e-6
        return lambda: result

    measured = session(capture=stale)
    with pytest.raises(Wrong, match="bit for bit"):
        measured.measure(replace(ROUTE, mode="graph"))


def test_another_backend_is_no_number(tiny: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REROUTE_BACKEND", "torch")
    with pytest.raises(Wrong, match="the backend should be triton and came out as torch"):
        tiny.measure(replace(ROUTE, backend="triton"))


def test_what_memory_does_not_allow_is_skipped(tiny: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "_free", lambda self: 2.0**10)
    values = tiny.measure(ROUTE)
    assert values["skipped"] == "needs about 0 GiB, and 0 are free"
    assert "median_ms" not in values

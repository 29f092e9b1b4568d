"""``python -m bench.end_to_end --quick``, and what it measures with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bench.end_to_end.interleaved import Parts, Spread
from bench.end_to_end.memory_log import LiveBytes

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """What ``python -m bench.end_to_end --quick`` prints and writes."""
    file = tmp_path_factory.mktemp("bench") / "results.json"
    command = [sys.executable, "-m", "bench.end_to_end", "--quick", "--json", str(file)]
    run = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout, json.loads(file.read_text())


def test_prints_where_the_numbers_come_from(quick: tuple[str, dict[str, Any]]) -> None:
    printed, results = quick
    assert "nothing here was measured on a GPU" in printed
    assert {"torch", "transformers", "cpus", "threads", "backend"} <= results["environment"].keys()
    assert results["environment"]["torch"] == torch.__version__


def test_prefill_fields(quick: tuple[str, dict[str, Any]]) -> None:
    (prefill,) = quick[1]["prefill"]
    assert {"median", "p20", "p80"} == prefill["ratio"].keys() == prefill["cpu_ratio"].keys()
    assert 0 < prefill["flops_ratio"] < 1
    routing = prefill["routing"]
    assert 0 < routing["share"]["median"] < 1
    # A part without time is one whose clock hangs on something that the product no longer calls.
    assert all(wall > 0 and cpu > 0 for wall, cpu in routing["parts"].values())
    assert {"plan", "defer", "RoPE", "scores", "top-k", "admit", "restore"} <= routing["parts"].keys()


def test_decode_fields(quick: tuple[str, dict[str, Any]]) -> None:
    decode = quick[1]["decode"]
    assert decode["ratio"]["median"] > 0
    dense, *compact = decode["lengths"]
    assert all(length < dense for length in compact)


def test_memory_keeps_its_promises(quick: tuple[str, dict[str, Any]]) -> None:
    real, fake = quick[1]["memory"]
    for count in (real, fake):
        assert count["routed_peak"] < count["dense_peak"]
        assert count["extra"] <= count["promised"] == count["pool"] + count["compact"] + count["tables"]
        assert count["scratch"]["largest"] < count["attention"] / 4
    assert real["dense_peak"] == pytest.approx(fake["dense_peak"], abs=256)
    assert real["routed_peak"] == pytest.approx(fake["routed_peak"], abs=256)


def test_modelled_budgets_are_what_was_asked_for(quick: tuple[str, dict[str, Any]]) -> None:
    for row in quick[1]["modelled"]:
        numerator, _, denominator = row["keep"].partition("/")
        keep = int(numerator) / int(denominator or 1)
        assert row["avg_tokens"] / row["visual"] == pytest.approx(keep, abs=0.002)
        assert row["flops_ratio"] == pytest.approx(keep, abs=0.1)


def test_live_bytes_of_a_toy() -> None:
    layer = nn.Linear(10, 10)
    with LiveBytes() as live, torch.no_grad():
        x = torch.zeros(100)  # 400 bytes
        view = x[50:]  # the same storage, kept alive by the view
        del x
        y = layer(view.view(5, 10))  # 200 bytes; the parameters were there before
        del view
        y.add_(1)  # in place
        alias = y.detach()
        del y
        z = alias + 1  # 200 bytes
        del alias
    assert live.timeline() == [0, 400, 600, 200, 400, 200]
    assert [a.bytes for a in live.log] == [400, 200, 200]
    assert [a.bytes for a in live.alive(5)] == [200]
    assert live.at(4).op == "aten.add.Tensor"
    del z


def test_live_bytes_tells_owners_and_spans_apart() -> None:
    live = LiveBytes(watched=(__name__.partition(".")[0],))
    make = live.spanned("make", lambda: torch.zeros(2))
    with live:
        kept = make()
        make()
    assert live.log[0].owner == __name__.partition(".")[0]
    assert [(s.start, s.end) for s in live.spans["make"]] == [(0, 1), (1, 2)]
    assert live.spans["make"][1].contains(2)
    assert not live.spans["make"][1].contains(1)
    del kept


def test_parts_do_not_count_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    parts = Parts("outer", undivided=("whole",))
    inner = parts.wrap(lambda: None, "inner")
    whole = parts.wrap(inner, "whole")
    outer = parts.wrap(lambda: (inner(), whole()), "outer")
    inner()  # outside: not counted
    outer()
    assert parts.wall == {"outer": 3, "inner": 1, "whole": 3}


def test_spread() -> None:
    assert Spread.of([1, 2, 3, 4, 5, 6]) == Spread(3.5, 2.0, 5.0)

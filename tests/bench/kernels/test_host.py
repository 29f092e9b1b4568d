"""What the kernels and the pool cost on the host."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest

from bench.kernels import pages


def test_pages_of_few_rows_waste_little() -> None:
    small, large = (pages.stream(size, prefills=60) for size in (16, 256))
    assert 0 < small[0] < large[0] < 0.2
    assert all(0 < together <= 1 and seconds > 0 for _, together, seconds in (small, large))


def test_host_time_of_a_step(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole command, with few repeats."""
    pytest.importorskip("triton")
    from bench.kernels import overhead

    ran: list[object] = []

    def best(call: Callable[[], object]) -> float:
        ran.append(call())
        return 1.0

    monkeypatch.setattr(overhead, "best", best)
    monkeypatch.setattr(overhead, "prefill_step", functools.partial(overhead.prefill_step, rounds=1))
    overhead.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(ran) + 3  # a title, and what clocks itself

"""What kernels are compiled for, and what a warm-up reports of it."""

from __future__ import annotations

from pathlib import Path
from threading import Thread
from typing import Any, Final

import pytest
import torch

pytest.importorskip("triton")

from cases import ScoreCase, same

from reroute_kernels import Backend, LoadedKernel, WarmUp, load_kernels, reference
from reroute_kernels.testing.compile_only import new_device

CPU = torch.device("cpu")
NEW: Final = "compiled"
CACHED: Final = "from Triton's cache"
OLD: Final = "loaded before"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Backend:
    """The Triton backend with few and short classes of rows, and nothing in Triton's cache."""
    from reroute_kernels import ops
    from reroute_kernels.triton_kernels import select

    for name, value in (("MIN_CHUNK", 16), ("MAX_ONE_PROGRAM", 32), ("CHUNK", 16)):
        monkeypatch.setattr(select, name, value)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return Backend.of("triton", "asked for", ops)


def select(backend: Backend, visual: int) -> None:
    rows = ScoreCase([visual + 4], [visual], [visual // 2]).inputs(CPU).rows
    backend.select(torch.zeros(1, visual), rows)


def test_the_shortest_row_of_each_kernel() -> None:
    """No row up to the most needs a kernel that they do not, and no two of them the same."""
    from reroute_kernels.triton_kernels.select import _chunking, row_classes

    assert row_classes(70_000) == [1, 1025, 2049, 4097, 16385, 65537]
    for most in (1, 576, 1024, 1025, 4096, 4097, 16384, 70_000, 300_000):
        cuts = [_chunking(width) for width in row_classes(most)]
        assert len(set(cuts)) == len(cuts)
        assert set(cuts) == {_chunking(n) for n in range(0, most + 1)}


def test_a_long_row_has_room_for_its_shares() -> None:
    from reroute_kernels.triton_kernels.select import _chunking

    for n in range(4097, 300_000, 777):
        share, metadata = _chunking(n)
        assert share * metadata >= n
        assert metadata & (metadata - 1) == 0


def test_of_batches_only_that_of_one_prompt_is_a_class() -> None:
    from reroute_kernels.triton_kernels import score

    with new_device() as compiled:
        for batch in (1, 2, 3, 16, 17, 32):
            score.score_topk(*ScoreCase([9] * batch, [4] * batch, [2] * batch).inputs(CPU))
    assert sorted(c.kernel for c in compiled) == ["_score_kernel", "_score_kernel", "_select_kernel"]


def test_the_report(small: Backend) -> None:
    """Says what was compiled, what Triton had on disk and what was there: of a prefill before, or of a warm-up."""

    def warm(visual: int) -> list[tuple[str, str]]:
        report = load_kernels(small, visual, 1, lambda backend: select(backend, 8))
        assert all(kernel.seconds > 0 for kernel in report.kernels)
        return [(kernel.name, kernel.source) for kernel in report.kernels]

    names = [f"select, up to {n} candidates" for n in (16, 32, 128)]
    with new_device() as compiled:
        select(small, 20)
        assert warm(40) == list(zip(names, (NEW, OLD, NEW), strict=True))
        assert len(compiled) == 3
        assert warm(32) == [(name, OLD) for name in names[:2]]
    with new_device() as compiled:
        assert warm(16) == [(names[0], CACHED)]
        assert [c.hit for c in compiled] == [True]


def test_other_threads_are_left_out(small: Backend) -> None:
    """They launch as ever, and what they compile is not what was asked for."""

    def both(backend: Backend) -> None:
        other = Thread(target=select, args=(small, 20))
        other.start()
        other.join()
        select(backend, 8)

    with new_device() as compiled:
        report = load_kernels(small, 16, 1, both)
        assert [kernel.name for kernel in report.kernels] == ["select, up to 16 candidates"]
        assert len(compiled) == 2
        select(small, 20)
        assert len(compiled) == 2


def test_two_at_once_take_turns(small: Backend) -> None:
    from triton import knobs

    reports: dict[int, WarmUp] = {}

    def warm(most: int) -> None:
        reports[most] = load_kernels(small, most, 1, lambda backend: select(backend, 8))

    with new_device() as compiled:
        listener = knobs.compilation.listener
        threads = [Thread(target=warm, args=(most,)) for most in (16, 32)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert knobs.compilation.listener is listener
    assert {most: len(report.kernels) for most, report in reports.items()} == {16: 1, 32: 2}
    sources = [kernel.source for report in reports.values() for kernel in report.kernels]
    assert sources.count(NEW) == len(compiled) == 2


def test_a_failure_leaves_nothing_behind(small: Backend) -> None:
    def fail(backend: Backend) -> None:
        raise RuntimeError("of a model")

    with new_device() as compiled:
        with pytest.raises(RuntimeError, match="of a model"):
            load_kernels(small, 16, 1, fail)
        select(small, 8)
        assert len(compiled) == 1
        assert load_kernels(small, 16, 1, lambda backend: select(backend, 8)).kernels[0].source == OLD


def test_it_prints_as_a_table() -> None:
    kernels = (
        LoadedKernel("defer", 0.25, "compiled"),
        LoadedKernel("score, one prompt", 1.5, "compiled"),
        LoadedKernel("admit", 0.004, "from Triton's cache"),
    )
    assert str(WarmUp("triton", "tensors are on cuda", 2880, 8, kernels)).splitlines() == [
        "3 kernels for up to 2880 visual tokens and batches of up to 8, ready after 1.75 s: "
        "2 compiled, 1 from Triton's cache",
        "  defer               0.25 s  compiled",
        "  score, one prompt   1.50 s  compiled",
        "  admit               0.00 s  from Triton's cache",
    ]
    none = load_kernels(Backend.of("torch", "asked for", reference), 2880, 8, lambda backend: pytest.fail("was run"))
    assert none.kernels == ()
    assert str(none) == "nothing to compile on backend torch (asked for)"


def test_launches_of_a_warm_up_are_right(executor: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows with more room than candidates, also for shares; the prefills get their own results."""
    from reroute_kernels import ops
    from reroute_kernels.triton_kernels import select

    if executor.kind != "cuda":
        monkeypatch.setattr(select, "MAX_ONE_PROGRAM", 1024)
    torch.manual_seed(0)
    inputs = ScoreCase([40, 20], [30, 0], [9, 0]).inputs(device)
    results = []
    report = load_kernels(
        Backend.of("triton", "asked for", ops),
        1025,
        2,
        lambda backend: results.append(backend.score_topk(*inputs)),
    )
    same(results[0], ops.score_topk(*inputs))
    if executor.kind != "interpreter":  # which compiles nothing
        assert len(report.kernels) == 3

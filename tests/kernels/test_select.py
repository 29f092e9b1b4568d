"""The selection kernel against the reference: any fp32 scores, counts and row lists, on every executor."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
from cases import make_rows_long, num_compiled, same, split
from hypothesis import given
from hypothesis import strategies as st
from tensors import NEGATIVE_NAN, padded
from torch import Tensor

from reroute_kernels import SelectMetadata, SelectRows, reference

KERNEL = "select"
pytestmark = pytest.mark.usefixtures("seeded")
INF, NAN = math.inf, math.nan
SPECIAL = torch.tensor([0.0, -0.0, NAN, NEGATIVE_NAN, INF, -INF, 0.5, 1e-45, -1e-45, 3.4e38, -1.0])


def check(
    kernel: Any, scores: list[Tensor], keep: list[int], device: torch.device, *, texts: int = 3, gaps: int = 0
) -> None:
    """One launch on a ragged batch whose lists have random rows, and whose samples have rows of nobody between them."""
    counts = [len(s) for s in scores]
    parts = [split(n + texts + gaps, n, gaps=gaps) for n in counts]
    candidates, text_rows = (padded([part[i] for part in parts], device=device) for i in (0, 1))
    lengths = tuple(n + texts + gaps for n in counts)
    starts = tuple(2 + sum(lengths[:b]) + 3 * b for b in range(len(counts)))
    positions = torch.randperm(starts[-1] + lengths[-1] + 5).to(device)
    metadata = SelectMetadata(starts, lengths, tuple(counts), tuple(len(t) for _, t in parts), tuple(keep))
    given = torch.full((len(counts), max(counts)), NAN)  # never read beyond the counts
    for row, score in zip(given, scores, strict=True):
        row[: len(score)] = score
    arguments = given.to(device), SelectRows(candidates, text_rows, positions, metadata)
    same(kernel.select(*arguments), reference.select(*arguments))


def softmax_source(kernel: Any, values: Tensor) -> Any:
    """Logits ``values`` (heads, length) with statistics of any kind: what the score launch leaves."""
    heads, length = values.shape
    stride, parts = -(-length // 64) * 64, -(-length // 64)
    logits = torch.nn.functional.pad(values, (0, stride - length)).flatten()
    statistics = torch.full((parts * heads,), 4.0), torch.rand(parts * heads) + 1
    return kernel.Logits(torch.cat((logits, *statistics)).to(values), stride, heads * stride, heads, parts, 64)


def decided(kernel: Any, source: Any, length: int, candidates: slice, keep: int, device: torch.device) -> Tensor:
    """The scores of a selection from ``source``, which must be exact by them. What are not candidates are texts."""
    row, chosen = torch.arange(length, device=device)[None], torch.zeros(length, dtype=torch.bool)
    chosen[candidates] = True
    lists = row[:, chosen], row[:, ~chosen], row[0]
    n = int(chosen.sum())
    metadata = SelectMetadata((0,), (length,), (n,), (length - n,), (keep,))
    counters = torch.zeros(kernel.num_counters(1), dtype=torch.int32, device=device)
    rows = SelectRows(*lists, metadata)
    got = kernel.launch_select(source, rows, metadata.counts(device), counters)
    same(got, reference.select(got.scores, rows))
    scores: Tensor = got.scores[0]
    return scores


@pytest.fixture(params=["one program", "staged", "refined"])
def path(request: pytest.FixtureRequest, kernel: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """All ways to select, at lengths a test can afford: rows of one program, of several shares, and crowds in these."""
    if request.param != "one program":
        make_rows_long(kernel, monkeypatch, 0 if request.param == "refined" else kernel.MAX_BUCKET_KEYS)
    return str(request.param)


def scores_of(kind: str, n: int) -> Tensor:
    return {
        "normal": torch.randn(n),
        "softmax": torch.randn(n).mul(3).softmax(0),
        "special": SPECIAL[torch.randint(len(SPECIAL), (n,))],
        "equal": torch.full((n,), 0.25),
        "few": torch.randint(0, 4, (n,)) / 4,
        "one bin": 0.25 + torch.randperm(n) * 2.0**-20,
        "descending": torch.arange(n, 0, -1).float(),
        "zeros": torch.zeros(n) * torch.randn(n),  # of either sign
    }[kind]


def slow(*cases: Any) -> list[Any]:
    return [pytest.param(case, marks=pytest.mark.slow) for case in cases]


KINDS = ["special", "equal", "few", "one bin", *slow("normal", "softmax", "descending", "zeros")]


@pytest.mark.parametrize("kind", KINDS)
def test_values(kernel: Any, device: torch.device, path: str, kind: str) -> None:
    """Thresholds in the midst of equal values, whose ties lie in several tiles and shares."""
    check(kernel, [scores_of(kind, 500), scores_of(kind, 400).flip(0)], [500 // 3, 130], device)


@pytest.mark.parametrize("keep", [0, 299, *slow(1, 300)])
def test_all_none_and_the_edges(kernel: Any, device: torch.device, path: str, keep: int) -> None:
    check(kernel, [torch.randn(300), torch.randn(2)], [keep, 1], device)


def test_rows_of_very_different_length(kernel: Any, device: torch.device, path: str) -> None:
    counts = [300, 0, 3, 128, 129, 256]  # of shares too: a multiple of one, and one more
    check(kernel, [torch.randn(n) for n in counts], [100, 0, 2, 128, 1, 255], device, texts=40, gaps=2)
    check(kernel, [torch.randn(n) for n in counts], [1, 0, 3, 0, 129, 100], device, texts=1)


def test_many_texts(kernel: Any, device: torch.device, path: str) -> None:
    check(kernel, [torch.randn(140), torch.randn(9)], [50, 3], device, texts=1100)


@given(st.data())
def test_any_ragged_batch(kernel: Any, device: torch.device, data: Any) -> None:
    counts = data.draw(st.lists(st.integers(0, 70), min_size=1, max_size=3))
    keep = [data.draw(st.integers(0, n)) for n in counts]
    torch.manual_seed(data.draw(st.integers(0, 99)))
    kind = data.draw(st.sampled_from(["normal", "special", "few"]))
    texts, gaps = data.draw(st.integers(1, 40)), data.draw(st.integers(0, 5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "BLOCK_N", 16)
        patch.setattr(kernel, "CHUNK", 16)
        patch.setattr(kernel, "MAX_ONE_PROGRAM", data.draw(st.sampled_from([0, 4096])))
        patch.setattr(kernel, "MAX_BUCKET_KEYS", data.draw(st.sampled_from([0, 8, 4096])))
        check(kernel, [scores_of(kind, n) for n in counts], keep, device, texts=texts, gaps=gaps)


def test_a_row_that_needs_no_patching_to_be_long(kernel: Any, device: torch.device) -> None:
    n = kernel.MAX_ONE_PROGRAM + 1
    check(kernel, [torch.randn(n), torch.randn(70)], [n // 4, 30], device)


def test_many_rivals_of_a_short_row(kernel: Any, device: torch.device) -> None:
    """More than one program looks at together."""
    check(kernel, [scores_of("one bin", 1100)], [600], device)


def test_a_crowd_costs_one_stage_more_not_a_pass_over_it(
    kernel: Any, device: torch.device, launches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All scores in one coarse bin: hardly more instructions than if they are spread, where all look at few rivals."""
    monkeypatch.setattr(kernel, "MAX_ONE_PROGRAM", 0)
    monkeypatch.setattr(kernel, "CHUNK", 1024)
    n = 3000  # of three shares, where notes are read of four
    for crowd in (n // 2, n):
        monkeypatch.setattr(kernel, "MAX_BUCKET_KEYS", crowd)
        check(kernel, [torch.rand(n) + 1], [n // 4], device)
    check(kernel, [torch.randn(n).mul(6).exp2()], [n // 4], device)
    refined, passes, spread = (report.warp_instructions for report in launches)
    assert refined < 1.2 * spread < passes


def test_texts_beyond_everything_and_no_texts(kernel: Any, device: torch.device) -> None:
    """Texts may lie beyond the rows the query sees, also where the last candidate is the row of their number; or there
    are none.
    """
    candidates = padded([range(3, 7), range(3)], device=device)
    texts = padded([[0, 7, 900], []], device=device)
    scores = torch.tensor([[1.0, 3.0, 2.0, 0.0], [1.0, 1.0, 1.0, 5.0]], device=device)
    metadata = SelectMetadata((0, 901), (7, 3), (4, 3), (3, 0), (2, 2))
    arguments = scores, SelectRows(candidates, texts, torch.arange(905, device=device), metadata)
    same(kernel.select(*arguments), reference.select(*arguments))


def test_larger_and_smaller_decisions_in_turn(kernel: Any, device: torch.device, path: str) -> None:
    """What an earlier one left in memory does not matter."""
    for n in (300, 40, 260):
        check(kernel, [torch.rand(n)], [n // 2], device)


@pytest.mark.parametrize("resident", [3, *slow(1, 40)])
def test_any_number_of_programs_may_be_resident(
    executor: Any, kernel: Any, device: torch.device, path: str, resident: int
) -> None:
    """Nobody waits for a program that has not started, and no schedule changes a bit."""
    if executor.kind != "simt":
        pytest.skip("only simt chooses the schedule")
    import simt

    with simt.installed(arch=int(executor.name.partition(":")[2]), seeds=(2, 3, 4), max_resident=resident):
        check(kernel, [scores_of("few", 300), scores_of("normal", 150)], [90, 20], device)


HAND_OVERS = [
    # the path that needs it, who hands over, how, and the order in the PTX that is weakened to another
    ("one program", "select._select_kernel", "arrive(state.scored_ptr)", "acq_rel", "acquire"),
    ("one program", "select._select_kernel", "arrive(state.scored_ptr)", "acq_rel", "release"),
    ("staged", "select._select_kernel", "arrive(state.scored_ptr)", "acq_rel", "acquire"),
    ("staged", "select._select_kernel", "wait(state.scored_ptr, num_scoring)", "acquire", "relaxed"),
    ("staged", "topk.chunks.collect_chunk", "arrive(state.collected_ptr)", "acq_rel", "acquire"),
    ("staged", "topk.chunks.emit_chunk", "wait(state.collected_ptr, num_chunks)", "acquire", "relaxed"),
    ("refined", "topk.chunks.refine_chunk", "wait(state.collected_ptr, num_chunks)", "acquire", "relaxed"),
    ("refined", "topk.chunks.refine_chunk", "arrive(state.refined_ptr)", "acq_rel", "acquire"),
    ("refined", "topk.chunks.find_pivot", "wait(state.refined_ptr, num_chunks)", "acquire", "relaxed"),
]


def with_callers(ptx: str) -> Iterator[tuple[str, str]]:
    """Every line, and the place that calls the function which it is of, as in ``select.py:187``."""
    files, caller = dict(re.findall(r'\.file\s+(\d+) ".*?([^/"]+)"', ptx)), ""
    for line in ptx.splitlines():
        if ".loc" in line:
            if comment := re.search(r"@\[ (\S+?:\d+):", line):
                caller = comment[1]
            elif operand := re.search(r"inlined_at (\d+) (\d+) ", line):  # Triton 3.9
                caller = f"{files[operand[1]]}:{operand[2]}"
            else:
                caller = ""
        yield line, caller


@pytest.mark.parametrize(("path", "function", "call", "order", "weaker"), HAND_OVERS, indirect=["path"])
def test_every_order_is_needed(
    executor: Any, kernel: Any, device: torch.device, path: str, function: str, call: str, order: str, weaker: str
) -> None:
    """The checks would notice: where one hand-over lacks its half of an order, what it hands over is a race."""
    if executor.kind != "simt":
        pytest.skip("only simt looks for races")
    import simt

    module, _, name = function.rpartition(".")
    source, first = inspect.getsourcelines(getattr(import_module(f"{kernel.__package__}.{module}"), name).fn)
    (at,) = (f"{module.rpartition('.')[2]}.py:{first + i}" for i, line in enumerate(source) if call in line)
    weakened: list[str] = []

    def transform(ptx: str) -> str:
        lines = [
            line.replace(f".{order}.", f".{weaker}.") if caller == at else line for line, caller in with_callers(ptx)
        ]
        weakened.extend(line for line in lines if line not in ptx)
        return "\n".join(lines)

    with (
        simt.installed(arch=int(executor.name.partition(":")[2]), seed=5, transform=transform),
        pytest.raises(simt.DataRace),
    ):
        check(kernel, [torch.randn(300)], [90], device)
    assert len(weakened) == 1


@pytest.mark.parametrize(("seed", "resident"), [(0, {}), (1, {}), (9, {"max_resident": 6}), (10, {"max_resident": 7})])
def test_another_order_of_programs(
    executor: Any, kernel: Any, device: torch.device, path: str, seed: int, resident: dict[str, int]
) -> None:
    """Which program is the last to arrive differs; nothing may be read before it has."""
    if executor.kind != "simt":
        pytest.skip("only simt chooses the order of programs, and looks for races")
    import simt

    with simt.installed(arch=int(executor.name.partition(":")[2]), seed=seed, **resident):
        check(kernel, [torch.randn(300)], [90], device)


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_a_crowd_at_its_limit(kernel: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch, more: int) -> None:
    """Who counts fine bins and who reads them agree on what a crowd is."""
    make_rows_long(kernel, monkeypatch, crowd=150)
    check(kernel, [scores_of("one bin", 150 + more)], [60], device)


def test_few_programs_score_many_tiles_each(
    kernel: Any, device: torch.device, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of long rows, and of large batches, do on a GPU. Scores do not depend on it. The first tile is 5
    candidates shorter, hence there is one more.
    """
    source = softmax_source(kernel, torch.randn(3, 140).to(device))
    monkeypatch.setattr(kernel, "BLOCK_N", 16)
    wanted = decided(kernel, source, 140, slice(5, 133), 50, device)
    monkeypatch.setattr(kernel, "num_sms", lambda _: 4)
    assert torch.equal(decided(kernel, source, 140, slice(5, 133), 50, device), wanted)
    check(kernel, [torch.randn(n) for n in (140, 65)], [100, 13], device, texts=9, gaps=2)


@pytest.mark.parametrize("kind", ["spread", "nearly equal", "tiny", "one bin", "broken"])
def test_scores_of_a_softmax(kernel: Any, device: torch.device, path: str, kind: str) -> None:
    """Their bins are finer than those of any scores; the outermost ones hold everything beyond 2 and below 2^-31."""
    values = torch.randn(3, 530)
    values = {"nearly equal": values * 1e-4, "tiny": values * 8 - 40}.get(kind, values * 3)
    if kind == "one bin":  # whose fine bins differ in each of their bits
        values[:, 20:520] = ((1 + (3.02 + torch.rand(500) * 0.96) / 16) * 2**-10).log()
        values[:, :20] = values[:, 520:] = math.log(0.4 / 30)
    if kind == "broken":
        values[0, 30:90], values[:, 200:300] = NAN, -INF
    scores = decided(kernel, softmax_source(kernel, values.to(device)), 530, slice(20, 520), 170, device)
    assert scores.isnan().any() == (kind == "broken")


def test_a_crowd_in_the_outermost_bin(kernel: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is wide: fine bins repeat in it, even where keys differ by one step of the others."""
    make_rows_long(kernel, monkeypatch, crowd=0)
    scores = (1 + torch.rand(1, 130) / 8) * 2.0**-40
    source = kernel.Logits(torch.cat((scores.log2()[0], torch.tensor([0.0, 1.0]))).to(device), 130, 130, 1, 1, 130)
    got = decided(kernel, source, 130, slice(128), 50, device)
    torch.testing.assert_close(got.cpu(), scores[0, :128], rtol=1e-4, atol=0)


def test_statistics_of_many_parts(kernel: Any, device: torch.device) -> None:
    """More than one step of their merge takes, with maxima that grow; and where the first step has none at all. Longer
    samples have several blocks in each part.
    """
    heads = 512
    for length, most in ((41, 41), (41, 30)):
        logits = torch.randn(heads, length) + torch.arange(length) / 3
        logits[: heads // 2, :12] = -INF
        block_of, parts = torch.arange(length) // -(-length // most), -(-length // -(-length // most))
        own = torch.stack([logits.masked_fill(block_of != part, -INF) for part in range(most)])  # (part, head, row)
        peaks = own.amax(-1)
        sums = (own - peaks.where(peaks > -INF, 0)[..., None]).exp2().sum(-1)
        peaks[parts:], sums[parts:] = NAN, NAN  # nobody writes there
        source = kernel.Logits(
            torch.cat((logits.flatten(), peaks.flatten(), sums.flatten())).to(device),
            length,
            heads * length,
            heads,
            most,
            1,
        )
        got = decided(kernel, source, length, slice(5, 40), 12, device)
        wanted = (logits * math.log(2)).double().softmax(-1).mean(0)[5:40].float()
        torch.testing.assert_close(got.cpu(), wanted, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("n", "first"), [(2304, 0), (2304, 35), (4100, 35)])  # one program selects; shares do
def test_sectors(kernel: Any, device: torch.device, launches: list[Any], n: int, first: int) -> None:
    """Nearly every sector is used in full, wherever the picture begins; every logit is read once."""
    heads, length = 28, n + 64
    logits = softmax_source(kernel, torch.randn(heads, length))
    decided(kernel, logits, length, slice(first, first + n), n // 4, device)
    (report,) = launches
    load, store = report.global_load, report.global_store
    programs = -(-(n + first % 8) // kernel.BLOCK_N)
    assert (
        report.tensors["source_ptr"].load_bytes == 4 * heads * n + programs * 8 * heads * logits.num_splits
    )  # with the statistics
    assert load.efficiency >= 0.975
    assert store.efficiency >= (0.82 if first else 0.91)
    assert load.min_sectors + store.min_sectors >= 0.96 * (load.sectors + store.sectors)


def test_another_prompt_compiles_nothing_anew(executor: Any, kernel: Any, device: torch.device, path: str) -> None:
    """Neither its sizes nor those of its batch are what a kernel is compiled for, nor whether 16 divides them."""
    compiled = partial(num_compiled, executor, kernel._select_kernel)
    check(kernel, [torch.randn(130)], [40], device)
    before = compiled()
    for counts, keep, texts in (([160, 144], [32, 16], 16), ([129], [1], 1), ([131, 2, 0, 7], [0, 1, 0, 7], 4)):
        check(kernel, [torch.randn(n) for n in counts], keep, device, texts=texts)
    assert compiled() == before


def test_a_row_that_cannot_be_counted_is_refused(kernel: Any, device: torch.device) -> None:
    wide = torch.empty(1, 1, device=device).expand(1, 2**22 + 1)
    long = wide.long()
    rows = SelectRows(long, long, long[0], SelectMetadata((0,), (9,), (9,), (0,), (1,)))
    with pytest.raises(ValueError, match="4194305 candidates in a row"):
        kernel.select(wide, rows)


def test_other_dtypes_and_strides(kernel: Any, device: torch.device) -> None:
    scores = torch.randn(2, 2, 50).bfloat16().to(device)[:, 1]
    rows = torch.arange(50, device=device).expand(2, 50)
    texts = torch.empty(2, 0, dtype=torch.int64, device=device)
    metadata = SelectMetadata((0, 50), (50, 50), (50, 50), (0, 0), (20, 10))
    lists = SelectRows(rows, texts, torch.arange(200, device=device)[::2], metadata)
    wanted = reference.select(scores, lists)
    same(kernel.select(scores, lists), wanted)
    transposed = lists._replace(candidates=rows.t().contiguous().t())
    same(kernel.select(scores.t().contiguous().t(), transposed), wanted)


def test_counts_that_are_on_the_device_are_not_uploaded(kernel: Any, device: torch.device) -> None:
    columns = ((0,), (9,), (5,), (4,), (2,))
    there = torch.tensor(columns, device=device)
    metadata = SelectMetadata(*columns, on_device=there)
    assert metadata.counts(device) is there
    assert metadata == SelectMetadata(*columns)
    scores, row = torch.randn(1, 5, device=device), torch.arange(9, device=device)[None]
    arguments = scores, SelectRows(row[:, :5], row[:, 5:], row[0], metadata)
    wanted = reference.select(*arguments)
    same(kernel.select(*arguments), wanted)
    there[4] = 0  # the kernel keeps what it reads there
    assert not torch.equal(kernel.select(*arguments).kept, wanted.kept)

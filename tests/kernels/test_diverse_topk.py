"""Diverse selection by the kernels, on every executor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from cases import exact, gibibytes, num_compiled, same, split
from diversity import check_picks, rows_of_exact_cosines
from hypothesis import given
from hypothesis import strategies as st
from tensors import padded
from torch import Tensor

from reroute_kernels import Selection, SelectMetadata, SelectRows, reference
from reroute_kernels.ranking import picks_per_round

KERNEL = "diverse"
pytestmark = pytest.mark.usefixtures("seeded")
INF, NAN = math.inf, math.nan
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class DiverseInputs(NamedTuple):
    """Arguments of ``diverse_topk``."""

    states: Tensor
    rows: SelectRows

    def of(self, b: int) -> Tensor:
        """The candidates' states of one sample."""
        candidates, metadata = self.rows.candidates, self.rows.metadata
        return self.states[metadata.starts[b] + candidates[b, : metadata.num_candidates[b]]]


@dataclass(frozen=True)
class DiverseCase:
    """One decision of a ragged batch. What is no candidate's state holds ``poison``."""

    num_candidates: Sequence[int]
    k: Sequence[int]
    features: int = 32
    dtype: torch.dtype = FP32
    exact: bool = True  # cosines without rounding, hence many ties; else of any rows at acute angles
    texts: int = 3
    gaps: int = 2
    poison: float = NAN

    def inputs(self, device: torch.device) -> DiverseInputs:
        """New values."""
        counts = self.num_candidates
        parts = [split(n + self.texts + self.gaps, n, gaps=self.gaps) for n in counts]
        candidates, texts = (padded([part[i] for part in parts], device=device) for i in (0, 1))
        lengths = [n + self.texts + self.gaps for n in counts]
        starts = [2 + sum(lengths[:b]) + 3 * b for b in range(len(counts))]
        states = torch.full((starts[-1] + lengths[-1] + 5, self.features), self.poison)
        for start, n, (rows, _) in zip(starts, counts, parts, strict=True):
            any_rows = torch.randn(n, self.features) + 2
            states[start + rows] = rows_of_exact_cosines(n, self.features) if self.exact else any_rows
        positions = torch.randperm(len(states)).to(device)
        metadata = SelectMetadata(*map(tuple, (starts, lengths, counts, [len(t) for _, t in parts], self.k)))
        return DiverseInputs(states.to(self.dtype).to(device), SelectRows(candidates, texts, positions, metadata))


def check(kernel: Any, inputs: DiverseInputs) -> Selection:
    """Of exact cosines: the reference's selection and scores, to the bit."""
    got: Selection = kernel.diverse_topk(*inputs)
    same(got, reference.diverse_topk(*inputs))
    return got


DTYPES = pytest.mark.parametrize("dtype", [FP32, BF16, pytest.param(FP16, marks=pytest.mark.slow)])


@DTYPES
def test_exactly(kernel: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Ragged: nothing, one, all and none kept; one pick a round, and several."""
    counts, k = [70, 0, 1, 33, 60, 9], [40, 0, 1, 0, 20, 9]
    check(kernel, DiverseCase(counts, k, dtype=dtype).inputs(device))


@DTYPES
def test_any_cosines(kernel: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Where similarities are rounded, picks are right up to their rounding."""
    inputs = DiverseCase([80, 30], [24, 4], features=96, dtype=dtype, exact=False).inputs(device)
    got = kernel.diverse_topk(*inputs)
    exact(inputs.rows, got)
    for b, (n, k) in enumerate(((80, 24), (30, 4))):
        check_picks(inputs.of(b), k, got.scores[b, :n], tolerance=2e-6)


@given(st.data())
def test_any_ragged_batch(kernel: Any, device: torch.device, data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=2))
    k = [data.draw(st.integers(0, n)) for n in counts]
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    case = DiverseCase(
        counts,
        k,
        *data.draw(st.sampled_from([(32, FP32), (200, BF16)])),
        texts=data.draw(st.integers(1, 5)),
        gaps=data.draw(st.integers(0, 3)),
    )
    check(kernel, case.inputs(device))


def test_k_of_zero(kernel: Any, device: torch.device, launches: list[Any]) -> None:
    """Launches a selection only."""
    check(kernel, DiverseCase([20, 0], [0, 0]).inputs(device))
    assert [report.kernel for report in launches] == ["_select_kernel"]


def test_more_picks_than_a_tile_of_them(kernel: Any, device: torch.device) -> None:
    """Nine of them in a round, of blocks of four."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "tiling", lambda *_: kernel.Tiling(4, 4, 32, 16, 1))
        check(kernel, DiverseCase([80], [72]).inputs(device))


def test_long_rows(kernel: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several chunks of the picking program, and of several rows for each part of the sum."""
    monkeypatch.setattr(kernel, "PICK_CHUNKS", (512, 512))
    monkeypatch.setattr(kernel, "MAX_SPLITS", 16)
    check(kernel, DiverseCase([560], [480], dtype=BF16).inputs(device))  # ties go on in the second chunk
    inputs = DiverseCase([1030], [40], dtype=BF16, exact=False).inputs(device)
    got = kernel.diverse_topk(*inputs)
    exact(inputs.rows, got)
    check_picks(inputs.of(0), 40, got.scores[0], tolerance=2e-6)


def test_the_first_pick(kernel: Any, device: torch.device) -> None:
    """Of many samples, with rows of zeros in most of them."""
    counts = [*range(1, 33)]
    check(kernel, DiverseCase(counts, [1] * len(counts), features=16).inputs(device))


def test_a_row_equals_the_sample_alone(kernel: Any, device: torch.device) -> None:
    """Bit for bit, whoever else is in the batch."""
    counts, k = [70, 130, 33], [3, 16, 2]
    inputs = DiverseCase(counts, k, features=96, dtype=BF16, exact=False).inputs(device)
    together = kernel.diverse_topk(*inputs)
    candidates, texts, positions, metadata = inputs.rows
    for b, n in enumerate(counts):
        m = metadata.num_texts[b]
        single = SelectMetadata(*(column[b : b + 1] for column in metadata.as_tuple()))
        rows = SelectRows(candidates[b : b + 1, :n].clone(), texts[b : b + 1, :m].clone(), positions, single)
        alone = kernel.diverse_topk(inputs.states, rows)
        assert torch.equal(alone.scores[0].view(torch.int32), together.scores[b, :n].view(torch.int32))
        assert torch.equal(alone.kept[0], together.kept[b, : k[b]])


@pytest.mark.parametrize(
    ("dtype", "value"), [(FP32, 1e30), (BF16, NAN), pytest.param(BF16, INF, marks=pytest.mark.slow)]
)
def test_a_broken_row_shows_and_corrupts_nothing(
    kernel: Any, device: torch.device, dtype: torch.dtype, value: float
) -> None:
    inputs = DiverseCase([70, 20], [16, 3], dtype=dtype).inputs(device)
    clean = kernel.diverse_topk(*inputs)
    inputs.states[inputs.rows.metadata.starts[0] + inputs.rows.candidates[0, 50], 7] = value
    got, wanted = kernel.diverse_topk(*inputs), reference.diverse_topk(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(got[:4], wanted[:4], strict=True))
    assert got.scores[0, :70].isnan().all()
    assert got.kept[0].tolist() == [*range(16)]
    assert torch.equal(got.scores[1], clean.scores[1])


def test_equal_rows_and_rows_of_zeros(kernel: Any, device: torch.device) -> None:
    inputs = DiverseCase([40, 40], [16, 16], features=16, poison=0.0).inputs(device)
    inputs.states[:50] = 0
    inputs.states[50:] = 0.5
    check(kernel, inputs)


def test_odd_widths_addresses_and_strides(kernel: Any, device: torch.device) -> None:
    check(kernel, DiverseCase([9], [3], 17, BF16).inputs(device))
    inputs = DiverseCase([40, 9], [4, 3], 130, BF16).inputs(device)
    states, (candidates, texts, positions, metadata) = inputs
    shifted = torch.cat((states.new_zeros(1), states.flatten()))[1:].view(states.shape)
    for other in (torch.cat((states, states[:, :1]), 1)[:, :-1], shifted, states.t().contiguous().t()):
        check(kernel, inputs._replace(states=other))
    transposed = SelectRows(candidates.t().contiguous().t(), texts, positions, metadata)
    check(kernel, inputs._replace(rows=transposed))


def test_rows_that_are_gibibytes_apart(executor: Any, kernel: Any, device: torch.device) -> None:
    """No offset is counted in 32 bits."""
    inputs = DiverseCase([20, 9], [5, 4], dtype=BF16).inputs(device)
    near = inputs.states
    stride = -(-(2**31) // inputs.rows.metadata.starts[1])  # all of the second sample is beyond
    far = gibibytes(executor, stride * len(near), BF16).as_strided(near.shape, (stride, 1)).copy_(near)
    same(kernel.diverse_topk(far, inputs.rows), kernel.diverse_topk(*inputs))


@pytest.mark.parametrize("resident", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_any_number_of_programs_may_be_resident(
    executor: Any, kernel: Any, device: torch.device, resident: int
) -> None:
    """And no schedule changes a bit."""
    if executor.kind != "simt":
        pytest.skip("only simt chooses the schedule")
    import simt

    with simt.installed(arch=int(executor.name.partition(":")[2]), seeds=(2, 3, 4), max_resident=resident):
        check(kernel, DiverseCase([130, 40], [4, 3], dtype=BF16).inputs(device))


def test_launches_and_the_least_bytes(kernel: Any, device: torch.device, launches: list[Any]) -> None:
    """Each pass reads each state once; beside that a round reads its picks once for each tile of candidates."""
    n, k, features = 128, 16, 1024
    inputs = DiverseCase([n], [k], features, BF16, exact=False).inputs(device)
    exact(inputs.rows, kernel.diverse_topk(*inputs))
    names = (
        "_diverse_norm_kernel",
        "_diverse_sum_kernel",
        "_diverse_first_kernel",
        *("_diverse_round_kernel",) * 8,
        "_select_kernel",
    )
    assert tuple(report.kernel for report in launches) == names
    norm, _, first_pick, *rounds, _ = launches
    row = 2 * features
    for report in (norm, first_pick):
        assert report.tensors["states_ptr"].load_bytes == n * row
        assert report.bytes_moved <= 1.35 * report.minimal_bytes  # parts of the sum, of 16 rows each
    for report, picks in zip(rounds, picks_per_round(k), strict=False):
        assert report.tensors["states_ptr"].load_bytes == (n + n // 64 * picks) * row
        assert report.bytes_moved <= 1.1 * report.minimal_bytes


def test_another_prompt_compiles_nothing_anew(executor: Any, kernel: Any, device: torch.device) -> None:
    """Neither its sizes, k and batch are what a kernel is compiled for, nor where the index lists begin."""
    names = "_diverse_norm_kernel", "_diverse_sum_kernel", "_diverse_first_kernel", "_diverse_round_kernel"
    compiled = partial(num_compiled, executor, *(getattr(kernel, name) for name in names))
    inputs = DiverseCase([40, 33], [4, 3]).inputs(device)
    wanted, before = check(kernel, inputs), compiled()
    assert before
    for counts, k in (([64, 48], [16, 2]), ([33], [2]), ([1], [1]), ([35, 2, 0, 7], [3, 1, 0, 3])):
        check(kernel, DiverseCase(counts, k).inputs(device))
    candidates, texts, positions, metadata = inputs.rows
    given = candidates, torch.tensor(metadata.as_tuple(), device=device)
    for moved in range(2):
        lists = list(given)
        lists[moved] = torch.cat((lists[moved].new_zeros(1), lists[moved].flatten()))[1:].view(lists[moved].shape)
        rows = SelectRows(lists[0], texts, positions, replace(metadata, on_device=lists[1]))
        same(kernel.diverse_topk(inputs.states, rows), wanted)
    assert compiled() == before


def test_what_cannot_be_is_refused(kernel: Any, device: torch.device) -> None:
    inputs = DiverseCase([9], [2]).inputs(device)
    with pytest.raises(ValueError, match=r"states of torch.bfloat16, .* not of torch.float64: convert"):
        kernel.diverse_topk(inputs.states.double(), inputs.rows)
    long = torch.empty(1, 1, dtype=torch.int64, device=device).expand(1, 2**22 + 1)
    rows = SelectRows(long, long, long[0], SelectMetadata((0,), (9,), (9,), (0,), (1,)))
    with pytest.raises(ValueError, match="4194305 candidates in a row"):
        kernel.diverse_topk(inputs.states, rows)

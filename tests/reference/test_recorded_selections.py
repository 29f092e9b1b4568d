"""Operations within capacities: one list of PyTorch operations, baked numbers included, serves any prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tape import Tape
from tensors import padded

from reroute_kernels import AttentionSpec, RopeTables, Selection, SelectMetadata, SelectRows
from reroute_kernels.reference import diverse_topk, score_topk

WIDTH, NUM_ROWS, LENGTH = 12, 40, 13
STARTS = (0, 20)
# Candidates and text rows of two samples, how many rows their queries see, and how many candidates stay.
PROMPTS: tuple[tuple[Any, ...], ...] = (
    (([2, 3, 4, 5, 8, 9], []), ([0, 1, 6, 7, 10, 11], [0, 1, 2]), (12, 3), (3, 0)),
    (([1, 2, 3], [0, 1, 4, 5]), ([0, 4, 5], [2, 3, 6, 7, 8]), (6, 8), (3, 1)),
)


class Inputs:
    """Tensors of a prompt; ``become`` another one in the same memory."""

    def __init__(self) -> None:
        self.query, self.keys = torch.empty(2, 4, 8), torch.empty(NUM_ROWS, 2, 8)
        self.cos, self.sin = torch.empty(NUM_ROWS, 8), torch.empty(NUM_ROWS, 8)
        self.query_rows = torch.zeros(2, dtype=torch.int64)
        self.candidates, self.text_rows = (torch.empty(2, WIDTH, dtype=torch.int64) for _ in range(2))
        self.positions, self.counts = torch.arange(NUM_ROWS) * 3, torch.zeros(5, 2, dtype=torch.int64)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All of them."""
        return list(vars(self).values())

    def become(self, number: int) -> SelectMetadata:
        """Prompt ``number``; and what the host knows of it if it counts itself."""
        candidates, texts, kv_lens, k = PROMPTS[number]
        torch.manual_seed(number)
        self.keys.fill_(torch.nan)  # what no query sees
        for start, length in zip(STARTS, kv_lens, strict=True):
            self.keys[start : start + length] = torch.randn(length, 2, 8)
        self.query.normal_()
        angles = torch.randn(NUM_ROWS, 4).repeat(1, 2)
        self.cos.copy_(angles.cos())
        self.sin.copy_(angles.sin())
        self.query_rows.copy_(torch.tensor([start + length - 1 for start, length in zip(STARTS, kv_lens, strict=True)]))
        self.candidates.copy_(padded(candidates, width=WIDTH))
        self.text_rows.copy_(padded(texts, width=WIDTH))
        exact = SelectMetadata(STARTS, kv_lens, tuple(map(len, candidates)), tuple(map(len, texts)), k)
        self.counts.copy_(torch.tensor(exact.as_tuple()))
        return exact

    def select(self, metadata: SelectMetadata) -> Selection:
        """Rank and select."""
        rows = SelectRows(self.candidates, self.text_rows, self.positions, metadata)
        tables = RopeTables(self.cos, self.sin, self.query_rows)
        return score_topk(self.query, self.keys, tables, rows, AttentionSpec(0.5))

    def within_capacities(self) -> SelectMetadata:
        """Of both prompts."""
        most = STARTS, (16, 16), (WIDTH, WIDTH), (WIDTH, WIDTH), (8, 8)
        return SelectMetadata(*most, on_device=self.counts, static_length=LENGTH)


def test_a_recorded_selection_serves_another_prompt() -> None:
    """And is what exact counts select, scores within rounding, where nothing of rows that are not seen gets in."""
    inputs, tapes = Inputs(), (Tape(), Tape())
    recorded = []
    for number, tape in enumerate(tapes):
        inputs.become(number)
        with tape:
            recorded.append(inputs.select(inputs.within_capacities()))
        assert all(any(t is own for own in inputs.tensors) for t in tape.external if t.numel())
    assert tapes[0].signature == tapes[1].signature
    for number in (0, 1, 0):
        exact = inputs.select(inputs.become(number))
        tapes[0].replay(recorded[0])
        got = recorded[0]
        assert torch.allclose(got.scores[:, :WIDTH], exact.scores, atol=1e-6)
        for b, (n, k) in enumerate(zip(inputs.counts[3].tolist(), inputs.counts[4].tolist(), strict=True)):
            active = exact.active_rows[b][exact.active_rows[b] >= 0].tolist()
            assert got.kept[b].tolist() == exact.kept[b, :k].tolist() + [-1] * (8 - k)
            assert len(active) == n + k
            assert got.active_rows[b].tolist() == active + [-1] * (LENGTH - len(active))
            places = {row: b * LENGTH + j for j, row in enumerate(active)}
            assert got.inverse_index[20 * b : 20 * b + 20].tolist() == [
                places.get(row, -1) for row in range(20 * b, 20 * b + 20)
            ]


def test_exact_counts_are_baked_in() -> None:
    """What the tape is for: the host's counts of one prompt are not those of the other."""
    inputs, signatures = Inputs(), []
    for number in (0, 1):
        exact = inputs.become(number)
        with Tape() as tape:
            inputs.select(exact)
        signatures.append(tape.signature)
    assert signatures[0] != signatures[1]


def test_a_diverse_selection_is_refused() -> None:
    inputs = Inputs()
    inputs.become(0)
    rows = SelectRows(inputs.candidates, inputs.text_rows, inputs.positions, inputs.within_capacities())
    with pytest.raises(ValueError, match="diverse selection by counts on the host"):
        diverse_topk(torch.randn(NUM_ROWS, 4), rows)

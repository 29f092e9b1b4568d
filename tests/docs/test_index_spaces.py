"""The example of docs/concepts/index-spaces.md is what the code computes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from reroute import Schedule
from reroute.core.plan import make_plan
from reroute_kernels import PagedPool, SelectMetadata, SelectRows, resolve

PAGE = Path(__file__).parents[2] / "docs" / "concepts" / "index-spaces.md"
KINDS = ("padding", "text", "visual")
IDS = np.array([[1, 2, 2, 2, 2, 1, 1], [0, 0, 1, 2, 2, 1, 1]])  # numbers of kinds
SCORES = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.2, 0.1, 0, 0]])
PAGE_SIZE = 4


def padded(lists: Sequence[Sequence[int]]) -> torch.Tensor:
    longest = max(map(len, lists))
    return torch.tensor([[*rows, *[-1] * (longest - len(rows))] for rows in lists])


def test_the_table_is_what_the_code_computes() -> None:
    plan = make_plan(IDS, IDS > 0, (2,), Schedule((1,), (0.5,)), "route")
    assert plan is not None
    pool = PagedPool(8, torch.float32, "cpu", page_size=PAGE_SIZE)
    pool.lease([24]).release()  # six pages in one piece
    first, _one, second, _four = (pool.lease([rows]) for rows in (4, 4, 8, 4))
    first.release()
    second.release()  # pages 1 and 4 stay taken
    lease = pool.lease(plan.lengths)
    table = lease.table.tolist()
    assert (table, lease.starts) == ([0, 2, 3, 5], (0, 8))

    candidates = [rows.tolist() for rows in plan.visual]
    texts = [[row for row in range(n) if row not in c] for n, c in zip(plan.lengths, candidates, strict=True)]
    counts = lease.starts, plan.lengths, tuple(map(len, candidates)), tuple(map(len, texts)), plan.decisions[0].k
    lists = padded(candidates), padded(texts), torch.arange(lease.num_rows)
    select = resolve("torch", torch.device("cpu")).select
    kept, active_rows, _, inverse_index, _ = select(SCORES, SelectRows(*lists, SelectMetadata(*counts)))
    assert kept.tolist() == [[1, 3], [0, -1]]
    assert active_rows.tolist() == [[0, 2, 4, 5, 6], [-1, 8, 9, 11, 12]]

    lines = []
    for b, position in np.ndindex(*IDS.shape):
        numbers = [-1] * 5
        if (sample_row := int(plan.order[b, position])) >= 0:
            pool_row = lease.starts[b] + sample_row
            slot = table[pool_row // PAGE_SIZE] * PAGE_SIZE + pool_row % PAGE_SIZE
            visual_index = candidates[b].index(sample_row) if sample_row in candidates[b] else -1
            numbers = [sample_row, pool_row, slot, visual_index, int(inverse_index[pool_row])]
        lines.append(f"| {' | '.join(map(str, (b, KINDS[IDS[b, position]], position, *numbers)))} |")
    assert re.findall(r"^\| [01] \| .*$", PAGE.read_text(), flags=re.MULTILINE) == lines

"""The index tensors of a plan on one device: everything a prefill needs to know of its prompt, in one upload."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch

from reroute_kernels import SelectMetadata
from reroute_kernels.streams import Mark, mark, queue_behind, stream_of
from reroute_kernels.upload import upload

if TYPE_CHECKING:
    from .plan import Ints, Plan

__all__ = ["PlanTensors"]


@dataclass(frozen=True)
class PlanTensors:
    """The plan's index tensors on one device, for one placement of the samples in the pool (R pool rows).

    - ``metadata``: of each decision, its counts.
    - ``uploaded``: the upload in the queue of its CUDA stream. Another stream has to ``join`` before it reads.
    - ``starts`` (B,): first pool row of each sample.
    - ``queries`` (stages, B): row of each sample's query among the rows that are scored for that stage.
    - ``dropped`` (stages, B): how many of each sample's rows do not run in that stage.
    - ``rows`` (B, L): pool row of each logical position, -1 for padding.
    - ``tokens`` (R,): flat logical index ``b * L + position`` of each pool row (page tails point at 0).
    - ``inverse_index`` (R,): the same, and -1 for page tails.
    - ``positions`` (R,): logical position of each pool row.
    - ``candidates`` (B, N), ``text_rows`` (B, M): sample rows, ascending, padded with -1.
    - ``visual_indices`` (1, N): 0, 1, 2, …
    """

    metadata: tuple[SelectMetadata, ...]
    uploaded: Mark | None
    starts: torch.Tensor
    queries: torch.Tensor
    dropped: torch.Tensor
    rows: torch.Tensor
    tokens: torch.Tensor
    inverse_index: torch.Tensor
    positions: torch.Tensor
    candidates: torch.Tensor
    text_rows: torch.Tensor
    visual_indices: torch.Tensor

    @classmethod
    def of(cls, plan: Plan, starts: Sequence[int], num_rows: int, device: torch.device) -> PlanTensors:
        """Upload those of ``plan`` for samples that start at pool rows ``starts``, of ``num_rows``."""
        order = plan.order
        rows = np.where(order >= 0, order + np.array(starts, dtype=np.int64)[:, None], -1)
        flat = rows.ravel()
        inverse_index = np.full(num_rows, -1, dtype=np.int64)
        used = np.flatnonzero(flat >= 0)
        inverse_index[flat[used]] = used
        tokens = np.maximum(inverse_index, 0)
        candidates, text_rows = _padded(plan.visual), _padded(plan.text_rows)
        counts = [plan.counts(decision, starts) for decision in plan.decisions]
        queries = [[start + n - 1 for start, n in zip(begin, kv_lens, strict=True)] for begin, kv_lens, *_ in counts]
        active = [plan.active(decision.stage) for decision in plan.decisions]
        dropped = [[all_rows - n for all_rows, n in zip(plan.lengths, some, strict=True)] for some in active]
        visual_indices = np.arange(candidates.shape[1], dtype=np.int64)[None]
        tables = (rows, tokens, inverse_index, tokens % plan.length, candidates, text_rows, visual_indices)
        counts_of_samples = np.array([*chain.from_iterable(counts), starts, *queries, *dropped], dtype=np.int64)
        parts = (*tables, counts_of_samples)
        packed = upload(np.concatenate([part.ravel() for part in parts]), device)
        pieces = packed.split([part.size for part in parts])
        *views, per_sample = (piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True))
        *on_device, starts_there, queries_there, dropped_there = per_sample.split(
            [*map(len, counts), 1, len(queries), len(dropped)]
        )
        metadata = tuple(SelectMetadata(*its, on_device=there) for its, there in zip(counts, on_device, strict=True))
        return cls(metadata, mark(stream_of(packed)), starts_there[0], queries_there, dropped_there, *views)

    def join(self) -> None:
        """Let the current CUDA stream wait for the upload, and keep the tables for all that it is asked to do.

        Inside a CUDA graph capture nothing is waited for: see ``reroute_kernels.streams.queue_behind``.
        """
        stream = stream_of(self.rows)
        if stream is not None:
            queue_behind([self.uploaded], stream)
            self.rows.record_stream(stream)  # and with it all tables, which share its memory


def _padded(rows: Sequence[Ints]) -> Ints:
    out = np.full((len(rows), max(map(len, rows))), -1, dtype=np.int64)
    for target, source in zip(out, rows, strict=True):
        target[: len(source)] = source
    return out

"""The index tensors of a plan on one device: everything a prefill needs to know of its prompt, in one upload."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
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
    - ``rows`` (B, L): pool row of each logical position, -1 for padding.
    - ``tokens`` (R,): flat logical index ``b * L + position`` of each pool row (page tails point at 0).
    - ``inverse_index`` (R,): the same, and -1 for page tails.
    - ``positions`` (R,): logical position of each pool row.
    - ``starts`` (B, 1): first pool row of each sample.
    - ``candidates`` (B, N), ``text_rows`` (B, M): sample rows, ascending, padded with -1.
    - ``visual_indices`` (1, N): 0, 1, 2, …
    - ``queries`` (stages, B): row of each sample's query among the rows that are scored for that stage.
    - ``dropped`` (stages, B): how many of each sample's rows do not run in that stage.
    """

    metadata: tuple[SelectMetadata, ...]
    uploaded: Mark | None
    rows: torch.Tensor
    tokens: torch.Tensor
    inverse_index: torch.Tensor
    positions: torch.Tensor
    starts: torch.Tensor
    candidates: torch.Tensor
    text_rows: torch.Tensor
    visual_indices: torch.Tensor
    queries: torch.Tensor
    dropped: torch.Tensor

    @classmethod
    def of(cls, plan: Plan, starts: Sequence[int], num_rows: int, device: torch.device) -> PlanTensors:
        """Upload those of ``plan`` for samples that start at pool rows ``starts``, of ``num_rows``."""
        offsets = np.asarray(starts, dtype=np.int64)[:, None]
        rows = np.where(plan.order >= 0, plan.order + offsets, -1)
        inverse_index = np.full(num_rows, -1, dtype=np.int64)
        flat = rows.ravel()
        inverse_index[flat[flat >= 0]] = np.flatnonzero(flat >= 0)
        tokens = inverse_index.clip(min=0)
        metadata = tuple(plan.metadata(decision, starts) for decision in plan.decisions)
        candidates, text_rows = _padded(plan.visual), _padded(plan.text_rows)
        active = [plan.active(decision.stage) for decision in plan.decisions]
        parts = (
            rows,
            tokens,
            inverse_index,
            tokens % plan.length,
            offsets,
            candidates,
            text_rows,
            np.arange(candidates.shape[1], dtype=np.int64)[None],
            np.array([np.add(m.starts, m.kv_lens) - 1 for m in metadata], dtype=np.int64),
            np.array([np.subtract(plan.lengths, counts) for counts in active], dtype=np.int64),
            np.array([m.as_tuple() for m in metadata], dtype=np.int64),
        )
        ends = list(accumulate(part.size for part in parts))
        packed = upload(np.concatenate([part.ravel() for part in parts]), device)
        pieces = torch.tensor_split(packed, ends[:-1])
        *tensors, on_device = (p.view(part.shape) for p, part in zip(pieces, parts, strict=True))
        metadata = tuple(replace(m, on_device=c) for m, c in zip(metadata, on_device, strict=True))
        return cls(metadata, mark(stream_of(packed)), *tensors)

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

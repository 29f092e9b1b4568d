"""The plan of one prefill: everything that is known before it runs, as host integers.

Reading the prompt's ids is the only moment at which the host waits for the device. From the plan on every count,
every offset and every shape is an integer, so that the prefill itself never synchronises (design promise 6).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from reroute_kernels import SelectMetadata
from reroute_kernels.streams import Mark, mark, queue_behind, stream_of
from reroute_kernels.upload import upload

from .errors import RerouteError
from .schedule import Action, Schedule

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]
    Bools = NDArray[np.bool_]

__all__ = ["Plan", "PlanTensors", "make_plan"]


@dataclass(frozen=True)
class PlanTensors:
    """The plan's index tensors on one device, for one placement of the samples in the pool (R pool rows).

    - ``metadata``: of each stage, the counts of its decision.
    - ``uploaded``: the upload in the queue of its CUDA stream. Another stream has to ``join`` before it reads.
    - ``rows`` (B, L): pool row of each logical position, -1 for padding.
    - ``tokens`` (R,): flat logical index ``b * L + position`` of each pool row (page tails point at 0).
    - ``inverse_index`` (R,): the same, and -1 for page tails.
    - ``positions`` (R,): logical position of each pool row.
    - ``starts`` (B, 1): first pool row of each sample.
    - ``candidates`` (B, N), ``text_rows`` (B, M): rows within the sample, ascending, padded with -1.
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

    def join(self) -> None:
        """Let the current CUDA stream wait for the upload, and keep the tables for all that it is asked to do.

        Inside a CUDA graph capture nothing is waited for: see ``reroute_kernels.streams.queue_behind``.
        """
        stream = stream_of(self.rows)
        if stream is not None:
            queue_behind([self.uploaded], stream)
            self.rows.record_stream(stream)  # and with it all tables, which share its memory


@dataclass(frozen=True, eq=False)
class Plan:
    """Host integers of one prefill of B prompts of L logical tokens (``make_plan`` builds it).

    ``order`` (B, L) numbers the valid tokens of each sample from 0, -1 for padding: the *sample row* of a token.
    """

    schedule: Schedule
    action: Action
    past: int
    order: Ints = field(repr=False)
    visual: tuple[Ints, ...] = field(repr=False)
    text_rows: tuple[Ints, ...] = field(repr=False)
    query: tuple[int, ...]
    kept: tuple[tuple[int, ...], ...]
    _tensors: dict[tuple[Any, ...], PlanTensors] = field(default_factory=dict, repr=False)

    @property
    def batch(self) -> int:
        """Number of samples B."""
        return int(self.order.shape[0])

    @property
    def length(self) -> int:
        """Logical length L of this call, padding included."""
        return int(self.order.shape[1])

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Valid tokens of each sample."""
        return tuple(len(v) + len(t) for v, t in zip(self.visual, self.text_rows, strict=True))

    @cached_property
    def visual_counts(self) -> tuple[int, ...]:
        """Visual tokens N of each sample."""
        return tuple(len(v) for v in self.visual)

    @cached_property
    def text_counts(self) -> tuple[int, ...]:
        """Text tokens M of each sample: always active."""
        return tuple(len(t) for t in self.text_rows)

    def scores_pool(self, stage: int) -> bool:
        """True if the decision of ``stage`` ranks rows of the pool, False if it ranks the compact rows.

        ``route`` always scores the whole prompt. ``remove`` does so once; later only survivors are left.
        """
        return self.action == "route" or stage == 0

    def metadata(self, stage: int, starts: Sequence[int]) -> SelectMetadata:
        """What the decision of ``stage`` scores; ``starts`` are the samples' first pool rows."""
        if self.scores_pool(stage):
            lengths = tuple(row + 1 for row in self.query)
            candidates = self.visual_counts
        else:
            width, active = self.width(stage - 1), self.active(stage - 1)
            starts = [(b + 1) * width - rows for b, rows in enumerate(active)]
            candidates = self.kept[stage - 1]
            lengths = tuple(self.visible_texts(b) + k for b, k in enumerate(candidates))
        return SelectMetadata(tuple(starts), lengths, candidates, self.text_counts, self.kept[stage])

    @property
    def changes_nothing(self) -> bool:
        """True if every stage keeps every visual token: the plain model is the right answer, bit for bit."""
        return all(stage == self.visual_counts for stage in self.kept)

    @cached_property
    def tail(self) -> int:
        """Trailing tokens that are text in every sample: the question and what follows it. Every layer runs them."""
        last = [rows[-1] if len(rows) else -1 for rows in self.visual]
        after: Bools = np.all(self.order > np.asarray(last)[:, None], axis=0)
        return int(np.cumprod(after[::-1]).sum())

    def active(self, stage: int) -> tuple[int, ...]:
        """Rows of each sample that run in ``stage`` (-1: the dense layers before the first routing layer)."""
        visual = self.visual_counts if stage < 0 else self.kept[stage]
        return tuple(m + k for m, k in zip(self.text_counts, visual, strict=True))

    def width(self, stage: int) -> int:
        """Compact length S of ``stage``: the longest sample; shorter ones have fillers on the left."""
        return max(self.active(stage)) if stage >= 0 else self.length

    def visible_texts(self, sample: int) -> int:
        """Text tokens that the query of ``sample`` may see, itself included."""
        return int(np.searchsorted(self.text_rows[sample], self.query[sample], side="right"))

    def layout(self, starts: Sequence[int], num_rows: int, device: torch.device) -> PlanTensors:
        """Index tensors for samples that start at pool rows ``starts``: one upload, kept for the next use.

        Any thread and CUDA stream may ask; the current stream waits for the upload if another one made it.
        """
        key = (tuple(starts), num_rows, device)
        layout = self._tensors.get(key)
        if layout is None:  # of two threads that come here at once, both take what the first one puts there
            layout = self._tensors.setdefault(key, _upload(self, starts, num_rows, device))
        layout.join()
        return layout


def make_plan(
    input_ids: Ints,
    valid: Bools,
    visual_ids: Sequence[int],
    schedule: Schedule,
    action: Action,
    *,
    past: int = 0,
    prompt_ends: Sequence[int] | None = None,
) -> Plan | None:
    """Plan the routing of one batch of prompts, or None if no sample has visual tokens.

    Args:
        input_ids: (B, L) token ids of this call.
        valid: (B, L) False at padding.
        visual_ids: ids of the placeholders that stand for visual tokens.
        past: logical length of the cache before this call.
        prompt_ends: per sample, one past the logical position of the last prompt token (default L): the last
            valid token before it is the query.

    Raises:
        RerouteError: a prompt with visual tokens ends in one: there is no question after the picture yet.
    """
    is_visual = np.isin(input_ids, np.asarray(visual_ids)) & valid
    if not is_visual.any():
        return None
    order = np.where(valid, np.cumsum(valid, axis=1) - 1, -1)
    ends = [input_ids.shape[1]] * len(input_ids) if prompt_ends is None else prompt_ends
    visual = tuple(row[mask] for row, mask in zip(order, is_visual, strict=True))
    text_rows = tuple(row[mask] for row, mask in zip(order, valid & ~is_visual, strict=True))
    query = tuple(int(row[:end].max(initial=-1)) for row, end in zip(order, ends, strict=True))
    for sample, (rows, last) in enumerate(zip(visual, query, strict=True)):
        if last < 0:
            raise RerouteError(f"Sample {sample} has no prompt token: its attention_mask is all zeros.")
        if len(rows) and rows[-1] >= last:
            raise RerouteError(
                f"The prompt of sample {sample} ends inside or right after its visual tokens, so there is no text to "
                "rank them by. Put the question after the picture, and do not split a prompt into chunks while "
                "routing is enabled."
            )
    kept = zip(*(schedule.counts(len(rows)) for rows in visual), strict=True)
    return Plan(schedule, action, past, order, visual, text_rows, query, tuple(kept))


def _upload(plan: Plan, starts: Sequence[int], num_rows: int, device: torch.device) -> PlanTensors:
    offsets = np.asarray(starts, dtype=np.int64)[:, None]
    rows = np.where(plan.order >= 0, plan.order + offsets, -1)
    inverse_index = np.full(num_rows, -1, dtype=np.int64)
    flat = rows.ravel()
    inverse_index[flat[flat >= 0]] = np.flatnonzero(flat >= 0)
    tokens = inverse_index.clip(min=0)
    stages = range(len(plan.kept))
    metadata = tuple(plan.metadata(stage, starts) for stage in stages)
    queries = np.array([np.add(m.starts, m.kv_lens) - 1 for m in metadata], dtype=np.int64)
    dropped = np.array([np.subtract(plan.lengths, plan.active(stage)) for stage in stages], dtype=np.int64)
    candidates, text_rows = _padded(plan.visual), _padded(plan.text_rows)
    visual_indices = np.arange(candidates.shape[1], dtype=np.int64)[None]
    counts = np.array([m.as_tuple() for m in metadata], dtype=np.int64)
    positions = tokens % plan.length
    parts = (
        rows,
        tokens,
        inverse_index,
        positions,
        offsets,
        candidates,
        text_rows,
        visual_indices,
        queries,
        dropped,
        counts,
    )
    ends = list(accumulate(part.size for part in parts))
    packed = upload(np.concatenate([part.ravel() for part in parts]), device)
    pieces = torch.tensor_split(packed, ends[:-1])
    *tensors, on_device = (p.view(part.shape) for p, part in zip(pieces, parts, strict=True))
    metadata = tuple(replace(m, on_device=c) for m, c in zip(metadata, on_device, strict=True))
    return PlanTensors(metadata, mark(stream_of(packed)), *tensors)


def _padded(rows: Sequence[Ints]) -> Ints:
    out = np.full((len(rows), max(map(len, rows))), -1, dtype=np.int64)
    for target, source in zip(out, rows, strict=True):
        target[: len(source)] = source
    return out

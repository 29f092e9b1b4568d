"""The state of one prefill: which rows run, where all others wait, what was decided. Gone when the prefill ends.

The pool is the home of the prompt. At a stage boundary the rows that ran are written back (*defer*: whoever is not
selected simply stays there), all candidates are scored, and the selected rows are copied out (*admit*).

Of a model that is spread over several GPUs the home is where RoPE tables and masks are; layers may be elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from reroute_kernels import Backend, Lease, PagedPool, RMSNorm, Rope, Selection

from .errors import RerouteError
from .methods import Method, ScoreView
from .plan import Plan, PlanTensors
from .trace import StageTrace, Trace

__all__ = ["DecoderAdapter", "PositionTables", "Prefill", "Workspace"]


class DecoderAdapter(Protocol):
    """What scoring needs from the model."""

    rope: Rope

    def input_norm(self, layer: int) -> RMSNorm | None:
        """The norm of rows before the attention of ``layer``, or None if there is more to it than its formula."""

    def normalise(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        """``rows`` (R, C) after that norm, by the model itself."""

    def project(self, layer: int, normed: torch.Tensor, query_rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries (B, H, D) of ``normed[query_rows]`` and keys (R, G, D) of ``normed`` (R, C), both before RoPE.

        Queries come after the layer's query norm, keys before its key norm.
        """

    def key_norm(self, layer: int) -> RMSNorm | None:
        """The norm of each key head of ``layer``, if it has one."""

    def scale(self, layer: int) -> float:
        """Factor on the attention logits of ``layer``."""

    def rope_tables(self, hidden: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cos and sin (B, S, rot) at position ids (B, S)."""


@dataclass(frozen=True)
class PositionTables:
    """What goes with each row of hidden states into a layer: cos, sin (B, S, rot), position ids (B, S) or None."""

    cos: torch.Tensor
    sin: torch.Tensor
    ids: torch.Tensor | None


@dataclass(frozen=True)
class _Competitors:
    """What competes at the next decision: sample rows (B, N), (B, M), and indices among all visual tokens (B, N)."""

    candidates: torch.Tensor
    text_rows: torch.Tensor
    visual_indices: torch.Tensor


class Workspace:
    """A place in a pool for the prefills of one plan, one after the other, on any CUDA stream.

    The first prefill leases the rows and uploads the index tables; both stay where they are until ``release``. So any
    later one allocates no pool rows and uploads nothing, and may be captured in a CUDA graph.
    """

    def __init__(self, plan: Plan) -> None:
        """Nothing is held yet."""
        self._plan = plan
        self._held: tuple[PagedPool, Lease, PlanTensors] | None = None

    def take(self, pool: PagedPool) -> tuple[Lease, PlanTensors]:
        """The lease and the index tables, for the current CUDA stream. ``Lease.end_use`` ends the prefill.

        Raises:
            PoolLimitError: the pool may not grow to hold the prompt; nothing is held then.
            torch.OutOfMemoryError: the device has no room for it; likewise.
        """
        if self._held is not None and self._held[0] is pool:
            _, lease, layout = self._held
            lease.begin_use()
            layout.join()
            return lease, layout
        self.release()
        lease = pool.lease(self._plan.lengths)
        try:
            layout = self._plan.layout(lease.starts, lease.num_rows, pool.device)
        except BaseException:
            lease.release()
            raise
        self._held = pool, lease, layout
        return lease, layout

    def release(self) -> None:
        """Give the rows back. Idempotent."""
        held, self._held = self._held, None
        if held is not None:
            _, lease, layout = held
            layout.join()  # graphs with these tables may have been replayed on this stream
            lease.release()


class Prefill:
    """One routed prefill. Call ``decide`` before a scoring layer, ``advance`` before a routing layer, ``restore`` at
    the end, and ``close`` in any case.
    """

    def __init__(
        self,
        plan: Plan,
        backend: Backend,
        pool: PagedPool,
        adapter: DecoderAdapter,
        tables: PositionTables,
        *,
        workspace: Workspace | None = None,
        method: Method | None = None,
        trace: bool = False,
    ) -> None:
        """Take rows in ``pool`` and sort the logical ``tables`` (batch dimension B or 1) into pool order.

        Whoever passes a ``workspace`` of ``plan`` releases it.

        Raises:
            PoolLimitError: the pool may not grow to hold the prompt; nothing is held then.
            torch.OutOfMemoryError: the device has no room for it; likewise.
        """
        self.plan, self.stage, self.tables = plan, -1, tables
        self._backend, self._adapter = backend, adapter
        self._method = None if method is None or method.uses_attention else method
        self._selection: Selection | None = None
        self._positions: torch.Tensor | None = None
        self._written: torch.Tensor | None = None
        self._trace: list[StageTrace] | None = [] if trace else None
        self._is_reserved = workspace is not None
        self._workspace = workspace or Workspace(plan)
        self._lease, self._tensors = self._workspace.take(pool)
        try:
            self._pool_tables = [self._to_pool_order(t) for t in (tables.cos, tables.sin, tables.ids) if t is not None]
            self._rows, self._inverse_index = self._tensors.rows, self._tensors.inverse_index
            visual_indices = self._tensors.visual_indices.expand_as(self._tensors.candidates)
            self._competitors = _Competitors(self._tensors.candidates, self._tensors.text_rows, visual_indices)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the pool rows back, unless they are reserved. Idempotent."""
        self._written = None
        if self._is_reserved:
            self._lease.end_use()
        else:
            self._workspace.release()

    @property
    def positions(self) -> torch.Tensor:
        """Logical position in this call of every row of the present stage, (B, S) int64, -1 for fillers."""
        assert self._positions is not None
        return self._positions

    @property
    def ranks_by_attention(self) -> bool:
        """False if the method scores by itself."""
        return self._method is None

    @property
    def has_fillers(self) -> bool:
        """True if some sample is shorter than the compact length of the present stage."""
        return min(self.plan.active(self.stage)) < self.plan.width(self.stage)

    @property
    def position_offset(self) -> torch.Tensor | None:
        """What the running stage's renumbered positions subtract from logical ones, (B, 1) int64; else None."""
        if self.plan.schedule.positions == "preserved":
            return None
        return self._tensors.dropped[self.stage][:, None]

    @property
    def trace(self) -> Trace | None:
        """The decisions so far, if tracing."""
        if self._trace is None:
            return None
        starts = self._tensors.starts
        rows = (self._tensors.candidates + starts).clamp(min=0)
        return Trace(tuple(self._trace), _trim(self._tensors.positions[rows], self.plan.visual_counts))

    def decide(self, layer: int, hidden: torch.Tensor) -> None:
        """Choose the rows of the next stage from ``hidden`` (B, S, C), the input of ``layer``, and the pool."""
        stage = self.stage + 1
        if self._method is None:
            selection = self._rank_by_attention(stage, layer, hidden)
        else:
            selection = self._rank_by_method(self._method, stage, layer, hidden)
        self._selection = selection
        self._record(stage, selection)

    def advance(self, hidden: torch.Tensor) -> torch.Tensor:
        """Enter the decided stage: ``hidden`` (B, S, C) goes home, the selected rows (B, S', C) come out."""
        assert self._selection is not None
        self._defer(hidden)
        next_stage = self.stage + 1
        self._rows = self._pool_rows(next_stage, self._selection.active_rows)
        self._positions, self._inverse_index = self._selection.active_positions, self._selection.inverse_index
        if self.plan.action == "remove":
            self._competitors = self._survivors(self._selection.kept)
        self.stage, self._selection = next_stage, None
        admitted, cos, sin, *ids = self._admit(self._rows, *self._pool_tables)
        self._written = None
        self.tables = PositionTables(cos, sin, ids[0].squeeze(-1) if ids else None)
        if self.plan.schedule.positions == "renumbered":
            self.tables = self._renumbered(admitted)
        return admitted.to(hidden.device)

    def restore(self, hidden: torch.Tensor) -> torch.Tensor:
        """The latest state of every token at logical length (B, L, C), given the running rows; padding is zero."""
        self._defer(hidden)
        return self._admit(self._tensors.rows)[0].to(hidden.device)

    # --- the kernels ----------------------------------------------------------------------------------------------

    def _defer(self, hidden: torch.Tensor) -> None:
        if hidden is not self._written:  # a layer that both decides and enters a stage writes once
            pages = self._lease.pages
            self._backend.defer(pages, self._lease.table, self._rows, hidden.to(pages.device))
            self._written = hidden

    def _admit(self, rows: torch.Tensor, *aux: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self._backend.admit(self._lease.pages, self._lease.table, rows, *aux)

    def _defer_and_normalise(self, stage: int, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Write ``hidden`` home; and what will be scored, after the input norm of ``layer``."""
        norm, pages = self._adapter.input_norm(layer), self._lease.pages
        if norm is None or norm.weight.device != pages.device or not self.plan.scores_pool(stage):
            self._defer(hidden)
            return self._adapter.normalise(layer, self._scored_rows(stage, hidden))
        self._written = hidden
        return self._backend.defer_rmsnorm(self._lease, self._rows, self._inverse_index, hidden.to(pages.device), norm)

    def _rank_by_attention(self, stage: int, layer: int, hidden: torch.Tensor) -> Selection:
        query_rows, normed = self._tensors.queries[stage], self._defer_and_normalise(stage, layer, hidden)
        query, keys = self._adapter.project(layer, normed, query_rows)
        cos, sin = self._scored_tables(stage)
        if keys.device != cos.device:
            query, keys = query.to(cos.device), keys.to(cos.device)
        return self._backend.score_topk(
            query,
            keys,
            cos,
            sin,
            query_rows,
            self._competitors.candidates,
            self._competitors.text_rows,
            self._scored_positions(stage),
            self._tensors.metadata[stage],
            scale=self._adapter.scale(layer),
            rope=self._adapter.rope,
            key_norm=self._adapter.key_norm(layer),
        )

    def _rank_by_method(self, method: Method, stage: int, layer: int, hidden: torch.Tensor) -> Selection:
        self._defer(hidden)
        metadata = self._tensors.metadata[stage]
        counts = metadata.num_candidates
        candidates = _trim(self._competitors.candidates, counts)
        rows = self._scored_rows(stage, hidden).to(self._lease.pages.device)
        seen = [rows[start + c] for start, c in zip(metadata.starts, candidates, strict=True)]
        view = ScoreView(seen, layer, stage, rows[self._tensors.queries[stage]])
        scores = torch.full_like(self._competitors.candidates, -torch.inf, dtype=torch.float32)
        for target, score, n in zip(scores, _checked_scores(method, view), counts, strict=True):
            target[:n] = score
        lists = self._competitors.candidates, self._competitors.text_rows, self._scored_positions(stage)
        return self._backend.select(scores, *lists, metadata)

    # --- index bookkeeping ----------------------------------------------------------------------------------------

    def _to_pool_order(self, table: torch.Tensor) -> torch.Tensor:
        """(B or 1, L) or (B or 1, L, w) in logical order -> (R, w) in pool order."""
        table = table.unsqueeze(-1) if table.ndim == 2 else table
        flat = table.expand(self.plan.batch, -1, -1).reshape(-1, table.shape[-1])
        return flat.index_select(0, self._tensors.tokens)

    def _pool_rows(self, stage: int, active: torch.Tensor) -> torch.Tensor:
        """Pool rows (B, S) of the selected rows ``active``, which are numbered among those that were scored."""
        if self.plan.scores_pool(stage):
            return active
        return self._rows.flatten()[active.clamp(min=0)].masked_fill(active < 0, -1)

    def _scored_rows(self, stage: int, hidden: torch.Tensor) -> torch.Tensor:
        return self._lease.rows() if self.plan.scores_pool(stage) else hidden.flatten(0, 1)

    def _scored_tables(self, stage: int) -> Sequence[torch.Tensor]:
        tables = self.tables.cos, self.tables.sin
        return self._pool_tables[:2] if self.plan.scores_pool(stage) else [t.flatten(0, 1) for t in tables]

    def _scored_positions(self, stage: int) -> torch.Tensor:
        return self._tensors.positions if self.plan.scores_pool(stage) else self.positions.flatten()

    def _survivors(self, kept: torch.Tensor) -> _Competitors:
        """What competes after a removal: ``kept`` (B, K) are indices into the former candidates, padded with -1."""
        old, dropped = self._competitors, kept < 0
        kept = kept.clamp(min=0)
        beyond = torch.iinfo(old.text_rows.dtype).max
        visual = old.candidates.gather(1, kept).masked_fill(dropped, beyond)
        text_rows = old.text_rows.masked_fill(old.text_rows < 0, beyond)
        return _Competitors(
            candidates=_merged(visual, text_rows).masked_fill(dropped, -1),
            text_rows=_merged(text_rows, visual).masked_fill(old.text_rows < 0, -1),
            visual_indices=old.visual_indices.gather(1, kept),
        )

    def _renumbered(self, hidden: torch.Tensor) -> PositionTables:
        """PDrop's original numbering: the rows that are left count from 0 (spec: PyramidDrop)."""
        ids = (self._rows >= 0).cumsum(1).sub(1).clamp(min=0)
        return PositionTables(*self._adapter.rope_tables(hidden, ids), ids)

    def _record(self, stage: int, selection: Selection) -> None:
        if self._trace is None:
            return
        counts = self.plan.kept[stage - 1] if stage and self.plan.action == "remove" else self.plan.visual_counts
        kept = self._competitors.visual_indices.gather(1, selection.kept.clamp(min=0))
        self._trace.append(
            StageTrace(
                layer=self.plan.schedule.layers[stage],
                kept=_trim(kept, self.plan.kept[stage]),
                candidates=_trim(self._competitors.visual_indices, counts),
                scores=_trim(selection.scores, counts),
            )
        )


def _trim(padded: torch.Tensor, counts: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(row[:n] for row, n in zip(padded, counts, strict=True))


def _checked_scores(method: Method, view: ScoreView) -> list[torch.Tensor]:
    """What ``method`` returns, if it is one number per candidate: anything else might be broadcast. Never waits."""
    returned = method.score(view)
    scores = [] if returned is None else list(returned)
    if len(scores) != len(view.hidden):
        raise RerouteError(
            f"Method {method.name!r} scored {len(scores)} samples instead of {len(view.hidden)}. Return one tensor for "
            "each of view.hidden."
        )
    for sample, (score, hidden) in enumerate(zip(scores, view.hidden, strict=True)):
        came = tuple(score.shape) if isinstance(score, torch.Tensor) else type(score).__name__
        if came != (len(hidden),):
            raise RerouteError(
                f"Method {method.name!r} scored sample {sample} with {came} instead of a tensor {(len(hidden),)}. "
                "Return one number for each row of view.hidden[b]."
            )
    return scores


def _merged(rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Rank of each of ``rows`` in the ascending union of two disjoint ascending lists, per sample."""
    ranks = torch.arange(rows.shape[1], device=rows.device)
    return ranks + torch.searchsorted(others, rows)

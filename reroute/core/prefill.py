"""The state of one prefill: which rows run, where all others wait, what was decided. Gone when the prefill ends.

Its home holds the latest hidden state of every prompt token. At a stage boundary the rows that ran are written back
(*defer*), all candidates are ranked, and the selected rows are gathered (*admit*). Ranking has no gradient: which rows
run is no function that could be differentiated. Their way home and back has one.

Of a model that is spread over several GPUs the home is where RoPE tables and masks are; layers may be elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from reroute_kernels import Backend, RopeTables, Selection, SelectRows

from ..rankers import DecoderAdapter, Merge, RankContext, Ranker, Vision
from ..rankers.vision import UNSEEN
from ..trace import StageTrace, Trace
from .decision import Decision
from .home import Home
from .plan import Plan

__all__ = ["Decided", "PositionTables", "Prefill", "Tables"]

Tables = tuple[torch.Tensor, torch.Tensor]
"""cos, sin."""


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


@dataclass(frozen=True)
class _Left:
    """What a removal left: pool rows (B, S), their logical positions (B, S), and their tables."""

    rows: torch.Tensor
    positions: torch.Tensor
    tables: PositionTables


class Decided(NamedTuple):
    """A decision that was made: which rows its stage runs, and how they take up others, if they do."""

    decision: Decision
    selection: Selection
    merge: Merge | None


class Prefill:
    """One routed prefill. Call ``look`` before the layers of ``Schedule.looks``, ``decide`` before a scoring layer,
    ``advance`` before a routing layer, ``restore`` at the end, and ``close`` in any case. All but the last raise
    RerouteError if the home cannot take the hidden states (``Home.check``).
    """

    def __init__(
        self,
        plan: Plan,
        home: Home,
        adapter: DecoderAdapter,
        tables: PositionTables,
        *,
        trace: bool = False,
    ) -> None:
        """Take over ``home`` and sort the logical ``tables`` (batch dimension B or 1) into the order of its rows."""
        self.plan, self.stage, self.tables = plan, -1, tables
        self._home, self._tensors = home, home.tensors
        self._adapter = adapter
        self._positions: torch.Tensor | None = None
        self._left: _Left | None = None
        self._is_home = False
        self._notes: list[tuple[Ranker, int, Any]] = []
        self._trace: list[StageTrace] | None = [] if trace else None
        try:
            self._pool_tables = [self._to_pool_order(t) for t in (tables.cos, tables.sin, tables.ids) if t is not None]
            self._rows, self._inverse_index = self._tensors.rows, self._tensors.inverse_index
            visual_indices = self._tensors.visual_indices.expand_as(self._tensors.candidates)
            self._competitors = _Competitors(self._tensors.candidates, self._tensors.text_rows, visual_indices)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the home. Idempotent."""
        self._home.close()

    @property
    def backend(self) -> Backend:
        """What runs the operations of this prefill."""
        return self._home.backend

    @property
    def positions(self) -> torch.Tensor:
        """Logical position in this prefill of every row of the present stage, (B, S) int64, -1 for fillers."""
        if self._positions is None:
            rows = self._tensors.rows
            self._positions = torch.where(rows < 0, -1, torch.arange(self.plan.length, device=rows.device))
        return self._positions

    @property
    def sample_rows(self) -> torch.Tensor:
        """Row within its sample, padding not counted, of every row of the present stage, (B, S), -1 for fillers."""
        return torch.where(self._rows < 0, -1, self._rows - self._tensors.starts[:, None])

    @property
    def has_fillers(self) -> bool:
        """True if some sample is shorter than the compact length of the present stage."""
        return min(self.plan.active(self.stage)) < self.plan.width(self.stage)

    @property
    def is_visual(self) -> torch.Tensor:
        """(B, L) bool at logical length: which are visual tokens."""
        candidates, length = self._tensors.candidates, self.plan.length
        rows = (candidates + self._tensors.starts[:, None]).clamp(min=0)
        at = self._tensors.positions[rows].masked_fill(candidates < 0, length)
        flags = torch.zeros(self.plan.batch, length + 1, dtype=torch.bool, device=at.device)
        return flags.scatter(1, at, True)[:, :length]

    @property
    def position_offset(self) -> torch.Tensor | None:
        """What the running stage's renumbered positions subtract from logical ones, (B, 1) int64; else None."""
        if self.plan.schedule.position_mode == "preserved":
            return None
        return self._tensors.dropped[self.stage][:, None]

    @property
    def trace(self) -> Trace | None:
        """The decisions so far, if tracing."""
        if self._trace is None:
            return None
        rows = (self._tensors.candidates + self._tensors.starts[:, None]).clamp(min=0)
        return Trace(tuple(self._trace), _trim(self._tensors.positions[rows], self.plan.visual_counts))

    def look(self, layer: int, hidden: torch.Tensor, tables: Tables | None = None) -> None:
        """Let rankers make notes on ``hidden`` (B, S, C), the input of ``layer``, for their later decisions.

        ``tables``: see ``decide``.
        """
        self._home.check(hidden, f"The hidden states before layer {layer}")
        schedule = self.plan.schedule
        decision = replace(self.plan.decisions[schedule.next_stage(layer)], score_layer=layer)
        for ranker in schedule.looks[layer]:
            with torch.no_grad():
                note = ranker.note(self._rank_context(replace(decision, ranker=ranker), hidden, UNSEEN, tables))
            self._notes.append((ranker, layer, note))

    def decide(
        self,
        decision: Decision,
        hidden: torch.Tensor,
        vision: Vision = UNSEEN,
        tables: Tables | None = None,
    ) -> Decided:
        """Choose the rows of a stage from the home and ``hidden`` (B, S, C), the input of ``decision.score_layer``.

        ``vision``: the pictures of this call, if the ranker needs them. ``tables``: logical cos, sin (B or 1, L, rot)
        of that layer, if they are others than those of the prefill.
        """
        self._home.check(hidden, f"The hidden states before layer {decision.score_layer}")
        self._is_home = False
        with torch.no_grad():
            selection, merge = decision.ranker.decide(self._rank_context(decision, hidden, vision, tables))
        if not self._is_home:  # the ranker did not ask for hidden states
            self._defer(hidden)
        self._record(decision, selection)
        return Decided(decision, selection, merge)

    def advance(self, decided: Decided, hidden: torch.Tensor) -> torch.Tensor:
        """Enter the decided stage: ``hidden`` (B, S, C) goes home, the selected rows (B, S', C) come out."""
        decision, selection, merge = decided
        if decision.score_layer != decision.layer:  # else ``decide`` has written it
            self._home.check(hidden, f"The hidden states before layer {decision.layer}")
            self._defer(hidden)
        if merge is not None:
            self._merge(decision, selection, merge(self._ranked(hidden)))
        self._rows = self._pool_rows(selection.active_rows)
        self._positions, self._inverse_index = selection.active_positions, selection.inverse_index
        if decision.action == "remove":
            self._competitors = self._survivors(selection.kept)
        self.stage = decision.stage
        admitted, cos, sin, *ids = self._home.admit(self._rows, *self._pool_tables)
        self.tables = PositionTables(cos, sin, ids[0].squeeze(-1) if ids else None)
        if self.plan.schedule.position_mode == "renumbered":
            self.tables = self._renumbered(admitted)
        if decision.action == "remove":
            self._left = _Left(self._rows, self._positions, self.tables)
        return admitted.to(hidden.device)

    def restore(self, hidden: torch.Tensor) -> torch.Tensor:
        """The latest state of every token at logical length (B, L, C), given the running rows; padding is zero."""
        self._home.check(hidden, "The hidden states that the decoder's layers return")
        self._defer(hidden)
        return self._home.admit(self._tensors.rows)[0].to(hidden.device)

    # --- ranking --------------------------------------------------------------------------------------------------

    def _defer(self, hidden: torch.Tensor) -> None:
        self._home.defer(self._rows, hidden)
        self._is_home = True

    def _defer_and_normalise(self, decision: Decision, hidden: torch.Tensor) -> torch.Tensor:
        """Write ``hidden`` home; and what will be scored, after the input norm of ``decision.score_layer``."""
        layer = decision.score_layer
        norm = self._adapter.input_norm(layer)
        if norm is None or norm.weight.device != self._home.device or self._left is not None:
            return self._adapter.normalise(layer, self._defer_and_read(hidden))
        self._is_home = True
        return self._home.defer_rmsnorm(self._rows, self._inverse_index, hidden, norm)

    def _defer_and_read(self, hidden: torch.Tensor) -> torch.Tensor:
        """Write ``hidden`` home; and what will be scored."""
        self._defer(hidden)
        return self._ranked(hidden).detach()

    def _ranked(self, hidden: torch.Tensor) -> torch.Tensor:
        """The rows (R, C) that are ranked, once ``hidden`` is home; gradients pass where they are recorded."""
        if self._left is None:
            return self._home.states()
        if self._left.rows is self._rows:
            return hidden.flatten(0, 1).to(self._home.device)
        return self._home.admit(self._left.rows)[0].flatten(0, 1)

    def _merge(self, decision: Decision, selection: Selection, merged: torch.Tensor) -> None:
        """Let the kept tokens go on with ``merged`` (B, K, C)."""
        kept = selection.kept
        starts = self._tensors.metadata[decision.stage].counts(kept.device)[0]
        rows = self._competitors.candidates.gather(1, kept.clamp(min=0)) + starts[:, None]
        self._home.defer(self._pool_rows(rows.masked_fill(kept < 0, -1)), merged)

    def _rank_context(
        self, decision: Decision, hidden: torch.Tensor, vision: Vision, own: Tables | None
    ) -> RankContext:
        cos, sin = self._scored_tables(own)
        positions = self._tensors.positions if self._left is None else self._left.positions.flatten()
        tables = RopeTables(cos, sin, self._tensors.queries[decision.stage])
        rotates = not decision.ranker.needs_attention or self._adapter.rotates(decision.score_layer)
        return RankContext(
            decision,
            self._adapter.agreeing(self.backend),
            self._adapter,
            tables if rotates else tables.unrotated(),
            SelectRows(
                self._competitors.candidates,
                self._competitors.text_rows,
                positions,
                self._tensors.metadata[decision.stage],
            ),
            self._competitors.visual_indices,
            hidden=lambda: self._defer_and_read(hidden).to(self._home.device),
            normed=lambda: self._defer_and_normalise(decision, hidden),
            questions=self.plan.question_lengths,
            vision=vision,
            notes={layer: note for ranker, layer, note in self._notes if ranker == decision.ranker},
        )

    def _scored_tables(self, own: Tables | None) -> Tables:
        """Tables (R, rot) of the rows that are ranked: of the prefill, or a layer's ``own`` logical ones."""
        left = self._left
        if own is None:
            cos, sin = self._pool_tables[:2]
            return (cos, sin) if left is None else (left.tables.cos.flatten(0, 1), left.tables.sin.flatten(0, 1))
        cos, sin = (self._to_pool_order(table.to(self._home.device)) for table in own)
        if left is None:
            return cos, sin
        rows = left.rows.flatten().clamp(min=0)
        return cos.index_select(0, rows), sin.index_select(0, rows)

    # --- index bookkeeping ----------------------------------------------------------------------------------------

    def _to_pool_order(self, table: torch.Tensor) -> torch.Tensor:
        """(B or 1, L) or (B or 1, L, w) in logical order -> (R, w) in pool order."""
        table = table.unsqueeze(-1) if table.ndim == 2 else table
        flat = table.expand(self.plan.batch, -1, -1).reshape(-1, table.shape[-1])
        return flat.index_select(0, self._tensors.tokens)

    def _pool_rows(self, active: torch.Tensor) -> torch.Tensor:
        """Pool rows (B, S) of the selected rows ``active``, which are numbered among those that were scored."""
        if self._left is None:
            return active
        return self._left.rows.flatten()[active.clamp(min=0)].masked_fill(active < 0, -1)

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
        """PDrop's original numbering: the rows that are left count from 0 ."""
        ids = (self._rows >= 0).cumsum(1).sub(1).clamp(min=0)
        return PositionTables(*self._adapter.rope_tables(hidden, ids), ids)

    def _record(self, decision: Decision, selection: Selection) -> None:
        if self._trace is None:
            return
        visual_indices = self._competitors.visual_indices
        kept = visual_indices.gather(1, selection.kept.clamp(min=0))
        self._trace.append(
            StageTrace(
                layer=decision.layer,
                kept=_trim(kept, decision.k),
                candidates=_trim(visual_indices, decision.candidates),
                scores=_trim(selection.scores, decision.candidates),
            )
        )


def _trim(padded: torch.Tensor, counts: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(row[:n] for row, n in zip(padded, counts, strict=True))


def _merged(rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Rank of each of ``rows`` in the ascending union of two disjoint ascending lists, per sample."""
    ranks = torch.arange(rows.shape[1], device=rows.device)
    return ranks + torch.searchsorted(others, rows)

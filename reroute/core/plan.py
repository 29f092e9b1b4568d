"""The plan of one prefill: everything that is known before it runs, as host integers.

Reading the prompt's ids is the only moment at which the host waits for the device. From the plan on every count,
every offset and every shape is an integer, so that the prefill itself never synchronises (promise 6 in
docs/design/specification.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import add
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from ..errors import RerouteError
from .decision import Decision
from .plan_tensors import PlanTensors
from .schedule import Action, Schedule

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]
    Bools = NDArray[np.bool_]

Counts: TypeAlias = tuple[int, ...]
"""One per sample."""

__all__ = ["Plan", "make_plan", "plan_tokens", "visual_mask"]


@dataclass(frozen=True, eq=False)
class Plan:
    """Host integers of one prefill of B prompts of L logical tokens (``make_plan`` builds it).

    ``order`` (B, L) numbers the valid tokens of each sample from 0, -1 for padding: the *sample row* of a token.
    ``knows_labels``: whether the end of the prompt was taken from labels.
    ``reopened``: how many of the L tokens, the first ones, came in earlier calls and run again from
    ``Schedule.first_look`` on.
    """

    schedule: Schedule
    past: int
    order: Ints = field(repr=False)
    visual: tuple[Ints, ...] = field(repr=False)
    text_rows: tuple[Ints, ...] = field(repr=False)
    query: tuple[int, ...]
    decisions: tuple[Decision, ...]
    knows_labels: bool = False
    reopened: int = 0
    _tensors: dict[tuple[Any, ...], PlanTensors] = field(default_factory=dict, repr=False)

    @property
    def batch(self) -> int:
        """Number of samples B."""
        return int(self.order.shape[0])

    @property
    def length(self) -> int:
        """Logical length L of this call and of what it reopens, padding included."""
        return int(self.order.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """Samples and tokens (B, L - reopened) of the call itself, padding included."""
        return self.batch, self.length - self.reopened

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

    @cached_property
    def question_lengths(self) -> tuple[int, ...]:
        """Rows of each sample from behind its visual tokens to its query; 0 without visual tokens."""
        return tuple(last - int(v[-1]) if len(v) else 0 for v, last in zip(self.visual, self.query, strict=True))

    def counts(self, decision: Decision, starts: Sequence[int]) -> tuple[Counts, Counts, Counts, Counts, Counts]:
        """The counts of ``decision`` for ``SelectMetadata``; ``starts`` are the samples' first pool rows."""
        if decision.from_pool:
            kv_lens = [row + 1 for row in self.query]
        else:
            left = decision.left_by
            starts = [(b + 1) * self.width(left) - rows for b, rows in enumerate(self.active(left))]
            kv_lens = [self.visible_texts(b) + n for b, n in enumerate(decision.candidates)]
        return tuple(starts), tuple(kv_lens), decision.candidates, self.text_counts, decision.k

    @cached_property
    def changes_nothing(self) -> bool:
        """True if every stage keeps every visual token: the plain model is the right answer, bit for bit.

        Never of a plan that reopens: what earlier turns left out has to come back.
        """
        return not self.reopened and all(decision.k == self.visual_counts for decision in self.decisions)

    @cached_property
    def tail(self) -> int:
        """Trailing positions behind the visual tokens of every sample: the question and what follows, and padding."""
        its = zip(self.order, self.visual, self.lengths, strict=True)
        pictured = [(row, int(rows[-1]), count == self.length) for row, rows, count in its if len(rows)]
        ends = (last if is_whole else int(np.flatnonzero(row == last)[0]) for row, last, is_whole in pictured)
        return self.length - max(ends) - 1

    @cached_property
    def tail_has_padding(self) -> bool:
        """Whether some sample lacks rows in the tail."""
        return min(self.lengths) < self.length and bool((self.order[:, self.length - self.tail :] < 0).any())

    def active(self, stage: int) -> tuple[int, ...]:
        """Rows of each sample that run in ``stage`` (-1: the dense layers before the first routing layer)."""
        return self._active[stage + 1]

    @cached_property
    def _active(self) -> tuple[tuple[int, ...], ...]:
        """``active`` of all stages, dense layers first: a prefill asks for it dozens of times."""
        visual = self.visual_counts, *(decision.k for decision in self.decisions)
        return tuple(tuple(map(add, self.text_counts, its)) for its in visual)

    def active_visual(self, stage: int) -> tuple[int, ...]:
        """Visual tokens of each sample that run in ``stage``."""
        return self.visual_counts if stage < 0 else self.decisions[stage].k

    def width(self, stage: int) -> int:
        """Compact length S of ``stage``: the longest sample; shorter ones have fillers on the left."""
        return max(self.active(stage)) if stage >= 0 else self.length

    def visible_texts(self, sample: int) -> int:
        """Text tokens that the query of ``sample`` may see, itself included."""
        return int(np.searchsorted(self.text_rows[sample], self.query[sample], side="right"))

    def tensors(self, starts: Sequence[int], num_rows: int, device: torch.device) -> PlanTensors:
        """Index tensors for samples that start at pool rows ``starts``: one upload, kept for the next use.

        Any thread and CUDA stream may ask; the current stream waits for the upload if another one made it.
        """
        key = (tuple(starts), num_rows, device)
        tensors = self._tensors.get(key)
        if tensors is None:  # of two threads that come here at once, both take what the first one puts there
            tensors = self._tensors.setdefault(key, PlanTensors.of(self, starts, num_rows, device))
        tensors.join()
        return tensors


def visual_mask(input_ids: Ints, visual_ids: Sequence[int]) -> Bools:
    """Where ``input_ids`` are placeholders that stand for visual tokens. Of few ids, faster than numpy.isin."""
    mask = np.zeros(input_ids.shape, dtype=bool)
    for token in visual_ids:
        mask |= input_ids == token
    return mask


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
    is_visual = visual_mask(input_ids, visual_ids)
    return plan_tokens(is_visual, valid, schedule, action, past=past, prompt_ends=prompt_ends)


def plan_tokens(
    is_visual: Bools,
    valid: Bools,
    schedule: Schedule,
    action: Action,
    *,
    past: int = 0,
    reopened: int = 0,
    prompt_ends: Sequence[int] | None = None,
) -> Plan | None:
    """``make_plan`` of tokens (B, L) of which it is known whether each ``is_visual``; ``reopened``: see ``Plan``."""
    is_visual = is_visual & valid
    if not is_visual.any():
        return None
    order = np.where(valid, np.cumsum(valid, axis=1) - 1, -1)
    ends = [valid.shape[1]] * len(valid) if prompt_ends is None else prompt_ends
    visual = tuple(row[mask] for row, mask in zip(order, is_visual, strict=True))
    text_rows = tuple(row[mask] for row, mask in zip(order, valid & ~is_visual, strict=True))
    query = tuple(int(row[:end].max(initial=-1)) for row, end in zip(order, ends, strict=True))
    decisions = _decisions(schedule, action, visual)
    plan = Plan(schedule, past, order, visual, text_rows, query, decisions, reopened=reopened)
    if not plan.changes_nothing:
        _check_questions(plan)
    return plan


def _check_questions(plan: Plan) -> None:
    for sample, (rows, last) in enumerate(zip(plan.visual, plan.query, strict=True)):
        if last < 0:
            raise RerouteError(f"Sample {sample} has no prompt token: its attention_mask is all zeros.")
        if len(rows) and rows[-1] >= last:
            raise RerouteError(
                f"The prompt of sample {sample} ends inside or right after its visual tokens, so there is no text to "
                "rank them by. Put the question after the picture, and do not split a prompt into chunks while "
                "routing is enabled."
            )


def _decisions(schedule: Schedule, action: Action, visual: Sequence[Ints]) -> tuple[Decision, ...]:
    visual_counts = tuple(map(len, visual))
    counts = zip(*map(schedule.counts, visual_counts), strict=True)
    decisions: list[Decision] = []
    left_by, candidates = -1, visual_counts
    columns = zip(schedule.layers, schedule.rankers, counts, schedule.each_action(action), strict=True)
    for stage, (layer, ranker, k, does) in enumerate(columns):
        score_layer = layer + ranker.layer_offset
        decisions.append(Decision(stage, layer, score_layer, candidates, k, ranker, does, left_by))
        if does == "remove":
            left_by, candidates = stage, k
    return tuple(decisions)

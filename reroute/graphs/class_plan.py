"""What a prefill reads of its plan, where one prefill stands for all prompts of a class: capacities, and one table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from reroute_kernels import SelectMetadata

from ..core.decision import Decision
from ..core.plan import Plan
from ..core.plan_tensors import PlanTensors
from ..core.schedule import Action, Schedule
from .shape_class import ShapeClass
from .table import PromptTable

__all__ = ["ClassPlan", "class_tensors"]


@dataclass(frozen=True, eq=False)
class ClassPlan(Plan):
    """A plan whose counts are capacities: no prompt of ``shape_class`` has more of anything.

    The L rows of a sample are its tokens without padding, and fillers behind them. So no row is known to be a filler
    here, and none needs a mask: attention is causal, and a filler comes after all that is real.
    """

    shape_class: ShapeClass = field(kw_only=True)

    @classmethod
    def of(cls, shape_class: ShapeClass, schedule: Schedule, action: Action) -> ClassPlan:
        """Of the prompts of ``shape_class`` under ``schedule``, ``action`` being that of the call."""
        batch, (length, *rows) = shape_class.batch, shape_class.rows
        decisions: list[Decision] = []
        left_by, candidates = -1, length
        columns = zip(schedule.layers, schedule.rankers, rows, schedule.each_action(action), strict=True)
        for stage, (layer, ranker, most, does) in enumerate(columns):
            counts = (candidates,) * batch, (min(most, candidates),) * batch
            decisions.append(Decision(stage, layer, layer + ranker.layer_offset, *counts, ranker, does, left_by))
            if does == "remove":
                left_by, candidates = stage, min(most, candidates)
        order = np.tile(np.arange(length), (batch, 1))
        return cls(schedule, 0, order, (), (), (), tuple(decisions), shape_class=shape_class)

    @property
    def changes_nothing(self) -> bool:
        """False: a class of prompts that keep everything has no stages, and needs no plan."""
        return False

    def active(self, stage: int) -> tuple[int, ...]:
        """See ``Plan``."""
        return (self.width(stage),) * self.batch

    def width(self, stage: int) -> int:
        """See ``Plan``."""
        return self.shape_class.rows[stage + 1]

    @property
    def tail(self) -> int:
        """0: which rows of a cache need no list, the prompt's own plan knows."""
        return 0

    @property
    def tail_has_padding(self) -> bool:
        """See ``tail``."""
        return False


def class_tensors(plan: ClassPlan, table: PromptTable, parts: Mapping[str, torch.Tensor]) -> PlanTensors:
    """The index tensors of ``plan``: views of ``parts``, which hold the table of whatever prompt is served.

    Raises:
        RuntimeError: inside a capture, as what is the same for all prompts is uploaded here.
    """
    length = plan.shape_class.rows[0]
    metadata = []
    for decision in plan.decisions:
        width = plan.width(decision.left_by)
        starts = table.starts if decision.from_pool else tuple(b * width for b in range(plan.batch))
        most = (width,) * plan.batch, decision.candidates, (length,) * plan.batch, decision.k
        counts = parts["counts"][decision.stage]
        rows = plan.width(decision.stage)
        metadata.append(SelectMetadata(starts, *most, on_device=counts, static_length=rows))
    return PlanTensors(
        tuple(metadata),
        uploaded=None,
        starts=parts["counts"][0, 0],  # the first decision is made in the pool
        **{name: parts[name] for name in SHARED},
        visual_indices=torch.arange(length, device=parts["rows"].device)[None],
    )


SHARED = ("queries", "dropped", "rows", "tokens", "inverse_index", "positions", "candidates", "text_rows")
"""Parts that a plan's own tensors have too."""

"""Prefills of a few tokens that make every decision of a schedule and run no layer: what warms kernels up."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from reroute_kernels import Backend, PagedPool

from .config import Settings
from .core.home import Home, PooledHome
from .core.plan import Plan, make_plan
from .core.prefill import PositionTables
from .core.schedule import Schedule
from .core.workspace import Workspace
from .rankers import RANKERS, RandomScores, Ranker
from .transformers import ModelAdapter
from .transformers.context import RoutedPrefill

__all__ = ["ShortPrefills", "long_prompts"]

TEXT, VISUAL = 0, 1
PROMPT = np.array([TEXT] * 4 + [VISUAL] * 16 + [TEXT] * 4)


class ShortPrefills:
    """Prefills of one prompt, or two, of a few tokens, by the code that runs those of long ones.

    So types, strides and addresses come from where they come from in a prefill that is served: the embedding, the
    rotary tables, the norms and projections of every scoring layer, the pool.
    """

    def __init__(self, adapter: ModelAdapter, settings: Settings) -> None:
        """Embed two prompts."""
        self._adapter, self._settings = adapter, settings
        self.hidden, self._positions, ids = _embedded(adapter, 2, len(PROMPT))
        self.tables = PositionTables(*adapter.rope_tables(self.hidden, ids), self._positions)

    def run(self, backend: Backend, pool: PagedPool, batch: int) -> None:
        """Prefills of one prompt, and of two if ``batch`` is more than 1."""
        for prompts in range(1, min(batch, 2) + 1):
            for has_ids in (True,) if self._adapter.renumbers else (True, False):
                self._prefill(prompts, has_ids, backend, pool)

    def _prefill(self, prompts: int, has_ids: bool, backend: Backend, pool: PagedPool) -> None:
        def home(plan: Plan, hidden: torch.Tensor, tables: PositionTables, workspace: Workspace | None) -> Home:
            return PooledHome(plan, backend, pool, workspace)

        schedule, action = _with_known_rankers(self._settings.schedule), self._settings.config.action
        ids = np.tile(PROMPT, (prompts, 1))
        plan = make_plan(ids, np.ones_like(ids, dtype=bool), (VISUAL,), schedule, action)
        assert plan is not None
        hidden = self.hidden[:prompts]
        forward = RoutedPrefill(plan, self._settings, self._adapter, home)
        try:
            for layer in range(len(self._adapter.layers)):
                kwargs = {
                    "position_embeddings": (self.tables.cos[:prompts], self.tables.sin[:prompts]),
                    "position_ids": self._positions[:prompts] if has_ids else None,
                }
                hidden = forward.before_layer(layer, hidden, kwargs).clone()  # as if the layer had run
                hidden = forward.after_layer(layer, hidden)
        finally:
            forward.close()


def long_prompts(
    adapter: ModelAdapter, settings: Settings, visual: int, text: int, batch: int
) -> tuple[Plan, torch.Tensor, torch.Tensor]:
    """The plan of ``batch`` prompts of so many tokens, their embeddings and rotary position ids."""
    ids = np.tile([VISUAL] * visual + [TEXT] * text, (batch, 1))
    plan = make_plan(ids, np.ones_like(ids, dtype=bool), (VISUAL,), settings.schedule, settings.config.action)
    assert plan is not None
    hidden, _, positions = _embedded(adapter, batch, visual + text)
    return plan, hidden, positions


def _embedded(adapter: ModelAdapter, batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Embeddings (B, L, C), positions (B, L), and what rotary tables are made of: the same, or several of them."""
    embedding = adapter.text.get_input_embeddings()
    device = embedding.weight.device
    ids = torch.zeros(batch, length, dtype=torch.int64, device="cpu" if device.type == "meta" else device)
    hidden: torch.Tensor = embedding(ids)
    positions = torch.arange(length, device=hidden.device).expand(batch, -1)
    return hidden, positions, positions if adapter.renumbers else positions.expand(adapter.position_axes, -1, -1)


def _with_known_rankers(schedule: Schedule) -> Schedule:
    """One's own rankers may not like prompts of a few tokens, and others have no pictures here.

    Any scores need the same kernels.
    """
    known = tuple(RANKERS.values())

    def usable(ranker: Ranker) -> bool:
        return type(ranker) in known and not ranker.needs_vision

    return replace(schedule, rankers=tuple(r if usable(r) else RandomScores() for r in schedule.rankers))

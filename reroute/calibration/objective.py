"""How far a routed model is from the plain one: the divergence of what they predict along the plain one's answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..core.schedule import Action, Schedule
from ..errors import RerouteError
from .dense import Model, Reference, resumed_at

if TYPE_CHECKING:
    from ..core.plan import Plan
    from ..handle import Handle

__all__ = ["CAP", "Objective"]

CAP = 5.0
"""Most that one prompt counts, in nats: how wrong a wrong answer is says little."""
SAME = 0.01
"""Nats that may lie between two runs of the plain model, by the order of arithmetic in half precision."""
CHUNK = 1 << 25
"""Logits that are compared at once."""


class Objective:
    """Divergence of each prompt under a schedule: min(5, mean over the tokens of its answer of KL(dense || routed)).

    The prompt's last token decides, as it does in ``generate``: the answer ranks nothing. Layers before the first
    decision do not run, as they would compute what the plain model did.
    """

    def __init__(self, model: Model, handle: Handle, references: Sequence[Reference]) -> None:
        """``handle`` routes ``model``, of which ``references`` are."""
        self._model, self._handle, self._references = model, handle, references
        self.prompts = sum(len(reference.indices) for reference in references)

    @torch.no_grad()
    def __call__(self, schedule: Schedule, action: Action) -> tuple[float, ...]:
        """Divergences in nats, in the order of the prompts.

        Raises:
            RerouteError: the model cannot be routed so.
        """
        found = [0.0] * self.prompts
        with self._handle.at(schedule=schedule, action=action):
            for reference in self._references:
                for index, value in zip(reference.indices, self._batch(reference), strict=True):
                    found[index] = min(CAP, value)
        return tuple(found)

    @torch.no_grad()
    def check_plain(self) -> None:
        """Check that the plain model predicts the same once more when it is given no more than runs here get.

        Raises:
            RerouteError: it is told more of pictures than their embeddings.
        """
        if max(self._divergences(self._references[0], None)) > SAME:
            raise RerouteError(
                "This model cannot be calibrated: its decoder is told more of pictures than their embeddings (where "
                "they are, or features between its layers), and schedules are tried without. Give method= and keep=."
            )

    def _batch(self, reference: Reference) -> list[float]:
        plan = self._handle.plan(reference.ids, reference.mask, labels=reference.labels)
        return self._divergences(reference, plan)

    def _divergences(self, reference: Reference, plan: Plan | None) -> list[float]:
        """Of each sample under ``plan``, where layers before its first decision do not run."""
        output = self._run(reference, plan).flatten(0, 1)
        head = self._model.head
        device = next(head.parameters()).device
        routed = output[reference.rows.to(output.device)].to(device)
        dense, chunk = reference.final.to(device), max(1, CHUNK // head.weight.shape[0])
        pairs = zip(dense.split(chunk), routed.split(chunk), strict=True)
        by_token = torch.cat([_divergence(head(p), head(q)) for p, q in pairs])
        owners = reference.owners.to(device)
        sums = torch.zeros(len(reference.indices), device=device).index_add_(0, owners, by_token)
        means: list[float] = (sums / owners.bincount(minlength=len(sums))).tolist()
        return means

    def _run(self, reference: Reference, plan: Plan | None) -> Tensor:
        """The last hidden states (B, L, C) under ``plan``."""
        model = self._model
        seen = () if plan is None else (*plan.schedule.looks, *(decision.score_layer for decision in plan.decisions))
        first = min(seen, default=0)
        start = max(layer for layer in reference.states if layer <= first)
        state = reference.states[start].to(model.whole.device)
        inputs = model.placed({"attention_mask": reference.mask, "position_ids": reference.positions})
        with self._handle.using(plan), resumed_at(model.layers, start, state):
            # Of the embeddings only size and type matter if any layer is passed over.
            output = model.base(inputs_embeds=state, use_cache=False, return_dict=True, **inputs)
        states: Tensor = output.last_hidden_state
        return states


def _divergence(dense: Tensor, routed: Tensor) -> Tensor:
    """KL(dense || routed) in nats (R,) of logits (R, V)."""
    p, q = dense.float().log_softmax(-1), routed.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)

"""The proof: scores as routing makes them are those of the layer's own attention, seen in a dry run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reroute_kernels import AttentionSpec, RopeTables, SelectMetadata, SelectRows
from reroute_kernels.reference import score_topk

from .dry_run import DryRun, Inputs, Seen
from .facts import LayerFacts, alike, refusal, rotated

if TYPE_CHECKING:
    from .base import ModelAdapter

__all__ = ["prove"]


def prove(adapter: ModelAdapter, facts: LayerFacts, index: int, run: DryRun, inputs: Inputs) -> None:
    """Compare what ``adapter`` says of layer ``index`` with what ``run`` shows: far positions, large logits.

    Raises:
        UnsupportedModelError: it is something else; says where they first differ.
    """
    layer, bound = adapter.layers[index], adapter.bound_to({index: run.layer}, {index: facts})
    plain, turned = run(inputs.unrotated()), run(inputs)
    assert plain is not None  # facts were found out
    assert turned is not None
    normed, last = bound.normalise(index, inputs.hidden[0]), torch.tensor([inputs.hidden.shape[1] - 1])
    spec, tables = bound.attention_spec(index), inputs if bound.rotates(index) else inputs.unrotated()
    query, keys = bound.project_own(index, normed, RopeTables(tables.cos[0], tables.sin[0], last))
    norm = bound.input_norm(index)
    before = keys if spec.key_norm is None else spec.key_norm(keys)
    after = (
        rotated(query.transpose(0, 1), _last(tables), spec.rope),
        rotated(before.transpose(0, 1), tables, spec.rope),
    )
    steps = {
        "the norm before attention": (normed, plain.rows[0][0]),
        "what kernels make of that norm": (normed if norm is None else norm(inputs.hidden[0]), normed),
    }
    if not facts.norms_come_last:  # else heads are others, and only scores the same
        steps |= {
            "queries before their rotation": (query[0], plain.query[:, -1]),
            "keys before their rotation": (before, plain.key.transpose(0, 1)),
            "rotated queries": (after[0][:, 0], turned.query[:, -1]),
            "rotated keys": (after[1], turned.key),
        }
    steps["scores"] = _scores(query, keys, tables, last, spec), _attention(turned)
    wrong = next((step for step, (ours, its) in steps.items() if not alike(ours, its)), None)
    if wrong is not None:
        raise refusal(f"{wrong} are not what its attention function gets", layer, index)


def _last(inputs: Inputs) -> Inputs:
    return inputs._replace(cos=inputs.cos[:, -1:], sin=inputs.sin[:, -1:])


def _scores(query: Tensor, keys: Tensor, inputs: Inputs, last: Tensor, spec: AttentionSpec) -> Tensor:
    """Attention of the last row to each row, mean over heads, as routing ranks by."""
    count = keys.shape[0]
    rows, columns = torch.arange(count)[None], ((0,), (count,), (count,), (0,), (1,))
    metadata = SelectMetadata(*columns, on_device=torch.tensor(columns))
    tables = RopeTables(inputs.cos[0], inputs.sin[0], last)
    selection = score_topk(query, keys, tables, SelectRows(rows, rows[:, :0], rows[0], metadata), spec)
    return selection.scores[0]


def _attention(seen: Seen) -> Tensor:
    """The same from what the attention function gets."""
    query, groups = seen.query[:, -1:], seen.query.shape[0] // seen.key.shape[0]
    scale = seen.options.get("scaling")
    logits = query @ seen.key.repeat_interleave(groups, 0).mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores: Tensor = logits.softmax(-1).mean(0)[0]
    return scores

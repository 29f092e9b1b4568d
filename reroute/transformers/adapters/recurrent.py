"""Layers that do not attend, and may run on the rows that are there if nothing else counts: by a state, or none."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from .dry_run import DryRun, Inputs
from .facts import alike, check_arguments, refusal

__all__ = ["check_recurrent", "check_row_by_row", "mixer_name"]

FILLERS = 5


def mixer_name(layer: Any, default: str) -> str:
    """What ``layer`` calls the part that keeps its state: the one with a place in the cache; ``default`` without."""
    layer = getattr(layer, "_orig_mod", layer)
    found = (name for name, child in layer.named_children() if hasattr(child, "layer_idx"))
    return next(found, default)


def check_recurrent(layer: Any, index: int, run: DryRun, hidden: Tensor, ids: Tensor, *, has_tables: bool) -> None:
    """Check that what ``layer`` makes of rows depends on these rows and their order alone.

    ``hidden`` (1, R, C) at positions ``ids`` (1, R) of its dry ``run``; ``has_tables``: whether it gets rotary tables.

    Raises:
        UnsupportedModelError: it depends on where they are, on what comes after them, or on fillers before them.
    """
    check_arguments(layer, index, run)
    near = torch.arange(ids.shape[1])[None]

    def mixed(hidden: Tensor, ids: Tensor, mask: Any = None) -> Tensor:
        return _mixed(layer, index, run, hidden, ids, mask, has_tables=has_tables)

    plain = mixed(hidden, near)
    if not alike(mixed(hidden, ids), plain):
        raise refusal("its rows depend on where in the prompt they are", layer, index)
    half = hidden.shape[1] // 2
    if not alike(mixed(hidden[:, :half], near[:, :half]), plain[:, :half]):
        raise refusal("its rows depend on what comes after them", layer, index)
    # In a batch of two, as it comes about.
    padded = torch.cat([hidden[:, -FILLERS:], hidden], 1).expand(2, -1, -1)
    mask = torch.ones(padded.shape[:2], dtype=torch.bool)
    mask[1, :FILLERS] = False
    places = torch.arange(padded.shape[1]).expand(2, -1)
    if not alike(mixed(padded, places, mask)[1:, FILLERS:], plain):
        raise refusal("rows that its mask hides leave something behind in its state", layer, index)


def check_row_by_row(layer: Any, index: int, mixer: Any) -> None:
    """Check that ``mixer`` of ``layer`` gets hidden states and nothing else: then it is an MLP as others are.

    Raises:
        UnsupportedModelError: it gets more, by which rows could meet.
    """
    taken = list(inspect.signature(type(mixer).forward).parameters)[1:]
    if len(taken) != 1:
        why = f"its configuration says that it is an MLP alone, and its {type(mixer).__name__} takes {', '.join(taken)}"
        raise refusal(why, layer, index)


def _mixed(layer: Any, index: int, run: DryRun, hidden: Tensor, ids: Tensor, mask: Any, *, has_tables: bool) -> Tensor:
    """What its mixer returns, with rotary tables of these positions."""
    angles = ids[..., None] * torch.linspace(1.0, 0.1, 8)
    tables = angles.cos(), angles.sin()
    try:
        mixed = run.mixed(Inputs(hidden, *tables, ids, mask, tables if has_tables else None))
    except Exception as error:
        why = f"it cannot be run on a few rows to see what its state does ({type(error).__name__}: {error})"
        raise refusal(why, layer, index) from None
    if mixed is None:
        raise refusal("its configuration says that it keeps a state, and it calls an attention function", layer, index)
    return mixed

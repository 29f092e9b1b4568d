"""What a decoder adds to its hidden states between its layers, as it is found when it runs without them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .dry_run import ROWS, on_cpu, rows, states_between
from .places import LEVELS

if TYPE_CHECKING:
    from .base import ModelAdapter

__all__ = ["FeatureForm", "Features", "added_before"]

MASKS = {"visual_pos_masks": (), "vision_mask": (1,)}
"""By which argument a decoder is told where visual tokens are, (B, L, …), and what comes behind these dimensions."""


@dataclass(frozen=True)
class FeatureForm:
    """In which form a decoder gets features.

    - ``argument``: which has an entry (n, C) for each of ``levels``: a mapping if ``is_mapping``, else a sequence.
    - ``mask``: which says where the n visual tokens are, (B, L, …), with dimensions ``more`` at the end.
    """

    argument: str
    levels: tuple[int, ...]
    is_mapping: bool
    mask: str
    more: tuple[int, ...]

    @classmethod
    def of(cls, adapter: ModelAdapter) -> FeatureForm | None:
        """That of a prompt with pictures; None if the decoder gets none, or it is not known in which."""
        names = adapter.text_parameters
        argument = next((name for name in LEVELS if name in names), "")
        mask = next((name for name in MASKS if name in names), "")
        if not (argument and mask):
            return None
        levels = LEVELS[argument](adapter.config)
        return cls(argument, tuple(sorted(levels)), isinstance(levels, Mapping), mask, MASKS[mask])

    def arguments(self, features: Iterable[Tensor], mask: Tensor) -> dict[str, Any]:
        """For a decoder; ``mask`` (B, L)."""
        entries: Any = dict(zip(self.levels, features, strict=True)) if self.is_mapping else list(features)
        shape = (*mask.shape, *(1 for _ in self.more))
        return {self.argument: entries, self.mask: mask.view(shape).expand(*mask.shape, *self.more)}


@dataclass(frozen=True)
class Features:
    """Features (n, C) of each level of ``form``, of the tokens that ``mask`` (B, L) marks, row by row."""

    form: FeatureForm
    levels: tuple[Tensor, ...]
    mask: Tensor

    @classmethod
    def given(cls, kwargs: Mapping[str, Any]) -> Features | None:
        """Those in a decoder's keyword arguments; None if there are none, or they are of a form that nobody knows."""
        argument = next((name for name in LEVELS if kwargs.get(name) is not None), None)
        name = next((name for name in MASKS if isinstance(kwargs.get(name), Tensor)), None)
        if argument is None or name is None:
            return None
        entries, mask = kwargs[argument], kwargs[name]
        is_mapping = isinstance(entries, Mapping)
        keys = tuple(sorted(entries)) if is_mapping else tuple(range(len(entries)))
        levels = tuple(entries[key] for key in keys)
        if mask.ndim < 2 or mask.dtype != torch.bool or not all(isinstance(one, Tensor) for one in levels):
            return None
        form = FeatureForm(argument, keys, is_mapping, name, tuple(mask.shape[2:]))
        return cls(form, levels, mask.flatten(2)[..., 0] if mask.ndim > 2 else mask)


def added_before(adapter: ModelAdapter, form: FeatureForm) -> tuple[int, ...] | None:
    """Of each level of ``form`` the layer before which the decoder adds it, to the rows that are marked.

    The decoder's own code is run on a few random rows, without its layers. None if that fails, or it does anything else
    with features.
    """
    hidden, ids = rows(adapter.text_config.hidden_size)
    ids = ids if adapter.position_axes == 1 else ids.expand(adapter.position_axes, -1, -1)
    with on_cpu():
        mask = (torch.arange(ROWS) % 3 == 1)[None]
        generator = torch.Generator().manual_seed(3)
        features = [torch.randn(int(mask.sum()), hidden.shape[-1], generator=generator) for _ in form.levels]
        try:
            without = states_between(adapter.text, hidden, ids)
            states = states_between(adapter.text, hidden, ids, **form.arguments(features, mask))
        except Exception:
            return None
        found: dict[int, int] = {}
        before = without[0]
        for layer, now in enumerate(states):
            if not torch.equal(now, before):
                level = next((i for i, its in enumerate(features) if torch.equal(now, _added(before, its, mask))), None)
                if level is None or level in found or layer == len(adapter.layers):
                    return None
                found[level] = layer
            before = now
        is_all = len(found) == len(features) and all(torch.equal(one, without[0]) for one in without)
    return tuple(found[level] for level in range(len(features))) if is_all else None


def _added(states: Tensor, features: Tensor, mask: Tensor) -> Tensor:
    out = states.clone()
    out[mask] += features
    return out

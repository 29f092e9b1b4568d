"""From the rows of a class, fillers last, to those of a prompt as eager prefills leave them: copies, and no views."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from reroute_kernels.upload import upload

from ..core.plan import Plan

if TYPE_CHECKING:
    from ..core.plan import Ints

__all__ = ["Alignment", "in_one", "picked"]


class Alignment:
    """Takes what a graph has made for the prompts of ``plan`` out of static memory.

    Dense layers have a column for each logical position, padding included; those of a stage have as many as the
    longest sample needs, and fillers come first. What stands in a column of padding is not defined, but it is finite.
    One prompt without padding is a slice of what the graph has; else rows are picked by an index, which is uploaded
    here, once for all stages.
    """

    def __init__(self, plan: Plan, num_stages: int, device: torch.device) -> None:
        """``num_stages`` that the graph runs: those of ``plan``, or none if it changes nothing."""
        self._batch = plan.batch
        self._widths = [plan.length, *(plan.width(stage) for stage in range(num_stages))]
        active = [plan.lengths, *(plan.active(stage) for stage in range(num_stages))]
        ragged = [i for i, (width, counts) in enumerate(zip(self._widths, active, strict=True)) if min(counts) < width]
        self._index: dict[int, torch.Tensor] = {}
        if ragged:
            picked = [plan.order if i == 0 else _right_aligned(self._widths[i], active[i]) for i in ragged]
            packed = upload(np.concatenate([index.ravel() for index in picked]), device)
            pieces = packed.split([index.size for index in picked])
            shapes = (index.shape for index in picked)
            self._index = {i: its.view(shape) for i, its, shape in zip(ragged, pieces, shapes, strict=True)}

    def is_ragged(self, stage: int) -> bool:
        """Whether some sample has fewer rows than the longest in ``stage`` (-1: the dense layers)."""
        return stage + 1 in self._index

    def lacks(self, stage: int) -> int:
        """How many rows less than logical positions there are in ``stage``."""
        return self._widths[0] - self._widths[stage + 1]

    def states(self, stage: int, buffer: torch.Tensor) -> torch.Tensor:
        """(…, T, D) of ``buffer`` (…, S, D), which is (B, S, D) or (n, B, …, S, D)."""
        wide = _wide(buffer)
        states = self._cut(stage, wide)
        states = states if self.is_ragged(stage) else states.clone(memory_format=torch.contiguous_format)
        return states.view(buffer.dtype)

    def to_copy(self, stage: int, buffer: torch.Tensor) -> torch.Tensor:
        """As ``states``, but perhaps a view, for whoever copies it in this turn."""
        return self._cut(stage, _wide(buffer)).view(buffer.dtype)

    def _cut(self, stage: int, buffer: torch.Tensor) -> torch.Tensor:
        index, width = self._index.get(stage + 1), self._widths[stage + 1]
        if index is None:
            return buffer[..., :width, :]
        if buffer.ndim == 3:
            return picked(buffer, in_one(index.clamp(min=0), buffer.shape[1]))
        shape, batch_dimension = [1] * buffer.ndim, 1
        shape[batch_dimension], shape[-2] = index.shape
        index = index.clamp(min=0).view(shape).expand(*buffer.shape[:-2], width, buffer.shape[-1])
        return buffer.gather(-2, index)

    def hidden(self, states: torch.Tensor) -> torch.Tensor:
        """(B, L', C) of ``states`` (B, L, C) of the dense layers; padding is zero, as after ``Prefill.restore``."""
        out, index = self.states(-1, states), self._index.get(0)
        return out if index is None else out.masked_fill_((index < 0)[..., None], 0)

    def positions(self, columns: torch.Tensor, rows: Sequence[int]) -> list[torch.Tensor]:
        """Of each stage the logical positions (B, T), -1 for fillers.

        ``columns``: those that the graph has, (B, S) of one stage after the other, which has ``rows`` S.
        """
        flat = columns if self._index else columns.clone()
        out = []
        for stage, piece in enumerate(flat.split([self._batch * count for count in rows])):
            index, its = self._index.get(stage + 1), piece.view(self._batch, -1)
            if index is None:
                its = its[:, : self._widths[stage + 1]]
                out.append(its if flat is not columns else its.clone())
            else:
                out.append(its.gather(1, index.clamp(min=0)).masked_fill_(index < 0, -1))
        return out


def in_one(rows: torch.Tensor, length: int) -> torch.Tensor:
    """The ``rows`` (B, T) of samples with ``length`` rows each, numbered through all samples."""
    return rows + torch.arange(len(rows), device=rows.device)[:, None] * length


def picked(states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """(B, T, C) of ``states`` (B, S, C), by numbers as of ``in_one``: PyTorch copies rows of one matrix fastest."""
    return states.flatten(0, 1).index_select(0, rows.flatten()).view(*rows.shape, -1)


def _wide(buffer: torch.Tensor) -> torch.Tensor:
    """Elements of up to 16 bytes in place of those of ``buffer``: PyTorch copies 16-bit ones slowly, one by one."""
    nbytes = buffer.shape[-1] * buffer.element_size()
    fitting = (its for its in (torch.complex128, torch.int64, torch.int32) if nbytes % its.itemsize == 0)
    return buffer.view(next(fitting, buffer.dtype))


def _right_aligned(width: int, counts: tuple[int, ...]) -> Ints:
    """(B, width): 0, 1, 2, … of each sample's rows, at the end; -1 before them."""
    index = np.arange(width) - (width - np.array(counts)[:, None])
    return np.where(index < 0, -1, index)

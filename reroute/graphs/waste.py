"""What the fillers of a class cost, modelled: seconds and FLOPs of a prefill with rows that nobody asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..core.cost import ModelShape, layer_flops
from ..core.schedule import Schedule
from .shape_class import TILE

__all__ = ["Roofline", "Waste", "waste"]


@dataclass(frozen=True)
class Roofline:
    """What a device reaches; of an H100 SXM by default, with shares of its peaks that are assumed, not measured.

    - ``flops``: a second, in matrix products. ``bandwidth``: bytes a second.
    - ``launch``: seconds between two kernels of a graph. ``launches``: kernels of a layer that do little else.
    - ``moves``: how often a layer reads or writes a row of its hidden size outside of matrix products.
    """

    flops: float = 989e12 * 0.65
    bandwidth: float = 3.35e12 * 0.85
    launch: float = 1.5e-6
    launches: int = 36
    moves: int = 14
    bytes_per_element: int = 2

    def layer_seconds(self, shape: ModelShape, rows: int, batch: int) -> float:
        """One decoder layer on ``batch`` samples of ``rows`` rows: each matrix product takes whole tiles of rows, or
        the time in which its weights arrive.
        """
        d, q, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        tokens = batch * rows
        tiles = -(-tokens // TILE) * TILE
        weights = (d * q, d * kv, d * kv, q * d, *(d * shape.intermediate,) * 3)
        products = sum(max(2 * tiles * w / self.flops, self.bytes_per_element * w / self.bandwidth) for w in weights)
        attention = 2 * q * batch * rows * rows / self.flops  # causal
        return (
            products
            + attention
            + self.moves * tokens * d * self.bytes_per_element / self.bandwidth
            + self.launches * self.launch
        )

    def prefill_seconds(self, shape: ModelShape, schedule: Schedule, rows: Sequence[int], batch: int) -> float:
        """All layers, of which those of stage i run on ``rows[i + 1]``, if there are rows of stages."""
        layers = _layers_of(schedule, shape.num_layers, len(rows) - 1)
        return sum(n * self.layer_seconds(shape, r, batch) for n, r in zip(layers, rows, strict=True))


@dataclass(frozen=True)
class Waste:
    """What is spent on fillers, as a share of what the prompt itself needs: 0.1 is a tenth more."""

    seconds: float
    flops: float


def waste(
    shape: ModelShape,
    schedule: Schedule,
    rows: Sequence[int],
    needed: Sequence[int],
    batch: int,
    roofline: Roofline = Roofline(),
) -> Waste:
    """Of a class with ``rows`` that serves a batch of ``batch`` prompts which need ``needed``, without ranking."""
    spent, least = (roofline.prefill_seconds(shape, schedule, each, batch) for each in (rows, needed))
    return Waste(spent / least - 1, _flops(shape, schedule, rows) / _flops(shape, schedule, needed) - 1)


def _layers_of(schedule: Schedule, num_layers: int, num_stages: int) -> tuple[int, ...]:
    """How many layers are dense, and how many each stage has; all are dense if there are none."""
    begins = (0, *schedule.layers[:num_stages], num_layers)
    return tuple(end - begin for begin, end in pairwise(begins))


def _flops(shape: ModelShape, schedule: Schedule, rows: Sequence[int]) -> int:
    layers = _layers_of(schedule, shape.num_layers, len(rows) - 1)
    return sum(n * layer_flops(shape, r) for n, r in zip(layers, rows, strict=True))

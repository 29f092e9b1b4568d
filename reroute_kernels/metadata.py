"""How many rows a decision ranks and keeps, as host integers: exactly, or at most."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor

from .upload import upload

__all__ = ["SelectMetadata"]


@dataclass(frozen=True)
class SelectMetadata:
    """Host integers of one decision, one per sample: the counts of a prompt, or *capacities* for any prompt within.

    Capacities size grids and outputs. How many rows there are is then read on the device only, so one launch, or one
    list of PyTorch operations, serves every prompt whose counts do not exceed them.

    Attributes:
        starts: first key row; samples follow one another.
        kv_lens: key rows the query sees, the pool P of the softmax.
        num_candidates: N_b.
        num_texts: M_b, rows that are always active.
        k: K_b.
        on_device: the five counts as (5, B) int64, for kernels; a plan uploads those of all its decisions together.
        static_length: None if the integers are counts. Else they are capacities, and this is the compact length S: no
            sample has more active rows. They come first then, and fillers behind them; else it is the other way round.
        flat: the five one after the other.

    Raises:
        ValueError: the integers contradict each other.
    """

    starts: tuple[int, ...]
    kv_lens: tuple[int, ...]
    num_candidates: tuple[int, ...]
    num_texts: tuple[int, ...]
    k: tuple[int, ...]
    on_device: Tensor | None = field(default=None, compare=False, repr=False, kw_only=True)
    static_length: int | None = field(default=None, kw_only=True)
    flat: tuple[int, ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Check them."""
        fields = self.as_tuple()
        object.__setattr__(self, "flat", tuple(chain.from_iterable(fields)))
        if not self.starts or len({len(column) for column in fields}) > 1:
            raise ValueError(f"every field needs one integer per sample: got {self}")
        if min(map(min, fields)) < 0:
            raise ValueError(f"counts must not be negative: got {self}")
        for b, (length, candidates, k) in enumerate(zip(self.kv_lens, self.num_candidates, self.k, strict=True)):
            if not k <= candidates <= length:
                raise ValueError(
                    f"sample {b}: k={k} <= num_candidates={candidates} <= kv_len={length} is violated; a candidate is "
                    "a row that the query sees"
                )
        for b, (start, length, following) in enumerate(zip(self.starts, self.kv_lens, self.starts[1:], strict=False)):
            if following < start + length:
                raise ValueError(
                    f"sample {b} has rows {start} to {start + length} and the next begins at {following}; "
                    f"samples follow one another"
                )

    def counts(self, device: torch.device) -> Tensor:
        """``on_device``, or else a new upload.

        Raises:
            ValueError: there are capacities only.
        """
        if self.on_device is not None:
            return self.on_device
        if self.static_length is not None:
            raise ValueError("capacities do not say how many rows a prompt has: pass its counts as on_device")
        return upload(self.as_tuple(), device)

    @property
    def num_active(self) -> tuple[int, ...]:
        """Rows the stage runs per sample, M_b + K_b."""
        return tuple(m + k for m, k in zip(self.num_texts, self.k, strict=True))

    def as_tuple(self) -> tuple[tuple[int, ...], ...]:
        """All counts, field after field."""
        return self.starts, self.kv_lens, self.num_candidates, self.num_texts, self.k

    @cached_property
    def compact_length(self) -> int:
        """The compact length S: ``static_length``, or else the largest of ``num_active``."""
        return max(self.num_active) if self.static_length is None else self.static_length

"""What a cache keeps so that a later turn may choose again: the state of every token before any choice counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ...core.prefill import PositionTables

__all__ = ["KeptStates"]


@dataclass(frozen=True)
class KeptStates:
    """The input of a decoder layer for T logical positions in a row.

    - ``layer``: which layer's. Those before it have run every token.
    - ``start``: logical position of the first token, that of the first routed call.
    - ``hidden`` (B, T, C).
    - ``tables`` (B, T, …): what goes with it into a layer.
    - ``is_visual`` (B, T): which are visual tokens. Which are padding, the mask of the later turn says.
    """

    layer: int
    start: int
    hidden: torch.Tensor
    tables: PositionTables
    is_visual: torch.Tensor

    @classmethod
    def of(
        cls, layer: int, start: int, hidden: torch.Tensor, tables: PositionTables, is_visual: torch.Tensor
    ) -> KeptStates:
        """As the layer gets them, with ``tables`` (B or 1, T, …)."""
        wide = _tables(lambda table: table.expand(len(hidden), *table.shape[1:]), tables)
        return cls(layer, start, hidden, wide, is_visual)

    @property
    def count(self) -> int:
        """T."""
        return self.hidden.shape[1]

    @property
    def end(self) -> int:
        """Logical position of the token that comes next."""
        return self.start + self.count

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tables = (self.tables.cos, self.tables.sin, self.tables.ids)
        return sum(tensor.nbytes for tensor in (self.hidden, *tables, self.is_visual) if tensor is not None)

    def followed_by(self, hidden: torch.Tensor, tables: PositionTables) -> KeptStates:
        """With the text (B, L) that comes next. There are position ids if both have them."""
        new = KeptStates.of(self.layer, self.end, hidden, tables, self.is_visual.new_zeros(hidden.shape[:2]))
        return replace(
            self,
            hidden=torch.cat([self.hidden, hidden], 1),
            tables=_tables(lambda *parts: torch.cat(parts, 1), self.tables, new.tables),
            is_visual=torch.cat([self.is_visual, new.is_visual], 1),
        )

    def until(self, logical: int) -> KeptStates:
        """Of the tokens before the position ``logical``."""
        return self.moved(lambda tensor: tensor[:, : logical - self.start])

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> KeptStates:
        """``move`` of every tensor, as to pick samples along dimension 0."""
        return replace(
            self, hidden=move(self.hidden), tables=_tables(move, self.tables), is_visual=move(self.is_visual)
        )


def _tables(change: Callable[..., torch.Tensor], *tables: PositionTables) -> PositionTables:
    """``change`` of each column of ``tables``; of position ids if all have them."""
    ids = [table.ids for table in tables]
    return PositionTables(
        change(*(table.cos for table in tables)),
        change(*(table.sin for table in tables)),
        None if any(i is None for i in ids) else change(*ids),
    )

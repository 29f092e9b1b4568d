"""What a cache keeps so that a later turn may choose again: the state of every token before any choice counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ...core.prefill import PositionTables

__all__ = ["PADDING", "TEXT", "VISUAL", "KeptStates"]

PADDING, TEXT, VISUAL = -1, 0, 1


@dataclass(frozen=True)
class KeptStates:
    """The input of a decoder layer for T logical positions in a row.

    - ``layer``: which layer's. Those before it have run every token.
    - ``start``: logical position of the first token, that of the first routed call.
    - ``hidden`` (B, T, C).
    - ``tables`` (B, T, …): what goes with it into a layer.
    - ``kinds`` (B, T) int64: ``PADDING``, ``TEXT`` or ``VISUAL``.
    """

    layer: int
    start: int
    hidden: torch.Tensor
    tables: PositionTables
    kinds: torch.Tensor

    @classmethod
    def of(
        cls, layer: int, start: int, hidden: torch.Tensor, tables: PositionTables, kinds: torch.Tensor
    ) -> KeptStates:
        """As the layer gets them, with ``tables`` (B or 1, T, …)."""
        cos, sin, ids = (None if t is None else t.expand(len(hidden), *t.shape[1:]) for t in _columns(tables))
        assert cos is not None and sin is not None
        return cls(layer, start, hidden, PositionTables(cos, sin, ids), kinds)

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
        return sum(t.nbytes for t in (self.hidden, *_columns(self.tables), self.kinds) if t is not None)

    def followed_by(self, hidden: torch.Tensor, tables: PositionTables, kinds: torch.Tensor) -> KeptStates:
        """With the tokens (B, L) that come next. There are position ids if both have them."""
        new = KeptStates.of(self.layer, self.end, hidden, tables, kinds)
        columns = zip(_columns(self.tables), _columns(new.tables), strict=True)
        cos, sin, ids = (None if a is None or b is None else torch.cat([a, b], 1) for a, b in columns)
        assert cos is not None and sin is not None
        return replace(
            self,
            hidden=torch.cat([self.hidden, hidden], 1),
            tables=PositionTables(cos, sin, ids),
            kinds=torch.cat([self.kinds, kinds], 1),
        )

    def cropped(self, newest: int) -> KeptStates:
        """Without the ``newest`` tokens."""
        count = self.count - newest
        return self.moved(lambda tensor: tensor[:, :count])

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> KeptStates:
        """With ``move`` of every tensor, as to pick samples along dimension 0."""
        cos, sin, ids = (None if t is None else move(t) for t in _columns(self.tables))
        assert cos is not None and sin is not None
        return replace(
            self, hidden=move(self.hidden), tables=PositionTables(cos, sin, ids), kinds=move(self.kinds)
        )


def _columns(tables: PositionTables) -> tuple[torch.Tensor | None, ...]:
    return tables.cos, tables.sin, tables.ids

"""Cache layers that hold other rows than the logical sequence.

A routed layer stores only the rows that its stage ran on, yet it answers with the *logical* length, from which
Transformers derives positions and mask sizes. Its class is swapped in place for a subclass of its own, so that no cache
is copied, ``generate()`` keeps the object it knows, and rows are stored as they would be without routing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from transformers.cache_utils import CacheLayerMixin, StaticLayer

from ...errors import UnsupportedCacheError
from .states import KeptStates
from .static import vacated
from .storage import can_crop, columns_of, empty_like, plain_class, visible_columns

__all__ = ["GuardedLayer", "RoutedLayer", "RowPositions", "TornLayer", "stored_as", "turn_into"]

HALF_FILLED = (
    "This cache was left half filled by a forward that did not end: some layers have its tokens and others do not. "
    "Start a new cache."
)

WITHOUT_ROUTING = (
    "This cache was filled while routing was on, and this forward runs without it: its masks and positions would not "
    "fit. Call reroute.enable again to go on with the cache, or start a new one."
)


@dataclass(frozen=True)
class RowPositions:
    """Which rows of the logical sequence a routed layer holds.

    - ``key_positions`` (B, T) int64: logical position of each of the first T rows that were stored, ascending, -1 for
      fillers. Rows stored later follow one by one. A sliding layer may have dropped some of the first; a static one
      lists all that it has room for.
    - ``logical``: the logical length when T rows are stored.
    - ``floor``: the logical length to which the cache may be cropped.
    - ``has_fillers``: whether ``key_positions`` has any -1.
    - ``position_offset`` (B, 1) int64 or None: what renumbered positions subtract from a logical position.
    - ``stage_key``: the routing layers of the stages that stored here: layers of one key hold the same rows.
    """

    key_positions: torch.Tensor
    logical: int
    floor: int
    has_fillers: bool
    position_offset: torch.Tensor | None
    stage_key: tuple[int, ...]

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> RowPositions:
        """Of other samples: ``move`` picks them along dimension 0."""
        offset = None if self.position_offset is None else move(self.position_offset)
        return replace(self, key_positions=move(self.key_positions), position_offset=offset)

    def until(self, logical: int) -> tuple[RowPositions, int]:
        """Those before the position ``logical``, and how many columns are left out. Waits for the device.

        Samples that end in padding have stored fewer rows: where another one's go on, theirs become fillers.
        """
        gone = self.key_positions >= logical
        counts = gone.sum(1)
        columns = int(counts.min())
        kept = self.key_positions.masked_fill(gone, -1)[:, : gone.shape[1] - columns]
        has_fillers = self.has_fillers or bool((counts > columns).any())
        return replace(self, key_positions=kept, logical=logical, has_fillers=has_fillers), columns


ROUTED: list[tuple[Callable[[type[Any]], bool], type[Any]]] = []
"""Kinds of storage that need more than ``RoutedLayer`` has, and which plain classes store so."""


def stored_as(fits: Callable[[type[Any]], bool]) -> Callable[[type[Any]], type[Any]]:
    """Let a subclass of ``RoutedLayer`` be what layers of the plain classes that ``fits`` become."""

    def register(kind: type[Any]) -> type[Any]:
        ROUTED.append((fits, kind))
        return kind

    return register


class GuardedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """A layer of a cache in which some lack rows: takes tokens only in forwards that are adapted to that.

    - ``floor``: the logical length to which it may be cropped. Of what lies before, not all layers have all.
    - ``may_update``: whether it takes tokens, once.
    - ``plain``: its class otherwise.
    """

    floor: int
    plain: ClassVar[type[Any]]
    may_update = False

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles are made anew: the class has no name by which it could be found."""
        return _made, (_kind_of(self), self.plain), vars(self)

    def allow_update(self) -> None:
        """Let the forward that now runs store its tokens here."""
        self.may_update = True

    def forbid_update(self) -> None:
        """Undo ``allow_update``: the forward has ended."""
        self.may_update = False

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Store tokens.

        Raises:
            UnsupportedCacheError: in a forward without routing; nothing is stored then.
        """
        if not self.may_update:
            raise UnsupportedCacheError(WITHOUT_ROUTING)
        self.may_update = False
        keys, values = super().update(*args, **kwargs)  # type: ignore[safe-super]
        return keys, values

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest tokens, whose number is given with a minus sign as everywhere in Transformers.

        Raises:
            UnsupportedCacheError: visual tokens or what lies before them would go, or the layer cannot give tokens
                back (quantised ones; static ones before Transformers 5.24, or with a window that may be full).
        """
        self.check_crop(tokens_to_remove)
        self._crop(-tokens_to_remove)

    def check_crop(self, tokens_to_remove: int) -> None:
        """Check ``crop`` before anything changes.

        Raises:
            UnsupportedCacheError: as ``crop`` does.
        """
        newest = int(self.get_seq_length()) - self.floor
        if not -newest <= tokens_to_remove <= 0:
            raise UnsupportedCacheError(
                f"Cannot crop({tokens_to_remove}) a routed cache: only its {newest} tokens after the visual ones can "
                f"be removed, by crop({-newest}) to crop(0). Start a new cache for a shorter prompt."
            )
        if not can_crop(self):
            raise UnsupportedCacheError(
                f"{self.plain.__name__} cannot give tokens back. Use a DynamicCache, or start a new cache."
            )

    def _crop(self, newest: int) -> None:
        super().crop(-newest)  # type: ignore[misc]

    def reset(self) -> None:
        """Become an ordinary empty layer again; a static one keeps its memory, as those do that are not routed."""
        plain = vacated(self) if isinstance(self, StaticLayer) else empty_like(self)
        self.__class__, self.__dict__ = type(plain), vars(plain)


class RoutedLayer(GuardedLayer):  # type: ignore[no-untyped-call]
    """A cache layer that lacks some rows of the logical sequence; ``rows`` says which it has.

    ``earlier``: what the cache keeps for later turns, in one of its layers.
    """

    rows: RowPositions
    earlier: KeptStates | None = None

    @property
    def floor(self) -> int:  # type: ignore[override]
        """See ``GuardedLayer``."""
        return self.rows.floor

    def begin(self) -> None:
        """The prompt is stored, and ``rows`` says which of it."""

    def get_seq_length(self) -> int:
        """Logical length, from which Transformers derives position ids and mask sizes."""
        if not self.is_initialized or self.keys is None:
            return 0
        return self.rows.logical + columns_of(self, 0) - int(self.rows.key_positions.shape[1])

    @property
    def first_visible(self) -> int:
        """Logical position before which no new token sees anything."""
        return 0

    @property
    def unlisted_room(self) -> int:
        """Columns that it has allocated for good, if ``rows`` does not list them."""
        return 0

    def all_positions_until(self, length: int) -> torch.Tensor:
        """Logical positions (B, T) of all rows that were ever stored, once the cache is of logical ``length``."""
        known = self.rows.key_positions
        if length < self.rows.logical:
            return known[:, : known.shape[1] - (self.rows.logical - length)]
        later = torch.arange(self.rows.logical, length, device=known.device)
        return torch.cat([known, later.expand(known.shape[0], -1)], dim=1)

    def key_positions_with(self, new: int) -> torch.Tensor:
        """Those of the keys that ``new`` more tokens attend to, their own among them."""
        length = self.get_seq_length()
        positions = self.all_positions_until(length + new)
        return positions[:, positions.shape[1] - visible_columns(self, length) - new :]

    def columns_with(self, new: int) -> int:
        """The last column of the logical sequence that Transformers' masks have, with ``new`` more tokens."""
        return self.get_seq_length() + new

    def _crop(self, newest: int) -> None:
        end = self.get_seq_length() - newest
        columns = newest
        if end < self.rows.logical:
            columns -= self.rows.logical - end
            self.rows, known = self.rows.until(end)
            columns += known
        super()._crop(columns)
        self._forget_states(end)

    def _forget_states(self, end: int) -> None:
        if self.earlier is not None:
            self.earlier = self.earlier.until(end)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder samples, and with them what is known of their rows."""
        super().reorder_cache(beam_idx)
        self._move(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat samples, and with them what is known of their rows."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._move(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Select samples, and with them what is known of their rows."""
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._move(lambda t: t[indices])

    def _move(self, move: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.rows = self.rows.moved(move)
        if self.earlier is not None:
            self.earlier = self.earlier.moved(move)


@stored_as(lambda plain: plain is StaticLayer)
class RoutedStaticLayer(RoutedLayer):  # type: ignore[no-untyped-call]
    """A routed layer with room for as many rows as it lacks less than the cache has room for tokens.

    All of its room is listed in ``rows``, since position follows position behind the prompt. So its shapes never
    change, the host has nothing to count while it decodes, and each step takes the same columns of its mask.
    ``max_cache_len`` is the logical one.
    """

    cumulative_length: Any
    max_cache_len: int

    def get_seq_length(self) -> Any:
        """Logical length (), on the device, as of every static layer."""
        ahead = self.rows.logical - self.rows.key_positions.shape[1]
        return self.cumulative_length + ahead if self.is_initialized else 0

    def key_positions_with(self, new: int) -> torch.Tensor:
        """See ``RoutedLayer``: of its whole room, whose columns the mask shows as they are filled."""
        return self.rows.key_positions

    def columns_with(self, new: int) -> int:
        """See ``RoutedLayer``."""
        return self.max_cache_len

    def _crop(self, newest: int) -> None:
        GuardedLayer._crop(self, newest)
        if self.earlier is not None:
            self._forget_states(int(self.get_seq_length()))


class TornLayer(GuardedLayer):  # type: ignore[no-untyped-call]
    """A layer of a cache that a forward has left half filled: takes no tokens from anybody, and gives none away."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Raises UnsupportedCacheError."""
        raise UnsupportedCacheError(HALF_FILLED)

    def crop(self, tokens_to_remove: int) -> None:
        """Raises UnsupportedCacheError."""
        raise UnsupportedCacheError(HALF_FILLED)


def turn_into(layer: Any, kind: type[Any]) -> None:
    """Make ``layer`` one of ``kind`` that stores as it did before."""
    layer.may_update = False  # compiled code is compiled anew if an attribute comes only later
    layer.__class__ = _class_of(kind, plain_class(layer))  # type: ignore[arg-type]  # types are hashable


@functools.cache
def _class_of(kind: Any, plain: Any) -> Any:
    own = kind
    if kind is RoutedLayer:
        own = next((its for fits, its in ROUTED if fits(plain)), kind)
    name = f"{kind.__name__.removesuffix('Layer')}{plain.__name__}"
    # A layer type of Transformers' own stays with the plain class.
    made = type(kind)(name, (own, plain), {"plain": plain, "_layer_type": None, "__doc__": own.__doc__})
    made._layer_type = getattr(plain, "_layer_type", None)  # by which masks look for layers
    return made


def _kind_of(layer: Any) -> type[Any]:
    return next(kind for kind in (RoutedLayer, TornLayer, GuardedLayer) if isinstance(layer, kind))


def _made(kind: type[Any], plain: type[Any]) -> Any:
    """A layer without any attributes."""
    return object.__new__(_class_of(kind, plain))  # type: ignore[arg-type]

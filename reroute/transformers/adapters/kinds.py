"""What each layer of a decoder sees, and so which rankers may decide before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from ...core.layer_names import CHUNKED, FULL, RECURRENT, REFERENCE, ROW_BY_ROW, SLIDING
from ...rankers import Ranker
from .recurrent import mixer_name

if TYPE_CHECKING:
    from .facts import LayerFacts
    from .layers import Layers

__all__ = ["LayerKinds"]


class LayerKinds:
    """Kinds of layers by the configuration, by which the cache is made, and by what is found out about them.

    - ``first_layer``: the first layer that may decide.
    - ``attention``: what a layer calls its attention.
    """

    text_config: Any
    layers: Sequence[Any]
    first_layer: int
    attention: ClassVar[str]
    facts: Callable[[int], LayerFacts]
    _known: Layers
    _kinds: Sequence[str]

    def read_kinds(self) -> None:
        """Take note of the kinds of all layers as the configuration names them now.

        At each call that is planned: to ask a configuration takes microseconds, and each layer is asked several times.
        """
        types = getattr(self.text_config, "layer_types", None)
        if types is None:
            slides = getattr(self.text_config, "sliding_window", None) is not None
            types = [SLIDING if slides else FULL] * len(self.layers)
        self._kinds = [str(kind) for kind in types]

    @property
    def has_one_kind(self) -> bool:
        """Whether all layers attend alike by the configuration, and so get the same mask."""
        kinds = getattr(self.text_config, "layer_types", None)
        return kinds is None or len(set(kinds)) <= 1

    def slides(self, layer: int) -> bool:
        """Whether ``layer`` looks back over a window or within a chunk only, of later tokens at least.

        Then its cache drops rows.
        """
        return self.kind(layer) in (SLIDING, CHUNKED, REFERENCE)

    def keeps_prompt(self, layer: int) -> bool:
        """Whether ``layer`` sees all of the first prompt, and a window of what comes after it."""
        return self.kind(layer) == REFERENCE

    def is_recurrent(self, layer: int) -> bool:
        """Whether ``layer`` keeps a state instead of keys, or the last rows for a convolution."""
        return self.kind(layer) in RECURRENT

    def attends(self, layer: int) -> bool:
        """Whether ``layer`` has keys: neither a state nor an MLP alone."""
        return self.kind(layer) not in (*RECURRENT, *ROW_BY_ROW)

    @cached_property
    def attending(self) -> tuple[int, ...]:
        """Layers that attend."""
        return tuple(filter(self.attends, range(len(self.layers))))

    @cached_property
    def recurrent(self) -> tuple[int, ...]:
        """Layers that keep a state."""
        return tuple(filter(self.is_recurrent, range(len(self.layers))))

    def is_row_by_row(self, layer: int) -> bool:
        """Whether ``layer`` takes each row by itself, and keeps nothing."""
        return self.kind(layer) in ROW_BY_ROW

    def mixer(self, layer: int) -> str:
        """What ``layer`` calls the part in which rows meet: its attention, or what keeps its state."""
        return mixer_name(self.layers[layer], self.attention) if self.is_recurrent(layer) else self.attention

    def is_full_attention(self, layer: int) -> bool:
        """Whether ``layer`` attends to everything before a token, without a sliding window."""
        return self.kind(layer) == FULL and self._window(layer) is None

    def sees_only_before(self, layer: int) -> bool:
        """Whether without a mask a token of ``layer`` sees only what comes before it."""
        return self._known.facts(self, layer, like_others=True).is_causal  # type: ignore[arg-type]

    @cached_property
    def sees_later(self) -> frozenset[bool]:
        """What its layers make of a missing mask: whether a token sees what comes after it. More than one, if not all
        do the same.
        """
        return frozenset(not self.sees_only_before(layer) for layer in self.attending)

    def is_known_kind(self, layer: int) -> bool:
        """Whether ``layer`` does not attend, or attends to all or to a part, as all agree that could tell."""
        kind = self.kind(layer)
        if not self.attends(layer):
            return True
        if kind in (CHUNKED, REFERENCE):
            given = self._given_chunks if kind == CHUNKED else self._given_all
            return self._window(layer) is None and layer in given
        return kind == (FULL if self._window(layer) is None else SLIDING)

    def sees_all(self, layer: int, start: int, end: int) -> bool:
        """Whether the last of the tokens from position ``start`` to ``end`` attends to all of them in ``layer``.

        The layer is one that ``ModelAdapter.check_layers`` has looked at in this call.
        """
        reach = self._chunk if self.kind(layer) == CHUNKED else self.facts(layer).window
        begin = 0 if self.kind(layer) == CHUNKED else start  # chunks begin behind the padding
        return reach is None or end - begin <= reach

    def reach(self, layer: int) -> int | None:
        """How many tokens the last one of a prompt may see in ``layer``: a window, or a chunk. None: all of them."""
        return self._chunk if self.kind(layer) == CHUNKED else self._window(layer)

    def may_decide(self, layer: int, ranker: Ranker) -> bool:
        """Whether a method's ``ranker`` may decide before ``layer``: by attention where it sees everything.

        Where no layer of the model does, those with windows may, for prompts that fit into them.
        """
        return self._may_decide(layer, ranker, self._seeing)

    def can_decide(self, layer: int, ranker: Ranker) -> bool:
        """Whether ``ranker`` can decide before ``layer`` for some prompts: by any attention."""
        return self._may_decide(layer, ranker, self.attends)

    def _may_decide(self, layer: int, ranker: Ranker, sees: Callable[[int], bool]) -> bool:
        looks = (layer + ranker.layer_offset, *ranker.looks_before(layer))
        if layer < self.first_layer or min(looks) < 0:
            return False
        return not ranker.needs_attention or all(map(sees, looks))

    @cached_property
    def _seeing(self) -> Callable[[int], bool]:
        kinds = self._kinds[: len(self.layers)]
        if FULL in kinds:
            return self.is_full_attention
        return self.keeps_prompt if REFERENCE in kinds else self.slides

    @cached_property
    def _given_chunks(self) -> frozenset[int]:
        return self._known.with_mask(self, chunks=True)  # type: ignore[arg-type]

    @cached_property
    def _given_all(self) -> frozenset[int]:
        return self._known.with_mask(self, chunks=False)  # type: ignore[arg-type]

    def kind(self, layer: int) -> str:
        """Of ``layer``, as Transformers names it."""
        return self._kinds[layer]

    @property
    def _chunk(self) -> int:
        return int(self.text_config.attention_chunk_size)

    def _window(self, layer: int) -> int | None:
        """Of what the attention function is told."""
        return self._known.facts(self, layer, like_others=True).window  # type: ignore[arg-type]

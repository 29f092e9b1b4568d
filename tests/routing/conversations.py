"""What was said to a model in the course of several calls, and what the oracle makes of it.

A row is the past of one sample: calls, each by rules of its own or plain, and what was taken back again. The oracle
runs all that was ever said; later tokens do not see what was taken back.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from models import PAD, Sample, Tiny, text
from oracle import MARGIN, Rules, _Turn, run
from support import small
from torch import Tensor

__all__ = [
    "NEW",
    "PROMPTS",
    "Again",
    "Conversation",
    "Crop",
    "Expected",
    "Name",
    "Row",
    "Say",
    "expected",
    "left_of",
    "sample_of",
]

Name = str | tuple[int, ...]
"""Of a sample: the name of a prompt, or the tokens themselves."""

PLAIN = Rules((0,), (1.0,))

PROMPTS = ("question", "like it", "late", "two pictures", "words")
NEW = ("one", "three", "picture", "talk")
"""What may follow; the last two are of one length."""


@dataclass(frozen=True)
class Say:
    """A call of the model. ``query``: the token of the call that ranks, if it is not the last one."""

    name: Name
    rules: Rules | None = None
    query: int | None = None


@dataclass(frozen=True)
class Crop:
    """The newest tokens are taken back."""

    count: int


@dataclass(frozen=True)
class Again:
    """A call that chose again: all that is left of ``events``, of which it is the last one, said in one call."""

    events: Row
    rules: Rules | None
    query: int


Row = tuple[Say | Crop | Again, ...]


@functools.cache
def sample_of(family: str, name: Name) -> Sample:
    """Names end in a digit: which one of their kind."""
    if isinstance(name, tuple):
        return text(*name)
    tiny, kind, seed = small(family), name[:-1], int(name[-1])
    parts: dict[str, Sequence[Any]] = {
        "question": (5, tiny.grid, 5),
        "like it": (5, tiny.grid, 5),
        "late": (2, tiny.grid, 9),
        "two pictures": (1, tiny.grid, 2, tiny.grid, 3),
        "words": (9,),
        "one": (1,),
        "three": (3,),
        "picture": (1, tiny.grid, 3),
        "talk": (1 + len(tiny.prompt(0, tiny.grid)) + 3,),
    }
    return tiny.prompt(100 * list(parts).index(kind) + seed, *parts[kind])


def picked(sample: Sample, live: Sequence[int]) -> Sample:
    """``sample`` with the tokens ``live`` only; its pictures are whole."""
    visual = set(sample.visual)
    assert visual <= set(live), "a picture was cropped"
    places = tuple(i for i, token in enumerate(live) if token in visual)
    return Sample(tuple(sample.ids[i] for i in live), places, sample.pixels, sample.grids)


def left_of(family: str, row: Row) -> Sample:
    """What is left of all that was said."""
    said, live = Sample(()), list[int]()
    for event in row:
        if isinstance(event, Crop):
            live = live[: len(live) - event.count]
        else:
            new = left_of(family, event.events) if isinstance(event, Again) else sample_of(family, event.name)
            live += range(len(said), len(said) + len(new))
            said += new
    return picked(said, live)


@dataclass(frozen=True)
class Expected:
    """``logits`` (L, V) of all that was ever said; ``kept``: rows that each layer has in the end.

    ``is_defined``: whether no selection is a matter of rounding.
    """

    logits: Tensor
    kept: list[int]
    is_defined: bool


@functools.cache
def untouched(family: str) -> Tiny:
    """A model of the oracle's own: what happens in calls of the other one does not happen here."""
    tiny = small(family)
    return replace(tiny, model=copy.deepcopy(tiny.model))


@functools.lru_cache(maxsize=4000)
def expected(family: str, row: Row) -> Expected:
    tiny = untouched(family)
    said, live, sees, turns, positions = Sample(()), list[int](), list[list[int]](), list[_Turn](), list[Tensor]()
    for event in row:
        if isinstance(event, Crop):
            live = live[: len(live) - event.count]
            continue
        new = left_of(family, event.events) if isinstance(event, Again) else sample_of(family, event.name)
        start = len(said)
        said += new
        for token in range(start, len(said)):
            live = [*live, token]
            sees.append(live)
        positions.append(tiny.positions(picked(said, live))[..., -len(new) :])
        query = len(new) - 1 if event.query is None else event.query
        visual = [start + i for i in new.visual] if event.rules else []
        turns.append(_Turn(start, start + query, visual, event.rules))
    visible = torch.zeros(len(said), len(said), dtype=torch.bool)
    for token, seen in enumerate(sees):
        visible[token, seen] = True
    decoder, head = tiny.model.model.language_model, tiny.model.lm_head
    result = run(decoder, head, tiny.embeds(said), torch.cat(positions, -1), turns, PLAIN, visible=visible)
    return Expected(result.logits, result.active[:, live].sum(1).tolist(), result.margin > MARGIN)


@dataclass
class Conversation:
    """A cache and what went into it.

    ``columns``: per row the tokens of the logical sequence, None for padding. ``floor``: how far a routed cache may be
    cropped. ``tail``: columns after the last picture. ``look``: the layer whose states are kept, for the columns from
    ``start`` to ``kept``, which the events from ``began`` on have said.
    """

    family: str
    cache: Any
    rows: list[Row]
    columns: list[list[int | None]]
    floor: int = 0
    tail: int = 0
    look: int | None = None
    began: int = 0
    start: int = 0
    kept: int = 0
    is_routed: bool = False
    is_renumbered: bool = False
    is_broken: bool = False
    is_busy: bool = False

    @property
    def length(self) -> int:
        return len(self.columns[0]) if self.columns else 0

    def ids(self) -> Tensor:
        return torch.tensor([[PAD if token is None else token for token in row] for row in self.columns])

    def mask(self) -> Tensor:
        return torch.tensor([[int(token is not None) for token in row] for row in self.columns])

    def last_picture(self) -> int:
        """One past the column of the last visual token since ``start``."""
        ends = []
        for row, columns in zip(self.rows, self.columns, strict=True):
            sample, before = left_of(self.family, row), len(left_of(self.family, row[: self.began]))
            places = [column for column, token in enumerate(columns) if token is not None]
            ends += [places[i] + 1 for i in sample.visual if i >= before]
        return max(ends)

    def spares(self, count: int) -> bool:
        """Whether each row has a token left without the newest ``count`` columns."""
        return all(any(token is not None for token in row[: self.length - count]) for row in self.columns)

    def crop(self, count: int) -> None:
        self.columns = [list(row) for row in self.columns]  # copies share them
        rows = list(self.rows)
        for b, columns in enumerate(self.columns):
            gone = sum(token is not None for token in columns[len(columns) - count :])
            rows[b] = (*rows[b], Crop(gone))
            self.columns[b] = columns[: len(columns) - count]
        self.rows, self.tail, self.kept = rows, self.tail - count, min(self.kept, self.length)

    def move(self, order: Sequence[int]) -> None:
        self.rows = [self.rows[b] for b in order]
        self.columns = [list(self.columns[b]) for b in order]

    def live(self, b: int) -> Sample:
        """The sample of row ``b`` as it is now."""
        return left_of(self.family, self.rows[b])

    @property
    def has_states(self) -> bool:
        """Whether a later call may choose again."""
        return self.look is not None and self.kept == self.length

    def follow(self, tiny: Tiny, new: Sequence[Sample]) -> dict[str, Tensor]:
        """Keyword arguments for ``new``, of one length, after this."""
        given = tiny.inputs(new)
        given["attention_mask"] = torch.cat([self.mask(), given["attention_mask"]], dim=1)
        ids = [tiny.positions(self.live(b) + one)[..., -len(one) :] for b, one in enumerate(new)]
        given["position_ids"] = torch.stack(ids, dim=-2)
        return given

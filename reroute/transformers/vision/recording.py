"""The pictures of one forward, as its rankers see them: which run of the tower made them, and whose they are.

The tower may run in the forward, or before it: ``generate`` has it run first, and hands over its features in
``mm_encoder_outputs``. Those have with them what was kept of the run that made them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ...core.plan import Plan
from ...errors import RerouteError
from ...rankers.vision import Grid, TowerShape
from .base import Tower, TowerRun

if TYPE_CHECKING:
    from ..adapters import ModelAdapter

__all__ = ["Recording", "attach", "recording_of"]

Span = tuple[int, int]

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
"""Arguments from which the tower makes features in a forward, in this order."""
RUN = "_reroute_run"
"""The attribute of features that names the run that made them."""

_NO_TOWER = (
    "A ranker of this schedule looks at the pictures, and in this call they come as features of which nothing is kept "
    "(inputs_embeds, mm_encoder_outputs that were changed or made elsewhere, a cache of features). Pass pixel_values "
    "with input_ids, or what model.get_image_features returned under these settings; or choose other rankers."
)

_OTHERS = (
    "The pictures have another number of patches than there are placeholders that are not padding, and a ranker of "
    "this schedule looks at them. Leave out placeholders that are padding, or choose rankers that do not look at the "
    "pictures."
)


def attach(run: TowerRun, features: Any) -> None:
    """Let ``features``, which the tower has returned outside of a forward, have with them what was kept."""
    setattr(features, RUN, run)


def recording_of(adapter: ModelAdapter, plan: Plan, call: Mapping[str, Any]) -> Recording | None:
    """The recording of a ``call`` of the base model, by name; None if no ranker of ``plan`` looks at pictures.

    Raises:
        RerouteError: what the rankers look at is not there, or not where it is known.
    """
    if not any(decision.ranker.needs_vision for decision in plan.decisions):
        return None
    adapter.tower.check_call(call)
    features = call.get("mm_encoder_outputs") or {}
    sources: list[_Source] = []
    for kind, pixels in PIXELS.items():
        if call.get(pixels) is not None:
            sources.append(_Source(kind, None, None))
        elif features.get(kind) is not None:
            sources.append(_made_before(kind, features[kind], adapter.tower))
    if not sources:
        raise RerouteError(_NO_TOWER)
    if len(sources) == 1:
        ends = list(accumulate(plan.visual_counts))
        spans = [[(end - count, end)] for end, count in zip(ends, plan.visual_counts, strict=True)]
    else:
        spans = _spans(adapter, call)
        if tuple(sum(end - start for start, end in sample) for sample in spans) != plan.visual_counts:
            raise RerouteError(_OTHERS)
    return Recording(adapter.tower, sources, spans)


class _Source(NamedTuple):
    """Features of one ``kind``: the run that made them, None before it, and their order, None if as they came."""

    kind: str
    run: TowerRun | None
    order: list[int] | None


def _made_before(kind: str, features: Any, tower: Tower) -> _Source:
    """Features of images that ``generate`` may have repeated since, image by image, in place."""
    run, parts = getattr(features, RUN, None), features.pooler_output
    if not isinstance(run, TowerRun) or run.tower is not tower or isinstance(parts, torch.Tensor):
        raise RerouteError(_NO_TOWER)
    numbers: dict[int, int] = {}
    order = [numbers.setdefault(id(part), len(numbers)) for part in parts]
    distinct = [parts[order.index(number)] for number in range(len(numbers))]
    places = [part.storage_offset() for part in distinct]  # parts of one tensor, as it was made
    if list(map(len, distinct)) != run.tokens_of_images or places != sorted(places):
        raise RerouteError(_NO_TOWER)
    return _Source(kind, run, order)


class Recording:
    """A ``Vision`` of one forward, once the tower has run."""

    def __init__(self, tower: Tower, sources: Sequence[_Source], spans: Sequence[Sequence[Span]]) -> None:
        """``spans``: per sample, where its visual tokens are among those of all ``sources``."""
        self.tower, self._sources, self._spans = tower, list(sources), spans
        self._device: torch.device | None = None

    def add(self, run: TowerRun) -> None:
        """The tower has run in this forward.

        Raises:
            RerouteError: more often than there are pictures for it.
        """
        for place, source in enumerate(self._sources):
            if source.run is None:
                self._sources[place] = source._replace(run=run)
                return
        raise RerouteError(
            "The vision tower runs more often in this forward than it has pictures, and it is not known which run is "
            "theirs. Call it before or after the forward, or choose rankers that do not look at the pictures."
        )

    def on(self, device: torch.device) -> Recording:
        """Itself, for a decision on ``device``.

        Raises:
            RerouteError: the tower has not run, or pictures and placeholders are not each other's.
        """
        self._device = device
        if any(source.run is None for source in self._sources):
            raise RerouteError(_NO_TOWER)
        held = max((end for spans in self._spans for _, end in spans), default=0)
        if sum(sum(run.tokens_of_images[i] for i in order) for run, order in self._runs) != held:
            raise RerouteError(_OTHERS)
        return self

    def release(self) -> None:
        """No ranker will look any more: let go of states, unless other forwards may come with the same features."""
        for run, _ in self._runs:
            if run.is_for_one:
                run.states.clear()

    @property
    def shape(self) -> TowerShape:
        """See ``Vision``."""
        return self.tower.shape

    @property
    def grids(self) -> list[list[Grid]]:
        """See ``Vision``."""
        frames = [(run.images[i], run.tokens_of_images[i]) for run, order in self._runs for i in order]
        starts = list(accumulate((count for _, count in frames), initial=0))
        placed = [(start, grids) for start, (grids, _) in zip(starts, frames, strict=False)]
        return [
            [grid for first, end in spans for start, grids in placed if first <= start < end for grid in grids]
            for spans in self._spans
        ]

    def states(self, index: int, *, as_run: bool = False) -> list[torch.Tensor]:
        """See ``Vision``."""
        number = self._kept(index)
        return self._per_sample(lambda run: self.tower.tokens(run, number, as_run=as_run))

    def cls(self, index: int) -> list[torch.Tensor]:
        """See ``Vision``."""
        number = self._kept(index)
        of_runs = [(self.tower.cls(run, number).to(self._device).split(1), order) for run, order in self._runs]
        rows = torch.cat([images[i] for images, order in of_runs for i in order])
        return list(rows.split([len(grids) for grids in self.grids]))

    def attention(self, layer: int) -> list[torch.Tensor]:
        """See ``Vision``."""
        number = self._kept(layer)
        return self._per_sample(lambda run: self.tower.attention(run, number), dim=1)

    def keys(self, layer: int) -> list[torch.Tensor]:
        """See ``Vision``."""
        number = self._kept(layer)
        return self._per_sample(lambda run: self.tower.keys(run, number))

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """See ``Vision``."""
        return self.tower.project(features).to(self._device)

    @property
    def _runs(self) -> list[tuple[TowerRun, Sequence[int]]]:
        """The runs, and the images of each in the order of their placeholders."""
        runs = ((source.run, source.order) for source in self._sources)
        return [(run, range(len(run.images)) if order is None else order) for run, order in runs if run is not None]

    def _kept(self, index: int) -> int:
        """The number of a hidden state. RerouteError if nobody asked for it."""
        number = self.tower.state_number(index)
        if any(number not in run.states for run, _ in self._runs):
            raise RerouteError(
                f"Hidden state {index} of the vision tower was not kept: name it in the ranker's tower_states."
            )
        return number

    def _per_sample(self, rows_of: Callable[[TowerRun], torch.Tensor], dim: int = 0) -> list[torch.Tensor]:
        """Of each sample, the rows of its visual tokens: ``rows_of`` gives those of a run, image after image."""
        parts: list[torch.Tensor] = []
        for run, order in self._runs:
            rows = rows_of(run).to(self._device)
            as_made = list(order) == list(range(len(run.images)))
            images = [rows] if as_made else rows.split(run.tokens_of_images, dim)
            parts += images if as_made else [images[i] for i in order]
        every = _joined(parts, dim)
        return [
            _joined([every.narrow(dim, start, end - start) for start, end in spans] or [every.narrow(dim, 0, 0)], dim)
            for spans in self._spans
        ]


def _joined(parts: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _spans(adapter: ModelAdapter, call: Mapping[str, Any]) -> list[list[Span]]:
    """Per sample: where its visual tokens are among those of all images, and then of all videos of the batch.

    Both are scattered in order to placeholders of their own. Reads the ids, and so waits for the device.
    """
    if call.get("input_ids") is None:
        raise RerouteError(_NO_TOWER)
    samples = adapter.visual_runs(call)
    images = sum(length for sample in samples for token, length in sample if token == adapter.visual_ids[0])
    place = dict(zip(adapter.visual_ids, (0, images), strict=True))
    out: list[list[Span]] = []
    for sample in samples:
        spans: list[Span] = []
        for token, length in sample:
            spans.append((place[token], place[token] + length))
            place[token] += length
        out.append(spans)
    return out

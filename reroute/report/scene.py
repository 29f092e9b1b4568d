"""One picture, one question, and what each way of running the model made of them."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from .results import Setup

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from ..demo.tinyvlm.boxes import Box
    from ..trace import Trace

__all__ = ["Answer", "Routed", "Scene", "Stage", "stages_of"]


@dataclass(frozen=True)
class Answer:
    """What was answered. ``box``: in shares of the picture, where the answer is one; None where unknown."""

    text: str
    box: Box | None = None
    correct: bool | None = None
    iou: float | None = None

    def to_json(self) -> dict[str, Any]:
        """For the page."""
        box = self.box and [round(edge, 4) for edge in self.box]
        return {"text": self.text, "box": box, "correct": self.correct, "iou": self.iou}


@dataclass(frozen=True)
class Stage:
    """Layers ``first`` to ``last`` of one sample.

    - ``kept``: the active visual tokens, ascending.
    - ``back``: those of them that an earlier stage deferred; removing would have lost them.
    - ``scores``: one per visual token, None for those that did not compete; empty before the first decision.
    """

    first: int
    last: int
    kept: tuple[int, ...]
    back: tuple[int, ...] = ()
    scores: tuple[float | None, ...] = ()

    def __str__(self) -> str:
        """Layers and counts, such as ``5-7: 16 (9 back)``."""
        layers = str(self.first) if self.first == self.last else f"{self.first}-{self.last}"
        return f"{layers}: {len(self.kept)}" + (f" ({len(self.back)} back)" if self.back else "")

    def to_json(self) -> dict[str, Any]:
        """For the page: scores as bytes in base64, 0 for no score, else 1 to 255 = share of the stage's highest."""
        values = [score for score in self.scores if score is not None]
        low, high = min(values, default=0.0), max(values, default=0.0)
        floor = min(low, 0.0)  # attention is positive; other methods' scores may not be
        span = (high - floor) or 1.0
        levels = bytes(0 if s is None else 1 + round(254 * (s - floor) / span) for s in self.scores)
        heat = base64.b64encode(levels).decode()
        return {"first": self.first, "last": self.last, "kept": self.kept, "back": self.back, "heat": heat}


@dataclass(frozen=True)
class Routed:
    """A setup on this scene. ``note`` is a line of figures such as FLOPs and time."""

    setup: Setup
    answer: Answer
    stages: Sequence[Stage]
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """For the page."""
        return {
            "method": self.setup.title,
            "action": self.setup.action,
            "budget": self.setup.budget,
            "config": json.loads(self.setup.config().to_json()),
            "answer": self.answer.to_json(),
            "stages": [stage.to_json() for stage in self.stages],
            "note": self.note,
        }


@dataclass(frozen=True)
class Scene:
    """``image`` is what the model saw; its ``grid`` (rows, columns) of patches are the visual tokens."""

    image: Image.Image
    grid: tuple[int, int]
    layers: int
    kind: str
    question: str
    runs: Sequence[Routed]
    dense: Answer | None = None
    truth: Answer | None = None
    why: str = ""

    def to_json(self) -> dict[str, Any]:
        """For the page."""
        return {
            "image": data_uri(self.image),
            "size": self.image.size,
            "grid": self.grid,
            "layers": self.layers,
            "kind": self.kind,
            "question": self.question,
            "why": self.why,
            "truth": self.truth and self.truth.to_json(),
            "dense": self.dense and self.dense.to_json(),
            "runs": [run.to_json() for run in self.runs],
        }


def stages_of(trace: Trace, layers: int, sample: int = 0) -> list[Stage]:
    """The stages of one sample of a traced prefill, the dense layers before the first decision included."""
    visual = len(trace.visual[sample])
    starts = [stage.layer for stage in trace]
    stages = [Stage(0, starts[0] - 1, tuple(range(visual)))] if starts[0] else []
    deferred: set[int] = set()
    for decision, (first, end) in zip(trace, pairwise([*starts, layers]), strict=True):
        kept = tuple(decision.kept[sample].tolist())
        back = tuple(sorted(deferred.intersection(kept)))
        scores = _spread(decision.candidates[sample], decision.scores[sample], visual)
        stages.append(Stage(first, end - 1, kept, back, scores))
        deferred.update(set(range(visual)).difference(kept))
    return stages


def _spread(candidates: Tensor, scores: Tensor, visual: int) -> tuple[float | None, ...]:
    by_token = dict(zip(candidates.tolist(), scores.tolist(), strict=True))
    return tuple(by_token.get(token) for token in range(visual))


def data_uri(image: Image.Image, longest: int = 1024) -> str:
    """The picture as a PNG inside a URI, reduced to at most ``longest`` pixels a side."""
    if max(image.size) > longest:
        image = image.copy()
        image.thumbnail((longest, longest))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"

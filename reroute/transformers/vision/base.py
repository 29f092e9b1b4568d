"""What must be known of a vision tower, and what is kept of a run of it. One for another tower is a small subclass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch

from ...errors import RerouteError, UnsupportedModelError
from ...rankers.base import Ranker
from ...rankers.vision import Grid, TowerShape

__all__ = ["Tower", "TowerRun"]


class Tower(ABC):
    """The vision tower of one model, and its projector. What is computed of a run has a row for each visual token."""

    module_types: ClassVar[tuple[str, ...]]
    """Classes of the modules that this knows."""

    def __init__(self, module: Any, projector: Any, config: Any) -> None:
        """The tower ``module`` and ``projector`` of a model with ``config``.

        Raises:
            UnsupportedModelError: the tower is of another kind.
        """
        if type(module).__name__ not in self.module_types:
            raise UnsupportedModelError(
                f"A ranker of this schedule looks at the pictures, and {type(module).__name__} is not a vision tower "
                f"that is known ({', '.join(self.module_types)}). Choose rankers that do not look at them."
            )
        self.module, self.projector, self.config = module, projector, config
        self.layers: Sequence[Any] = list(self._layers())

    @property
    @abstractmethod
    def shape(self) -> TowerShape:
        """Its sizes.

        Raises:
            RerouteError: the configuration makes something else of the tower's states than is known.
        """

    @abstractmethod
    def images(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[list[Grid]]:
        """The grids, in tokens, of the frames of each image or video that the tower is called with; of an image one."""

    @abstractmethod
    def check_call(self, call: Mapping[str, Any]) -> None:
        """Check that a ``call`` of the base model, by name, makes of the states what the configuration says.

        Raises:
            RerouteError: it does not.
        """

    @abstractmethod
    def tokens(self, run: TowerRun, index: int, *, as_run: bool) -> torch.Tensor:
        """See ``Vision.states``."""

    def cls(self, run: TowerRun, index: int) -> torch.Tensor:
        """See ``Vision.cls``; of all images of the run. RerouteError if there is no such row."""
        raise RerouteError(f"{type(self.module).__name__} has no CLS row. Choose rankers that do not look at it.")

    @abstractmethod
    def attention(self, run: TowerRun, layer: int) -> torch.Tensor:
        """See ``Vision.attention``."""

    @abstractmethod
    def keys(self, run: TowerRun, layer: int) -> torch.Tensor:
        """See ``Vision.keys``."""

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """See ``Vision.project``."""
        projected: torch.Tensor = self.projector(features.to(next(self.projector.parameters()).device))
        return projected

    def wanted_by(self, rankers: Iterable[Ranker]) -> frozenset[int]:
        """The hidden states that ``rankers`` read. RerouteError if there are no such states."""
        shape = self.shape
        asked = (ranker.tower_states(shape) for ranker in rankers if ranker.needs_vision)
        return frozenset(self.state_number(index) for states in asked for index in states)

    def state_number(self, index: int) -> int:
        """A hidden state's number from 0, the input of the first layer.

        Raises:
            RerouteError: there is no such state.
        """
        count = len(self.layers) + 1
        if not -count <= index < count:
            raise RerouteError(
                f"The vision tower has the hidden states 0 to {count - 1}, or -{count} to -1, and a ranker asks for "
                f"{index}. Choose others in tower_states."
            )
        return index % count

    @abstractmethod
    def _layers(self) -> Sequence[Any]:
        """The layers that a run goes through, in order."""

    @property
    def _projector_size(self) -> int:
        """Multiply-adds of a token in the projector."""
        return sum(weight.numel() for weight in self.projector.parameters() if weight.ndim == 2)


class TowerRun:
    """What is kept of one run of a tower. States are kept as they are: nothing is copied.

    - ``images``: see ``Tower.images``.
    - ``states``: the hidden states that were ``wanted``, by number.
    - ``rope``: what its layers got as ``position_embeddings``.
    - ``places``: where each token is, row by row of each image, if that is not where it runs; set by its tower.
    - ``is_for_one``: whether one prefill will get its features, that of the ``generate`` in which it is.
    """

    def __init__(
        self, tower: Tower, images: list[list[Grid]], wanted: Collection[int], *, is_for_one: bool = False
    ) -> None:
        """It has not begun."""
        self.tower, self.images, self.is_for_one = tower, images, is_for_one
        self.states: dict[int, torch.Tensor] = {}
        self.rope: tuple[torch.Tensor, torch.Tensor] | None = None
        self.places: torch.Tensor | None = None
        self._wanted = wanted

    def __deepcopy__(self, memo: Any) -> TowerRun:
        """``generate`` copies features for its assistant: they are still of this run."""
        return self

    @property
    def tokens_of_images(self) -> list[int]:
        """Visual tokens of each image or video."""
        return [sum(rows * columns for rows, columns in frames) for frames in self.images]

    def before_layer(self, index: int, hidden: torch.Tensor, kwargs: Mapping[str, Any]) -> None:
        """Take note of the input of a layer."""
        if index in self._wanted:
            self.states[index] = hidden
            self.rope = kwargs.get("position_embeddings")

    def after_layer(self, index: int, output: torch.Tensor) -> None:
        """Take note of the output of a layer: it is a state of its own where no layer follows."""
        if index == len(self.tower.layers) - 1 and index + 1 in self._wanted:
            self.states[index + 1] = output

"""``model.generate`` while routing is on."""

from __future__ import annotations

import functools
import weakref
from typing import Any

from .planner import Planner

__all__ = ["RoutedGenerate"]


class RoutedGenerate:
    """``model.generate`` while routing is on. Holds the model weakly, and a copied model gets its own back."""

    def __init__(self, planner: Planner, model: Any) -> None:
        """Take the place of ``model.generate`` once it is assigned."""
        self.__doc__ = model.generate.__doc__
        self._planner, self._model, self._own = planner, weakref.ref(model), model.__dict__.get("generate")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate, and let the planner know where the prompt ends."""
        model = self._model()
        with self._planner.generating(model, args, kwargs):
            return self._original(model)(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """What the copied model had before."""
        return self._original(memo[id(self._model())])

    def restore(self) -> None:
        """Give the model its own back."""
        model: Any = self._model()
        if model is not None and self._own is None:
            model.__dict__.pop("generate", None)
        elif model is not None:
            model.generate = self._own

    def _original(self, model: Any) -> Any:
        return functools.partial(type(model).generate, model) if self._own is None else self._own

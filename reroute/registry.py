"""Classes by name: those of the package, and those of installed packages that offer some as entry points."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from .errors import RerouteError, unknown

__all__ = ["Registry"]

Kind = TypeVar("Kind")


class Registry(MutableMapping[str, type[Kind]], Generic[Kind]):
    """Classes of one kind by the names under which settings store them; assign to add one.

    A package adds its own where it is installed, in its ``pyproject.toml``::

        [project.entry-points."reroute.methods"]
        mine = "my_package:Mine"

    They are imported when a name is asked for that is not known yet, or all names are.
    """

    def __init__(
        self, kind: str, group: str, classes: Mapping[str, type[Kind]], options: Registry[Any] | None = None
    ) -> None:
        """``kind`` is the word for errors, ``group`` that of the entry points; ``options`` may be of that registry,
        or of this one.
        """
        self._kind, self._group, self._options = kind, group, self if options is None else options
        self._classes = dict(classes)
        self._has_loaded = False

    def __getitem__(self, name: str) -> type[Kind]:
        """The class of this name. KeyError if there is none."""
        if name not in self._classes:
            self._load()
        return self._classes[name]

    def __setitem__(self, name: str, value: type[Kind]) -> None:
        """Add a class."""
        self._classes[name] = value

    def __delitem__(self, name: str) -> None:
        """Take a class out."""
        del self._classes[name]

    def __iter__(self) -> Iterator[str]:
        """All names."""
        self._load()
        return iter(self._classes)

    def __len__(self) -> int:
        """How many there are."""
        self._load()
        return len(self._classes)

    def find(self, name: object) -> type[Kind]:
        """The class of this name. RerouteError if there is none, which lists those that there are."""
        if not isinstance(name, str) or name not in self:
            raise unknown(self._kind, name, self)
        return self[name]

    def named(self, chosen: Any) -> dict[str, Any]:
        """An object, a dataclass, as its name and its options, for JSON; ``built`` makes an equal one.

        Raises:
            RerouteError: its class has no name here.
        """
        name = next((name for name in self if self[name] is type(chosen)), None)
        if name is None or not is_dataclass(chosen):
            where = f"{self._group}.{self._group.rpartition('.')[2].upper()}"
            raise RerouteError(
                f"{type(chosen).__name__} cannot be stored: it must be a dataclass with a name in {where}."
            )
        options = ((field.name, getattr(chosen, field.name)) for field in fields(chosen))
        return {"name": name, **{key: self._written(option) for key, option in options}}

    def built(self, written: Mapping[str, Any]) -> Any:
        """The object that ``named`` wrote.

        Raises:
            RerouteError: no class of this name, or options that it refuses.
            TypeError, KeyError: not what ``named`` writes.
        """
        options = dict(written)
        kind: Any = self.find(options.pop("name"))
        return kind(**{key: self._read(option) for key, option in options.items()})

    def _written(self, option: Any) -> Any:
        return self._options.named(option) if is_dataclass(option) else option

    def _read(self, option: Any) -> Any:
        if isinstance(option, dict):
            return self._options.built(option)
        return tuple(option) if isinstance(option, list) else option  # JSON has lists where options are tuples

    def _load(self) -> None:
        if self._has_loaded:
            return
        self._has_loaded = True
        for entry in entry_points(group=self._group):
            if entry.name in self._classes:
                continue
            try:
                self._classes[entry.name] = entry.load()
            except Exception as error:
                warnings.warn(
                    f"The {self._kind} {entry.name!r} ({entry.value}) cannot be imported: {error}", stacklevel=2
                )

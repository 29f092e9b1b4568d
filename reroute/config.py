"""The settings of routing as one object, which can be stored with the results that belong to them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, get_args

import torch

from reroute_kernels import BACKENDS, Backend, PagedPool, check_backend, resolve

from .checks import check_name, shown
from .core.moving import moved
from .core.schedule import Action, Schedule
from .core.solver import check_keep
from .errors import RerouteError
from .graphs import Graphs
from .methods import METHODS, Method, get
from .rankers import Ranker

__all__ = ["RoutingConfig", "Settings", "check_arguments"]

VERSION = 1
"""Of what ``to_json`` writes."""

DEFAULT_METHOD = "diverse"


@dataclass(frozen=True)
class RoutingConfig:
    """How a model is routed; see ``reroute.enable``, which takes the same settings one by one.

    - ``method``: a name, a ``Method``, or None, which is ``"diverse"`` unless there is a ``schedule``.
    - ``action``: ``"route"`` or ``"remove"``.
    - ``keep``: budget avg_T / N, or None for the ratios of the method.
    - ``schedule``: decisions, instead of those of ``method`` and ``keep``.
    - ``backend``: ``"auto"``, ``"torch"`` or ``"triton"``.
    - ``trace``: keep the decisions of the last prefill.
    - ``reopens``: later turns choose again among all visual tokens.
    - ``graphs``: prefills replay CUDA graphs; True is ``Graphs()``.

    Raises:
        RerouteError: settings that cannot be right whatever the model and the machine.
    """

    method: str | Method | None = None
    action: Action = "route"
    keep: float | None = None
    schedule: Schedule | None = None
    backend: str = "auto"
    trace: bool = False
    reopens: bool = False
    graphs: bool | Graphs = False

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        check_name("action", self.action, get_args(Action))
        if not isinstance(self.schedule, Schedule | None):
            raise RerouteError(
                f"schedule must be a reroute.Schedule, not {shown(self.schedule)}: pass Schedule(layers=(3, 7), "
                "ratios=(0.5, 0.25)), Schedule.from_dict(columns) of a dict, or Schedule.from_json(text) of JSON."
            )
        for name in ("trace", "reopens"):
            if not isinstance(value := getattr(self, name), bool):
                raise RerouteError(f"{name} must be True or False, not {shown(value)}.")
        if not isinstance(self.graphs, bool | Graphs):
            raise RerouteError(f"graphs must be True, False or a reroute.Graphs, not {shown(self.graphs)}.")
        if self.graphs is True:
            object.__setattr__(self, "graphs", Graphs())
        if self.schedule is not None and self.keep is not None:
            raise RerouteError("Give either schedule= (explicit ratios) or keep= (a budget to solve for), not both.")
        if self.schedule is not None and self.method is not None:
            raise RerouteError(
                "Give either schedule= or method=, not both: a method is a name for a schedule and its rankers. To "
                "rank a schedule's decisions by something else, pass Schedule(…, rankers=(RandomScores(),))."
            )
        if self.method is not None:
            get(self.method)
        if self.keep is not None:
            object.__setattr__(self, "keep", check_keep(self.keep))
        check_name("backend", self.backend, BACKENDS)

    @property
    def method_name(self) -> str:
        """Of the method; ``"schedule"`` if there is only a schedule."""
        if self.schedule is not None:
            return "schedule"
        return get(self.method or DEFAULT_METHOD).name

    @property
    def in_words(self) -> str:
        """Method, action and, if it is given, budget, as handles show themselves."""
        return f"{self.method_name}, {self.action}" + ("" if self.keep is None else f", keep={self.keep:.4g}")

    def backend_on(self, device: torch.device) -> Backend:
        """What runs operations on ``device``.

        Raises:
            RerouteError: REROUTE_BACKEND asks for one that there is not.
            reroute_kernels.BackendUnavailable: it cannot run there; says why.
        """
        with _of_environment():
            return resolve(self.backend, device)

    def check_backend(self) -> None:
        """Raise what ``backend_on`` would raise for any device of this machine, but without touching a GPU."""
        with _of_environment():
            check_backend(self.backend)

    def schedule_for(self, num_layers: int) -> Schedule:
        """The schedule for a model of ``num_layers`` decoder layers.

        Raises:
            RerouteError: no ratios of the method reach the budget ``keep``.
        """
        if self.schedule is not None:
            return self.schedule
        method = get(self.method or DEFAULT_METHOD)
        if self.keep is not None:
            method = method.with_budget(self.keep, num_layers, self.action)
        return method.schedule(num_layers, self.action)

    def changed(
        self,
        *,
        method: str | Method | None = None,
        action: Action | None = None,
        keep: float | None = None,
        schedule: Schedule | None = None,
        reopens: bool | None = None,
    ) -> RoutingConfig:
        """The settings with those that are given. A ``schedule`` ends ``method`` and ``keep``; these end one."""
        if schedule is None:
            schedule = self.schedule if method is None and keep is None else None
            keep = self.keep if keep is None else keep
            method = self.method if method is None else method
        action = self.action if action is None else action
        reopens = self.reopens if reopens is None else reopens
        return replace(self, method=method, action=action, keep=keep, schedule=schedule, reopens=reopens)

    def for_model(self, num_layers: int) -> Settings:
        """The settings worked out for a model of ``num_layers`` decoder layers. Raises what ``schedule_for`` does."""
        return Settings(self, self.schedule_for(num_layers))

    def to_json(self) -> str:
        """The settings as a JSON object; ``from_json`` gives equal ones back, if methods and rankers have names there.

        Raises:
            RerouteError: the method or its ranker has no name in its registry, or options that JSON cannot hold.
        """
        written: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        if isinstance(self.method, Method):
            written["method"] = METHODS.named(self.method)
        if self.schedule is not None:
            written["schedule"] = self.schedule.as_dict()
        if isinstance(self.graphs, Graphs):
            written["graphs"] = asdict(self.graphs)
        try:
            return json.dumps({"version": VERSION, **written})
        except TypeError as error:
            raise RerouteError(f"The options of {self.method_name!r} cannot be stored: {error}.") from None

    @classmethod
    def from_json(cls, text: str) -> RoutingConfig:
        """The settings that ``to_json`` wrote.

        Raises:
            RerouteError: not such an object, one of a later version, or settings that cannot be right.
        """
        try:
            read = dict(json.loads(text))
            version = read.pop("version", None)
        except (TypeError, ValueError, RecursionError) as error:
            raise _unreadable(error) from None
        if version != VERSION:
            raise RerouteError(
                f"A routing configuration of version {version} cannot be read; this release knows version {VERSION}."
            )
        try:
            if isinstance(read.get("method"), dict):
                read["method"] = METHODS.built(read["method"])
            if read.get("schedule") is not None:
                read["schedule"] = Schedule.from_dict(read["schedule"])
            if isinstance(read.get("graphs"), dict):
                read["graphs"] = Graphs(**read["graphs"])
            return cls(**read)
        except RerouteError:
            raise
        except (TypeError, KeyError, ValueError) as error:
            raise _unreadable(error) from None


@dataclass(frozen=True, eq=False)
class Settings:
    """What a call is routed by: a configuration, and what it means for one model."""

    config: RoutingConfig
    schedule: Schedule

    @property
    def keeps_all(self) -> bool:
        """Whether no visual token is ever left out: the plain model, whatever the prompt."""
        return min(self.schedule.ratios) == 1

    def moved(self, num_layers: int, may_decide: Callable[[int, Ranker], bool]) -> Settings:
        """Those with decisions of a method where a ranker ``may_decide``; those of a schedule of the caller stay.

        Raises:
            RerouteError: no ratios of the method reach the budget ``keep`` there.
        """
        if self.config.schedule is not None or self.keeps_all:
            return self
        return replace(self, schedule=moved(self.schedule, num_layers, may_decide, self.config.keep))

    @property
    def needs_vision(self) -> bool:
        """Whether a ranker looks at the pictures."""
        return not self.keeps_all and any(ranker.needs_vision for ranker in self.schedule.rankers)


def check_arguments(config: object, pool: object) -> None:
    """Check the types of what ``reroute.enable`` takes beside single settings.

    Raises:
        RerouteError: one of them is something else; says what to pass.
    """
    if not isinstance(config, RoutingConfig | None):
        raise RerouteError(
            f"config must be a reroute.RoutingConfig, not {shown(config)}: pass RoutingConfig(keep=0.33), or "
            "RoutingConfig.from_json(text) of what to_json wrote."
        )
    if not isinstance(pool, PagedPool | None):
        raise RerouteError(
            f"pool must be a reroute_kernels.PagedPool, not {shown(pool)}: to bound its memory pass "
            "PagedPool(4096, torch.float16, 'cuda', max_bytes=256 << 20), with the model's width and dtype."
        )


@contextmanager
def _of_environment() -> Iterator[None]:
    """A backend that is not known here is one that the environment asks for: names of settings are checked."""
    try:
        yield
    except ValueError as error:
        raise RerouteError(f"{error}. Unset REROUTE_BACKEND, or set it to one of these.") from None


def _unreadable(error: Exception) -> RerouteError:
    return RerouteError(f"Not a routing configuration: {error}. Pass what RoutingConfig.to_json wrote.")

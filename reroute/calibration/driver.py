"""``reroute.calibrate``: from a model and prompts to a schedule and a report."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any, get_args

from ..api import enable, handle_of
from ..checks import check_name, is_count, shown, whole
from ..core.cost import ModelShape
from ..core.schedule import Action, Schedule
from ..core.solver import check_keep
from ..errors import RerouteError
from ..files import check_writable
from ..methods import Method, get
from ..schedule_file import ScheduleFile
from ..transformers import adapter_of
from ..transformers.parallel import has_distributed_weights
from .dense import Model, answer, refer
from .forecast import forecast
from .objective import Objective
from .prompts import Prompts
from .proposal import Space
from .report import Calibration, compare, doubts
from .search import Evaluation, best_of, climb
from .state import State, digest_of

__all__ = ["calibrate"]

logger = logging.getLogger("reroute")

Progress = Callable[[str], object]


def calibrate(
    model: Any,
    prompts: Iterable[Mapping[str, Any]],
    *,
    keep: float,
    action: Action = "route",
    methods: Sequence[str | Method] = ("pdrop", "fastv", "diverse"),
    out: str | os.PathLike[str] | None = None,
    evaluations: int = 80,
    max_new_tokens: int = 32,
    batch_tokens: int = 8192,
    seed: int = 0,
    backend: str = "auto",
    progress: Progress | None = None,
) -> Calibration:
    """Find the schedule of a budget under which ``model`` stays nearest to what it is without routing. Needs no labels.

    The plain model answers every prompt greedily. A schedule is as good as the mean over prompts of min(5, mean over
    the answer's tokens of KL(dense || routed)), in nats, given the answer so far. A hill climb moves, adds, drops and
    scales decisions of the best schedules so far, and lets others rank them, from those of ``methods``; all of them run
    the budget exactly. A random half of the prompts chooses, and all figures of the report are of the other half.

    Args:
        model: a supported ``…ForConditionalGeneration`` that is not routed now. Nobody else may call it meanwhile.
        prompts: for each prompt what ``model.generate`` takes: what its processor returns for one prompt, on any
            device. Give 100 or more, of every kind that will be asked: a schedule that was calibrated on one kind of
            question can fail at others.
        keep: budget: visual tokens per layer, mean over all layers, as a share of all (avg_T / N).
        action: what the schedule is for: ``"route"``, or ``"remove"``, whose ratios only fall.
        methods: names or methods with whose schedules the search begins, as far as they reach the budget, and which are
            compared with what is found. Whatever ranks one of their decisions may rank any; without ``"diverse"`` the
            last token's attention ranks all.
        out: a file for the schedule, which ``reroute.enable(model, schedule=out)`` takes. An interrupted calibration
            leaves ``OUT.state`` beside it, and the same call goes on from there.
        evaluations: how many schedules are tried.
        max_new_tokens: of an answer that are compared; the end of it counts as one.
        batch_tokens: most tokens of a forward, unless one prompt has more.
        seed: of the halves and the search. With equal arguments the same is found.
        backend: see ``reroute.enable``.
        progress: is told a line before it begins, which counts the forwards, and one for each schedule that was tried.
            Default: logged at level INFO.

    Returns:
        The schedule and the report, which ``print`` shows.

    Raises:
        RerouteError: the model, a prompt, the budget or ``out`` cannot be, or the state beside ``out`` is of another
            calibration. Nothing has run then.
    """
    keep = _budget(keep, action, evaluations, max_new_tokens, batch_tokens, seed)
    path = None if out is None else Path(out)
    if path is not None:
        check_writable(path)
    _check_plain(model)
    adapter = adapter_of(model)
    if adapter.base is model or adapter.decoder_embeds:
        raise RerouteError(
            f"{type(model).__name__} cannot be calibrated: calibration runs its decoder on embeddings, through a base "
            "model without the head, and here these are not parts of their own. Choose a method and keep= instead."
        )
    read = Prompts.read(prompts, adapter.visual_ids)
    visual, may_decide = tuple(sorted({p.visual for p in read.all})), cache(adapter.may_decide)
    space = Space(keep, len(adapter.layers), action, visual, _chosen(methods), may_decide)
    about: dict[str, Any] = {"keep": keep, "action": action, "seed": seed, "max_new_tokens": max_new_tokens}
    published, left_out = space.published(), space.left_out()
    _check_decoder_alone(published)
    about["methods"] = {name: schedule.to_json() for name, schedule in published.items()}
    state = State.beside(path, {"model": digest_of(model), "prompts": read.digest, **about})
    answers, history = state.read()
    choosing, judging = _halves(len(read.all), seed)
    shape, plain = ModelShape.from_config(adapter.text_config), Model.of(model, adapter)
    tell: Progress = logger.info if progress is None else progress
    runs = (max(0, evaluations - len(history)), 2 * (1 + len(published)))
    parts = [[read.all[i] for i in half] for half in (choosing, judging)]
    tell(str(forecast(shape, parts, runs, space.starts()[0].schedule, max_new_tokens, batch_tokens)))
    for note in left_out:
        tell(note)
    if history:
        tell(f"{len(history)} schedules were tried before")

    with enable(model, keep=1.0, backend=backend) as handle:
        if answers is None:
            answers = answer(plain, read.all, max_new_tokens, batch_tokens)
            state.write(answers, history)
        kept = partial(_keep, state, answers, tell, evaluations)
        last = space.last_first_layer
        objective = Objective(plain, handle, refer(plain, parts[0], _at(answers, choosing), last, batch_tokens))
        objective.check_plain()
        history = climb(space, objective, evaluations=evaluations, seed=seed, history=history, done=kept)
        best = best_of(history)
        compared = {"calibrated": best.proposal.schedule, **published}
        objective = Objective(plain, handle, refer(plain, parts[1], _at(answers, judging), last, batch_tokens))
        comparisons, notes = compare(objective, shape, parts[1], compared, action)
    result = Calibration(
        schedule=best.proposal.schedule,
        keep=keep,
        action=action,
        num_layers=space.num_layers,
        evaluations=len(history),
        chosen_on=len(choosing),
        mean_chosen=best.mean,
        comparisons=tuple(comparisons),
        warnings=(*read.warnings, *doubts(comparisons)),
        notes=(*left_out, *notes),
    )
    if path is not None:
        ScheduleFile(path, result.schedule, space.num_layers).write(_about(result))
        state.remove()
    return result


def _keep(
    state: State, answers: Sequence[Sequence[int]], tell: Progress, evaluations: int, found: Sequence[Evaluation]
) -> None:
    """One more schedule was tried."""
    state.write(answers, found)
    last, best = found[-1], best_of(found)
    tell(f"{len(found):3} of {evaluations}  KL {last.mean:.4f}  best {best.mean:.4f}  {last.proposal}")


def _at(items: Sequence[list[int]], indices: Sequence[int]) -> list[list[int]]:
    return [items[i] for i in indices]


def _check_plain(model: Any) -> None:
    """RerouteError unless ``model`` is the plain one, ready for inference."""
    if handle_of(model) is not None:
        raise RerouteError("This model is routed now: call reroute.disable(model), as calibrate needs the plain one.")
    if model.training:
        raise RerouteError("The model is in training mode, in which answers are random: call model.eval() first.")
    if has_distributed_weights(model):
        raise RerouteError(
            "The model is spread over processes, each of which would write the same files. Calibrate in one process, "
            "with device_map if need be: the schedule serves the others too."
        )


def _chosen(methods: Sequence[str | Method]) -> tuple[Method, ...]:
    """The methods to begin with. RerouteError if there is none, or one is not known."""
    if isinstance(methods, str) or not methods:
        raise RerouteError(f"methods must be several, such as ('pdrop', 'diverse'), not {shown(methods)}.")
    chosen = tuple(map(get, methods))
    names = [method.name for method in chosen]
    if twice := next((name for name in names if names.count(name) > 1), ""):
        raise RerouteError(f"methods are told apart by their names, and {twice!r} is there twice: calibrate with each.")
    return chosen


def _check_decoder_alone(published: Mapping[str, Schedule]) -> None:
    """RerouteError if a decision needs more than the decoder, which alone runs, or has an action of its own."""
    for name, schedule in published.items():
        if any(ranker.needs_vision for ranker in schedule.rankers):
            raise RerouteError(f"{name} looks at the vision tower, which does not run again for each schedule.")
        if schedule.actions:
            raise RerouteError(f"{name} has actions of its own, and calibrate finds schedules for one action.")


def _budget(keep: float, action: str, evaluations: int, max_new_tokens: int, batch_tokens: int, seed: int) -> float:
    """``keep``, checked with the other numbers. RerouteError if one cannot be."""
    check_name("action", action, get_args(Action))
    counts = {"evaluations": evaluations, "max_new_tokens": max_new_tokens, "batch_tokens": batch_tokens}
    for name, value in counts.items():
        if not is_count(value):
            raise RerouteError(f"{name} must be a whole number of at least 1, not {shown(value)}.")
    try:
        whole(seed)
    except TypeError:
        raise RerouteError(f"seed must be a whole number, not {shown(seed)}.") from None
    keep = check_keep(keep)
    if keep == 1:
        raise RerouteError("keep=1 is the plain model, with nothing to calibrate: give a budget below 1, such as 0.33.")
    return keep


def _halves(count: int, seed: int) -> tuple[list[int], list[int]]:
    """Which prompts choose, and which judge: at random, as files are often sorted or alternate."""
    order = list(range(count))
    Random(f"{seed} halves").shuffle(order)
    return sorted(order[: (count + 1) // 2]), sorted(order[(count + 1) // 2 :])


def _about(result: Calibration) -> dict[str, Any]:
    """What a schedule file says beside the schedule."""
    best = result.best
    return {
        "action": result.action,
        "calibration": {
            "kl": round(best.mean, 6),
            "standard_error": round(best.error, 6),
            "prompts": result.chosen_on + len(best.divergences),
            "evaluations": result.evaluations,
        },
    }

"""From a model and prompts to a schedule, a report and a file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Tiny
from torch import Tensor

import reroute
from reroute.calibration import Calibration, driver
from reroute.calibration.dense import refer
from reroute.core.solver import budget_of
from reroute.errors import RerouteError
from reroute.methods import FastV, PDrop
from reroute.rankers import Norm

Inputs = dict[str, Tensor]
SETTINGS: dict[str, Any] = {"keep": 0.4, "evaluations": 12, "max_new_tokens": 4}


class Interrupt:
    """Told of the progress; breaks off at the line that says so."""

    def __init__(self, at: str) -> None:
        self.at, self.lines = at, list[str]()

    def __call__(self, line: str) -> None:
        self.lines.append(line)
        if self.at and line.lstrip().startswith(self.at):
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def result(few: Tiny, prompts: list[Inputs]) -> Calibration:
    return reroute.calibrate(few.model, prompts, **SETTINGS)


def test_what_is_found_meets_the_budget_and_is_no_worse_than_the_start(result: Calibration) -> None:
    schedule = result.schedule
    assert budget_of(schedule.layers, schedule.ratios, 8) == pytest.approx(0.4, abs=1e-12)
    assert (result.evaluations, result.chosen_on, len(result.best.divergences)) == (12, 6, 6)
    assert result.best.schedule == schedule
    names = [row.name for row in result.comparisons if row.action == "route"]
    assert names == ["calibrated", "pdrop", "fastv", "diverse"]


def test_decisions_may_be_ranked_by_what_a_method_brings(few: Tiny, prompts: list[Inputs], tmp_path: Path) -> None:
    """Found, reported, written and read with its rankers."""
    file = tmp_path / "found.json"
    methods = ("diverse", PDrop(ranker=Norm()))
    found = reroute.calibrate(few.model, prompts, methods=methods, out=file, seed=4, **SETTINGS)
    assert [row.name for row in found.comparisons if row.action == "route"] == ["calibrated", "diverse", "pdrop"]
    by = {type(ranker).__name__ for ranker in found.schedule.rankers}
    assert by <= {"Diversity", "LastTokenAttention", "Norm"}
    assert len(by) == 1 or all(f" {name}" in str(found) for name in by)
    with reroute.enable(few.model, schedule=file) as handle:
        assert handle.schedule == found.schedule


def test_methods_that_have_no_such_schedule_are_named(few: Tiny, prompts: list[Inputs]) -> None:
    """Not as a shorter table alone."""
    told: list[str] = []
    methods = ("pdrop", "cdpruner", FastV(layer=7))
    settings = {**SETTINGS, "evaluations": 1, "methods": methods, "progress": told.append}
    found = reroute.calibrate(few.model, prompts, **settings)
    assert [row.name for row in found.comparisons if row.action == "route"] == ["calibrated", "pdrop"]
    assert "cdpruner is left out: " in str(found)
    assert "fastv is left out: " in str(found)
    assert [line for line in told if "is left out" in line] == list(found.notes[:2])


def test_the_model_is_as_it_was(few: Tiny, result: Calibration, prompts: list[Inputs]) -> None:
    assert reroute.handle_of(few.model) is None
    assert not any(layer._forward_pre_hooks for layer in few.model.model.language_model.layers)


def test_the_choosing_half_is_improved(few: Tiny, prompts: list[Inputs]) -> None:
    settings = {**SETTINGS, "methods": ("pdrop", "fastv")}
    first = reroute.calibrate(few.model, prompts, **{**settings, "evaluations": 2})
    more = reroute.calibrate(few.model, prompts, **{**settings, "evaluations": 30})
    assert more.mean_chosen < 0.95 * first.mean_chosen


def test_equal_calls_find_equal_schedules(few: Tiny, prompts: list[Inputs], result: Calibration) -> None:
    assert reroute.calibrate(few.model, iter(prompts), **SETTINGS) == result
    assert reroute.calibrate(few.model, prompts, seed=1, **SETTINGS).comparisons != result.comparisons


def test_the_halves_share_no_prompt() -> None:
    for count in (4, 5, 100):
        choosing, judging = driver._halves(count, 0)
        assert sorted(choosing + judging) == list(range(count))
        assert len(choosing) - len(judging) in (0, 1)
    assert choosing != list(range(50))


def test_under_remove_ratios_only_fall(few: Tiny, prompts: list[Inputs]) -> None:
    found = reroute.calibrate(few.model, prompts, action="remove", **SETTINGS)
    found.schedule.validate(8, "remove")
    assert found.best.action == "remove"
    names = {row.name for row in found.comparisons if row.action == "route"}
    assert names == {"calibrated", "pdrop", "fastv", "diverse"}


# --- the report -------------------------------------------------------------------------------------------------------


def test_the_report_is_of_the_prompts_that_chose_nothing(
    few: Tiny, prompts: list[Inputs], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[int, ...]] = []

    def spied(model: Any, own: Any, *others: Any) -> Any:
        ran.append(tuple(int(prompt.tokens["input_ids"].sum()) for prompt in own))
        return refer(model, own, *others)

    monkeypatch.setattr(driver, "refer", spied)
    reroute.calibrate(few.model, prompts, **SETTINGS)
    choosing, judging = ran
    sums = [int(inputs["input_ids"].sum()) for inputs in prompts]
    assert sorted(choosing + judging) == sorted(sums)


def test_the_report_as_text(result: Calibration) -> None:
    said = str(result)
    assert re.search(r"keep 0\.4 on 8 layers, action route: nearest .* on 6 prompts,\nof 12 schedules, is", said)
    assert re.search(r"^  calibrated route +\d\.\d{3} ± \d\.\d{3} +\d+\.\d +\d+\.\d%$", said, re.MULTILINE)
    assert re.search(r"^  pdrop route +\d\.\d{3} ± \d\.\d{3} +[+-]\d\.\d{3} ± \d\.\d{3} +\d+\.\d ", said, re.MULTILINE)
    assert re.search(r"^  pdrop remove ", said, re.MULTILINE)
    grows = any(b > a for a, b in zip(result.schedule.ratios, result.schedule.ratios[1:], strict=False))
    assert ("calibrated remove: not possible" in said) == grows
    assert "Warning: 12 prompts are few" in said


def test_differences_are_paired(result: Calibration) -> None:
    row = next(row for row in result.comparisons if row.name == "fastv" and row.action == "route")
    gaps = torch.tensor(row.divergences) - torch.tensor(result.best.divergences)
    value, error = row.minus(result.best)
    assert value == pytest.approx(float(gaps.mean()), abs=1e-6)
    assert error == pytest.approx(float(gaps.std() / len(gaps) ** 0.5), abs=1e-6)


def test_prompts_of_one_kind_are_doubted(few: Tiny, prompts: list[Inputs]) -> None:
    one_kind = "prompts seem to be of one kind"
    assert not any(one_kind in warning for warning in reroute.calibrate(few.model, prompts, **SETTINGS).warnings)
    alike = [few.inputs([few.prompt(seed, 3, few.grid, 4)]) for seed in range(8)]
    assert any(one_kind in warning for warning in reroute.calibrate(few.model, alike, **SETTINGS).warnings)


def test_the_plan_is_told_before_anything_runs(few: Tiny, prompts: list[Inputs]) -> None:
    told = Interrupt("plain model")
    with pytest.raises(KeyboardInterrupt):
        reroute.calibrate(few.model, prompts, progress=told, **SETTINGS)
    (line,) = told.lines
    tokens = sum(inputs["input_ids"].shape[1] for inputs in prompts)
    assert f"at most 5 forwards, {2 * (tokens + 12 * 3):,} tokens" in line or "at most 10 forwards" in line
    assert re.search(r"routed runs: at most 20 forwards, [\d,]+ tokens, [\d.e-]+ TFLOP \(modelled\)", line)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["1 of", "7 of", "12 of"])
def test_an_interrupted_calibration_goes_on(
    few: Tiny, prompts: list[Inputs], result: Calibration, tmp_path: Path, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, told = tmp_path / "schedule.json", Interrupt(at)
    with pytest.raises(KeyboardInterrupt):
        reroute.calibrate(few.model, prompts, out=out, progress=told, **SETTINGS)
    assert reroute.handle_of(few.model) is None
    assert [path.name for path in tmp_path.iterdir()] == ["schedule.json.state"]

    monkeypatch.setattr(driver, "answer", lambda *_: pytest.fail("the answers are known"))
    again = Interrupt("")
    assert reroute.calibrate(few.model, prompts, out=out, progress=again, **SETTINGS) == result
    tried = [line for line in again.lines if " of 12 " in line]
    assert len(tried) == 12 - int(at.split()[0])
    assert [path.name for path in tmp_path.iterdir()] == ["schedule.json"]


def test_the_file_is_what_enable_takes(few: Tiny, prompts: list[Inputs], result: Calibration, tmp_path: Path) -> None:
    out = tmp_path / "schedule.json"
    reroute.calibrate(few.model, prompts, out=str(out), **SETTINGS)
    written = json.loads(out.read_text())
    assert written["keep"] == pytest.approx(0.4)
    assert written["calibration"]["kl"] == pytest.approx(result.best.mean, abs=1e-6)
    for given in (out, str(out)):
        with reroute.enable(few.model, schedule=given, keep=0.4) as handle:
            assert handle.schedule == result.schedule
    with pytest.raises(RerouteError, match=r"has the budget keep=0\.4, not 0\.3\. Leave keep out"):
        reroute.enable(few.model, schedule=out, keep=0.3)
    with pytest.raises(RerouteError, match="is that of one model"):
        reroute.enable(None, schedule=out)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"keep": 0.5}, "another keep"),
        ({"seed": 3}, "another seed"),
        ({"action": "remove"}, "another action"),
        ({"prompts": slice(11)}, "another prompts"),
        ({"model": True}, "another model"),
    ],
)
def test_the_state_of_another_calibration_is_refused(
    few: Tiny, prompts: list[Inputs], tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    out = tmp_path / "schedule.json"
    with pytest.raises(KeyboardInterrupt):
        reroute.calibrate(few.model, prompts, out=out, progress=Interrupt("2 of"), **SETTINGS)
    state = (tmp_path / "schedule.json.state").read_bytes()
    weight = few.model.lm_head.weight
    value = weight[1, 2].clone()
    settings = {**SETTINGS, **change}
    given = prompts[settings.pop("prompts", slice(None))]
    if settings.pop("model", False):
        weight[1, 2] += 1
    try:
        with pytest.raises(RerouteError, match=f"{said}.* Delete .*state to begin anew"):
            reroute.calibrate(few.model, given, out=out, **settings)
    finally:
        weight[1, 2] = value
    assert (tmp_path / "schedule.json.state").read_bytes() == state


def test_a_damaged_state_is_refused(few: Tiny, prompts: list[Inputs], tmp_path: Path) -> None:
    (tmp_path / "schedule.json.state").write_text('{"version": 1')
    with pytest.raises(RerouteError, match="cannot be read as the state of a calibration"):
        reroute.calibrate(few.model, prompts, out=tmp_path / "schedule.json", **SETTINGS)


# --- what cannot be ---------------------------------------------------------------------------------------------------


def without(name: str) -> Callable[[list[Inputs]], Any]:
    return lambda prompts: [{k: v for k, v in prompt.items() if k != name} for prompt in prompts]


@pytest.mark.parametrize(
    ("given", "settings", "said"),
    [
        (lambda p: p, {"keep": 1.0}, "keep=1 is the plain model"),
        (lambda p: p, {"keep": 3}, "keep = avg_T / N must be a number"),
        (lambda p: p, {"action": "drop"}, "Unknown action 'drop'"),
        (lambda p: p, {"evaluations": 0}, "evaluations must be a whole number of at least 1, not 0"),
        (lambda p: p, {"max_new_tokens": 2.5}, "max_new_tokens must be a whole number"),
        (lambda p: p, {"seed": "a"}, "seed must be a whole number, not 'a'"),
        (lambda p: p, {"methods": ("fastv", "pdrop", "fastv")}, "'fastv' is there twice"),
        (lambda p: p, {"methods": "pdrop"}, "methods must be several, such as ('pdrop', 'diverse'), not 'pdrop'"),
        (lambda p: p, {"methods": []}, "methods must be several"),
        (lambda p: p, {"methods": ["pdrop", "nothing"]}, "Unknown method 'nothing'"),
        (lambda p: p, {"methods": ["visionzip"]}, "visionzip looks at the vision tower"),
        (lambda p: p, {"out": "nowhere/at/all.json"}, "folder nowhere/at does not exist"),
        (lambda p: p[0], {}, "prompts must be a list"),
        (lambda p: None, {}, "prompts must be a list"),
        (lambda p: p[:3], {}, "3 prompts are too few"),
        (lambda p: [*p, "Where is the cup?"], {}, "Prompt 13 is not what model.generate takes"),
        (lambda p: [*p, {k: torch.cat([v, v]) for k, v in p[0].items()}], {}, "Prompt 13 is not what model.generate"),
        (without("input_ids"), {}, "Prompt 1 is not what model.generate takes"),
        (lambda p: [{**x, "labels": x["input_ids"]} for x in p], {}, "Prompt 1 has labels: leave these out"),
        (lambda p: [{**x, "input_ids": x["input_ids"].clamp(max=9)} for x in p], {}, "Prompt 1 has no picture"),
        (
            lambda p: [{k: v[:, :4] if k == "input_ids" else v for k, v in x.items()} for x in p],
            {},
            "ends in a picture",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(
    few: Tiny, prompts: list[Inputs], given: Callable[[Any], Any], settings: dict[str, Any], said: str
) -> None:
    calls: list[Any] = []
    hook = few.model.register_forward_pre_hook(lambda *_: calls.append(_))
    try:
        with pytest.raises(RerouteError, match=re.escape(said)):
            reroute.calibrate(few.model, given(prompts), **{**SETTINGS, **settings})
    finally:
        hook.remove()
    assert not calls
    assert reroute.handle_of(few.model) is None


def test_a_routed_model_is_refused(few: Tiny, prompts: list[Inputs]) -> None:
    with reroute.enable(few.model, keep=0.5), pytest.raises(RerouteError, match=r"call reroute\.disable"):
        reroute.calibrate(few.model, prompts, **SETTINGS)


def test_a_model_in_training_is_refused(few: Tiny, prompts: list[Inputs]) -> None:
    few.model.train()
    try:
        with pytest.raises(RerouteError, match=r"call model\.eval\(\) first"):
            reroute.calibrate(few.model, prompts, **SETTINGS)
    finally:
        few.model.eval()


def test_a_mask_may_be_missing(few: Tiny, prompts: list[Inputs], result: Calibration) -> None:
    assert reroute.calibrate(few.model, without("attention_mask")(prompts), **SETTINGS).schedule == result.schedule

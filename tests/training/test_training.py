from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from reroute.demo import tinyvlm
from reroute.demo.tinyvlm import architecture, scenes
from training.tinyvlm import initialise, label_tower, phases, train
from training.tinyvlm.muon import Muon, orthogonalise
from training.tinyvlm.phase import Phase, generator
from training.tinyvlm.recipe import LABELS, RECIPES, PatchLabels, Ramp, Recipe, Stage, TextSupervision, ramp, shortened
from training.tinyvlm.train import CheckpointError, Run

MICRO = Recipe(
    seed=3,
    vision=PatchLabels(steps=2, batch=2, rate=1e-3),
    stages=(
        Stage("one", steps=3, rate=1e-3, digits=((0.0, (2, 3)),), paired=0.5, batch=2),
        Stage("two", steps=2, rate=1e-3, digits=((0.0, (3, 4)),), paired=0.5, batch=2),
    ),
)
TEXT = dataclasses.replace(
    MICRO, vision=TextSupervision(steps=2, batch=2, rate=1e-3, digits=((0.0, (2, 3)),), decay_from=0.5)
)


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    # Validating and aligning the projector at full size would take most of the time.
    align, made = initialise.align_projector, phases.phases

    def unvalidated(model: LlavaForConditionalGeneration, recipe: Recipe) -> list[Phase]:
        parts = made(model, recipe)
        for part in parts:
            patch.setattr(part, "validate", lambda batches=6: {})
        return parts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(initialise, "align_projector", partial(align, batches=4))
        patch.setattr(train, "phases", unvalidated)
        yield


def start(folder: Path, recipe: Recipe = MICRO) -> Run:
    return Run(folder, recipe, architecture.config(2, 32, 1))


@pytest.fixture(scope="module", params=[MICRO, TEXT], ids=["labels", "text"])
def finished(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Run:
    folder = tmp_path_factory.mktemp("whole")
    run = start(folder, request.param)
    assert run.train()
    return run


def assert_equal(a: Run, b: Run) -> None:
    one, other = a.model.state_dict(), b.model.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("stops", [(1, 2), (3,), (4, 1)])
def test_interrupted_run_equals_uninterrupted_one(tmp_path: Path, finished: Run, stops: tuple[int, ...]) -> None:
    for stop in stops:
        assert not start(tmp_path, finished.recipe).train(stop_after=stop)
    run = start(tmp_path, finished.recipe)
    assert run.train()
    assert_equal(run, finished)


def test_finished_run_stays_finished(finished: Run) -> None:
    again = start(finished.folder, finished.recipe)
    assert_equal(again, finished)
    assert again.train()
    assert_equal(again, finished)


def test_later_stage_may_be_edited(tmp_path: Path, finished: Run) -> None:
    edited = dataclasses.replace(MICRO.stages[1], rate=2e-3)
    recipe = dataclasses.replace(finished.recipe, stages=(MICRO.stages[0], edited))
    shutil.copyfile(finished.folder / "after-one.pt", tmp_path / "state.pt")
    resumed = start(tmp_path, recipe)
    assert resumed.train()
    scratch = start(tmp_path / "scratch", recipe)
    assert scratch.train()
    assert_equal(resumed, scratch)


def test_every_part_is_trained(finished: Run) -> None:
    fresh = architecture.build(architecture.config(2, 32, 1), MICRO.seed).state_dict()
    trained = finished.model.state_dict()
    still = {name for name in trained if torch.equal(trained[name], fresh[name])}
    # The tower's last norm is behind the features that LLaVA uses.
    assert {name.split(".")[-2] for name in still} <= {"post_layernorm"}


def test_tower_is_frozen_after_its_phase(finished: Run) -> None:
    after = torch.load(finished.folder / "after-vision.pt", weights_only=True)["model"]
    final = finished.model.state_dict()
    tower = [name for name in final if "vision_tower" in name]
    assert tower
    assert all(torch.equal(after[name], final[name]) for name in tower)


def test_text_training_reads_no_patch_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> NoReturn:
        raise AssertionError("a patch label was read")

    for module, name in ((scenes, "coverage"), (label_tower, "coverage"), (label_tower, "patch_labels")):
        monkeypatch.setattr(module, name, refuse)
    assert start(tmp_path / "text", TEXT).train()
    with pytest.raises(AssertionError, match="patch label"):  # the guard holds what the other recipe reads
        start(tmp_path / "labels").train()


def test_foreign_and_corrupt_states_are_refused(tmp_path: Path, finished: Run) -> None:
    state = tmp_path / "state.pt"
    original = (finished.folder / "state.pt").read_bytes()
    for content in (b"", b"not a checkpoint", original[:1000], original[: len(original) // 2]):
        state.write_bytes(content)
        with pytest.raises(CheckpointError, match="delete it"):
            start(tmp_path, finished.recipe)
    torch.save({"weights": torch.zeros(3)}, state)
    with pytest.raises(CheckpointError, match="not a state of this program"):
        start(tmp_path)
    torch.save([1, 2], state)
    with pytest.raises(CheckpointError, match="not a state of this program"):
        start(tmp_path)
    state.write_bytes(original)
    with pytest.raises(CheckpointError, match="another seed"):
        start(tmp_path, dataclasses.replace(finished.recipe, seed=4))
    with pytest.raises(CheckpointError, match="another size"):
        Run(tmp_path, finished.recipe, architecture.config(3, 32, 1))


def test_edited_stage_does_not_go_on_midway(tmp_path: Path) -> None:
    assert not start(tmp_path).train(stop_after=3)
    edited = dataclasses.replace(MICRO.stages[0], rate=2e-3)
    run = start(tmp_path, dataclasses.replace(MICRO, stages=(edited, MICRO.stages[1])))
    with pytest.raises(CheckpointError, match="within another stage"):
        run.train()


def test_command_line_names_the_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "state.pt").write_bytes(b"broken")
    with pytest.raises(SystemExit) as exit:
        train.main(["--out", str(tmp_path)])
    assert exit.value.code == 2
    assert "cannot be read" in capsys.readouterr().err


def test_every_step_has_its_own_randomness() -> None:
    draws = {
        generator(recipe, name, step).integers(2**62)
        for recipe in (MICRO, dataclasses.replace(MICRO, seed=4))
        for name in ("one", "two")
        for step in range(10)
    }
    assert len(draws) == 40


def test_validation_names_the_kinds(finished: Run) -> None:
    made = phases.phases(finished.model, finished.recipe)
    labels = isinstance(finished.recipe.vision, PatchLabels)
    assert set(made[0].validate(batches=1)) == ({"class", "colour"} if labels else {"box", "word", "caption"})
    shares = made[1].validate(batches=1)
    assert {"attr", "hop", "riddle", "word"} <= set(shares)
    assert all(0 <= share <= 1 for share in shares.values())


def test_schedules() -> None:
    assert Ramp(((0.3, 0.7), (0.65, 0.0))).at(0.1) == 0.7
    assert Ramp(((0.3, 0.7), (0.65, 0.0))).at(0.475) == pytest.approx(0.35)
    assert ramp(1.0, 0.5).at(1.0) == 0.5
    bind = LABELS.stages[0]
    assert [bind.mix(done).digits for done in (0.0, 0.2, 0.9)] == [(2, 4), (4, 6), (5, 8)]
    for recipe in RECIPES.values():
        short = shortened(recipe, 7)
        assert {short.vision.steps, *(stage.steps for stage in short.stages)} == {7}
        assert len({stage.name for stage in recipe.stages}) == len(recipe.stages)


def test_every_model_that_ships_has_its_recipe_and_seed() -> None:
    assert list(RECIPES) == list(tinyvlm.CHECKPOINTS)
    assert len({recipe.seed for recipe in RECIPES.values()}) == len(RECIPES)


@pytest.mark.parametrize("shape", [(16, 16), (8, 24), (24, 8)])
def test_orthogonalise(shape: tuple[int, int]) -> None:
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrices))
    assert values.min() > 0.3
    assert values.max() < 1.3


def test_muon_equals_one_matrix_at_a_time() -> None:
    random = torch.Generator().manual_seed(0)
    shapes = [(8, 8), (8, 12), (8, 8), (12, 8)]
    together = [torch.nn.Parameter(torch.randn(s, generator=random)) for s in shapes]
    apart = [torch.nn.Parameter(p.detach().clone()) for p in together]
    optimisers = [Muon(together, lr=0.1), *(Muon([p], lr=0.1) for p in apart)]
    for _ in range(2):
        for p, q in zip(together, apart, strict=True):
            p.grad = torch.randn(p.shape, generator=random)
            q.grad = p.grad.clone()
        for optimiser in optimisers:
            optimiser.step()
    for p, q in zip(together, apart, strict=True):
        torch.testing.assert_close(p, q)

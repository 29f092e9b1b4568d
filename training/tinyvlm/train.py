"""Trains tinyvlm from scratch: python -m training.tinyvlm.train --out runs/tinyvlm

Training is dense only: no visual token is ever dropped, deferred or hidden, and the last step's
weights are the result. A run that was stopped goes on exactly where it was when started again
with the same folder, because every step draws its data from (seed, stage, step) alone. For the
same reason a later stage of the recipe may be edited without repeating the earlier ones.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

from reroute.demo.tinyvlm import architecture

from . import export
from .phase import Phase, generator
from .phases import phases
from .recipe import RECIPES, Recipe, shortened

FORMAT: Final = "reroute-embedded-run-1"  # of state.pt; runs that have begun carry it
LOG_EVERY: Final = 20
SAVE_EVERY: Final = 50
VALIDATE_EVERY: Final = 100


class CheckpointError(ValueError):
    """A run's saved state cannot be used."""


class Run:
    """One training run in one folder."""

    def __init__(self, folder: Path, recipe: Recipe, configuration: LlavaConfig) -> None:
        """Start a run, or go on with the one in the folder."""
        self.folder, self.recipe = folder, recipe
        self.model: LlavaForConditionalGeneration = architecture.build(configuration, recipe.seed)
        self.phases = phases(self.model, recipe)
        self.done: list[str] = []  # fingerprints of the phases that are complete
        self.partial: dict[str, Any] | None = None  # state of the phase in progress
        folder.mkdir(parents=True, exist_ok=True)
        if self.file.exists():
            self._load()

    @property
    def file(self) -> Path:
        """Where the state is kept."""
        return self.folder / "state.pt"

    def train(self, stop_after: int | None = None) -> bool:
        """Train to the end, or for `stop_after` steps; returns whether the run is complete."""
        left = stop_after
        for index, phase in enumerate(self.phases):
            if index < len(self.done):
                continue
            left = self._train_phase(phase, left)
            if left is not None and left < 0:
                return False
        return True

    def _train_phase(self, phase: Phase, left: int | None) -> int | None:
        """Train one phase; returns the steps left to run, negative when stopped in between."""
        self.model.requires_grad_(False)
        phase.modules.requires_grad_(True)
        self.model.train()
        optimisers = phase.optimisers()
        peaks = [[group["lr"] for group in o.param_groups] for o in optimisers]
        if self.partial is None:
            phase.begin()
        start, averages = self._restore(phase, optimisers)
        clock = time.monotonic()
        for step in range(start, phase.steps):
            if left is not None:
                if left == 0:
                    self._save(phase, optimisers, step, averages)
                    return -1
                left -= 1
            loss, figures = phase.loss(generator(self.recipe, phase.name, step), step)
            norm = _update(phase, optimisers, peaks, loss, phase.factor(step))
            for name, value in figures.items():
                averages[name] = 0.95 * averages.get(name, value) + 0.05 * value
            if step % LOG_EVERY == 0:
                pace = (time.monotonic() - clock) / (step - start + 1)
                self.log(f"{phase.name} {step} {pace:.2f} s/step norm={norm:.2f}", averages)
            if (step + 1) % VALIDATE_EVERY == 0:
                self._validate(phase, step + 1)
            if (step + 1) % SAVE_EVERY == 0:
                self._save(phase, optimisers, step + 1, averages)
        phase.finish()
        self.done.append(_fingerprint(phase))
        self.partial = None
        self._save_complete(phase)
        self._validate(phase, phase.steps, batches=16)
        return left

    def log(self, text: str, figures: dict[str, float]) -> None:
        """One line on the screen and in the run's log."""
        line = " ".join([text, *(f"{name}={value:.3g}" for name, value in figures.items())])
        print(line, flush=True)
        with (self.folder / "log.txt").open("a") as file:
            file.write(line + "\n")

    def _validate(self, phase: Phase, step: int, batches: int = 6) -> None:
        self.model.train(False)
        self.log(f"VALIDATION {phase.name} {step}", phase.validate(batches))
        self.model.train(True)

    def _restore(self, phase: Phase, optimisers: Sequence[torch.optim.Optimizer]) -> tuple[int, dict[str, float]]:
        """Next step and running averages of a phase; loads its state when it was interrupted."""
        if self.partial is None:
            return 0, {}
        state, self.partial = self.partial, None
        if state["phase"] != _fingerprint(phase):
            raise CheckpointError(
                f"{self.file} stopped within another stage than {phase.name!r} as it is now: undo "
                f"the edit, or go back to the stage's start with {self.folder}/after-*.pt"
            )
        phase.modules.load_state_dict(state["modules"])
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        return int(state["step"]), dict(state["averages"])

    def _save(
        self,
        phase: Phase,
        optimisers: Sequence[torch.optim.Optimizer],
        step: int,
        averages: dict[str, float],
    ) -> None:
        """Save within a phase."""
        partial = {
            "phase": _fingerprint(phase),
            "step": step,
            "modules": phase.modules.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in optimisers],
            "averages": dict(averages),
        }
        _write(self.file, self._state() | {"partial": partial})

    def _save_complete(self, phase: Phase) -> None:
        """Save at the end of a phase, and keep a copy to restart the next one from."""
        _write(self.file, self._state())
        shutil.copyfile(self.file, self.folder / f"after-{phase.name}.pt")

    def _state(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "seed": self.recipe.seed,
            "done": list(self.done),
            "model": self.model.state_dict(),
            "partial": None,
        }

    def _load(self) -> None:
        """Go on from the saved state, if it belongs to this recipe."""
        try:
            state = torch.load(self.file, map_location="cpu", weights_only=True)
            known = isinstance(state, dict) and state.get("format") == FORMAT
        except Exception as error:  # a damaged pickle may raise anything
            raise CheckpointError(
                f"{self.file} cannot be read ({error}); delete it to start the run from scratch, "
                f"or put a copy of the last {self.folder}/after-*.pt in its place"
            ) from error
        if not known:
            raise CheckpointError(f"{self.file} is not a state of this program; use another --out")
        expected = [_fingerprint(phase) for phase in self.phases][: len(state["done"])]
        if state["seed"] != self.recipe.seed or state["done"] != expected:
            raise CheckpointError(
                f"{self.file} was trained with another seed or other stages than the recipe now says; use another --out"
            )
        try:
            self.model.load_state_dict(state["model"])
        except RuntimeError as error:
            raise CheckpointError(f"{self.file} holds a model of another size") from error
        self.done, self.partial = list(state["done"]), state["partial"]


def _fuse(model: LlavaForConditionalGeneration) -> None:
    """Compile the decoder layers, which saves a sixth of a step, where there is a C++ compiler."""
    if shutil.which("g++") or shutil.which("clang++"):
        for layer in model.model.language_model.layers:
            layer.forward = torch.compile(layer.forward, dynamic=False)


def _update(
    phase: Phase,
    optimisers: Sequence[torch.optim.Optimizer],
    peaks: list[list[float]],
    loss: torch.Tensor,
    factor: float,
) -> float:
    """One optimiser step; returns the gradient's norm before it was clipped to 1."""
    for optimiser, rates in zip(optimisers, peaks, strict=True):
        optimiser.zero_grad()
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * factor
    torch.autograd.backward(loss)
    norm = nn.utils.clip_grad_norm_(phase.parameters(), 1.0)
    for optimiser in optimisers:
        optimiser.step()
    return float(norm)


def _fingerprint(phase: Phase) -> str:
    """Name and settings of a phase."""
    return f"{phase.name}: {phase.settings()}"


def _write(path: Path, state: dict[str, Any]) -> None:
    """Replace a file in one go, so that an interruption leaves the old one."""
    fresh = path.with_suffix(".new")
    torch.save(state, fresh)
    os.replace(fresh, path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m training.tinyvlm.train", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--model", choices=RECIPES, default="labels", help="which recipe (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; resumes it")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--export", type=Path, help="copy the finished checkpoint folder here")
    parser.add_argument("--smoke", type=int, metavar="STEPS", help="so many steps per stage only")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    recipe = RECIPES[options.model]
    if options.smoke:
        recipe = shortened(recipe, options.smoke)
    try:
        run = Run(options.out, recipe, architecture.config())
        run.log(f"recipe {json.dumps(asdict(recipe))} threads {torch.get_num_threads()}", {})
        _fuse(run.model)
        run.train()
    except CheckpointError as error:
        parser.exit(2, f"{error}\n")
    for folder in (options.out / "checkpoint", options.export):
        if folder is not None:
            export.write(run.model, folder)


if __name__ == "__main__":
    main()
